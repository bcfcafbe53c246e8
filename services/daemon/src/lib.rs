//! What every daemon's `main` has in common.
//!
//! Owns: the journal, the runtime, the bus connection, readiness, reloads, the watchdog, the end; atomic files
//! ([`files`]), records that survive a power cut ([`records`]), quotas of workspaces ([`quotas`]),
//! calls that wait for a restart ([`retry`]).
//! Refuses to know: what any daemon is for.
//!
//! ```text
//!   start ──► journal ──► bus ──► body(Context) ──► ready() ──► … stopped() ──► body returns ──► exit 0
//!                                     └── Err, bus lost ──► logged once with its chain ──► exit 1 (PID 1 restarts)
//! ```

mod log;
mod notify;

pub mod files;
pub mod quotas;
pub mod records;
pub mod retry;

use std::{
    error::Error,
    future::Future,
    io,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use pandastack_bus::zbus;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};

/// Largest credential that is read, bytes: what systemd passes to one service at most.
const CREDENTIAL_LIMIT: u64 = 1024 * 1024;

/// How long blocking work may go on after the body has returned.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What [`run`] hands to a daemon's body. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Context {
    /// The system bus. The body registers its object first and requests its name last.
    pub bus: zbus::Connection,
    state: Arc<Path>,
    is_ready: Arc<AtomicBool>,
    reloads: watch::Receiver<u64>,
    stop: watch::Receiver<bool>,
}

/// Runs a daemon: journal, tokio runtime, system bus, signals, then `body` until it returns.
///
/// SIGTERM and SIGINT complete [`Context::stopped`]; the body is expected to return then. SIGHUP counts up
/// [`Context::reloads`]. An error of the body is logged once with its chain, and the exit code is 1.
pub fn run<F, Fut, E>(name: &'static str, body: F) -> ExitCode
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Error + Send + Sync + 'static,
{
    log::init(name);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name(name)
        .build()
        .map_err(StartError::Runtime)
        .map_err(boxed)
        .and_then(|runtime| {
            let outcome = runtime.block_on(start(body));
            // Blocking work may not hold up the end: whatever it was doing has to survive a power cut anyway.
            runtime.shutdown_timeout(LAST_WORDS);
            outcome
        });
    match outcome {
        Ok(()) => {
            tracing::info!("stopped");
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("{}", chain(error.as_ref()));
            notify::status(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

impl Context {
    /// The daemon's own directory for state that survives reboots (the first of `$STATE_DIRECTORY`).
    pub fn state_dir(&self) -> &Path {
        &self.state
    }

    /// The credential `name` from `$CREDENTIALS_DIRECTORY`; `None` when it was not given.
    ///
    /// # Errors
    /// It cannot be read, is larger than 1 MiB, or `name` is not a plain file name.
    pub fn credential(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not the name of a credential"));
        }
        let Some(directory) = std::env::var_os("CREDENTIALS_DIRECTORY") else { return Ok(None) };
        files::read_limited(&Path::new(&directory).join(name), CREDENTIAL_LIMIT)
    }

    /// Says `READY=1`: the bus name is ours and state is reconciled. `status` is one line for `systemctl status`.
    pub fn ready(&self, status: &str) {
        self.is_ready.store(true, Ordering::SeqCst);
        tracing::info!("ready: {status}");
        notify::ready(status);
    }

    /// Sets the line that `systemctl status` shows.
    pub fn status(&self, text: &str) {
        notify::status(text);
    }

    /// Counts the SIGHUPs (`systemctl reload`) since the start.
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.reloads.clone()
    }

    /// Completes when the daemon has been asked to stop (SIGTERM or SIGINT); at once if that was earlier.
    pub async fn stopped(&self) {
        let mut stop = self.stop.clone();
        // The sender lives as long as the runtime, so an error means that everything ends anyway.
        let _ = stop.wait_for(|stopped| *stopped).await;
    }

    /// Starts to pet the watchdog at half of `$WATCHDOG_USEC`, each time only after `ping` returned and the bus
    /// answered. Without a watchdog in the unit nothing is started.
    ///
    /// `ping` travels through the part that does the work (an actor's mailbox, a lock), so that a stuck daemon is
    /// restarted.
    pub fn watchdog<P, Fut>(&self, ping: P)
    where
        P: Fn() -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send,
    {
        let Some(limit) = sd_notify::watchdog_enabled() else { return };
        let bus = self.bus.clone();
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(limit / 2);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                ping().await;
                match bus_answers(&bus).await {
                    Ok(()) => notify::alive(),
                    // Not petted: without a bus nobody reaches this daemon, and PID 1 starts a new one.
                    Err(error) => tracing::error!("the bus does not answer: {error}"),
                }
            }
        });
    }
}

