//! One sandbox in memory, and the shell around its state machine.
//!
//! Owns: that exactly one event at a time changes a sandbox, that its record is durable before an effect, that a teardown
//! goes on to its end, and what is told to listeners. Refuses to know: how an effect is done (`effects`), when an event is
//! due (`create`, `bake`, `reap`, `startup`).

use std::{
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use pandastack_bus::{Error, Result, SandboxId};
use tokio::{
    sync::{OwnedMutexGuard, watch},
    task::AbortHandle,
    time::{Instant, timeout},
};

use crate::{
    machine::{Effect, Event, State},
    manager::{self, Manager},
    ports::{Limits, Process, World},
    record::Record,
    wake::Sleep,
};

/// PID 1 tells within this why a process ended.
const OBITUARY: Duration = Duration::from_millis(300);
/// Measurements kept of one creation.
const TIMINGS_KEPT: usize = 32;

/// A sandbox, slot or bake.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// Whoever holds it, and nobody else, changes the sandbox.
    actor: Arc<tokio::sync::Mutex<()>>,
    /// What is true now; changed only by the actor.
    record: watch::Sender<Arc<Record>>,
    /// Milliseconds on the daemon's clock of the last use.
    touched: AtomicU64,
    /// Why the work under way shall end; set once.
    abort: watch::Sender<Option<String>>,
    /// Its process, and the task that waits for the end of it.
    process: Mutex<Option<(Process, AbortHandle)>>,
    /// When the request that it belongs to was accepted.
    accepted: OnceLock<Instant>,
    /// Limits of its unit, as far as this daemon set them.
    limits: Mutex<Option<Limits>>,
    /// What was measured while it was made: name and microseconds.
    timings: Mutex<Vec<(String, u64)>>,
    /// What it has to do with being hibernated.
    pub sleep: Sleep,
}

impl Sandbox {
    /// With what is on record, used `now_ms`.
    pub fn new(record: Record, now_ms: u64) -> Self {
        Self {
            id: record.id.clone(),
            actor: Arc::default(),
            record: watch::Sender::new(Arc::new(record)),
            touched: AtomicU64::new(now_ms),
            abort: watch::Sender::new(None),
            process: Mutex::new(None),
            accepted: OnceLock::new(),
            limits: Mutex::new(None),
            timings: Mutex::new(Vec::new()),
            sleep: Sleep::default(),
        }
    }

    /// What is true now.
    pub fn record(&self) -> Arc<Record> {
        Arc::clone(&self.record.borrow())
    }

    /// Makes known what is true now. Only for whoever has the turn.
    pub fn publish(&self, record: &Record) {
        self.record.send_replace(Arc::new(record.clone()));
    }

    /// Completes when it is in a state that `holds`; it may be in another one by then.
    pub async fn until(&self, holds: impl Fn(State) -> bool) {
        // Its sender is `self`: it cannot be gone.
        let _ = self.record.subscribe().wait_for(|record| holds(record.state)).await;
    }

    /// It was used at this time of the daemon's clock.
    pub fn touch(&self, now_ms: u64) {
        self.touched.fetch_max(now_ms, Ordering::Relaxed);
    }

