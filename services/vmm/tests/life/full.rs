//! A disk without room.

use std::sync::Arc;

use pandastack_bus::{
    Error,
    vmm::{State, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{clean, eventually, open, spec},
    fakes::Fake,
};

/// A file system in memory of a few MiB; gone when dropped.
struct Small(tempfile::TempDir);

impl Small {
    /// `None` where it cannot be mounted (needs root).
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"]).arg(directory.path());
        if mount.status().is_ok_and(|status| status.success()) {
            return Some(Self(directory));
        }
        println!("skipped: nothing can be mounted here");
        None
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.path().join("filler")).unwrap();
        let full =
            std::iter::repeat_with(|| std::io::Write::write_all(&mut file, &[7; 4096])).find(Result::is_err);
        assert_eq!(full.unwrap().unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.path().join("filler")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_can_be_emptied() {
    let world = Fake::new();
    let Some(small) = Small::mount() else { return };
    let (daemon, _told) = open(&world, small.0.path());
    let backend = Backend(Arc::clone(&daemon));
    let id = backend.create("r".into(), spec(false)).await.unwrap().id;
    small.fill();

    let refused = backend.set_ttl(id.clone(), 99).await;
    assert!(matches!(refused, Err(Error::NoSpace(_))), "{refused:?}");
    let refused = backend.create("s".into(), spec(false)).await;
    assert!(matches!(refused, Err(Error::NoSpace(_) | Error::Internal(_))), "{refused:?}");
    assert!(backend.delete(id).await.unwrap());

    assert_eq!(world.owners().len(), 0);
    assert_eq!(daemon.records.iter().unwrap().len(), 0);
    assert!(!daemon.is_poisoned());
    clean(&world);
}

/// What a verb makes durable is its last step: when the disk does not take it, everything before is undone.
#[tokio::test]
async fn on_a_full_disk_a_sandbox_stays_as_it_is() {
    let world = Fake::new();
    let Some(small) = Small::mount() else { return };
    let (daemon, _told) = open(&world, small.0.path());
    let backend = Backend(Arc::clone(&daemon));
    let made = backend.create(String::new(), spec(false)).await.unwrap();
    world.books.lock().unwrap().minds.insert(made.machine.clone(), "a thought".into());
    let state = || daemon.info(&made.id).unwrap().state;
    let captures = || world.books.lock().unwrap().snapshots.len();

    small.fill();
    assert!(matches!(backend.pause(made.id.clone()).await, Err(Error::NoSpace(_))));
    assert!(matches!(backend.hibernate(made.id.clone()).await, Err(Error::NoSpace(_))));
    assert_eq!(state(), State::Running);
    assert!(world.books.lock().unwrap().paused.is_empty());
    eventually("the capture goes", || captures() == 0).await;
    small.empty();
    backend.hibernate(made.id.clone()).await.unwrap();
    let slot = daemon.make_slot().await.unwrap();
    daemon.push_slot(slot);
    small.fill();
    assert!(matches!(backend.wake(made.id.clone()).await, Err(Error::NoSpace(_))));
    assert_eq!((state(), captures(), world.owners().len()), (State::Hibernated, 1, 0));
    small.empty();
    let awake = backend.wake(made.id.clone()).await.unwrap();

    assert_eq!(world.books.lock().unwrap().minds[&awake.machine], "a thought");
    clean(&world);
}