/// Why a daemon did not come as far as its body, or was ended in it.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("no runtime")]
    Runtime(#[source] io::Error),
    #[error("$STATE_DIRECTORY is not set; this program is started by its unit")]
    NoStateDirectory,
    #[error("signals cannot be handled")]
    Signals(#[source] io::Error),
    #[error("the system bus cannot be reached")]
    Bus(#[source] zbus::Error),
    #[error("the connection to the system bus was lost")]
    BusLost,
}

type Failure = Box<dyn Error + Send + Sync>;

async fn start<F, Fut, E>(body: F) -> Result<(), Failure>
where
    F: FnOnce(Context) -> Fut,
    Fut: Future<Output = Result<(), E>>,
    E: Error + Send + Sync + 'static,
{
    let state = state_directory().ok_or(StartError::NoStateDirectory)?;
    let (reload, reloads) = watch::channel(0);
    let (halt, stop) = watch::channel(false);
    let is_ready = Arc::new(AtomicBool::new(false));
    let signals = Signals::new().map_err(StartError::Signals)?;
    tokio::spawn(signals.serve(reload, halt, Arc::clone(&is_ready)));
    let bus = pandastack_bus::system().await.map_err(StartError::Bus)?;
    let lost = bus.clone();
    tokio::select! {
        outcome = body(Context { bus, state: state.into(), is_ready, reloads, stop }) => outcome.map_err(boxed),
        // A connection that was lost never comes back, and nobody reaches this daemon without one. What was under way
        // is as after a kill.
        () = lost.closed() => Err(boxed(StartError::BusLost)),
    }
}

struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn serve(
        mut self,
        reload: watch::Sender<u64>,
        halt: watch::Sender<bool>,
        is_ready: Arc<AtomicBool>,
    ) {
        loop {
            tokio::select! {
                Some(()) = self.hangup.recv() => {
                    // Before the first READY=1 a reload must not claim that the daemon is ready.
                    let announce = is_ready.load(Ordering::SeqCst);
                    if announce { notify::reloading(); }
                    reload.send_modify(|count| *count += 1);
                    tracing::info!("reloading");
                    if announce { notify::reloaded(); }
                }
                Some(()) = self.terminate.recv() => stop(&halt),
                Some(()) = self.interrupt.recv() => stop(&halt),
                else => return,
            }
        }
    }
}

fn stop(halt: &watch::Sender<bool>) {
    notify::stopping();
    halt.send_replace(true);
}

async fn bus_answers(bus: &zbus::Connection) -> zbus::Result<()> {
    let name = "org.freedesktop.DBus";
    bus.call_method(Some(name), "/org/freedesktop/DBus", Some(name), "GetId", &()).await.map(drop)
}

fn state_directory() -> Option<PathBuf> {
    let all = std::env::var_os("STATE_DIRECTORY")?;
    let first = all.to_str()?.split(':').next()?;
    (!first.is_empty()).then(|| PathBuf::from(first))
}

fn boxed<E: Error + Send + Sync + 'static>(error: E) -> Failure {
    Box::new(error)
}

/// The sentence of an error followed by those of its causes.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