    /// Seconds since it was used.
    pub fn idle_seconds(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.touched.load(Ordering::Relaxed)) / 1000
    }

    /// Whether something is being done to it right now.
    pub fn is_busy(&self) -> bool {
        self.actor.try_lock().is_err()
    }

    /// The right to change it; nothing else happens to it meanwhile.
    pub async fn turn(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.actor).lock_owned().await
    }

    /// Completes when nothing is being done to it.
    pub async fn settled(&self) {
        drop(self.actor.lock().await);
    }

    /// Takes back every [`Sandbox::abort`]: what they were about is over.
    fn forget_aborts(&self) {
        self.abort.send_replace(None);
    }

    /// Asks the work under way to end after its present effect.
    pub fn abort(&self, reason: &str) {
        self.abort.send_if_modified(|set| {
            let first = set.is_none();
            set.get_or_insert_with(|| reason.to_owned());
            first
        });
    }

    /// Completes with the reason once [`Sandbox::abort`] was called.
    pub async fn aborted(&self) -> String {
        let mut wish = self.abort.subscribe();
        let reason = wish.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Keeps a process and the task that watches it; the watch over the one before ends.
    pub fn set_process(&self, process: Option<(Process, AbortHandle)>) {
        let mut slot = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, before)) = std::mem::replace(&mut *slot, process) {
            before.abort();
        }
    }

    /// Its process, while it is watched.
    pub fn process(&self) -> Option<Process> {
        let slot = self.process.lock().unwrap_or_else(PoisonError::into_inner);
        slot.as_ref().map(|(process, _)| Arc::clone(process))
    }

    /// Whether this process is the one that is watched.
    pub fn has_process(&self, process: &Process) -> bool {
        self.process().is_some_and(|own| Arc::ptr_eq(&own, process))
    }

    /// The request that it belongs to was accepted then. Only the first one counts.
    pub fn accept(&self, at: Instant) {
        let _ = self.accepted.set(at);
    }

    /// When the request that it belongs to was accepted; `None` for one that another run of the daemon made.
    pub fn accepted(&self) -> Option<Instant> {
        self.accepted.get().copied()
    }

    /// Limits of its unit; `None` while unknown.
    pub fn limits(&self) -> Option<Limits> {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the limits of its unit.
    pub fn set_limits(&self, limits: Option<Limits>) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = limits;
    }

    /// Notes how long something took.
    pub fn timed(&self, what: &str, since: Instant) {
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut timings = self.timings.lock().unwrap_or_else(PoisonError::into_inner);
        if timings.len() < TIMINGS_KEPT {
            timings.push((what.to_owned(), micros));
        }
    }

    /// Forgets measurements of this kind, because they are taken again.
    pub fn forget_timings(&self, prefix: &str) {
        let mut timings = self.timings.lock().unwrap_or_else(PoisonError::into_inner);
        timings.retain(|(name, _)| !name.starts_with(prefix));
    }

    /// What was measured while it was made.
    pub fn timings(&self) -> Vec<(String, u64)> {
        self.timings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What an event brings along.
#[derive(Default)]
pub struct Happening {
    /// One sentence for the events of the sandbox.
    pub detail: String,
    /// Changes the record before the step is taken: its purpose, a name.
    pub change: Option<Change>,
    /// Whether it shall still happen, asked when nothing else can change the sandbox any more.
    pub guard: Option<Guard>,
    /// A failure that may pass is a setback.
    pub patient: bool,
}

/// A last look at a record.
pub type Guard = Box<dyn FnOnce(&Record) -> bool + Send>;

/// A change of a record.
pub type Change = Box<dyn FnOnce(&mut Record) + Send>;

impl std::fmt::Debug for Happening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Happening").field("detail", &self.detail).finish_non_exhaustive()
    }
}

impl Happening {
    /// Only a sentence.
    pub fn because(detail: impl Into<String>) -> Self {
        Self { detail: detail.into(), ..Self::default() }
    }
}

impl<W: World> Manager<W> {
    /// Lets an event happen to a sandbox and does everything that follows from it, to the end.
    ///
    /// Runs in a task of its own: a caller that goes away changes nothing.
    ///
    /// # Errors
    /// [`Error::WrongState`] when the event has no business in this state or its guard says no (nothing was done); otherwise the first failure,
    /// after everything that can be undone was undone.
    pub fn happen(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        event: Event,
        with: Happening,
    ) -> impl Future<Output = Result<State>> + Send + use<W> {
        let (manager, target) = (Arc::clone(self), Arc::clone(sandbox));
        let task = tokio::spawn(async move { manager.run(&target, event, with).await });
        let ended = |error| Err(Error::Internal(format!("a task ended early: {error}")));
        async move { task.await.unwrap_or_else(ended) }
    }

