//! Creates, deletes, slots, bakes and recoveries.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use pandastack_bus::{
    Error,
    vmm::{SandboxSpec, State, VmmBackend},
};
use pandastack_vmm::{backend::Backend, machine::Event, sandbox::Happening};
use tokio::time::timeout;

use crate::{
    daemon::{clean, eventually, open, reopened, spec, started},
    fakes::{Fake, Handle},
};

#[tokio::test]
async fn a_sandbox_lives_from_create_to_delete() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, mut told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));

    let made = backend.create("r".into(), spec(false)).await.unwrap();

    assert_eq!((made.state, made.boot_mode.as_str()), (State::Running, "snapshot"));
    assert_eq!(made.guest_ip, "10.200.0.7");
    assert_eq!(backend.list("w".into()).await.unwrap(), vec![made.clone()]);
    assert_eq!(backend.list("other".into()).await.unwrap(), vec![]);
    assert!(backend.open_agent(made.id.clone(), true).await.is_ok());
    assert!(backend.create_timings(made.id.clone()).await.unwrap().iter().any(|(name, _)| name == "load_us"));
    assert!(backend.delete(made.id.clone()).await.unwrap());
    assert!(!backend.delete(made.id.clone()).await.unwrap());
    assert!(matches!(backend.get(made.id.clone()).await, Err(Error::NotFound(_))));
    assert_eq!(world.owners().len(), 0);
    let mut states = vec![];
    while let Ok(change) = told.try_recv() {
        states.push(change.state);
    }
    assert_eq!(states, ["creating", "running", "stopping", ""]);
    clean(&world);
}

#[tokio::test]
async fn one_request_makes_one_sandbox_however_often_it_comes() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    world.slow.store(true, Ordering::Relaxed);
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));

    let create = || backend.create("r".into(), spec(false));
    let (one, two, three) = tokio::join!(create(), create(), create());

    let id = one.unwrap().id;
    assert_eq!((two.unwrap().id, three.unwrap().id), (id.clone(), id.clone()));
    assert_eq!(world.owners().len(), 1);
    let mut other = spec(false);
    other.ttl_seconds = 7;
    assert!(matches!(backend.create("r".into(), other).await, Err(Error::Exists(_))));
    backend.set_ttl(id.clone(), 99).await.unwrap();
    assert_eq!(backend.create("r".into(), spec(false)).await.unwrap().id, id, "settings are not the request");
    drop((backend, daemon));

    let daemon = started(&world, directory.path()).await;
    let backend = Backend(Arc::clone(&daemon));
    assert_eq!(backend.create("r".into(), spec(false)).await.unwrap().id, id);
    assert!(backend.delete(id.clone()).await.unwrap());
    drop((backend, daemon));

    let backend = Backend(started(&world, directory.path()).await);
    let late = backend.create("r".into(), spec(false)).await;
    assert!(matches!(late, Err(Error::NotFound(_))), "a request is not made twice: {late:?}");
    assert_eq!(world.owners().len(), 0);
}

#[tokio::test]
async fn labels_that_are_set_later_are_durable_and_bounded() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create("r".into(), spec(false)).await.unwrap().id;
    let set = async |backend: &Backend<Handle>, key: &str, value: &str| {
        backend.set_label(id.clone(), key.to_owned(), value.to_owned()).await
    };
    assert_eq!(set(&backend, "port.80", "web").await.unwrap().metadata["port.80"], "web");
    set(&backend, "port.81", "x").await.unwrap();
    assert!(!set(&backend, "port.81", "").await.unwrap().metadata.contains_key("port.81"));
    assert!(matches!(set(&backend, "", "x").await, Err(Error::InvalidArgument(_))));
    assert!(matches!(set(&backend, "a", &"x".repeat(257)).await, Err(Error::InvalidArgument(_))));
    drop((backend, daemon));

    let backend = Backend(started(&world, directory.path()).await);
    assert_eq!(backend.get(id.clone()).await.unwrap().metadata["port.80"], "web");
    assert_eq!(backend.create("r".into(), spec(false)).await.unwrap().id, id, "labels are not the request");
    let mut last = Ok(());
    for port in 0..200 {
        last = set(&backend, &format!("port.{port}"), "x").await.map(drop);
    }
    assert!(matches!(last, Err(Error::Quota(_))), "{last:?}");
}

