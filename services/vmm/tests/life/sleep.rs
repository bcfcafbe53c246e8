//! Pause, resume, hibernate, wake.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use pandastack_bus::{
    Error,
    storage::Purpose,
    vmm::{SandboxSpec, State, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{Daemon, clean, eventually, open, spec, started},
    fakes::{Fake, Handle},
};

/// A sandbox with something in its memory.
async fn thinking(backend: &Backend<Handle>, world: &Fake, spec: SandboxSpec) -> String {
    let made = backend.create(String::new(), spec).await.unwrap();
    world.books.lock().unwrap().minds.insert(made.machine, "a thought".into());
    made.id
}

/// What is in the memory of the machine that it has now.
fn mind(daemon: &Daemon, world: &Fake, id: &str) -> Option<String> {
    let machine = daemon.info(id).unwrap().machine;
    world.books.lock().unwrap().minds.get(&machine).cloned()
}

#[tokio::test]
async fn a_paused_sandbox_stands_still_until_it_is_resumed() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, mut told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;

    assert_eq!(backend.pause(id.clone()).await.unwrap().state, State::Paused);
    assert_eq!(backend.pause(id.clone()).await.unwrap().state, State::Paused, "already");
    assert!(world.books.lock().unwrap().paused.contains(&id));
    assert!(matches!(backend.open_agent(id.clone(), true).await, Err(Error::WrongState(_))));
    assert!(matches!(backend.wake(id.clone()).await, Err(Error::WrongState(_))));
    backend.set_ttl(id.clone(), 99).await.unwrap();
    assert_eq!(backend.resume(id.clone()).await.unwrap().state, State::Running);
    assert_eq!(backend.resume(id.clone()).await.unwrap().state, State::Running, "already");
    assert!(!world.books.lock().unwrap().paused.contains(&id));

    assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
    let mut states = vec![];
    while let Ok(change) = told.try_recv() {
        states.push(change.state);
    }
    assert_eq!(states, ["creating", "running", "paused", "paused", "running"]);
    clean(&world);
}

#[tokio::test]
async fn a_hibernated_sandbox_holds_nothing_and_comes_back_as_it_was() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    for round in 0..3 {
        let asleep = backend.hibernate(id.clone()).await.unwrap();
        assert_eq!((asleep.state, asleep.machine.as_str()), (State::Hibernated, ""));
        assert_eq!(asleep.guest_ip, "");
        assert_eq!(backend.hibernate(id.clone()).await.unwrap(), asleep, "already: round {round}");
        assert_eq!(world.owners().len(), 0, "round {round}");
        assert!(matches!(backend.open_agent(id.clone(), false).await, Err(Error::WrongState(_))));
        assert!(matches!(backend.pause(id.clone()).await, Err(Error::WrongState(_))));
        assert!(matches!(backend.resume(id.clone()).await, Err(Error::WrongState(_))));
        assert_eq!(backend.get(id.clone()).await.unwrap().state, State::Hibernated, "a look wakes nobody");

        let awake = backend.wake(id.clone()).await.unwrap();

        assert_eq!((awake.state, awake.boot_mode.as_str()), (State::Running, "wake"));
        assert_ne!(awake.machine, id);
        assert_eq!(awake.guest_ip, "10.200.0.7");
        assert_eq!(backend.wake(id.clone()).await.unwrap().machine, awake.machine, "already");
        assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
        assert_eq!(world.owners().into_iter().collect::<Vec<_>>(), [awake.machine]);
        eventually("the capture goes", || world.books.lock().unwrap().snapshots.is_empty()).await;
    }
    let kinds: Vec<_> =
        backend.events(id.clone()).await.unwrap().into_iter().map(|event| event.kind).collect();
    assert_eq!(kinds[2..4], ["sandbox.hibernated", "sandbox.woken"], "{kinds:?}");
    assert!(backend.delete(id).await.unwrap());
    assert_eq!(world.owners().len(), 0);
    eventually("no record is left", || daemon.records.iter().unwrap().is_empty()).await;
    clean(&world);
}

#[tokio::test]
async fn a_woken_sandbox_is_nobody_else() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let made = backend.create(String::new(), spec(false)).await.unwrap();
    let before = world.books.lock().unwrap().machine_ids[&made.machine].clone();

    backend.hibernate(made.id.clone()).await.unwrap();
    let awake = backend.wake(made.id).await.unwrap();

    assert_eq!(world.books.lock().unwrap().machine_ids[&awake.machine], before);
}