    async fn run(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        event: Event,
        mut with: Happening,
    ) -> Result<State> {
        let _turn = sandbox.actor.lock().await;
        let mut record = Record::clone(&sandbox.record());
        if with.guard.take().is_some_and(|guard| !guard(&record)) {
            return Err(Error::WrongState("that is not so any more".into()));
        }
        let mut event = event;
        let mut failure = None;
        loop {
            let Some((state, effects)) = record.state.on(event) else {
                if let Some(error) = failure {
                    return Err(error);
                }
                return Err(Error::WrongState(format!("not while it is {:?}", record.state)));
            };
            if effects.is_empty() && state == record.state {
                break;
            }
            if let Some(change) = with.change.take() {
                change(&mut record);
            }
            self.note(&mut record, state, event, &with.detail);
            record.state = state;
            if state == State::Hibernated {
                // What was wrong with its last machine says nothing about the next one.
                sandbox.forget_aborts();
            }
            sandbox.publish(&record);
            let outcome = self.effects(sandbox, &mut record, effects).await;
            sandbox.publish(&record);
            match outcome {
                Ok(()) if state.is_working(event) && !effects.is_empty() => {
                    event = Event::Done;
                    with.detail.clear();
                }
                Ok(()) => break,
                Err(error) => {
                    tracing::warn!(sandbox = %sandbox.id, state = ?state, "{}: {}", sandbox.id, error.message());
                    with.detail = error.message();
                    match state {
                        State::Waking => sandbox.sleep.not_woken(&error),
                        State::Hibernated => sandbox.sleep.set_untidy(true),
                        _ => {}
                    }
                    // A machine that ended by itself, or that somebody wants gone, does not come back by waiting.
                    let passes = with.patient && may_pass(&error) && sandbox.abort.borrow().is_none();
                    failure.get_or_insert(error);
                    event = match event {
                        Event::Fault | Event::Setback => break,
                        Event::Boot if passes => Event::Setback,
                        _ => Event::Fault,
                    };
                }
            }
        }
        if record.state == State::Gone {
            self.remove(&sandbox.id);
        }
        failure.map_or(Ok(record.state), Err)
    }

    /// Does effects in order. The first failure ends it, except in a teardown, which goes on with what may still be done.
    async fn effects(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        record: &mut Record,
        effects: &[Effect],
    ) -> Result<()> {
        let mut failures: Vec<Error> = Vec::new();
        let mut stopped = true;
        for effect in effects {
            if record.state.is_abortable()
                && let Some(reason) = sandbox.abort.borrow().clone()
            {
                return Err(Error::WrongState(reason));
            }
            let forbidden = match effect {
                Effect::Release | Effect::DropVolumes => !stopped,
                Effect::Forget => !failures.is_empty(),
                _ => false,
            };
            if forbidden {
                continue;
            }
            let start = Instant::now();
            let outcome = self.perform(sandbox, record, *effect).await;
            match record.state {
                State::Preparing | State::Dressing | State::Creating | State::Running => {
                    sandbox.timed(effect_name(*effect), start);
                }
                State::Waking => sandbox.timed(&format!("wake_{}", effect_name(*effect)), start),
                _ => {}
            }
            tracing::debug!(sandbox = %sandbox.id, effect = ?effect, micros = start.elapsed().as_micros() as u64, "did");
            match outcome {
                Ok(()) => {}
                Err(error @ Error::NoSpace(_)) if effect.is_dispensable(record.state) => {
                    tracing::error!(sandbox = %sandbox.id, "goes on without its record: {}", error.message());
                }
                Err(error) if effect.is_teardown() && !record.state.is_abortable() => {
                    tracing::error!(sandbox = %sandbox.id, effect = ?effect, "{}", error.message());
                    stopped &= *effect != Effect::StopUnit;
                    failures.push(error);
                }
                Err(Error::GuestUnreachable(text)) => {
                    // A guest is often silent because its machine is gone; that says more.
                    let slot = sandbox.sleep.slot();
                    let gone = timeout(OBITUARY, slot.as_ref().unwrap_or(sandbox).aborted()).await;
                    let why = gone.map_or(text.clone(), |reason| format!("{reason} ({text})"));
                    return Err(Error::GuestUnreachable(why));
                }
                Err(error) => return Err(error),
            }
        }
        match failures.len() {
            0 => Ok(()),
            1 => Err(failures.remove(0)),
            _ => {
                let all: Vec<_> = failures.iter().map(Error::message).collect();
                Err(Error::Internal(all.join("; ")))
            }
        }
    }

