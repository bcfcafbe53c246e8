//! Templates of workspaces on a real XFS: made of a volume, baked, published, replaced, deleted.

use std::fs;

use super::disk::{DISK_MIB, Disk, access, bytes, fill_up, inode, list, state_of, volume};
use pandastack_bus::{
    Error,
    storage::{BUILDS, Fill, StorageBackend as _, TemplateInfo, TemplateSpec, TemplateState},
};
use pandastack_storage::{Manager, own::LIMIT};

const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbbbbbb";
const ONE: &str = "11111111111111111111";
const TWO: &str = "22222222222222222222";

fn wish(id: &str, title: &str) -> TemplateSpec {
    TemplateSpec {
        id: id.into(),
        workspace: "work".into(),
        title: title.into(),
        vcpus: 1,
        memory_mib: 128,
        env: [("A".into(), "B".into())].into(),
        workdir: "/srv".into(),
    }
}

/// A template of its own whose disk is a clone of `base` with a mark in it.
async fn adopted(manager: &Manager, id: &str, title: &str) -> TemplateInfo {
    manager.clone_template("base".into(), BUILDS.into(), "target".into(), 96).await.unwrap();
    let made = manager.adopt_template(BUILDS.into(), "target".into(), wish(id, title)).await.unwrap();
    assert!(manager.delete_volume(BUILDS.into(), "target".into()).await.unwrap());
    made
}

async fn published(disk: &Disk, manager: &Manager, id: &str, title: &str, replace: bool) {
    adopted(manager, id, title).await;
    disk.bake_with(manager, B, id, b"memory").await;
    manager.release(B.into()).await.unwrap();
    manager.publish_template(id.into(), replace).await.unwrap();
}

async fn meant(manager: &Manager, workspace: &str, name: &str) -> Option<String> {
    manager.find_template(workspace.into(), name.into()).await.ok().map(|info| info.name)
}

#[tokio::test]
async fn a_clone_of_a_template_shares_its_blocks_and_is_as_large_as_it_shall_be() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open();
    let early = manager.clone_template("base".into(), BUILDS.into(), "from0".into(), 0).await;
    assert!(matches!(early, Err(Error::NotReady(_))), "{early:?}");
    manager.import_all().await;

    let same = manager.clone_template("base".into(), BUILDS.into(), "from0".into(), 0).await.unwrap();
    let grown = manager.clone_template("base".into(), BUILDS.into(), "target".into(), 128).await.unwrap();

    assert_eq!((same.size_mib, grown.size_mib), (DISK_MIB, 128));
    let pristine = fs::read(disk.state.join("templates/base/disk/root.img")).unwrap();
    for folder in list(&disk.state.join("volumes")) {
        assert!(fs::read(folder.join("disk.img")).unwrap().starts_with(&pristine));
    }
    let taken = manager.clone_template("base".into(), BUILDS.into(), "target".into(), 0).await;
    assert!(matches!(taken, Err(Error::Exists(_))), "{taken:?}");
    let unknown = manager.clone_template("nobody".into(), BUILDS.into(), "x".into(), 0).await;
    assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");
}

