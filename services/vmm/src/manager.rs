//! What the daemon knows and holds: the registry of sandboxes, slots, counters.
//!
//! Owns: the maps and their consistency. Refuses to know: how a sandbox is made (`create`), kept (`reap`), found again
//! (`startup`).

use std::{
    collections::{HashMap, VecDeque},
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use pandastack_bus::{
    Error, Result, SandboxId,
    storage::{SnapshotInfo, VolumeSnapshotInfo},
    vmm::{Capacity, Fork, unknown_sandbox},
};
use pandastack_daemon::{
    quotas::Quotas,
    records::{Records, RecordsError},
};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    time::Instant,
};

use crate::{
    admission::{self, Host},
    catalogue::Catalogue,
    console::Consoles,
    create::Requests,
    history::{Hint, History},
    machine::State,
    meter::Meter,
    ports::World,
    quota::Claims,
    record::{Record, Shape, Tombstone},
    sandbox::Sandbox,
    wardrobe::Asked,
};

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Prepared slots to keep.
    pub slots: usize,
    /// Restores, and starts of units, at the same time.
    pub parallel: usize,
    /// Sandboxes that one workspace may have, whatever their state, unless it has a quota of its own.
    pub workspace_sandboxes: usize,
    /// Seconds without use after which a persistent sandbox is hibernated; 0: never.
    pub idle_hibernate_seconds: u64,
}

/// A sandbox changed; to be told on the bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Its id.
    pub id: String,
    /// Its tenant.
    pub workspace: String,
    /// Its state; empty when it is gone.
    pub state: &'static str,
    /// Counts its changes.
    pub generation: u64,
}

/// Everything.
#[derive(Debug)]
pub struct Manager<W> {
    /// Where effects happen.
    pub world: W,
    /// How much of what.
    pub config: Config,
    /// Templates.
    pub catalogue: Arc<Catalogue>,
    /// Durable sandboxes.
    pub records: Arc<Records<Record>>,
    /// Durable requests whose sandbox is gone.
    pub tombstones: Arc<Records<Tombstone>>,
    /// Requests by name.
    pub requests: Requests<SandboxId>,
    /// Forks by request.
    pub forks: Requests<Fork>,
    /// Snapshots that are being taken, by id.
    pub snapshots: Requests<SnapshotInfo>,
    /// Snapshots of volumes that are being taken, by id.
    pub volume_snapshots: Requests<VolumeSnapshotInfo>,
    /// Snapshots that nobody needs any more and that could not be deleted yet.
    pub garbage: Mutex<Vec<String>>,
    /// Nothing is made any more: the appliance is about to go down.
    pub closing: AtomicBool,
    /// Events of all sandboxes.
    pub history: History,
    /// Hints at new ones, to be told; taken once.
    pub hints: Mutex<Option<mpsc::UnboundedReceiver<Hint>>>,
    /// Sandboxes whose guest's connections a capture just cut, to be told.
    pub cuts: mpsc::UnboundedSender<SandboxId>,
    /// The other end of it, taken once.
    pub told_cuts: Mutex<Option<mpsc::UnboundedReceiver<SandboxId>>>,
    /// Changes to be told.
    pub changes: mpsc::UnboundedSender<Change>,
    /// Starts of units at the same time.
    pub starts: Semaphore,
    /// Restores at the same time.
    pub restores: Arc<Semaphore>,
    /// Sandboxes booted again at the same time.
    pub recoveries: Semaphore,
    /// Sandboxes hibernated by us at the same time.
    pub hibernations: Semaphore,
    /// What workspaces are about to get.
    pub claims: Claims,
    /// What workspaces may have.
    pub quotas: Arc<Quotas>,
    /// Creates under way.
    pub creating: watch::Sender<usize>,
    /// What sandboxes take of the host.
    pub meter: Meter,
    /// Consoles that are being read.
    pub consoles: Consoles,
    /// Memory that creates under way are expected to take, MiB.
    pub pending_mib: Arc<AtomicU64>,
    /// Slots are missing.
    pub refill: Notify,
    /// Space on the data partition as last told: free and reserve, bytes.
    pub space: Mutex<Option<(u64, u64)>>,
    /// Templates that were asked for last.
    pub asked: Asked,
    /// Creates that succeeded.
    pub created: AtomicU64,
    /// Creates that did not.
    pub refused: AtomicU64,
    sandboxes: Mutex<HashMap<SandboxId, Arc<Sandbox>>>,
    slots: Mutex<VecDeque<Arc<Sandbox>>>,
    start: Instant,
}

