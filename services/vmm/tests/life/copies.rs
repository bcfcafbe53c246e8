//! Snapshots, forks and volumes.

use std::sync::{Arc, atomic::Ordering};

use pandastack_bus::{
    Error, SandboxId,
    storage::{Purpose, VolumeUse},
    vmm::{Child, SandboxSpec, State, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{clean, eventually, open, spec, started},
    fakes::Fake,
};

fn children(count: usize) -> Vec<Child> {
    let child = |number: usize| Child {
        metadata: [("fork_index".to_owned(), number.to_string())].into(),
        ttl_seconds: 60,
        persistent: false,
    };
    (0..count).map(child).collect()
}

fn volume(name: &str, read_only: bool) -> VolumeUse {
    VolumeUse { name: name.into(), read_only }
}

/// Captures of these purposes that are on storage.
fn captures(world: &Fake) -> Vec<Purpose> {
    world.books.lock().unwrap().snapshots.values().map(|kept| kept.info.spec.purpose).collect()
}

fn think(world: &Fake, machine: &str, thought: &str) {
    world.books.lock().unwrap().minds.insert(machine.into(), thought.into());
}

fn mind(world: &Fake, machine: &str) -> Option<String> {
    world.books.lock().unwrap().minds.get(machine).cloned()
}

#[tokio::test]
async fn a_snapshot_is_taken_once_per_id_and_the_sandbox_runs_on() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;
    let other = backend.create(String::new(), spec(false)).await.unwrap().id;
    world.slow.store(true, Ordering::Relaxed);
    let wanted = SandboxId::random().to_string();

    let take = || backend.snapshot(id.clone(), wanted.clone());
    let (one, two) = tokio::join!(take(), take());
    world.slow.store(false, Ordering::Relaxed);

    let info = one.unwrap();
    assert_eq!(Ok(&info), two.as_ref());
    assert_eq!((info.spec.id.as_str(), info.spec.sandbox.as_str()), (wanted.as_str(), id.as_str()));
    assert_eq!((info.spec.workspace.as_str(), info.spec.memory_mib), ("w", 128));
    assert_eq!(take().await.unwrap(), info, "later, too");
    let log = world.books.lock().unwrap().log.clone();
    let order: Vec<_> = ["sync", "begin", "pause", "write", "disks", "resume", "commit"]
        .map(|what| log.iter().position(|line| line.starts_with(&format!("{what} "))).unwrap())
        .into();
    assert!(order.is_sorted(), "{order:?}");
    assert_eq!(log.iter().filter(|line| line.starts_with("begin")).count(), 1);
    assert_eq!(backend.get(id.clone()).await.unwrap().state, State::Running);
    assert!(matches!(backend.snapshot(other, wanted.clone()).await, Err(Error::Exists(_))));
    assert!(matches!(backend.snapshot(id.clone(), "../x".into()).await, Err(Error::InvalidArgument(_))));
    assert!(backend.delete(id.clone()).await.unwrap());
    assert_eq!(take().await.unwrap(), info, "a snapshot outlives its sandbox");
    let late = backend.snapshot(id, SandboxId::random().to_string()).await;
    assert!(matches!(late, Err(Error::NotFound(_))), "{late:?}");
    clean(&world);
}

#[tokio::test]
async fn what_stands_still_is_captured_and_stays_so() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let made = backend.create(String::new(), spec(false)).await.unwrap();
    think(&world, &made.machine, "a thought");
    let snapshot = || backend.snapshot(made.id.clone(), SandboxId::random().to_string());

    backend.pause(made.id.clone()).await.unwrap();
    let of_paused = snapshot().await.unwrap();
    assert_eq!(backend.get(made.id.clone()).await.unwrap().state, State::Paused);
    assert!(world.books.lock().unwrap().paused.contains(&made.machine));
    backend.hibernate(made.id.clone()).await.unwrap();
    let of_asleep = snapshot().await.unwrap();
    let fork = backend.fork(String::new(), made.id.clone(), children(1)).await.unwrap();

    assert_eq!(backend.get(made.id.clone()).await.unwrap().state, State::Hibernated);
    let child = backend.get(fork.children[0].id.clone()).await.unwrap();
    assert_eq!(mind(&world, &child.machine).as_deref(), Some("a thought"));
    for snapshot in [of_paused, of_asleep] {
        let wish = SandboxSpec { snapshot: snapshot.spec.id, ..spec(false) };
        let copy = backend.create(String::new(), wish).await.unwrap();
        assert_eq!(mind(&world, &copy.machine).as_deref(), Some("a thought"));
        assert!(backend.delete(copy.id).await.unwrap());
    }
    clean(&world);
}