#[tokio::test]
async fn many_requests_wake_it_once() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    world.slow.store(true, Ordering::Relaxed);

    let open = || backend.open_agent(id.clone(), true);
    let (a, b, c, d) = tokio::join!(open(), open(), backend.wake(id.clone()), open());

    assert!(a.is_ok() && b.is_ok() && c.is_ok() && d.is_ok());
    let log = world.books.lock().unwrap().log.clone();
    assert_eq!(log.iter().filter(|line| line.starts_with("fill_snapshot")).count(), 1);
    clean(&world);
}

#[tokio::test]
async fn a_port_is_reached_as_the_agent_is() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();

    assert!(matches!(backend.open_port(id.clone(), 0, true).await, Err(Error::InvalidArgument(_))));
    assert!(matches!(backend.open_port(id.clone(), 80, false).await, Err(Error::WrongState(_))));
    assert_eq!(backend.open_port(id.clone(), 80, true).await.unwrap().1, b"80");
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
    backend.pause(id.clone()).await.unwrap();
    assert!(matches!(backend.open_port(id, 80, true).await, Err(Error::WrongState(_))));
    clean(&world);
}

#[tokio::test]
async fn those_who_wait_for_a_wake_share_its_failure() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    world.slow.store(true, Ordering::Relaxed);
    world.deaf.store(1, Ordering::SeqCst);

    let open = || backend.open_agent(id.clone(), true);
    let (a, b, c) = tokio::join!(open(), open(), open());

    for outcome in [a, b, c] {
        assert!(matches!(outcome, Err(Error::GuestUnreachable(_))), "{outcome:?}");
    }
    assert_eq!(daemon.info(&id).unwrap().state, State::Hibernated);
    assert_eq!(world.owners().len(), 0, "the borrowed slot is gone");
    backend.wake(id.clone()).await.unwrap();
    assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
    clean(&world);
}

#[tokio::test]
async fn a_paused_sandbox_can_be_hibernated_and_wakes_running() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.pause(id.clone()).await.unwrap();

    backend.hibernate(id.clone()).await.unwrap();

    assert_eq!(backend.wake(id.clone()).await.unwrap().state, State::Running);
    assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
    clean(&world);
}

/// Every call of a verb fails in turn: it is told, and the sandbox is as before, with its memory.
#[tokio::test]
async fn a_verb_that_fails_changes_nothing() {
    for (verb, before) in [
        ("pause", "running"),
        ("resume", "paused"),
        ("hibernate", "running"),
        ("hibernate", "paused"),
        ("wake", "hibernated"),
    ] {
        for fault in 1.. {
            let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
            let (daemon, _told) = open(&world, directory.path());
            let backend = Backend(Arc::clone(&daemon));
            let id = thinking(&backend, &world, spec(true)).await;
            match before {
                "paused" => drop(backend.pause(id.clone()).await.unwrap()),
                "hibernated" => drop(backend.hibernate(id.clone()).await.unwrap()),
                _ => {}
            }
            world.fail_at.store(fault, Ordering::SeqCst);

            let done = match verb {
                "pause" => backend.pause(id.clone()).await,
                "resume" => backend.resume(id.clone()).await,
                "hibernate" => backend.hibernate(id.clone()).await,
                _ => backend.wake(id.clone()).await,
            };

            let at = format!("{verb} of one {before}, call {fault}: {done:?}");
            if done.is_err() {
                assert_eq!(daemon.info(&id).unwrap().state.as_str(), before, "{at}");
                assert_eq!(world.books.lock().unwrap().paused.contains(&id), before == "paused", "{at}");
                let machines = usize::from(before != "hibernated");
                daemon.reap();
                eventually(&at, || world.owners().len() == machines).await;
                eventually(&at, || world.books.lock().unwrap().snapshots.len() == 1 - machines).await;
                assert!(world.books.lock().unwrap().captures.is_empty(), "{at}");
            }
            let calls_left = world.fail_at.swap(0, Ordering::SeqCst);
            if daemon.info(&id).unwrap().state == State::Paused {
                backend.resume(id.clone()).await.unwrap();
            }
            backend.hibernate(id.clone()).await.unwrap();
            backend.wake(id.clone()).await.unwrap();
            assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"), "{at}");
            clean(&world);
            if calls_left > 0 {
                assert!(done.is_ok(), "{at}");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_machine_that_does_not_go_goes_later_and_never_beside_the_next_one() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    world.fail("stop");

    assert_eq!(backend.hibernate(id.clone()).await.unwrap().state, State::Hibernated);
    assert!(world.owners().contains(&id));
    assert!(backend.wake(id.clone()).await.is_err(), "its last machine is still there");
    *world.fails.lock().unwrap() = None;
    daemon.reap();
    eventually("it is gone", || world.owners().is_empty()).await;

    backend.wake(id.clone()).await.unwrap();
    assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
    clean(&world);
}

#[tokio::test]
async fn a_slot_that_dies_while_a_sandbox_moves_in_takes_nothing_with_it() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Arc::new(Backend(Arc::clone(&daemon)));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    world.slow.store(true, Ordering::Relaxed);
    let (waker, of) = (Arc::clone(&backend), id.clone());
    let waking = tokio::spawn(async move { waker.wake(of).await });
    eventually("it is loaded", || !world.books.lock().unwrap().guests.is_empty()).await;

    {
        let mut books = world.books.lock().unwrap();
        books.units.clear();
        books.guests.clear();
    }

    let failed = waking.await.unwrap();
    assert!(
        matches!(&failed, Err(Error::GuestUnreachable(why)) if why.contains("switched itself off")),
        "{failed:?}"
    );
    eventually("nothing is left", || world.owners().is_empty()).await;
    backend.wake(id.clone()).await.unwrap();
    assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
    clean(&world);
}

#[tokio::test]
async fn a_machine_that_dies_as_a_sandbox_moves_in_keeps_its_disk() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    *world.dies_after.lock().unwrap() = Some("identify".into());

    backend.wake(id.clone()).await.unwrap();

    eventually("it is failed", || daemon.info(&id).unwrap().state == State::Failed).await;
    eventually("its network is free", || world.books.lock().unwrap().attachments.is_empty()).await;
    let machine = daemon.info(&id).unwrap().machine;
    assert!(world.books.lock().unwrap().directories.contains_key(&machine), "the slot took it away");
    assert!(backend.delete(id).await.unwrap());
    assert_eq!(world.owners().len(), 0);
    clean(&world);
}

#[tokio::test]
async fn a_woken_machine_that_dies_is_failed() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    let machine = backend.wake(id.clone()).await.unwrap().machine;

    world.books.lock().unwrap().units.remove(&machine);

    eventually("it is failed", || daemon.info(&id).unwrap().state == State::Failed).await;
    assert!(matches!(backend.hibernate(id.clone()).await, Err(Error::WrongState(_))));
    assert!(matches!(backend.wake(id.clone()).await, Err(Error::WrongState(_))));
    assert!(backend.delete(id).await.unwrap());
    assert_eq!(world.owners().len(), 0);
}

