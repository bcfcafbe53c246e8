//! A hibernated sandbox moves into a slot.
//!
//! Owns: the slot that is borrowed meanwhile, that it is the sandbox's machine afterwards, and that all who wait for a wake
//! share its outcome. Refuses to know: which step follows which (`machine`), the write that decides it (`commit`).

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pandastack_bus::{Error, Result, network::NetworkBackend, storage::StorageBackend};
use tokio::{
    sync::{OwnedMutexGuard, OwnedSemaphorePermit},
    time::{Instant, timeout},
};

use crate::{
    admission::{self, Host},
    create::{Pending, UnderWay},
    effects::{limits, shape},
    machine::{Event, State},
    manager::Manager,
    ports::{Units, World},
    record::Record,
    sandbox::{Happening, Sandbox},
};

/// A slot is found or made within this.
const SLOT: Duration = Duration::from_secs(15);

/// What a sandbox has to do with being hibernated.
#[derive(Debug, Default)]
pub struct Sleep {
    lent: Mutex<Option<Lent>>,
    untidy: AtomicBool,
    failures: Mutex<Failures>,
}

/// Wakes that failed: how many, and the last one's reason.
#[derive(Debug, Default)]
struct Failures {
    count: u64,
    last: Option<Error>,
}

/// A slot while a sandbox moves in.
#[derive(Debug)]
pub struct Lent {
    slot: Arc<Sandbox>,
    /// Nothing else happens to the slot: its end would take away what is about to be the sandbox's.
    turn: OwnedMutexGuard<()>,
    _restore: OwnedSemaphorePermit,
    _pending: Pending,
}

impl Sleep {
    fn lent(&self) -> MutexGuard<'_, Option<Lent>> {
        self.lent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The slot that is borrowed right now.
    pub fn slot(&self) -> Option<Arc<Sandbox>> {
        self.lent().as_ref().map(|lent| Arc::clone(&lent.slot))
    }

    /// Whether something of its last machine is still there although it is hibernated.
    pub fn is_untidy(&self) -> bool {
        self.untidy.load(Ordering::SeqCst)
    }

    /// Says so.
    pub fn set_untidy(&self, untidy: bool) {
        self.untidy.store(untidy, Ordering::SeqCst);
    }

    /// A wake failed.
    pub fn not_woken(&self, error: &Error) {
        let mut failed = self.failed();
        failed.count += 1;
        failed.last = Some(error.clone());
    }

    fn failures(&self) -> u64 {
        self.failed().count
    }

    /// Why a wake failed after there had been so many failures.
    fn failure_since(&self, before: u64) -> Option<Error> {
        let failed = self.failed();
        failed.last.clone().filter(|_| failed.count != before)
    }
}