/// Every call of a capture fails in turn: nothing is left, and the sandbox runs on.
#[tokio::test]
async fn a_capture_that_fails_leaves_a_running_sandbox() {
    for what in ["begin", "pause", "write", "disks", "resume", "commit", "sync"] {
        let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
        let (daemon, _told) = open(&world, directory.path());
        let backend = Backend(Arc::clone(&daemon));
        let id = backend.create(String::new(), spec(false)).await.unwrap().id;
        world.fail(what);

        let taken = backend.snapshot(id.clone(), SandboxId::random().to_string()).await;
        let forked = backend.fork("f".into(), id.clone(), children(1)).await;
        *world.fails.lock().unwrap() = None;

        // A guest that does not sync is captured all the same.
        assert_eq!((taken.is_ok(), forked.is_ok()), (what == "sync", what == "sync"), "{what}");
        assert!(world.books.lock().unwrap().captures.is_empty(), "{what}");
        assert_eq!(backend.get(id.clone()).await.unwrap().state, State::Running);
        if what != "sync" {
            assert_eq!(world.owners().len(), 1, "{what}");
            assert_eq!(captures(&world), [], "{what}");
        }
        if what != "resume" {
            assert!(world.books.lock().unwrap().paused.is_empty(), "{what}");
        }
        assert!(backend.snapshot(id.clone(), SandboxId::random().to_string()).await.is_ok(), "{what}");
        assert!(
            backend.fork("f".into(), id, children(1)).await.is_ok(),
            "a failed request may be made again"
        );
        clean(&world);
    }
}

#[tokio::test]
async fn a_snapshot_makes_sandboxes_of_its_workspace_only() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let parent = backend.create(String::new(), spec(false)).await.unwrap();
    think(&world, &parent.machine, "a thought");
    let snapshot = SandboxId::random().to_string();
    backend.snapshot(parent.id.clone(), snapshot.clone()).await.unwrap();
    let wish = SandboxSpec { snapshot: snapshot.clone(), template: String::new(), ..spec(false) };

    let copy = backend.create("r".into(), wish.clone()).await.unwrap();

    assert_eq!(
        (copy.boot_mode.as_str(), copy.snapshot.as_str(), copy.template.as_str()),
        ("snapshot", &*snapshot, "base")
    );
    assert_eq!(copy.disk_mib, parent.disk_mib);
    assert_eq!(mind(&world, &copy.machine).as_deref(), Some("a thought"));
    assert_eq!(backend.create("r".into(), wish.clone()).await.unwrap().id, copy.id);
    let foreign = SandboxSpec { workspace: "x".into(), ..wish.clone() };
    let unknown = SandboxSpec { snapshot: SandboxId::random().to_string(), ..wish.clone() };
    for bad in [foreign, unknown] {
        assert!(matches!(backend.create(String::new(), bad).await, Err(Error::NotFound(_))));
    }
    let both = SandboxSpec { volumes: vec![volume("v", false)], ..wish.clone() };
    assert!(matches!(backend.create(String::new(), both).await, Err(Error::InvalidArgument(_))));
    world.books.lock().unwrap().snapshots.get_mut(&snapshot).unwrap().info.unusable =
        "another processor".into();
    let refused = backend.create(String::new(), wish).await;
    assert!(
        matches!(&refused, Err(Error::WrongState(why)) if why.contains("another processor")),
        "{refused:?}"
    );
    assert_eq!(world.owners().len(), 2);
    clean(&world);
}