#[tokio::test]
async fn what_is_hibernated_or_paused_can_be_deleted() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let (asleep, paused) =
        (thinking(&backend, &world, spec(false)).await, thinking(&backend, &world, spec(false)).await);
    backend.hibernate(asleep.clone()).await.unwrap();
    backend.pause(paused.clone()).await.unwrap();

    world.fail("delete_snapshot");
    assert!(backend.delete(asleep.clone()).await.is_err(), "its capture is still there");
    *world.fails.lock().unwrap() = None;
    assert!(backend.delete(asleep).await.unwrap() && backend.delete(paused).await.unwrap());

    assert_eq!(world.owners().len(), 0);
    assert_eq!(world.books.lock().unwrap().snapshots.len(), 0);
    assert_eq!(daemon.records.iter().unwrap().len(), 0);
    clean(&world);
}

#[tokio::test]
async fn a_hibernated_sandbox_survives_a_power_cut() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    drop((backend, daemon));
    world.cut_power();

    let daemon = started(&world, directory.path()).await;

    assert_eq!(daemon.info(&id).unwrap().state, State::Hibernated);
    Backend(Arc::clone(&daemon)).wake(id.clone()).await.unwrap();
    assert_eq!(mind(&daemon, &world, &id).as_deref(), Some("a thought"));
    clean(&world);
}

#[tokio::test]
async fn a_woken_persistent_sandbox_is_booted_again_where_it_lives() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(true)).await;
    backend.hibernate(id.clone()).await.unwrap();
    let machine = backend.wake(id.clone()).await.unwrap().machine;
    drop((backend, daemon));
    world.cut_power();

    let daemon = started(&world, directory.path()).await;

    let back = daemon.info(&id).unwrap();
    assert_eq!((back.state, back.boot_mode.as_str(), back.machine), (State::Running, "cold", machine));
    clean(&world);
}