    /// Writes down what an event means.
    fn note(&self, record: &mut Record, state: State, event: Event, detail: &str) {
        record.generation += 1;
        let now = self.unix_ms();
        let kind = match (state, event) {
            (State::Hibernated, Event::Fault) if record.state == State::Waking => "wake.failed",
            (_, Event::Fault) if matches!(record.state, State::Hibernating { .. }) => "hibernate.failed",
            // `Commit` has noted it.
            (State::Running, Event::Done)
                if matches!(record.state, State::Creating | State::Waking | State::Resuming) =>
            {
                return;
            }
            (State::Creating, _) => "sandbox.creating",
            (State::Running, Event::Done) => "sandbox.running",
            (State::Running, Event::Adopt) => "sandbox.adopted",
            (State::Recovering, Event::Setback) => "recover.setback",
            (State::Recovering, Event::Boot) => "recover.cold_boot",
            (State::Recovering, _) => "recover.waiting",
            (State::Failed, Event::Died) => "vm.died",
            (State::Failed, Event::Lost { .. }) => "vm.lost",
            (State::Failed, Event::Fault) => "sandbox.failed",
            (State::Stopping, _) => "sandbox.stopping",
            _ => return,
        };
        match (state, event) {
            (State::Failed, Event::Died | Event::Lost { .. } | Event::Fault)
                if record.state != State::Failed =>
            {
                record.reason = detail.chars().take(500).collect();
            }
            (State::Running | State::Recovering, _) => record.reason.clear(),
            _ => {}
        }
        if record.state == state && !matches!(event, Event::Lost { .. } | Event::Boot | Event::Setback) {
            return;
        }
        record.note(now, kind, detail);
        if record.sandbox().is_some() {
            tracing::info!(sandbox = %record.id, "{} {kind}{}{detail}", record.id, if detail.is_empty() { "" } else { ": " });
        }
    }

    /// Tells listeners what a sandbox is now.
    pub fn announce(&self, record: &Record) {
        let Some(sandbox) = record.sandbox() else { return };
        // A listener that ended takes the daemon with it; nothing to report here.
        let _ = self.changes.send(manager::Change {
            id: record.id.to_string(),
            workspace: sandbox.spec.workspace.clone(),
            state: record.public_state().map_or("", pandastack_bus::vmm::State::as_str),
            generation: record.generation,
        });
    }
}

/// Whether waiting may help.
pub fn may_pass(error: &Error) -> bool {
    matches!(
        error,
        Error::Bus(_)
            | Error::Timeout(_)
            | Error::NotReady(_)
            | Error::NoCapacity(_)
            | Error::GuestUnreachable(_)
    )
}

fn effect_name(effect: Effect) -> &'static str {
    match effect {
        Effect::Save => "save_us",
        Effect::Furnish => "furnish_us",
        Effect::FurnishPristine => "fill_us",
        Effect::Load => "load_us",
        Effect::Unpause => "resume_us",
        Effect::Freshen => "hello_and_freshen_us",
        Effect::Identify => "hello_and_identity_us",
        Effect::GrowDisk => "grow_us",
        Effect::Announce => "announce_us",
        Effect::Prepare => "prepare_us",
        Effect::LimitExpected => "limit_expected_us",
        Effect::StartUnit => "start_unit_us",
        Effect::Attach => "attach_us",
        Effect::AwaitApi => "await_api_us",
        Effect::Mount => "mount_us",
        Effect::Borrow => "borrow_us",
        Effect::FurnishImage => "limits_and_fill_us",
        Effect::Commit => "save_us",
        _ => "other_us",
    }
}
