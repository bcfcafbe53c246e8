//! A create, end to end, and what a request is.
//!
//! Owns: the order of admission, slot, record, restore; the one sandbox per request; how long it may take. Refuses to
//! know: how a slot is made (`slots`), what each step does (`machine`, `effects`).

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use pandastack_bus::{
    Error, Result, SandboxId,
    vmm::{SandboxInfo, SandboxSpec, unknown_sandbox},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    admission, agent,
    effects::RESTORE_ANSWER,
    machine::{Event, State},
    manager::Manager,
    ports::World,
    record::{self, Purpose, REQUEST_KEPT_MS, Shape, Tombstone, fingerprint},
    sandbox::{Happening, Sandbox},
};

/// A create answers within this, before its caller stops to wait.
const WHOLE: Duration = Duration::from_secs(25);
/// Of this, a template that is still being baked may take so much.
const BAKE_WAIT: Duration = Duration::from_secs(20);
/// Slots tried for one request.
const ATTEMPTS: usize = 2;
/// Longest name of a request, bytes.
const REQUEST_LIMIT: usize = 512;
/// Largest root disk, MiB: 1 TiB, as storage has it.
const DISK_LIMIT_MIB: u64 = 1 << 20;

impl<W: World> Manager<W> {
    /// Makes a sandbox, or answers with the one that this request made before.
    ///
    /// # Errors
    /// See [`Error`]: for each of them nothing was made, or what was made has been undone.
    pub async fn create(self: &Arc<Self>, request: String, spec: SandboxSpec) -> Result<SandboxInfo> {
        validate(&request, &spec)?;
        let accepted = Instant::now();
        if request.is_empty() {
            let manager = Arc::clone(self);
            let task = tokio::spawn(async move { manager.make(accepted, String::new(), spec).await });
            let id = task.await.map_err(|error| Error::Internal(error.to_string()))??;
            return self.info(id.as_str());
        }
        let mut outcome = match self.requests.enter(&request, &fingerprint(&spec))? {
            Turn::Join(outcome) => outcome,
            Turn::First(tell, outcome) => {
                let manager = Arc::clone(self);
                // To its end, whoever is still waiting: a repetition of the request joins here.
                tokio::spawn(async move {
                    let made = manager.make(accepted, request.clone(), spec).await;
                    if made.is_err() {
                        manager.requests.leave(&request);
                    }
                    tell.send_replace(Some(made));
                });
                outcome
            }
        };
        let made = outcome.wait_for(Option::is_some).await.map(|made| made.clone());
        let id =
            made.ok().flatten().unwrap_or_else(|| Err(Error::Internal("a create ended early".into())))?;
        self.info(id.as_str())
    }

    /// What callers are told about a sandbox.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn info(&self, id: &str) -> Result<SandboxInfo> {
        let sandbox = self.sandbox(id)?;
        sandbox.record().info(sandbox.idle_seconds(self.now_ms())).ok_or_else(|| unknown_sandbox(id))
    }

    async fn make(
        self: &Arc<Self>,
        accepted: Instant,
        request: String,
        spec: SandboxSpec,
    ) -> Result<SandboxId> {
        let made = self.make_counted(accepted, &request, &spec).await;
        let counter = if made.is_ok() { &self.created } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
        if let Err(error) = &made {
            tracing::warn!(template = spec.template, "a create was refused or failed: {}", error.message());
        }
        made
    }

    async fn make_counted(
        self: &Arc<Self>,
        accepted: Instant,
        request: &str,
        spec: &SandboxSpec,
    ) -> Result<SandboxId> {
        let deadline = accepted + WHOLE;
        let template =
            self.catalogue.baked(self.world.storage(), &spec.template, accepted + BAKE_WAIT).await?;
        if spec.disk_mib != 0 && spec.disk_mib < template.disk_mib {
            return Err(Error::InvalidArgument(format!(
                "a disk of {} MiB is smaller than the template's {} MiB",
                spec.disk_mib, template.disk_mib
            )));
        }
        let mut claim = self.claim(&spec.workspace)?;
        admission::admit(&self.host()?, template.memory_mib, spec.disk_mib)?;
        let _pending = Pending::new(&self.pending_mib, admission::need_mib(template.memory_mib));
        let _under_way = UnderWay::new(&self.creating);
        self.asked.note(&template.name);
        let shape = Shape::of(&template, spec.disk_mib);
        let _turn = timeout_at(deadline - RESTORE_ANSWER, self.restores.acquire())
            .await
            .map_err(|_| Error::NoCapacity("too many sandboxes are being made at once".into()))?;
        let mut last = Error::Timeout("there was no time left".into());
        for attempt in 1..=ATTEMPTS {
            if attempt > 1 && Instant::now() + RESTORE_ANSWER > deadline {
                break;
            }
            let slot = timeout_at(deadline, self.slot(Some(&shape)))
                .await
                .map_err(|_| Error::NoCapacity("no machine could be started in time".into()))??;
            claim.is_for(&slot.id);
            match self.give(&slot, accepted, request, spec, &shape).await {
                Ok(()) => return Ok(slot.id.clone()),
                Err(error @ (Error::NoSpace(_) | Error::NoCapacity(_) | Error::InvalidArgument(_))) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::warn!(sandbox = %slot.id, attempt, "thrown away: {}", error.message());
                    last = error;
                }
            }
        }
        Err(match last {
            Error::GuestUnreachable(text) => Error::Timeout(text),
            other => other,
        })
    }

    /// Makes a slot the sandbox of a request; the machine takes it down again when that fails.
    async fn give(
        self: &Arc<Self>,
        slot: &Arc<Sandbox>,
        accepted: Instant,
        request: &str,
        spec: &SandboxSpec,
        shape: &Shape,
    ) -> Result<()> {
        slot.accept(accepted);
        slot.touch(self.now_ms());
        // One that is dressed has a machine id already.
        let (event, machine_id) = match slot.record().machine_id() {
            Some(machine_id) => (Event::TakeDressed, machine_id.to_owned()),
            None => (Event::Take, agent::machine_id()),
        };
        let sandbox = record::Sandbox {
            request: request.to_owned(),
            fingerprint: fingerprint(spec),
            spec: spec.clone(),
            shape: shape.clone(),
            machine_id,
            boot_mode: "snapshot".into(),
            boot_ms: 0,
            born: false,
        };
        let now = self.unix_ms();
        let change = move |record: &mut record::Record| {
            record.purpose = Purpose::Sandbox(Box::new(sandbox));
            record.created_unix_ms = now;
        };
        let with = Happening { change: Some(Box::new(change)), ..Happening::default() };
        match self.happen(slot, event, with).await {
            Ok(State::Running) => {
                slot.touch(self.now_ms());
                slot.timed("total_us", accepted);
                Ok(())
            }
            Ok(other) => Err(Error::Internal(format!("a create ended {other:?}"))),
            Err(error) => {
                // Only its last record could not be saved: nobody was told of it, so it goes, too.
                if slot.record().state == State::Running {
                    let _ = self.happen(slot, Event::Delete, Happening::default()).await;
                }
                Err(error)
            }
        }
    }
}