#[tokio::test]
async fn a_volume_becomes_a_template_that_its_workspace_sees_once_it_is_published() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume(BUILDS.into(), "target".into(), 48).await.unwrap();
    manager.hold_volumes(A.into(), BUILDS.into(), vec![volume("target", false)]).await.unwrap();
    let held = manager.adopt_template(BUILDS.into(), "target".into(), wish(ONE, "mine")).await;
    assert!(matches!(held, Err(Error::WrongState(_))), "{held:?}");
    manager.drop_volumes(A.into()).await.unwrap();

    let made = manager.adopt_template(BUILDS.into(), "target".into(), wish(ONE, "mine")).await.unwrap();

    assert_eq!((made.name.as_str(), made.title.as_str(), made.workspace.as_str()), (ONE, "mine", "work"));
    assert_eq!((made.disk_mib, made.state, made.hidden), (48, TemplateState::Unbaked, true));
    assert_eq!((made.workdir.as_str(), made.env["A"].as_str()), ("/srv", "B"));
    let root = disk.state.join("templates").join(ONE).join("disk/root.img");
    assert_eq!(access(&root).0, 0o400);
    assert_eq!(bytes(&root, 1024 + 0x38, 2), [0x53, 0xEF]);
    let again = manager.adopt_template(BUILDS.into(), "target".into(), wish(ONE, "mine")).await.unwrap();
    assert_eq!(again, made);
    assert!(
        manager.delete_volume(BUILDS.into(), "target".into()).await.unwrap(),
        "whoever has it writes elsewhere"
    );
    assert_eq!(meant(&manager, "work", "mine").await, None);
    let early = manager.publish_template(ONE.into(), false).await;
    assert!(matches!(early, Err(Error::WrongState(_))), "{early:?}");

    disk.bake_with(&manager, B, ONE, b"memory").await;
    for _ in 0..2 {
        manager.publish_template(ONE.into(), false).await.unwrap();
    }

    let restarted = disk.open();
    for manager in [&manager, &restarted] {
        assert_eq!(meant(manager, "work", "mine").await.as_deref(), Some(ONE));
        assert_eq!(meant(manager, "other", "mine").await, None);
        assert_eq!(meant(manager, "work", ONE).await, None, "an id is no name");
        assert_eq!(meant(manager, "work", "base-alias").await.as_deref(), Some("base"));
        assert_eq!(state_of(manager, ONE).await, TemplateState::Baked);
        let info = manager.template(ONE.into()).await.unwrap();
        assert!(!info.hidden && info.size_bytes > 0 && info.created_unix_ms > 0);
    }
    manager.prepare(A.into()).await.unwrap();
    manager.fill(A.into(), ONE.into(), Fill::Baked, 0).await.unwrap();
    assert_eq!(inode(&disk.sandbox(A).join("mem")), inode(&disk.bake(ONE).unwrap().join("mem")));
}

#[tokio::test]
async fn a_replacement_takes_the_name_at_once_and_what_was_made_goes_on() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    published(&disk, &manager, ONE, "mine", false).await;
    manager.prepare(A.into()).await.unwrap();
    manager.fill(A.into(), ONE.into(), Fill::Baked, 0).await.unwrap();
    adopted(&manager, TWO, "mine").await;
    disk.bake_with(&manager, B, TWO, b"memory").await;
    let taken = manager.publish_template(TWO.into(), false).await;
    assert!(matches!(taken, Err(Error::Exists(_))), "{taken:?}");
    assert_eq!(meant(&manager, "work", "mine").await.as_deref(), Some(ONE));
    // Cut short before the old one was removed.
    let old = disk.state.join("templates").join(ONE);
    let copy = disk.dir.path().join("old");
    assert!(std::process::Command::new("cp").arg("-a").args([&old, &copy]).status().unwrap().success());

    manager.publish_template(TWO.into(), true).await.unwrap();

    assert_eq!(meant(&manager, "work", "mine").await.as_deref(), Some(TWO));
    assert!(!old.exists() && disk.sandbox(A).join("mem").exists());
    drop(manager);
    assert!(std::process::Command::new("cp").arg("-a").args([&copy, &old]).status().unwrap().success());
    let manager = disk.open();
    assert_eq!(meant(&manager, "work", "mine").await.as_deref(), Some(TWO));
    assert!(!old.exists(), "what was replaced goes at the next start");
}

#[tokio::test]
async fn a_template_is_deleted_by_its_owner_only() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    published(&disk, &manager, ONE, "mine", false).await;
    adopted(&manager, TWO, "unfinished").await;
    for (workspace, name) in [("other", ONE), ("work", "base"), ("", "base"), ("work", "nobody")] {
        assert!(!manager.delete_template(workspace.into(), name.into()).await.unwrap(), "{workspace} {name}");
    }
    for id in [ONE, TWO] {
        assert!(manager.delete_template("work".into(), id.into()).await.unwrap());
        assert!(!manager.delete_template("work".into(), id.into()).await.unwrap());
        assert!(!disk.state.join("templates").join(id).exists());
    }
    let names: Vec<_> = disk.open().templates().await.unwrap().into_iter().map(|info| info.name).collect();
    assert_eq!(names, ["base"]);
    manager.prepare(A.into()).await.unwrap();
    let gone = manager.fill(A.into(), ONE.into(), Fill::Baked, 0).await;
    assert!(matches!(gone, Err(Error::NotFound(_))), "{gone:?}");
}