#[tokio::test]
async fn a_caller_that_goes_away_changes_nothing() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    world.slow.store(true, Ordering::Relaxed);
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));

    let gone = timeout(Duration::from_millis(30), backend.create("r".into(), spec(false))).await;

    assert!(gone.is_err());
    eventually("it is made all the same", || daemon.capacity().unwrap().running == 1).await;
    let id = backend.create("r".into(), spec(false)).await.unwrap().id;
    let gone = timeout(Duration::from_millis(5), backend.delete(id)).await;
    assert!(gone.is_err());
    eventually("it is gone all the same", || world.owners().is_empty()).await;
    clean(&world);
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_replaced_once_and_leaves_nothing() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));

    world.deaf.store(1, Ordering::SeqCst);
    let made = backend.create("a".into(), spec(false)).await.unwrap();
    assert_eq!(world.owners().into_iter().collect::<Vec<_>>(), vec![made.id.clone()]);

    world.deaf.store(2, Ordering::SeqCst);
    let failed = backend.create("b".into(), spec(false)).await;
    assert!(matches!(failed, Err(Error::Timeout(_))), "{failed:?}");
    assert_eq!(world.owners().len(), 1);
    assert_eq!(backend.list(String::new()).await.unwrap().len(), 1);
    assert!(backend.create("b".into(), spec(false)).await.is_ok(), "a failed request may be made again");
    clean(&world);
}

#[tokio::test]
async fn bad_wishes_make_nothing() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let unknown = SandboxSpec { template: "nope".into(), ..spec(false) };
    let small = SandboxSpec { disk_mib: 1, ..spec(false) };
    let hasty = SandboxSpec { ttl_seconds: 0, ..spec(false) };

    for wish in [unknown, small, hasty] {
        let refused = backend.create("r".into(), wish.clone()).await;
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{wish:?}: {refused:?}");
    }

    assert_eq!(world.owners().len(), 0);
    assert!(matches!(backend.set_ttl("x".into(), 5).await, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_delete_cuts_a_create_short() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    world.slow.store(true, Ordering::Relaxed);
    let (daemon, _told) = open(&world, directory.path());
    let backend = Arc::new(Backend(Arc::clone(&daemon)));
    let maker = Arc::clone(&backend);
    let making = tokio::spawn(async move { maker.create("r".into(), spec(false)).await });
    eventually("it is creating", || !daemon.all().iter().all(|one| one.record().public_state().is_none()))
        .await;
    let id = backend.list(String::new()).await.unwrap()[0].id.clone();

    let (one, two) = tokio::join!(backend.delete(id.clone()), backend.delete(id.clone()));

    assert_eq!((one, two), (Ok(true), Ok(true)));
    assert!(!world.owners().contains(&id));
    let _ = making.await.unwrap();
    clean(&world);
}

#[tokio::test]
async fn a_machine_that_dies_is_failed_with_a_reason_and_its_disk_stays() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;

    world.books.lock().unwrap().units.remove(&id);
    eventually("it is failed", || daemon.info(&id).unwrap().state == State::Failed).await;

    assert_eq!(backend.get(id.clone()).await.unwrap().reason, "the guest switched itself off");
    eventually("its network is free", || world.books.lock().unwrap().attachments.is_empty()).await;
    assert!(world.books.lock().unwrap().directories.contains_key(&id));
    assert!(backend.events(id.clone()).await.unwrap().iter().any(|event| event.kind == "vm.died"));
    assert!(matches!(backend.open_agent(id.clone(), true).await, Err(Error::WrongState(_))));
    assert!(backend.delete(id).await.unwrap());
    assert_eq!(world.owners().len(), 0);
}

