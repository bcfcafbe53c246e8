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
    storage::{Purpose as Capture, SnapshotInfo, StorageBackend},
    vmm::{SandboxInfo, SandboxSpec, unknown_sandbox},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use crate::{
    admission, agent,
    catalogue::{may_use, unknown},
    effects::RESTORE_ANSWER,
    machine::{Event, State},
    manager::Manager,
    ports::World,
    quota::Claim,
    record::{self, Purpose, REQUEST_KEPT_MS, Shape, Tombstone, fingerprint},
    sandbox::{Happening, Sandbox},
    volumes,
};

/// A create has a slot within this; what is left is its restore, and its caller waits for some seconds more.
pub const WHOLE: Duration = Duration::from_secs(25);
/// Of this, a template that is still being baked may take so much.
const BAKE_WAIT: Duration = Duration::from_secs(20);
/// A create whose turn comes with less than this left is refused. Its restore may take as much longer as its caller waits:
/// the clients do for 30 s.
const LEAST: Duration = Duration::from_secs(2);
/// Slots tried for one request.
const ATTEMPTS: usize = 2;
/// Longest name of a request, bytes.
pub const REQUEST_LIMIT: usize = 512;
/// Largest root disk, MiB: 1 TiB, as storage has it.
const DISK_LIMIT_MIB: u64 = 1 << 20;

impl<W: World> Manager<W> {
    /// Makes a sandbox, or answers with the one that this request made before.
    ///
    /// # Errors
    /// See [`Error`]: for each of them nothing was made, or what was made has been undone.
    pub async fn create(self: &Arc<Self>, request: String, spec: SandboxSpec) -> Result<SandboxInfo> {
        validate(&request, &spec)?;
        self.check_open()?;
        let accepted = Instant::now();
        let manager = Arc::clone(self);
        let (name, asked) = (request.clone(), fingerprint(&spec));
        let work = async move { manager.make(accepted, name, spec).await };
        let id = self.once(|manager| &manager.requests, true, request, &asked, work).await?;
        self.info(id.as_str())
    }

