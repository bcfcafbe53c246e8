//! What is told of sandboxes: their events, also after they are gone; their consoles; what they take.

use std::{collections::BTreeMap, io::Read, sync::Arc};

use pandastack_bus::{
    Error,
    vmm::{Child, HistoryQuery, HistoryRow, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{Daemon, clean, open, reopened, spec},
    fakes::{Fake, Handle},
};

async fn told(backend: &Backend<Handle>, sandbox: &str, after: u64) -> Vec<HistoryRow> {
    let query = HistoryQuery {
        workspace: "w".into(),
        sandbox: sandbox.into(),
        after,
        limit: 100,
        ..HistoryQuery::default()
    };
    backend.history(query).await.unwrap().rows
}

fn kinds(rows: &[HistoryRow]) -> Vec<&str> {
    rows.iter().map(|row| &*row.kind).collect()
}

#[tokio::test]
async fn the_history_has_a_life_to_its_end_and_outlives_the_daemon() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;
    backend.pause(id.clone()).await.unwrap();
    backend.resume(id.clone()).await.unwrap();
    backend.hibernate(id.clone()).await.unwrap();
    backend.wake(id.clone()).await.unwrap();
    let child = Child { metadata: BTreeMap::new(), ttl_seconds: 60, persistent: false };
    let fork = backend.fork("f".into(), id.clone(), vec![child]).await.unwrap();
    let before = told(&backend, &id, 0).await;
    backend.delete(id.clone()).await.unwrap();

    let rows = told(&backend, &id, 0).await;

    let life = [
        "sandbox.creating",
        "sandbox.running",
        "sandbox.paused",
        "sandbox.resumed",
        "sandbox.hibernated",
        "sandbox.woken",
        "fork.completed",
    ];
    assert_eq!(kinds(&rows)[..life.len()], life);
    assert_eq!(kinds(&rows).last(), Some(&"sandbox.deleted"));
    let of = |kind: &str| &rows.iter().find(|row| row.kind == kind).unwrap().payload;
    assert_eq!(of("sandbox.running")["boot_mode"], "snapshot");
    assert_eq!((&*of("sandbox.woken")["boot_mode"], &*of("sandbox.woken")["template"]), ("wake", "base"));
    assert!(of("sandbox.woken")["boot_ms"].parse::<u64>().is_ok());
    assert_eq!(of("fork.completed")["children"], fork.children[0].id);
    assert!(told(&backend, &fork.children[0].id, 0).await.iter().all(|row| row.seq > before[5].seq));
    assert!(
        backend
            .history(HistoryQuery { workspace: "x".into(), limit: 9, ..HistoryQuery::default() })
            .await
            .unwrap()
            .rows
            .is_empty()
    );
    drop((daemon, backend));

    let daemon = reopened(&world, directory.path()).await;
    let backend = Backend(Arc::clone(&daemon));
    assert_eq!(told(&backend, &id, 0).await, rows);
    clean(&world);
}

#[tokio::test]
async fn a_create_that_failed_is_not_told_of() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    world.fail("load");

    assert!(backend.create(String::new(), spec(false)).await.is_err());

    assert_eq!(told(&backend, "", 0).await, []);
}

#[tokio::test]
async fn a_console_is_that_of_the_present_machine_and_readers_are_few() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;
    backend.hibernate(id.clone()).await.unwrap();
    let machine = backend.wake(id.clone()).await.unwrap().machine;
    assert_ne!(machine, id);

    let mut text = String::new();
    let console = backend.open_console(id.clone(), u32::MAX, 7, false).await.unwrap();
    std::fs::File::from(console).read_to_string(&mut text).unwrap();
    assert!(
        text.starts_with(&machine) && text.contains("lines: 10000") && text.contains("since: 7"),
        "{text}"
    );
    let mut open = Vec::new();
    while let Ok(console) = backend.open_console(id.clone(), 1, 0, true).await {
        open.push(console);
    }
    assert_eq!(open.len(), 4);
    assert!(matches!(backend.open_console(id.clone(), 1, 0, false).await, Err(Error::NoCapacity(_))));
    world.books.lock().unwrap().consoles.clear();
    assert!(backend.open_console(id, 1, 0, false).await.is_ok());
    assert!(matches!(backend.open_console("0".repeat(20), 1, 0, false).await, Err(Error::NotFound(_))));
}

async fn cpu(backend: &Backend<Handle>, id: &str) -> pandastack_bus::Result<usize> {
    let series = backend.metrics("w".into(), id.into(), 0, u64::MAX, 15).await?;
    assert_eq!(series.len(), 4);
    Ok(series[0].points.len())
}

#[tokio::test]
async fn what_runs_is_measured_and_what_sleeps_is_not() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told): (Daemon, _) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create(String::new(), spec(false)).await.unwrap().id;
    daemon.measure().await;
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    daemon.measure().await;
    assert_eq!((cpu(&backend, &id).await, cpu(&backend, "").await), (Ok(1), Ok(1)));
    backend.hibernate(id.clone()).await.unwrap();
    daemon.measure().await;
    assert_eq!(cpu(&backend, &id).await, Ok(1));
    backend.delete(id.clone()).await.unwrap();
    assert!(matches!(cpu(&backend, &id).await, Err(Error::NotFound(_))));
    daemon.measure().await;
    assert_eq!(cpu(&backend, "").await, Ok(1));
}