#[tokio::test]
async fn a_teardown_goes_on_to_its_end_and_is_repeated() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;

    world.fail("detach");
    assert!(backend.delete(id.clone()).await.is_err());
    {
        let books = world.books.lock().unwrap();
        assert!(!books.units.contains_key(&id) && !books.directories.contains_key(&id));
    }
    assert_eq!(backend.get(id.clone()).await.unwrap().state, State::Stopping, "it is not told to be gone");
    *world.fails.lock().unwrap() = None;
    daemon.reap();
    eventually("it is gone", || world.owners().is_empty() && daemon.find(&id.parse().unwrap()).is_none())
        .await;
}

#[tokio::test]
async fn a_process_that_does_not_stop_keeps_its_files() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;

    world.fail("stop");

    assert!(backend.delete(id.clone()).await.is_err());
    assert!(world.books.lock().unwrap().directories.contains_key(&id));
    clean(&world);
}

#[tokio::test]
async fn a_template_is_baked_and_everything_made_for_it_goes() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    world.books.lock().unwrap().baked = false;
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    tokio::spawn(Arc::clone(&daemon).keep_baked());

    let made = backend.create(String::new(), spec(false)).await.unwrap();

    eventually("only the sandbox is left", || world.owners().into_iter().eq([made.id.clone()])).await;
    let books = world.books.lock().unwrap();
    let at = |what: &str| books.log.iter().position(|line| line.starts_with(what)).unwrap();
    assert!(at("warm_up") < at("capture") && at("capture") < at("seal"));
    drop(books);
    clean(&world);
}

#[tokio::test(start_paused = true)]
async fn a_template_that_cannot_be_baked_says_why() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    world.books.lock().unwrap().baked = false;
    world.fail("warm_up");
    let (daemon, _told) = open(&world, directory.path());
    tokio::spawn(Arc::clone(&daemon).keep_baked());
    let backend = Backend(Arc::clone(&daemon));

    let early = backend.create(String::new(), spec(false)).await;
    assert!(matches!(early, Err(Error::NotReady(_))), "{early:?}");
    tokio::time::sleep(Duration::from_secs(300)).await;

    let late = backend.create(String::new(), spec(false)).await;
    assert!(matches!(&late, Err(Error::NotReady(text)) if text.contains("warm_up is broken")), "{late:?}");
    assert_eq!(world.owners().len(), 0);
}

#[tokio::test]
async fn slots_are_refilled_behind_and_used_first() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    tokio::spawn(Arc::clone(&daemon).keep_slots());
    eventually("a slot is ready", || daemon.ready_slots().len() == 1).await;
    let slot = world.owners().into_iter().next().unwrap();

    let made = backend.create(String::new(), spec(false)).await.unwrap();

    assert_eq!(made.id, slot);
    eventually("another one is ready", || daemon.ready_slots().len() == 1 && world.owners().len() == 2).await;
    let slot = world.owners().into_iter().find(|id| *id != made.id).unwrap();
    world.books.lock().unwrap().units.remove(&slot);
    eventually("a dead slot is replaced", || {
        daemon.refill.notify_one();
        daemon.ready_slots().len() == 1 && !world.owners().contains(&slot)
    })
    .await;
    clean(&world);
}

#[tokio::test]
async fn a_request_waits_for_a_sandbox_that_is_booted_again() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let kept = Backend(Arc::clone(&daemon)).create(String::new(), spec(true)).await.unwrap().id;
    drop(daemon);
    world.cut_power();
    world.slow.store(true, Ordering::Relaxed);
    let daemon = reopened(&world, directory.path()).await;
    let backend = Backend(Arc::clone(&daemon));

    let boots = async {
        for action in daemon.reconcile().await.unwrap() {
            daemon.carry_out(action).await;
        }
    };
    let asks = async {
        eventually("it is on its way", || daemon.info(&kept).unwrap().state == State::Creating).await;
        backend.open_agent(kept.clone(), true).await
    };
    let (answer, ()) = tokio::join!(asks, boots);

    assert!(answer.is_ok(), "{answer:?}");
    assert_eq!(daemon.info(&kept).unwrap().state, State::Running);
    clean(&world);
}