#[tokio::test]
async fn a_fork_makes_children_in_order_and_leaves_no_capture() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let parent = backend.create(String::new(), spec(false)).await.unwrap();
    think(&world, &parent.machine, "a thought");

    let fork = || backend.fork("f".into(), parent.id.clone(), children(3));
    let (one, two) = tokio::join!(fork(), fork());

    let one = one.unwrap();
    assert_eq!(Ok(&one), two.as_ref(), "one request, one fork");
    assert_eq!(fork().await.as_ref(), Ok(&one));
    assert!(one.paused_us > 0 && one.unix_ms > 0);
    for (number, birth) in one.children.iter().enumerate() {
        let child = backend.get(birth.id.clone()).await.unwrap();
        assert_eq!((child.state, child.boot_mode.as_str()), (State::Running, "fork"));
        assert_eq!(
            (child.parent.as_str(), child.metadata["fork_index"].clone()),
            (&*parent.id, number.to_string())
        );
        assert_eq!(mind(&world, &child.machine).as_deref(), Some("a thought"));
    }
    assert_eq!(backend.get(parent.id.clone()).await.unwrap().state, State::Running);
    eventually("the capture goes", || captures(&world).is_empty()).await;
    assert!(matches!(backend.fork("f".into(), parent.id.clone(), children(2)).await, Err(Error::Exists(_))));
    assert!(matches!(
        backend.fork(String::new(), parent.id.clone(), children(17)).await,
        Err(Error::InvalidArgument(_))
    ));
    let full = backend.fork(String::new(), parent.id.clone(), children(1)).await;
    assert!(matches!(full, Err(Error::Quota(_))), "{full:?}");
    let noted = || {
        daemon.sandbox(&parent.id).unwrap().record().events.iter().any(|event| event.kind == "sandbox.forked")
    };
    eventually("its parent knows", noted).await;
    clean(&world);
}

#[tokio::test]
async fn a_fork_is_remembered_across_a_restart() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let parent = backend.create(String::new(), spec(false)).await.unwrap().id;
    let fork = backend.fork("f".into(), parent.clone(), children(2)).await.unwrap();
    assert!(backend.delete(fork.children[0].id.clone()).await.unwrap());
    drop((backend, daemon));

    let backend = Backend(started(&world, directory.path()).await);

    assert_eq!(backend.fork("f".into(), parent, children(2)).await.unwrap(), fork);
    assert_eq!(world.owners().len(), 2, "nothing was made again");
}

#[tokio::test]
async fn a_fork_answers_with_what_could_be_made_and_fails_when_nothing_could() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let parent = backend.create(String::new(), spec(false)).await.unwrap().id;

    // Each child tries two slots.
    world.deaf.store(4, Ordering::SeqCst);
    let failed = backend.fork("f".into(), parent.clone(), children(2)).await;
    assert!(matches!(failed, Err(Error::Timeout(_))), "{failed:?}");
    assert_eq!(world.owners().len(), 1);
    eventually("the capture goes", || captures(&world).is_empty()).await;
    world.deaf.store(3, Ordering::SeqCst);
    let partial = backend.fork("f".into(), parent, children(2)).await.unwrap();

    let made: Vec<_> = partial.children.iter().filter(|birth| !birth.id.is_empty()).collect();
    assert_eq!(made.len(), 1);
    assert!(partial.children.iter().any(|birth| birth.id.is_empty() && birth.error.contains("deaf")));
    assert_eq!(world.owners().len(), 2);
    clean(&world);
}