impl<W: World> Manager<W> {
    /// Opens the records below `directory`. Nothing is done about them yet.
    ///
    /// # Errors
    /// They cannot be opened.
    pub fn open(
        world: W,
        directory: &Path,
        config: Config,
        changes: mpsc::UnboundedSender<Change>,
    ) -> std::result::Result<Arc<Self>, RecordsError> {
        let records: Records<Record> = Records::open(&directory.join("sandboxes"))?;
        let tombstones: Records<Tombstone> = Records::open(&directory.join("requests"))?;
        let at = directory.join("quotas");
        let quotas = Quotas::open(&at).map_err(|source| RecordsError::Io { path: at, source })?;
        let (hint, hints) = mpsc::unbounded_channel();
        let (cuts, told_cuts) = mpsc::unbounded_channel();
        let manager = Self {
            world,
            history: History::open(&directory.join("events"), hint),
            hints: Mutex::new(Some(hints)),
            cuts,
            told_cuts: Mutex::new(Some(told_cuts)),
            config,
            catalogue: Arc::default(),
            requests: Requests::default(),
            forks: Requests::default(),
            snapshots: Requests::default(),
            volume_snapshots: Requests::default(),
            garbage: Mutex::default(),
            closing: AtomicBool::new(false),
            records: Arc::new(records),
            tombstones: Arc::new(tombstones),
            changes,
            starts: Semaphore::new(config.parallel),
            restores: Arc::new(Semaphore::new(config.parallel)),
            recoveries: Semaphore::new(config.parallel),
            hibernations: Semaphore::new(config.parallel),
            claims: Claims::default(),
            quotas: Arc::new(quotas),
            creating: watch::Sender::new(0),
            meter: Meter::default(),
            consoles: Consoles::default(),
            pending_mib: Arc::default(),
            refill: Notify::new(),
            space: Mutex::new(None),
            asked: Asked::default(),
            created: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            sandboxes: Mutex::default(),
            slots: Mutex::default(),
            start: Instant::now(),
        };
        for (key, record) in manager.records.iter()? {
            if key != record.id.as_str() {
                tracing::error!("a record of {} lies under the name {key}", record.id);
                continue;
            }
            manager.insert(Sandbox::new(record, manager.now_ms()));
        }
        let (all, tombstones) = (manager.all(), manager.tombstones.iter()?);
        let records: Vec<_> = all.iter().map(|sandbox| sandbox.record()).collect();
        manager.history.fill_in(records.iter().map(|record| &**record));
        manager.requests.load(&all, &tombstones, manager.unix_ms());
        manager.forks.load(&all, &tombstones, manager.unix_ms());
        Ok(Arc::new(manager))
    }

    /// Whether something new may be made.
    ///
    /// # Errors
    /// [`Error::NotReady`].
    pub fn check_open(&self) -> Result<()> {
        match self.closing.load(Ordering::SeqCst) {
            true => Err(Error::NotReady("the appliance is about to go down".into())),
            false => Ok(()),
        }
    }