    /// Does the work of a request to its end, whoever is still waiting. A repetition of the request joins while it is under
    /// way, and with `keep` also after it succeeded. One without a name is never repeated.
    ///
    /// # Errors
    /// As the work's; [`Error::Exists`] when the request means something else.
    pub async fn once<T: Clone + Send + Sync + 'static>(
        self: &Arc<Self>,
        requests: fn(&Self) -> &Requests<T>,
        keep: bool,
        request: String,
        fingerprint: &str,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        if request.is_empty() {
            let task = tokio::spawn(work).await;
            return task.map_err(|error| Error::Internal(error.to_string()))?;
        }
        let mut outcome = match requests(self).enter(&request, fingerprint)? {
            Turn::Join(outcome) => outcome,
            Turn::First(tell, outcome) => {
                let manager = Arc::clone(self);
                tokio::spawn(async move {
                    let made = work.await;
                    if !keep || made.is_err() {
                        requests(&manager).leave(&request);
                    }
                    tell.send_replace(Some(made));
                });
                outcome
            }
        };
        let made = outcome.wait_for(Option::is_some).await.map(|made| made.clone());
        made.ok().flatten().unwrap_or_else(|| Err(Error::Internal("a request's work ended early".into())))
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
        let sandbox = self.wished(accepted, request, spec).await?;
        let shape = &sandbox.shape;
        let mut claims = self.claim(&spec.workspace, shape, 1)?;
        let claim = claims.first_mut().ok_or_else(|| Error::Internal("nothing was claimed".into()))?;
        // At once, before it waits for its turn; what counts is asked then.
        admission::admit(&self.host()?, shape.memory_mib, sandbox.spec.disk_mib)?;
        let _under_way = UnderWay::new(&self.creating);
        self.place(accepted, deadline, claim, &sandbox).await
    }

    /// What a wish comes to: from a template, or from a snapshot.
    async fn wished(
        self: &Arc<Self>,
        accepted: Instant,
        request: &str,
        spec: &SandboxSpec,
    ) -> Result<record::Sandbox> {
        if !spec.snapshot.is_empty() {
            let snapshot = self.world.storage().snapshot(spec.snapshot.clone()).await?;
            return from_snapshot(request, spec, &snapshot);
        }
        let mut template =
            self.catalogue.baked(self.world.storage(), &spec.template, accepted + BAKE_WAIT).await?;
        if !may_use(&spec.workspace, &template) {
            // The copy may be older than its publication.
            template = self.world.storage().template(spec.template.clone()).await?;
        }
        if !may_use(&spec.workspace, &template) {
            return Err(unknown(&spec.template));
        }
        if spec.disk_mib != 0 && spec.disk_mib < template.disk_mib {
            return Err(Error::InvalidArgument(format!(
                "a disk of {} MiB is smaller than the template's {} MiB",
                spec.disk_mib, template.disk_mib
            )));
        }
        let (shape, asked) = (Shape::of(&template, spec.disk_mib), fingerprint(spec));
        // From here on it is called as its users call it, also when the template itself is gone.
        let spec = SandboxSpec { template: template.title, ..spec.clone() };
        Ok(record::Sandbox::new(request, asked, spec, shape, "snapshot"))
    }

    /// Makes a sandbox of a slot; of another one if the first is no good.
    ///
    /// # Errors
    /// Nothing is left.
    pub async fn place(
        self: &Arc<Self>,
        accepted: Instant,
        deadline: Instant,
        claim: &mut Claim<'_>,
        sandbox: &record::Sandbox,
    ) -> Result<SandboxId> {
        let _turn = timeout_at(deadline - LEAST, self.restores.acquire())
            .await
            .map_err(|_| Error::NoCapacity("too many sandboxes are being made at once".into()))?;
        // Only those that are being made are about to take memory: a burst that waits takes none. A fork asked for all.
        let _pending = match sandbox.forked {
            Some(_) => None,
            None => {
                admission::admit(&self.host()?, sandbox.shape.memory_mib, sandbox.spec.disk_mib)?;
                Some(Pending::new(&self.pending_mib, admission::need_mib(sandbox.shape.memory_mib)))
            }
        };
        // A dressed slot is the template as it was baked, and nothing else.
        let plain = sandbox.source.is_empty() && sandbox.spec.volumes.is_empty() && !sandbox.shape.disk_grown;
        let shape = plain.then_some(&sandbox.shape);
        if let Some(shape) = shape {
            self.asked.note(&shape.template);
        }
        let mut last = Error::Timeout("there was no time left".into());
        for attempt in 1..=ATTEMPTS {
            if attempt > 1 && Instant::now() + RESTORE_ANSWER > deadline {
                break;
            }
            let slot = timeout_at(deadline, self.slot(shape))
                .await
                .map_err(|_| Error::NoCapacity("no machine could be started in time".into()))??;
            self.hold_volumes(&slot, &sandbox.spec).await?;
            claim.is_for(&slot.id);
            match self.give(&slot, accepted, sandbox).await {
                Ok(()) => return Ok(slot.id.clone()),
                Err(
                    error @ (Error::NoSpace(_)
                    | Error::NoCapacity(_)
                    | Error::InvalidArgument(_)
                    | Error::NotFound(_)),
                ) => {
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
        sandbox: &record::Sandbox,
    ) -> Result<()> {
        slot.accept(accepted);
        slot.touch(self.now_ms());
        // One that is dressed has a machine id already.
        let (event, machine_id) = match slot.record().machine_id() {
            Some(machine_id) => (Event::TakeDressed, machine_id.to_owned()),
            None => (Event::Take, agent::machine_id()),
        };
        let sandbox = record::Sandbox { machine_id, ..sandbox.clone() };
        let now = self.unix_ms();
        let change = move |record: &mut record::Record| {
            record.purpose = Purpose::Sandbox(Box::new(sandbox));
            record.created_unix_ms = now;
        };
        let with = Happening { change: Some(Box::new(change)), ..Happening::default() };
        match self.happen(slot, event, with).await? {
            State::Running => {
                slot.touch(self.now_ms());
                slot.timed("total_us", accepted);
                Ok(())
            }
            other => Err(Error::Internal(format!("a create ended {other:?}"))),
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
    if !spec.snapshot.is_empty() && !spec.volumes.is_empty() {
        return refuse("a snapshot brings its own volumes");
    }
    volumes::check(&spec.volumes)
}

/// What a wish for a copy of a snapshot comes to.
fn from_snapshot(request: &str, spec: &SandboxSpec, snapshot: &SnapshotInfo) -> Result<record::Sandbox> {
    // Nobody learns of a snapshot that is somebody else's.
    if snapshot.spec.workspace != spec.workspace || snapshot.spec.purpose != Capture::Snapshot {
        return Err(Error::NotFound(format!("snapshot {} not found", spec.snapshot)));
    }
    if !snapshot.unusable.is_empty() {
        return Err(Error::WrongState(format!("the snapshot cannot be used: {}", snapshot.unusable)));
    }
    let asked = fingerprint(spec);
    let spec = SandboxSpec { template: snapshot.spec.template.clone(), disk_mib: 0, ..spec.clone() };
    let shape = Shape::of_snapshot(snapshot);
    Ok(record::Sandbox {
        source: spec.snapshot.clone(),
        clones: snapshot.spec.volumes.clone(),
        ..record::Sandbox::new(request, asked, spec, shape, "snapshot")
    })
}

/// Every request whose answer is still owed or remembered.
#[derive(Debug)]
pub struct Requests<T>(Mutex<HashMap<String, Entry<T>>>);

type Outcome<T> = Option<Result<T>>;

#[derive(Debug)]
struct Entry<T> {
    fingerprint: String,
    until_unix_ms: u64,
    outcome: watch::Receiver<Outcome<T>>,
}

/// Whose turn it is to do a request's work.
enum Turn<T> {
    First(watch::Sender<Outcome<T>>, watch::Receiver<Outcome<T>>),
    Join(watch::Receiver<Outcome<T>>),
}

impl<T> Default for Requests<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl Requests<SandboxId> {
    /// Takes over what is on record.
    pub fn load(&self, sandboxes: &[Arc<Sandbox>], tombstones: &[(String, Tombstone)], now_unix_ms: u64) {
        let valid = |left: &&Tombstone| left.until_unix_ms > now_unix_ms && left.fork.is_none();
        for left in tombstones.iter().map(|(_, left)| left).filter(valid) {
            self.remember(&left.request, left.fingerprint.clone(), left.until_unix_ms, left.id.clone());
        }
        for record in sandboxes.iter().map(|sandbox| sandbox.record()) {
            let named =
                |inner: &&record::Sandbox| inner.born && !inner.request.is_empty() && inner.forked.is_none();
            let Some(inner) = record.sandbox().filter(named) else { continue };
            let until = record.created_unix_ms.saturating_add(REQUEST_KEPT_MS);
            self.remember(&inner.request, inner.asked(), until, record.id.clone());
        }
    }
}

impl<T> Requests<T> {
    fn map(&self) -> MutexGuard<'_, HashMap<String, Entry<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request that was answered by an earlier run of the daemon.
    pub fn remember(&self, request: &str, fingerprint: String, until_unix_ms: u64, answer: T) {
        let (_, outcome) = watch::channel(Some(Ok(answer)));
        self.map().insert(request.to_owned(), Entry { fingerprint, until_unix_ms, outcome });
    }

    fn enter(&self, request: &str, fingerprint: &str) -> Result<Turn<T>> {
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

    /// What a request was answered with.
    pub fn remembered(&self, request: &str) -> Option<T>
    where
        T: Clone,
    {
        let map = self.map();
        let outcome = map.get(request)?.outcome.borrow();
        outcome.as_ref()?.as_ref().ok().cloned()
    }

    /// Forgets a request.
    pub fn leave(&self, request: &str) {
        self.map().remove(request);
    }

    /// Forgets what is older than a day and of whose answer nothing is there any more.
    pub fn purge(&self, now_unix_ms: u64, is_there: impl Fn(&T) -> bool) {
        self.map().retain(|_, entry| match &*entry.outcome.borrow() {
            Some(Ok(answer)) if !is_there(answer) => {
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
pub struct UnderWay<'a>(&'a watch::Sender<usize>);

impl<'a> UnderWay<'a> {
    /// For as long as this lives.
    pub fn new(count: &'a watch::Sender<usize>) -> Self {
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
#[derive(Debug)]
pub struct Pending(Arc<AtomicU64>, u64);

impl Pending {
    /// For as long as this lives.
    pub fn new(sum: &Arc<AtomicU64>, mib: u64) -> Self {
        sum.fetch_add(mib, Ordering::Relaxed);
        Self(Arc::clone(sum), mib)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
