//! A daemon over the fakes, and what tests ask of it.

use std::{path::Path, sync::Arc, time::Duration};

use pandastack_bus::vmm::SandboxSpec;
use pandastack_vmm::manager::{Config, Manager};
use tokio::sync::mpsc;

use crate::fakes::{Fake, Handle};

const CONFIG: Config = Config { slots: 1, parallel: 4, workspace_sandboxes: 4, idle_hibernate_seconds: 300 };

/// The daemon under test.
pub type Daemon = Arc<Manager<Handle>>;

pub fn open(
    world: &Arc<Fake>,
    directory: &Path,
) -> (Daemon, mpsc::UnboundedReceiver<pandastack_vmm::manager::Change>) {
    open_with(world, directory, CONFIG)
}

pub fn open_with(
    world: &Arc<Fake>,
    directory: &Path,
    config: Config,
) -> (Daemon, mpsc::UnboundedReceiver<pandastack_vmm::manager::Change>) {
    let (changes, told) = mpsc::unbounded_channel();
    (Manager::open(Handle(Arc::clone(world)), directory, config, changes).unwrap(), told)
}

/// One whose slots are all ready: of each two, one is dressed.
pub async fn with_slots(world: &Arc<Fake>, directory: &Path, slots: usize) -> Daemon {
    let (daemon, _) = open_with(world, directory, Config { slots, ..CONFIG });
    daemon.catalogue.renew(&Handle(Arc::clone(world))).await.unwrap();
    tokio::spawn(Arc::clone(&daemon).keep_slots());
    eventually("the slots are ready", || {
        let ready = daemon.ready_slots();
        let dressed = ready.iter().filter(|slot| slot.record().shape().is_some()).count();
        (ready.len(), dressed) == (slots, slots / 2)
    })
    .await;
    daemon
}

/// Opens the records as soon as the daemon before has let go of them.
pub async fn reopened(world: &Arc<Fake>, directory: &Path) -> Daemon {
    for _ in 0..200 {
        let (changes, _) = mpsc::unbounded_channel();
        if let Ok(daemon) = Manager::open(Handle(Arc::clone(world)), directory, CONFIG, changes) {
            return daemon;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the daemon before never lets go");
}

/// A daemon's start, cold boots included.
pub async fn started(world: &Arc<Fake>, directory: &Path) -> Daemon {
    let daemon = reopened(world, directory).await;
    for action in daemon.reconcile().await.unwrap() {
        daemon.carry_out(action).await;
    }
    daemon
}

pub fn spec(persistent: bool) -> SandboxSpec {
    SandboxSpec {
        workspace: "w".into(),
        template: "base".into(),
        metadata: Default::default(),
        ttl_seconds: 60,
        persistent,
        disk_mib: 0,
        snapshot: String::new(),
        volumes: Vec::new(),
    }
}

pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..400 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never: {what}");
}

pub fn clean(world: &Fake) {
    assert_eq!(world.books.lock().unwrap().violations, Vec::<String>::new());
}