#[tokio::test]
async fn volumes_are_held_put_in_place_and_mounted() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let wish = SandboxSpec { volumes: vec![volume("data", false), volume("model", true)], ..spec(false) };

    let made = backend.create(String::new(), wish.clone()).await.unwrap();

    let mounts: Vec<_> =
        made.mounts.iter().map(|mount| (mount.path.as_str(), mount.read_only, mount.private)).collect();
    assert_eq!(mounts, [("/mnt/data", false, false), ("/mnt/model", true, false)]);
    {
        let books = world.books.lock().unwrap();
        let devices: Vec<_> = books.mounts[&made.machine].iter().map(|mount| mount.device.as_str()).collect();
        assert_eq!(devices, ["vdb", "vdf"]);
        assert_eq!(books.renewed, [format!("{} w0", made.machine), format!("{} r0", made.machine)]);
        let at =
            |what: &str| books.log.iter().position(|line| line.starts_with(&format!("{what} "))).unwrap();
        let order = ["hold", "fill", "insert", "load", "renew", "mount"].map(at);
        assert!(order.is_sorted(), "{order:?}");
    }
    let slots = world.owners().len();
    let taken = backend.create(String::new(), wish).await;
    assert!(matches!(taken, Err(Error::WrongState(_))), "{taken:?}");
    let shared = SandboxSpec { volumes: vec![volume("model", true)], ..spec(false) };
    let shared = backend.create(String::new(), shared).await.unwrap();
    assert_eq!(world.owners().len(), slots + 1, "the slot of the refused one was not wasted");
    let five = (0..5).map(|number| volume(&format!("v{number}"), false)).collect();
    let five = backend.create(String::new(), SandboxSpec { volumes: five, ..spec(false) }).await;
    assert!(matches!(five, Err(Error::InvalidArgument(_))));
    let missing = SandboxSpec { volumes: vec![volume("missing", false)], ..spec(false) };
    assert!(matches!(backend.create(String::new(), missing).await, Err(Error::NotFound(_))));

    for id in [made.id, shared.id] {
        assert!(backend.delete(id).await.unwrap());
    }
    assert!(world.books.lock().unwrap().holds.is_empty());
    clean(&world);
}

#[tokio::test]
async fn a_create_that_fails_holds_no_volume() {
    for what in ["hold", "fill", "insert", "load", "renew", "mount", "identify"] {
        let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
        let (daemon, _told) = open(&world, directory.path());
        let backend = Backend(Arc::clone(&daemon));
        world.fail(what);

        let wish = SandboxSpec { volumes: vec![volume("data", false)], ..spec(false) };
        assert!(backend.create(String::new(), wish).await.is_err(), "{what}");

        assert!(world.books.lock().unwrap().holds.is_empty(), "{what}");
        assert_eq!(backend.list(String::new()).await.unwrap(), [], "{what}");
        clean(&world);
    }
}

#[tokio::test]
async fn a_hibernated_sandbox_keeps_its_volumes_and_a_copy_has_its_own() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let wish = SandboxSpec { volumes: vec![volume("data", false)], ..spec(false) };
    let parent = backend.create(String::new(), wish).await.unwrap().id;
    let image = || world.books.lock().unwrap().snapshots.values().next().unwrap().clone();

    backend.hibernate(parent.clone()).await.unwrap();
    assert!(!image().volumes, "they stay where they are");
    assert!(world.books.lock().unwrap().holds.contains_key(&parent));
    let awake = backend.wake(parent.clone()).await.unwrap();
    assert_eq!(world.books.lock().unwrap().inserted[&awake.machine], parent);
    let fork = backend.fork(String::new(), parent.clone(), children(1)).await.unwrap();
    let child = backend.get(fork.children[0].id.clone()).await.unwrap();
    assert!(child.mounts[0].private && child.mounts[0].path == "/mnt/data");
    assert!(!world.books.lock().unwrap().holds.contains_key(&child.id));
    assert!(!world.books.lock().unwrap().mounts.contains_key(&child.machine), "mounted already");
    eventually("the capture goes", || captures(&world).is_empty()).await;
    backend.hibernate(child.id.clone()).await.unwrap();
    assert!(image().volumes, "its clones are nowhere else");

    for id in [parent, child.id] {
        assert!(backend.delete(id).await.unwrap());
    }
    assert!(world.books.lock().unwrap().holds.is_empty());
    clean(&world);
}

#[tokio::test]
async fn volumes_held_for_nobody_are_free_after_a_restart() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let wish = SandboxSpec { volumes: vec![volume("data", false)], ..spec(true) };
    let kept = Backend(Arc::clone(&daemon)).create(String::new(), wish).await.unwrap().id;
    drop(daemon);
    let stranger = SandboxId::random().to_string();
    world.books.lock().unwrap().holds.insert(stranger, vec![volume("other", false)]);
    world.cut_power();

    let daemon = started(&world, directory.path()).await;

    let books = world.books.lock().unwrap();
    assert_eq!(books.holds.keys().collect::<Vec<_>>(), [&kept]);
    assert_eq!(daemon.info(&kept).unwrap().state, State::Running);
    assert_eq!(
        books.log.last().map(String::as_str),
        Some(&*format!("mount {kept}")),
        "a booted guest mounts again"
    );
}