#[tokio::test]
async fn a_persistent_sandbox_is_booted_again_with_its_name() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let kept = backend.create(String::new(), spec(true)).await.unwrap();
    let lost = backend.create(String::new(), spec(false)).await.unwrap();
    drop((backend, daemon));
    world.cut_power();

    let daemon = started(&world, directory.path()).await;

    let back = daemon.info(&kept.id).unwrap();
    assert_eq!((back.state, back.boot_mode.as_str(), back.boot_ms), (State::Running, "cold", kept.boot_ms));
    let events = Backend(Arc::clone(&daemon)).events(kept.id).await.unwrap();
    assert!(events.iter().any(|event| event.kind == "recover.cold_boot"), "{events:?}");
    let other = daemon.info(&lost.id).unwrap();
    assert_eq!((other.state, other.reason.is_empty()), (State::Failed, false));
    assert!(world.books.lock().unwrap().directories.contains_key(&lost.id), "its disk is kept");
    clean(&world);
}

#[tokio::test]
async fn an_event_out_of_place_is_refused() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let slot = daemon.make_slot().await.unwrap();
    let id = Backend(Arc::clone(&daemon)).create(String::new(), spec(false)).await.unwrap().id;
    let sandbox = daemon.sandbox(&id).unwrap();

    let refused = daemon.happen(&sandbox, Event::Take, Happening::default()).await;

    assert!(matches!(refused, Err(Error::WrongState(_))));
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
    drop(slot);
}

#[tokio::test(start_paused = true)]
async fn a_machine_that_cannot_be_looked_at_is_not_taken_for_dead() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;
    drop((backend, daemon));

    world.fail("process");
    let daemon = started(&world, directory.path()).await;
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
    assert!(daemon.sandbox(&id).unwrap().process().is_none());

    *world.fails.lock().unwrap() = None;
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(daemon.sandbox(&id).unwrap().process().is_some(), "it is watched in the end");
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
    clean(&world);
}

#[tokio::test(start_paused = true)]
async fn a_recovery_is_tried_again_but_not_for_ever() {
    for (silent, expected) in [(4, State::Running), (5, State::Failed)] {
        let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
        let (daemon, _told) = open(&world, directory.path());
        let id = Backend(Arc::clone(&daemon)).create(String::new(), spec(true)).await.unwrap().id;
        drop(daemon);
        world.cut_power();
        world.deaf.store(silent, Ordering::SeqCst);

        let daemon = started(&world, directory.path()).await;

        assert_eq!(daemon.info(&id).unwrap().state, expected, "{silent} silent boots");
        assert!(Backend(Arc::clone(&daemon)).delete(id).await.unwrap());
        assert_eq!(world.owners().len(), 0);
        clean(&world);
    }
}

#[tokio::test]
async fn a_workspace_has_so_many_sandboxes_and_another_one_its_own() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));

    let create = || backend.create(String::new(), spec(false));
    let (a, b, c, d, e, f) = tokio::join!(create(), create(), create(), create(), create(), create());

    let all = [a, b, c, d, e, f];
    assert_eq!(all.iter().filter(|made| made.is_ok()).count(), 4);
    assert_eq!(all.iter().filter(|made| matches!(made, Err(Error::Quota(_)))).count(), 2, "{all:?}");
    let other = SandboxSpec { workspace: "x".into(), ..spec(false) };
    assert!(backend.create(String::new(), other).await.is_ok());
    let one = all.iter().find_map(|made| made.as_ref().ok()).unwrap().id.clone();
    assert!(backend.delete(one).await.unwrap());
    assert!(create().await.is_ok());
}