#[tokio::test]
async fn names_for_all_and_too_many_are_refused_and_leave_nothing() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume(BUILDS.into(), "target".into(), 16).await.unwrap();
    let adopt = async |spec: TemplateSpec| manager.adopt_template(BUILDS.into(), "target".into(), spec).await;
    for title in ["base", "base-alias"] {
        assert!(matches!(adopt(wish(ONE, title)).await, Err(Error::Exists(_))), "{title}");
    }
    for wrong in [
        wish("base", "mine"),
        wish("..", "mine"),
        wish(ONE, ".."),
        wish(ONE, "a/b"),
        TemplateSpec { vcpus: 0, ..wish(ONE, "mine") },
        TemplateSpec { memory_mib: 1, ..wish(ONE, "mine") },
        TemplateSpec { workdir: "srv".into(), ..wish(ONE, "mine") },
        TemplateSpec { workspace: String::new(), ..wish(ONE, "mine") },
    ] {
        let refused = adopt(wrong.clone()).await;
        assert!(
            matches!(refused, Err(Error::InvalidArgument(_) | Error::Exists(_))),
            "{wrong:?}: {refused:?}"
        );
    }
    assert_eq!(list(&disk.state.join("templates")).len(), 1);
    for number in 0..LIMIT {
        adopt(wish(&format!("{number:020}"), &format!("t{number}"))).await.unwrap();
    }
    assert!(matches!(adopt(wish(ONE, "one-more")).await, Err(Error::Quota(_))));
    adopt(wish(TWO, "t0")).await.unwrap();
    let other = TemplateSpec { workspace: "other".into(), ..wish(A, "t0") };
    adopt(other).await.unwrap();
    let _ballast = fill_up(&disk, &manager.usage().await.unwrap());
    let full = adopt(TemplateSpec { workspace: "third".into(), ..wish(B, "x") }).await;
    assert!(matches!(full, Err(Error::NoSpace(_))), "{full:?}");
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test]
async fn own_templates_outlive_a_missing_partition_and_one_that_cannot_be_read_stays() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    published(&disk, &manager, ONE, "mine", false).await;
    adopted(&manager, TWO, "broken").await;
    drop(manager);
    fs::write(disk.state.join("templates").join(TWO).join("own.json"), "{").unwrap();
    let aside = disk.dir.path().join("aside");
    fs::rename(&disk.sources.templates, &aside).unwrap();

    let manager = disk.open();

    assert_eq!(meant(&manager, "work", "mine").await.as_deref(), Some(ONE));
    assert_eq!(list(&disk.state.join("templates")).len(), 3);
    drop(manager);
    fs::rename(&aside, &disk.sources.templates).unwrap();
    fs::remove_dir_all(disk.sources.templates.join("base")).unwrap();
    disk.add_template("other", "x");
    let manager = disk.open();
    assert_eq!(meant(&manager, "work", "mine").await.as_deref(), Some(ONE));
    let names = list(&disk.state.join("templates"));
    assert_eq!(names.len(), 2, "{names:?}");
}

#[tokio::test]
async fn a_hidden_template_is_nobodys_and_can_be_cloned() {
    let Some(disk) = Disk::mount(&[]) else { return };
    disk.add_template("builder", "tools");
    let path = disk.sources.templates.join("builder/template.toml");
    fs::write(&path, format!("hidden = true\n{}", fs::read_to_string(&path).unwrap())).unwrap();
    let manager = disk.open_imported().await;

    assert!(manager.template("builder".into()).await.unwrap().hidden);
    assert_eq!(meant(&manager, "work", "builder").await, None);
    assert_eq!(meant(&manager, "work", "builder-alias").await, None);
    manager.clone_template("builder".into(), BUILDS.into(), "x".into(), 0).await.unwrap();
}
