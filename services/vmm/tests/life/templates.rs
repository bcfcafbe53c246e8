//! Templates that are not for all: a workspace's own, and those of the appliance itself.

use pandastack_bus::{
    Error,
    storage::{BUILDS, StorageBackend, TemplateInfo, TemplateState},
    vmm::{SandboxSpec, VmmBackend},
};
use pandastack_vmm::{backend::Backend, machine::State};

use crate::{
    daemon::{Daemon, clean, eventually, open, spec},
    fakes::{Fake, Handle},
};

const OWN: &str = "oooooooooooooooooooo";

async fn add(world: &std::sync::Arc<Fake>, name: &str, change: impl FnOnce(&mut TemplateInfo)) {
    let mut info = Handle(std::sync::Arc::clone(world)).template("base".into()).await.unwrap();
    info.name = name.into();
    info.title = name.into();
    change(&mut info);
    world.books.lock().unwrap().more_templates.push(info);
}

fn wish(workspace: &str, template: &str) -> SandboxSpec {
    SandboxSpec { workspace: workspace.into(), template: template.into(), ..spec(false) }
}

fn state(world: &Fake, name: &str) -> TemplateState {
    world.books.lock().unwrap().more_templates.iter().find(|one| one.name == name).unwrap().state
}

fn records(daemon: &Daemon) -> usize {
    daemon.all().iter().filter(|one| one.record().state != State::Ready).count()
}

#[tokio::test]
async fn a_template_of_its_own_is_for_its_workspace_under_its_title() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    add(&world, OWN, |info| (info.title, info.workspace) = ("mine".into(), "w".into())).await;
    let (daemon, _told) = open(&world, directory.path());
    daemon.catalogue.renew(&Handle(std::sync::Arc::clone(&world))).await.unwrap();
    let backend = Backend(std::sync::Arc::clone(&daemon));

    let foreign = backend.create(String::new(), wish("v", OWN)).await;
    assert!(matches!(foreign, Err(Error::InvalidArgument(_))), "{foreign:?}");
    assert_eq!(records(&daemon), 0);
    let made = backend.create("r".into(), wish("w", OWN)).await.unwrap();
    let again = backend.create("r".into(), wish("w", OWN)).await.unwrap();

    assert_eq!((made.template.as_str(), &again.id), ("mine", &made.id));
    let snapshot = backend.snapshot(made.id.clone(), "s".repeat(20)).await.unwrap();
    assert_eq!(snapshot.spec.template, "mine");
    clean(&world);
}

#[tokio::test]
async fn a_template_of_the_appliance_is_baked_when_it_is_needed_and_nobody_elses() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    add(&world, "builder", |info| (info.hidden, info.state) = (true, TemplateState::Unbaked)).await;
    add(&world, OWN, |info| {
        (info.hidden, info.state, info.workspace) = (true, TemplateState::Unbaked, "w".into());
    })
    .await;
    let (daemon, _told) = open(&world, directory.path());
    daemon.catalogue.renew(&Handle(std::sync::Arc::clone(&world))).await.unwrap();
    tokio::spawn(std::sync::Arc::clone(&daemon).keep_baked());
    // One that is not published yet is baked at once: only then it can be.
    eventually("the own one is baked", || state(&world, OWN) == TemplateState::Baked).await;
    assert_eq!(state(&world, "builder"), TemplateState::Unbaked);
    let backend = Backend(std::sync::Arc::clone(&daemon));

    let built = backend.create(String::new(), wish(BUILDS, "builder")).await;

    assert_eq!(built.unwrap().template, "builder");
    assert_eq!(state(&world, "builder"), TemplateState::Baked);
    for (workspace, template) in [("w", "builder"), ("w", OWN), (BUILDS, OWN), (BUILDS, "base")] {
        let refused = backend.create(String::new(), wish(workspace, template)).await;
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{workspace} {template}: {refused:?}");
    }
    clean(&world);
}
