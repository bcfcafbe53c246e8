//! What a workspace may have.

use std::sync::{Arc, atomic::Ordering};

use pandastack_bus::{
    Error, SandboxId,
    quota::{Quota, Resource},
    storage::Purpose,
    vmm::{Child, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{clean, open, spec, started},
    fakes::Fake,
};

fn children(count: usize) -> Vec<Child> {
    (0..count).map(|_| Child { ttl_seconds: 60, ..Child::default() }).collect()
}

/// What snapshots are for.
fn captures(world: &Fake) -> Vec<Purpose> {
    world.books.lock().unwrap().snapshots.values().map(|kept| kept.info.spec.purpose).collect()
}

#[tokio::test]
async fn a_workspace_has_so_many_snapshots_also_when_many_are_taken_at_once() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let (daemon, _told) = open(&world, directory.path());
    let backend = Backend(Arc::clone(&daemon));
    backend.set_quota("w".into(), Resource::Snapshots, 2).await.unwrap();
    let (one, two) =
        tokio::join!(backend.create(String::new(), spec(false)), backend.create(String::new(), spec(false)));
    let (one, two) = (one.unwrap().id, two.unwrap().id);
    world.slow.store(true, Ordering::Relaxed);
    let take = |id: &str| backend.snapshot(id.to_owned(), SandboxId::random().to_string());

    let (a, b, c, d) = tokio::join!(take(&one), take(&two), take(&one), take(&two));

    let all = [a, b, c, d];
    assert_eq!(all.iter().filter(|taken| taken.is_ok()).count(), 2, "{all:?}");
    assert_eq!(all.iter().filter(|taken| matches!(taken, Err(Error::Quota(_)))).count(), 2, "{all:?}");
    assert_eq!(captures(&world), [Purpose::Snapshot; 2]);
    // The same one again is no further one, and forks and sleep take none.
    let kept = all.iter().find_map(|taken| taken.as_ref().ok()).unwrap();
    assert!(backend.snapshot(kept.spec.sandbox.clone(), kept.spec.id.clone()).await.is_ok());
    assert!(backend.fork(String::new(), one.clone(), children(1)).await.is_ok());
    backend.hibernate(one.clone()).await.unwrap();
    world.books.lock().unwrap().snapshots.remove(&kept.spec.id);
    assert!(take(&two).await.is_ok());
    let line = |resource| {
        let backend = &backend;
        async move {
            backend
                .quotas("w".into())
                .await
                .unwrap()
                .into_iter()
                .find(|line| line.resource == resource)
                .unwrap()
        }
    };
    assert_eq!(line(Resource::Snapshots).await, Quota { resource: Resource::Snapshots, limit: 2, used: 2 });
    assert_eq!(
        line(Resource::MemoryMib).await,
        Quota { resource: Resource::MemoryMib, limit: -1, used: 3 * 128 }
    );
    clean(&world);
}

#[tokio::test]
async fn a_quota_bounds_memory_outlives_the_daemon_and_leaves_nothing_behind() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let daemon = started(&world, directory.path()).await;
    let backend = Backend(Arc::clone(&daemon));
    backend.set_quota("w".into(), Resource::MemoryMib, 2 * 128).await.unwrap();
    let storages = backend.set_quota("w".into(), Resource::Volumes, 1).await;
    assert!(matches!(storages, Err(Error::InvalidArgument(_))), "{storages:?}");
    drop((backend, daemon));
    let daemon = started(&world, directory.path()).await;
    let backend = Backend(Arc::clone(&daemon));

    let create = || backend.create(String::new(), spec(false));
    let (a, b, c) = tokio::join!(create(), create(), create());

    let all = [a, b, c];
    assert_eq!(all.iter().filter(|made| made.is_ok()).count(), 2, "{all:?}");
    assert!(all.iter().any(|made| matches!(made, Err(Error::Quota(text)) if text.contains("MiB of memory"))));
    assert_eq!(backend.list("w".into()).await.unwrap().len(), 2);
    let parent = all.iter().find_map(|made| made.as_ref().ok()).unwrap().id.clone();
    // Asleep it counts, too: it may wake.
    backend.hibernate(parent.clone()).await.unwrap();
    assert!(matches!(create().await, Err(Error::Quota(_))));
    let fork = |count| backend.fork(String::new(), parent.clone(), children(count));
    assert!(matches!(fork(1).await, Err(Error::Quota(_))));
    assert!(matches!(fork(3).await, Err(Error::BeyondQuota(_))));
    assert_eq!(world.books.lock().unwrap().snapshots.len(), 1, "nothing was captured for them");
    backend.set_quota("w".into(), Resource::MemoryMib, -1).await.unwrap();
    assert!(create().await.is_ok());
    clean(&world);
}
