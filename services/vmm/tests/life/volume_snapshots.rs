//! Snapshots of volumes: whose guest is asked first, and what happens when it cannot.

use std::sync::{Arc, atomic::Ordering};

use pandastack_bus::{
    Error, SandboxId,
    storage::{VolumeSnapshotInfo, VolumeSnapshotSpec, VolumeUse},
    vmm::{SandboxSpec, State, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{clean, open, spec, started},
    fakes::{Fake, Handle},
};

fn wish(volume: &str) -> VolumeSnapshotSpec {
    VolumeSnapshotSpec {
        id: SandboxId::random().to_string(),
        workspace: "w".into(),
        volume: volume.into(),
        label: "l".into(),
        synced: false,
    }
}

async fn with_volume(backend: &Backend<Handle>, name: &str, read_only: bool) -> String {
    let volumes = vec![VolumeUse { name: name.into(), read_only }];
    backend.create(String::new(), SandboxSpec { volumes, ..spec(true) }).await.unwrap().id
}

/// Calls about the volume and its guest since the last time.
fn calls(world: &Fake) -> Vec<String> {
    let mut books = world.books.lock().unwrap();
    let log = std::mem::take(&mut books.log);
    log.into_iter()
        .filter(|line| ["sync ", "keep ", "pause "].iter().any(|call| line.starts_with(call)))
        .collect()
}

fn said(info: &VolumeSnapshotInfo, spec: &VolumeSnapshotSpec) -> bool {
    assert_eq!(VolumeSnapshotSpec { synced: false, ..info.spec.clone() }, *spec);
    info.spec.synced
}

#[tokio::test]
async fn the_guest_that_writes_is_synced_first_and_runs_on() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = with_volume(&backend, "data", false).await;
    let machine = backend.get(id.clone()).await.unwrap().machine;
    calls(&world);
    let data = wish("data");

    let taken = backend.snapshot_volume(data.clone()).await.unwrap();

    assert!(said(&taken, &data));
    assert_eq!(calls(&world), [format!("sync {machine}"), "keep data".into()]);
    assert_eq!(backend.get(id.clone()).await.unwrap().state, State::Running);
    // Readers, and those who have other volumes, are not asked.
    with_volume(&backend, "model", true).await;
    calls(&world);
    let model = wish("model");
    assert!(said(&backend.snapshot_volume(model.clone()).await.unwrap(), &model));
    assert_eq!(calls(&world), ["keep model"]);
    // Nor is a guest that sleeps: what it knew is where its memory is.
    backend.hibernate(id.clone()).await.unwrap();
    calls(&world);
    let asleep = wish("data");
    assert!(said(&backend.snapshot_volume(asleep.clone()).await.unwrap(), &asleep));
    assert_eq!(calls(&world), ["keep data"]);
    assert_eq!(backend.get(id).await.unwrap().state, State::Hibernated);
    clean(&world);
}

#[tokio::test]
async fn without_a_sync_it_is_taken_all_the_same_and_says_so() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = with_volume(&backend, "data", false).await;
    world.fail("sync");
    let deaf = wish("data");
    assert!(!said(&backend.snapshot_volume(deaf.clone()).await.unwrap(), &deaf));
    *world.fails.lock().unwrap() = None;

    backend.pause(id.clone()).await.unwrap();
    let still = wish("data");
    assert!(!said(&backend.snapshot_volume(still.clone()).await.unwrap(), &still));
    assert_eq!(backend.get(id).await.unwrap().state, State::Paused);
    clean(&world);
}

#[tokio::test]
async fn it_is_taken_once_per_id_also_by_the_daemon_that_comes_after() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = with_volume(&backend, "data", false).await;
    calls(&world);
    world.slow.store(true, Ordering::Relaxed);
    let data = wish("data");

    let take = || backend.snapshot_volume(data.clone());
    let (one, two) = tokio::join!(take(), take());
    world.slow.store(false, Ordering::Relaxed);

    let info = one.unwrap();
    assert_eq!(two.as_ref(), Ok(&info));
    assert_eq!(calls(&world).iter().filter(|call| *call == "keep data").count(), 1);
    assert!(backend.delete(id).await.unwrap());
    drop(backend);
    drop(daemon);
    let again = Backend(started(&world, directory.path()).await);
    assert_eq!(again.snapshot_volume(data).await.unwrap(), info, "its volume has no holder any more");
    clean(&world);
}

#[tokio::test]
async fn it_waits_for_what_is_being_done_to_its_sandbox() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = with_volume(&backend, "data", false).await;
    world.slow.store(true, Ordering::Relaxed);

    let (asleep, taken) = tokio::join!(backend.hibernate(id.clone()), async {
        tokio::task::yield_now().await;
        backend.snapshot_volume(wish("data")).await
    });

    assert_eq!(asleep.unwrap().state, State::Hibernated);
    assert!(taken.unwrap().spec.synced);
    let log = world.books.lock().unwrap().log.clone();
    let last = |call: &str| log.iter().rposition(|line| line.starts_with(call)).unwrap();
    assert!(last("commit ") < last("keep "), "{log:?}");
    clean(&world);
}

#[tokio::test]
async fn what_cannot_be_is_refused() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = with_volume(&backend, "data", false).await;
    let bad = VolumeSnapshotSpec { id: "../x".into(), ..wish("data") };
    assert!(matches!(backend.snapshot_volume(bad).await, Err(Error::InvalidArgument(_))));
    assert!(matches!(backend.snapshot_volume(wish("missing")).await, Err(Error::NotFound(_))));
    world.fail("keep");
    assert!(backend.snapshot_volume(wish("data")).await.is_err());
    *world.fails.lock().unwrap() = None;
    assert!(world.books.lock().unwrap().kept.is_empty());
    assert!(backend.delete(id).await.unwrap(), "its turn was given back");
    clean(&world);
}