#[tokio::test(start_paused = true)]
async fn an_idle_persistent_sandbox_is_hibernated_and_another_is_not() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let idle = thinking(&backend, &world, spec(true)).await;
    let used = thinking(&backend, &world, spec(true)).await;
    tokio::time::sleep(Duration::from_secs(299)).await;
    backend.touch(vec![used.clone()]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;

    daemon.reap();

    eventually("it sleeps", || daemon.info(&idle).unwrap().state == State::Hibernated).await;
    assert_eq!(daemon.info(&used).unwrap().state, State::Running);
    assert!(backend.open_agent(idle.clone(), true).await.is_ok());
    assert_eq!(mind(&daemon, &world, &idle).as_deref(), Some("a thought"));
    clean(&world);
}

#[tokio::test]
async fn a_shutdown_hibernates_what_is_persistent_and_tells_what_is_not() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let kept = thinking(&backend, &world, spec(true)).await;
    let paused = thinking(&backend, &world, spec(true)).await;
    let fleeting = thinking(&backend, &world, spec(false)).await;
    backend.pause(paused.clone()).await.unwrap();
    let slot = daemon.make_slot().await.unwrap();
    let slot_id = slot.id.to_string();
    daemon.push_slot(slot);

    assert_eq!(backend.hibernate_all().await.unwrap(), Vec::<String>::new());

    let state = |id: &str| daemon.info(id).unwrap().state;
    assert_eq!((state(&kept), state(&paused)), (State::Hibernated, State::Hibernated));
    assert_eq!(state(&fleeting), State::Running);
    daemon.reap();
    let log = world.books.lock().unwrap().log.clone();
    let stopped = |id: &str| log.contains(&format!("stop {id}"));
    let nobody = !stopped(&kept) && !stopped(&paused) && !stopped(&slot_id);
    assert!(nobody, "PID 1 does that, and would keep us waiting");
    assert!(matches!(backend.create(String::new(), spec(false)).await, Err(Error::NotReady(_))));
    assert!(matches!(backend.wake(kept.clone()).await, Err(Error::NotReady(_))));
    assert!(matches!(
        backend.fork(String::new(), fleeting.clone(), vec![]).await,
        Err(Error::InvalidArgument(_))
    ));
    drop((backend, daemon));

    world.cut_power();
    let daemon = started(&world, directory.path()).await;

    assert!(world.owners().into_iter().eq([fleeting]), "only the disk of the one that failed is left");
    for id in [&kept, &paused] {
        Backend(Arc::clone(&daemon)).wake(id.clone()).await.unwrap();
        assert_eq!(mind(&daemon, &world, id).as_deref(), Some("a thought"));
    }
    clean(&world);
}

#[tokio::test]
async fn a_shutdown_tells_what_could_not_be_hibernated() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(true)).await;
    world.fail("write");

    let failures = backend.hibernate_all().await.unwrap();

    assert_eq!(failures, [format!("{id}: write is broken")]);
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
}

/// A daemon that is killed in a capture leaves a machine that stands still: the next one lets it go on.
#[tokio::test]
async fn a_machine_that_stands_still_unasked_goes_on_after_a_restart() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let (id, paused) =
        (thinking(&backend, &world, spec(false)).await, thinking(&backend, &world, spec(false)).await);
    backend.pause(paused.clone()).await.unwrap();
    drop((backend, daemon));
    {
        let mut books = world.books.lock().unwrap();
        books.paused.insert(id.clone());
        books.paused.remove(&paused);
        books.captures.insert(id.clone(), Default::default());
    }

    let daemon = started(&world, directory.path()).await;

    let books = world.books.lock().unwrap();
    assert_eq!(books.paused.iter().collect::<Vec<_>>(), [&paused]);
    assert!(books.captures.is_empty());
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
}

#[tokio::test]
async fn nobodys_captures_go_at_the_start() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = thinking(&backend, &world, spec(false)).await;
    backend.hibernate(id.clone()).await.unwrap();
    drop((backend, daemon));
    let kept = world.books.lock().unwrap().snapshots.values().next().unwrap().clone();
    for purpose in [Purpose::Fork, Purpose::Hibernation, Purpose::Snapshot] {
        let mut other = kept.clone();
        other.info.spec.id = pandastack_bus::SandboxId::random().to_string();
        other.info.spec.purpose = purpose;
        world.books.lock().unwrap().snapshots.insert(other.info.spec.id.clone(), other);
    }

    let daemon = started(&world, directory.path()).await;

    let purposes: Vec<_> =
        world.books.lock().unwrap().snapshots.values().map(|kept| kept.info.spec.purpose).collect();
    assert_eq!(purposes.len(), 2, "a tenant's snapshot, and what a sandbox consists of: {purposes:?}");
    assert!(!purposes.contains(&Purpose::Fork));
    Backend(daemon).wake(id).await.unwrap();
}