impl<W: World> Manager<W> {
    /// Brings a hibernated sandbox back; whoever asks while that is under way shares the outcome.
    ///
    /// # Errors
    /// It is still hibernated, or [`Error::WrongState`].
    pub async fn wake(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Result<()> {
        sandbox.touch(self.now_ms());
        let _under_way = UnderWay::new(&self.creating);
        let before = sandbox.sleep.failures();
        let target = Arc::clone(sandbox);
        let guard = move |_: &Record| target.sleep.failures() == before;
        let with = Happening { guard: Some(Box::new(guard)), ..Happening::default() };
        match self.happen(sandbox, Event::Wake, with).await {
            Ok(_) => {
                sandbox.touch(self.now_ms());
                Ok(())
            }
            Err(error) => Err(sandbox.sleep.failure_since(before).unwrap_or(error)),
        }
    }

    /// Takes a slot for a sandbox that wakes.
    ///
    /// # Errors
    /// [`Error::NoCapacity`] and the like; nothing was taken.
    pub async fn borrow(self: &Arc<Self>, sandbox: &Arc<Sandbox>, record: &Record) -> Result<()> {
        self.check_open()?;
        sandbox.forget_timings("wake_");
        if sandbox.sleep.is_untidy() {
            self.clear(record).await?;
            sandbox.sleep.set_untidy(false);
        }
        let memory_mib = shape(record)?.memory_mib;
        // Its disk shares every block with the capture.
        admission::admit(&Host { disk_free_bytes: None, ..self.host()? }, memory_mib, 0)?;
        let pending = Pending::new(&self.pending_mib, admission::need_mib(memory_mib));
        let found = timeout(SLOT, async {
            let restore = Arc::clone(&self.restores).acquire_owned().await;
            let restore = restore.map_err(|error| Error::Internal(error.to_string()))?;
            loop {
                let slot = self.slot(None).await?;
                let turn = slot.turn().await;
                // It may have ended before its turn.
                if slot.record().state == State::Ready {
                    return Ok::<_, Error>((slot, turn, restore));
                }
            }
        });
        let (slot, turn, restore) =
            found.await.map_err(|_| Error::NoCapacity("no machine could be started in time".into()))??;
        *sandbox.sleep.lent() = Some(Lent { slot, turn, _restore: restore, _pending: pending });
        Ok(())
    }

    /// What is left of the machine that a hibernated sandbox had goes.
    async fn clear(&self, record: &Record) -> Result<()> {
        let id = record.machine();
        self.world.units().stop(id).await?;
        self.world.network().detach(id.to_string()).await?;
        self.world.storage().release(id.to_string()).await.map(drop)
    }

    /// Takes down what is left of the machine of a sandbox that was hibernated.
    pub async fn tidy(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        match self.happen(sandbox, Event::Adopt, Happening::default()).await {
            Ok(State::Hibernated) => sandbox.sleep.set_untidy(false),
            Ok(_) | Err(Error::WrongState(_)) => {}
            Err(error) => {
                tracing::error!(sandbox = %sandbox.id, "its last machine is not gone yet: {}", error.message());
            }
        }
    }

    /// Limits and files of the borrowed slot; they do not wait for each other.
    ///
    /// # Errors
    /// As the ports answer.
    pub async fn furnish_image(&self, sandbox: &Sandbox, record: &Record) -> Result<()> {
        let slot = sandbox.sleep.slot().ok_or_else(lost)?;
        let image = record.sandbox().map(|inner| inner.image.clone()).unwrap_or_default();
        let start = Instant::now();
        let fill = async {
            self.world.storage().fill_snapshot(slot.id.to_string(), image).await?;
            self.insert_volumes(&slot.id, record).await?;
            sandbox.timed("wake_storage_fill_us", start);
            Ok(())
        };
        let (filled, limited) = tokio::join!(fill, self.limit(&slot, &slot.id, limits(shape(record)?)));
        filled.and(limited)
    }

    /// The slot goes, with whatever was put into it.
    pub async fn give_back(self: &Arc<Self>, sandbox: &Sandbox) {
        let Some(Lent { slot, turn, .. }) = sandbox.sleep.lent().take() else { return };
        drop(turn);
        // Housekeeping repeats it.
        if let Err(error) = self.happen(&slot, Event::Delete, Happening::default()).await {
            tracing::error!(sandbox = %slot.id, "a borrowed slot is not gone yet: {}", error.message());
        }
    }

    /// The borrowed slot is the sandbox's from now on. Nothing here may fail any more.
    pub fn move_in(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let Some(lent) = sandbox.sleep.lent().take() else { return };
        let slot = &lent.slot;
        sandbox.set_limits(slot.limits());
        // A handle of its own: the slot's is still being waited for.
        let own = slot.process().map(|process| process.try_clone());
        let watched = match own {
            Some(Ok(process)) => self.watch(sandbox, &slot.id, Arc::new(process)),
            Some(Err(error)) => Err(Error::Internal(error.to_string())),
            None => Err(Error::WrongState("its process is gone".into())),
        };
        slot.set_process(None);
        if let Err(error) = watched {
            tracing::error!(sandbox = %sandbox.id, "is not watched yet: {}", error.message());
            let (manager, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
            tokio::spawn(async move {
                sandbox.settled().await;
                manager.adopt_or_lose(&sandbox).await;
            });
        }
        let mut gone = Record::clone(&slot.record());
        gone.state = State::Gone;
        slot.publish(&gone);
        self.remove(&slot.id);
        // Not waited for: until it is gone, the next start sees that it is another's machine.
        let (records, key) = (Arc::clone(&self.records), slot.id.to_string());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = records.remove(&key) {
                tracing::error!("the record of slot {key} stays: {}", pandastack_daemon::chain(&error));
            }
        });
    }
}

/// A wake without its slot.
pub fn lost() -> Error {
    Error::Internal("no slot is borrowed".into())
}