fn validate(request: &str, spec: &SandboxSpec) -> Result<()> {
    let refuse = |text: &str| Err(Error::InvalidArgument(text.into()));
    if request.len() > REQUEST_LIMIT {
        return refuse("the request's name is too long");
    }
    if spec.workspace.is_empty() {
        return refuse("a sandbox belongs to a workspace");
    }
    if spec.ttl_seconds == 0 {
        return refuse("the idle limit is at least one second");
    }
    if spec.disk_mib > DISK_LIMIT_MIB {
        return refuse("the disk is too large");
    }
    Ok(())
}

/// Every request whose answer is still owed or remembered.
#[derive(Debug, Default)]
pub struct Requests(Mutex<HashMap<String, Entry>>);

type Outcome = Option<Result<SandboxId>>;

#[derive(Debug)]
struct Entry {
    fingerprint: String,
    until_unix_ms: u64,
    outcome: watch::Receiver<Outcome>,
}

/// Whose turn it is to make a request's sandbox.
enum Turn {
    First(watch::Sender<Outcome>, watch::Receiver<Outcome>),
    Join(watch::Receiver<Outcome>),
}

impl Requests {
    fn map(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what is on record.
    pub fn load(&self, sandboxes: &[Arc<Sandbox>], tombstones: Vec<(String, Tombstone)>, now_unix_ms: u64) {
        let mut map = self.map();
        let mut add = |request: &str, fingerprint: String, until: u64, id: SandboxId| {
            let (_, outcome) = watch::channel(Some(Ok(id)));
            map.insert(request.to_owned(), Entry { fingerprint, until_unix_ms: until, outcome });
        };
        for (_, left) in tombstones.into_iter().filter(|(_, left)| left.until_unix_ms > now_unix_ms) {
            add(&left.request, left.fingerprint, left.until_unix_ms, left.id);
        }
        for record in sandboxes.iter().map(|sandbox| sandbox.record()) {
            let Some(inner) = record.sandbox().filter(|inner| inner.born && !inner.request.is_empty()) else {
                continue;
            };
            let until = record.created_unix_ms.saturating_add(REQUEST_KEPT_MS);
            add(&inner.request, inner.asked(), until, record.id.clone());
        }
    }

    fn enter(&self, request: &str, fingerprint: &str) -> Result<Turn> {
        let mut map = self.map();
        match map.get(request) {
            Some(entry) if entry.fingerprint != fingerprint => {
                Err(Error::Exists("this request was made before, for something else".into()))
            }
            Some(entry) => Ok(Turn::Join(entry.outcome.clone())),
            None => {
                let (tell, outcome) = watch::channel(None);
                let entry = Entry {
                    fingerprint: fingerprint.to_owned(),
                    until_unix_ms: u64::MAX,
                    outcome: outcome.clone(),
                };
                map.insert(request.to_owned(), entry);
                Ok(Turn::First(tell, outcome))
            }
        }
    }

    /// Forgets a request.
    pub fn leave(&self, request: &str) {
        self.map().remove(request);
    }

    /// Forgets what is older than a day and whose sandbox is gone.
    pub fn purge(&self, now_unix_ms: u64, is_there: impl Fn(&SandboxId) -> bool) {
        self.map().retain(|_, entry| match &*entry.outcome.borrow() {
            Some(Ok(id)) if !is_there(id) => {
                // Those of this run of the daemon learn their age when their sandbox goes.
                if entry.until_unix_ms == u64::MAX {
                    entry.until_unix_ms = now_unix_ms.saturating_add(REQUEST_KEPT_MS);
                }
                entry.until_unix_ms > now_unix_ms
            }
            _ => true,
        });
    }
}

/// Counts a create while it is under way.
struct UnderWay<'a>(&'a watch::Sender<usize>);

impl<'a> UnderWay<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

/// Memory that a create under way is expected to take.
pub struct Pending<'a>(&'a AtomicU64, u64);

impl<'a> Pending<'a> {
    /// For as long as this lives.
    pub fn new(sum: &'a AtomicU64, mib: u64) -> Self {
        sum.fetch_add(mib, Ordering::Relaxed);
        Self(sum, mib)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