    /// Milliseconds on a clock that starts with the daemon and never jumps.
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Wall clock, Unix milliseconds.
    pub fn unix_ms(&self) -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    }

    fn map(&self) -> MutexGuard<'_, HashMap<SandboxId, Arc<Sandbox>>> {
        self.sandboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a sandbox known.
    pub fn insert(&self, sandbox: Sandbox) -> Arc<Sandbox> {
        let sandbox = Arc::new(sandbox);
        self.map().insert(sandbox.id.clone(), Arc::clone(&sandbox));
        sandbox
    }

    /// Forgets a sandbox of which nothing is left.
    pub fn remove(&self, id: &SandboxId) {
        self.map().remove(id);
    }

    /// Whatever has this id: sandbox, slot or bake.
    pub fn find(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        self.map().get(id).cloned()
    }

    /// The sandbox that a caller means.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn sandbox(&self, id: &str) -> Result<Arc<Sandbox>> {
        id.parse()
            .ok()
            .and_then(|parsed| self.find(&parsed))
            .filter(|found| found.record().public_state().is_some())
            .ok_or_else(|| unknown_sandbox(id))
    }

    /// Everything that is known, in no order.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.map().values().cloned().collect()
    }

    /// A slot that is ready: one that is dressed for this machine if one is given and there is such a slot, otherwise an
    /// empty one; the oldest first.
    pub fn pop_slot(&self, shape: Option<&Shape>) -> Option<Arc<Sandbox>> {
        let ready = self.ready_slots();
        let dressed = |slot: &&Arc<Sandbox>| shape.is_some() && slot.record().shape() == shape;
        let empty = |slot: &&Arc<Sandbox>| slot.record().shape().is_none();
        ready
            .iter()
            .filter(dressed)
            .chain(ready.iter().filter(empty))
            .find(|slot| self.claim_slot(&slot.id))
            .cloned()
    }

    /// Takes this slot out of the pool. `false`: somebody else has it.
    pub fn claim_slot(&self, id: &SandboxId) -> bool {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let found = slots.iter().position(|slot| slot.id == *id);
        found.and_then(|at| slots.remove(at)).is_some_and(|slot| slot.record().state == State::Ready)
    }

    /// Keeps a slot that is ready.
    pub fn push_slot(&self, slot: Arc<Sandbox>) {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).push_back(slot);
    }

    /// Slots that are ready, the oldest first.
    pub fn ready_slots(&self) -> Vec<Arc<Sandbox>> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.retain(|slot| slot.record().state == State::Ready);
        slots.iter().cloned().collect()
    }

    /// Whether a store does not know any more what the disk holds; see [`Records::is_poisoned`].
    pub fn is_poisoned(&self) -> bool {
        self.records.is_poisoned() || self.tombstones.is_poisoned()
    }

    /// What the host has now.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn host(&self) -> Result<Host> {
        let text = std::fs::read_to_string("/proc/meminfo")
            .map_err(|error| Error::Internal(format!("/proc/meminfo: {error}")))?;
        let (total, available) = admission::parse_meminfo(&text)
            .ok_or_else(|| Error::Internal("/proc/meminfo does not parse".into()))?;
        let space = *self.space.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Host {
            memory_total_mib: total,
            memory_available_mib: available,
            memory_pending_mib: self.pending_mib.load(Ordering::Relaxed),
            disk_free_bytes: space.map(|(free, _)| free),
            disk_reserve_bytes: space.map_or(0, |(_, reserve)| reserve),
        })
    }

    /// What is left to give away.
    ///
    /// # Errors
    /// As [`Manager::host`].
    pub fn capacity(&self) -> Result<Capacity> {
        let host = self.host()?;
        let states: Vec<_> = self.all().iter().filter_map(|one| one.record().public_state()).collect();
        let running = states.iter().filter(|state| **state == pandastack_bus::vmm::State::Running).count();
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Capacity {
            sandboxes: small(states.len()),
            running: small(running),
            slots: small(self.ready_slots().len()),
            slots_wanted: small(self.config.slots),
            memory_available_mib: host.memory_available_mib,
            memory_reserve_mib: admission::reserve_mib(host.memory_total_mib),
            creates_total: self.created.load(Ordering::Relaxed),
            create_failures_total: self.refused.load(Ordering::Relaxed),
        })
    }
}