#[tokio::test]
async fn a_disk_that_can_never_fit_is_refused() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    *daemon.space.lock().unwrap() = Some((10 << 30, 2 << 30));
    let backend = Backend(Arc::clone(&daemon));
    let with = |gib: u64| SandboxSpec { disk_mib: gib << 10, ..spec(false) };

    assert!(matches!(backend.create(String::new(), with(9)).await, Err(Error::NoSpace(_))));
    assert!(matches!(backend.create(String::new(), with(1025)).await, Err(Error::InvalidArgument(_))));
    assert!(backend.create(String::new(), with(8)).await.is_ok());
}

#[tokio::test]
async fn a_name_made_up_for_one_call_is_not_remembered() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    for (request, kept) in [("once-1", 0), ("w/key", 1)] {
        let made = backend.create(request.into(), spec(false)).await.unwrap();
        assert_eq!(backend.create(request.into(), spec(false)).await.unwrap().id, made.id);
        assert!(backend.delete(made.id).await.unwrap());
        assert_eq!(daemon.tombstones.iter().unwrap().len(), kept, "{request}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_end_by_the_clock_is_judged_again_when_it_takes_effect() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;
    let sandbox = daemon.sandbox(&id).unwrap();
    tokio::time::sleep(Duration::from_secs(61)).await;

    let decided = daemon.ending(&sandbox);
    backend.set_persistent(id.clone(), true).await.unwrap();
    backend.set_persistent(id.clone(), false).await.unwrap();
    let late = daemon.happen(&sandbox, Event::Delete, decided).await;

    assert!(matches!(late, Err(Error::WrongState(_))), "a setting is a use: {late:?}");
    assert_eq!(daemon.info(&id).unwrap().state, State::Running);
    tokio::time::sleep(Duration::from_secs(61)).await;
    assert!(daemon.happen(&sandbox, Event::Delete, daemon.ending(&sandbox)).await.is_ok());
}

#[tokio::test]
async fn a_setting_does_not_wait_for_a_boot() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    world.slow.store(true, Ordering::Relaxed);
    let (daemon, _told) = open(&world, directory.path());
    let backend = Arc::new(Backend(Arc::clone(&daemon)));
    let maker = Arc::clone(&backend);
    let making = tokio::spawn(async move { maker.create(String::new(), spec(false)).await });
    eventually("it is creating", || daemon.all().iter().any(|one| one.record().public_state().is_some()))
        .await;
    let id = backend.list(String::new()).await.unwrap()[0].id.clone();

    let early = backend.set_ttl(id.clone(), 5).await;

    assert!(matches!(early, Err(Error::WrongState(_))), "{early:?}");
    making.await.unwrap().unwrap();
    assert!(backend.set_ttl(id, 5).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_empty_pool_is_refilled_at_once() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    daemon.creating.send_modify(|count| *count += 1);
    let start = tokio::time::Instant::now();

    tokio::spawn(Arc::clone(&daemon).keep_slots());

    eventually("a slot is ready although creates never end", || daemon.ready_slots().len() == 1).await;
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn recoveries_wait_for_their_turn_and_may_be_deleted_meanwhile() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let kept = backend.create(String::new(), spec(true)).await.unwrap().id;
    let gone = backend.create(String::new(), spec(true)).await.unwrap().id;
    drop((backend, daemon));
    world.cut_power();
    let daemon = reopened(&world, directory.path()).await;
    let turns = daemon.recoveries.acquire_many(4).await.unwrap();
    for action in daemon.reconcile().await.unwrap() {
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move { daemon.carry_out(action).await });
    }
    let state = |id: &str| daemon.info(id).map(|info| info.state);

    eventually("both wait", || [&kept, &gone].iter().all(|id| state(id) == Ok(State::Creating))).await;
    assert!(world.books.lock().unwrap().units.is_empty());
    assert!(Backend(Arc::clone(&daemon)).delete(gone.clone()).await.unwrap());
    drop(turns);
    eventually("the other one is back", || state(&kept) == Ok(State::Running)).await;
    assert!(!world.owners().contains(&gone));
    clean(&world);
}
