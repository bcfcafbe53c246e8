//! Conversations with the agents in the guests.
//!
//! Owns: a few greeted connections per sandbox, their renewal, sessions that outlive a connection.
//! Refuses to know: HTTP, who may do what. Everything a guest says is bounded in size and time by the protocol's client.
//!
//! ```text
//!   vmm.open_agent ──► greet ──► idle ──► one activity ──► idle
//!   (wakes it)                     └── EOF, error, old age ──► dropped, the next one is opened on demand
//! ```
//!
//! A request wakes a hibernated sandbox; what goes on by itself (a command that is followed, the kill of an abandoned
//! one) does not. While a sandbox stands still no connection of before is used.

mod error;
mod followers;
mod log;
mod session;
mod stdin;
mod still;
mod stream;

pub use error::GuestError;
use followers::Followers;
pub use log::LogReader;
pub use session::Session;
pub use stdin::Stdin;
pub use still::Still;
use stream::Line;
pub use stream::{AgentStream, Pulse};

use std::{
    collections::HashMap,
    os::unix::net::UnixStream as StdUnixStream,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use pandastack_bus::{
    Error as BusError,
    vmm::{State, VmmProxy},
};
use pandastack_protocol::{Client, ClientError, Entry, Request};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::bus::again;

/// Idle connections kept per sandbox.
const IDLE_PER_SANDBOX: usize = 4;
/// Idle connections kept in all.
const IDLE_TOTAL: usize = 2048;
const IDLE_FOR: Duration = Duration::from_secs(300);
const GREETING: Duration = Duration::from_secs(5);
/// How long the agent may take to answer a request.
pub const ANSWER: Duration = Duration::from_secs(20);
/// How long it may take for the next part of a file.
pub const PART: Duration = Duration::from_secs(60);
/// How often a first step is tried: a capture resets every connection.
const ATTEMPTS: usize = 3;

/// A connection that is ready for a request.
#[derive(Debug)]
pub struct Greeted {
    /// The conversation.
    pub client: Client<AgentStream>,
    /// The look at its stream.
    pub pulse: Pulse,
    since: Instant,
    fresh: bool,
}

/// The connections of all sandboxes.
#[derive(Debug)]
pub struct Guests {
    vmm: VmmProxy<'static>,
    idle: Mutex<HashMap<String, Vec<Greeted>>>,
    /// Every stream that is open, idle or not.
    open: Mutex<HashMap<String, Vec<Line>>>,
    /// Which of them stand still.
    pub still: Still,
    followers: Arc<Followers>,
}

/// Whether a hibernated sandbox is woken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wake {
    /// Somebody asked for something that needs the guest.
    Yes,
    /// It goes on by itself, and waits or ends where the guest sleeps.
    No,
}

impl Guests {
    /// No connections yet.
    pub fn new(vmm: VmmProxy<'static>) -> Arc<Self> {
        Arc::new(Self {
            vmm,
            idle: Mutex::default(),
            open: Mutex::default(),
            still: Still::default(),
            followers: Arc::default(),
        })
    }

    /// An idle connection, or a new one.
    pub async fn connect(&self, sandbox: &str, wake: Wake) -> Result<Greeted, GuestError> {
        match self.take(sandbox) {
            Some(greeted) => Ok(greeted),
            None => self.open(sandbox, wake).await,
        }
    }

    /// A new connection in the place of all idle ones, one of which turned out to be cut.
    pub async fn renew(&self, sandbox: &str) -> Result<Greeted, GuestError> {
        self.forget(sandbox);
        self.open(sandbox, Wake::Yes).await
    }

    /// A new connection.
    pub async fn open(&self, sandbox: &str, wake: Wake) -> Result<Greeted, GuestError> {
        let stood_still = self.still.is(sandbox);
        let mut again = true;
        loop {
            let error = match self.greeted(sandbox, wake).await {
                Ok(greeted) => {
                    // Only what was known before: what is heard meanwhile is newer.
                    if stood_still {
                        self.still.seen(sandbox, false);
                    }
                    return Ok(greeted);
                }
                Err(GuestError::Bus(error)) if !matches!(error, BusError::NotFound(_)) => error,
                Err(error) => return Err(error),
            };
            // Why it could not be had: a look at the state, as rarely as such errors are.
            let state = self.look(sandbox).await;
            let moved_on = match state {
                Ok(State::Running) => true,
                Ok(State::Hibernated) => wake == Wake::Yes,
                _ => false,
            };
            if moved_on && matches!(error, BusError::WrongState(_)) && std::mem::take(&mut again) {
                continue;
            }
            return Err(match state {
                Ok(State::Paused) => GuestError::Paused,
                Ok(State::Hibernated) => GuestError::Asleep(error),
                _ => GuestError::Bus(error),
            });
        }
    }

    /// What state a sandbox is in; whether it stands still is remembered.
    pub async fn look(&self, sandbox: &str) -> pandastack_bus::Result<State> {
        let state = again(|| self.vmm.get(sandbox.to_owned())).await?.state;
        self.changed(sandbox, state.as_str());
        Ok(state)
    }

    /// A sandbox is in this state now.
    pub fn changed(&self, sandbox: &str, state: &str) {
        let still = matches!(state, "paused" | "hibernated");
        self.still.seen(sandbox, still);
        if still {
            // They would take requests, and answer none.
            self.drop_idle(sandbox);
        }
    }

    /// Whether a guest that could not be reached does not run now and will again: it stands still, or is on its way there or
    /// back.
    async fn waits(&self, sandbox: &str, error: &GuestError) -> bool {
        match error {
            GuestError::Paused | GuestError::Asleep(_) => true,
            GuestError::Bus(BusError::WrongState(_)) => {
                !matches!(self.look(sandbox).await, Ok(State::Failed | State::Stopping))
            }
            _ => false,
        }
    }

    async fn greeted(&self, sandbox: &str, wake: Wake) -> Result<Greeted, GuestError> {
        let mut last = String::new();
        // A connection can be accepted and reset right after a restore: greet again.
        for _ in 0..ATTEMPTS {
            let fd = again(|| self.vmm.open_agent(sandbox.to_owned(), wake == Wake::Yes))
                .await
                .map_err(GuestError::Bus)?;
            let stream = StdUnixStream::from(std::os::fd::OwnedFd::from(fd));
            let stream = stream
                .set_nonblocking(true)
                .and_then(|()| UnixStream::from_std(stream))
                .map_err(|error| GuestError::Bus(BusError::Internal(error.to_string())))?;
            let (stream, pulse) = AgentStream::new(stream);
            self.opened(sandbox, pulse.line());
            let mut nonce = [0u8; 8];
            getrandom::fill(&mut nonce).expect("the kernel's random generator answers");
            match Client::greet(stream, u64::from_le_bytes(nonce), GREETING).await {
                Ok(client) => return Ok(Greeted { client, pulse, since: Instant::now(), fresh: true }),
                Err(ClientError::Guest(failure)) => return Err(GuestError::Refused(failure)),
                Err(error) => last = error.to_string(),
            }
        }
        tracing::warn!(sandbox, error = %last, "the agent does not answer the greeting");
        Err(GuestError::Bus(BusError::GuestUnreachable("the guest does not answer".into())))
    }

    /// Gives an idle connection back.
    pub fn put(&self, sandbox: &str, client: Client<AgentStream>, pulse: Pulse) {
        if !pulse.looks_alive() || self.still.is(sandbox) {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = idle.values().map(Vec::len).sum();
        let of_sandbox = idle.entry(sandbox.to_owned()).or_default();
        if of_sandbox.len() < IDLE_PER_SANDBOX && total < IDLE_TOTAL {
            of_sandbox.push(Greeted { client, pulse, since: Instant::now(), fresh: false });
        }
    }

    /// Opens a connection ahead of the first request.
    pub fn warm(self: &Arc<Self>, sandbox: &str) {
        let (this, sandbox) = (Arc::clone(self), sandbox.to_owned());
        tokio::spawn(async move {
            if let Ok(greeted) = this.open(&sandbox, Wake::No).await {
                this.put(&sandbox, greeted.client, greeted.pulse);
            }
        });
    }

    /// A capture cut every stream into this guest. Whoever waits on one learns of it now, and not when its patience ends.
    pub fn cut(&self, sandbox: &str) {
        self.drop_idle(sandbox);
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(sandbox);
        open.into_iter().flatten().for_each(|line| line.cut());
    }

    fn opened(&self, sandbox: &str, line: Line) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let of_sandbox = open.entry(sandbox.to_owned()).or_default();
        of_sandbox.retain(Line::is_open);
        of_sandbox.push(line);
    }

    /// The sandbox is gone.
    pub fn forget(&self, sandbox: &str) {
        self.drop_idle(sandbox);
        self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(sandbox);
        self.still.forget(sandbox);
    }

    fn drop_idle(&self, sandbox: &str) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).remove(sandbox);
    }

    /// Drops what was idle for long or is broken.
    pub fn sweep(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, idle| {
            idle.retain(|greeted| greeted.since.elapsed() < IDLE_FOR && greeted.pulse.looks_alive());
            !idle.is_empty()
        });
        self.open.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, open| {
            open.retain(Line::is_open);
            !open.is_empty()
        });
    }

    /// A request whose answer is one message. The second value: an earlier attempt was lost and may have had its effect.
    pub async fn call<T: DeserializeOwned>(
        &self,
        sandbox: &str,
        request: &Request,
        wake: Wake,
    ) -> Result<(T, bool), (GuestError, bool)> {
        let (mut lost, mut fresh) = (false, 0);
        loop {
            let mut greeted = self.connect(sandbox, wake).await.map_err(|error| (error, lost))?;
            fresh += usize::from(greeted.fresh);
            match greeted.client.call(request, ANSWER).await {
                Ok(answer) => {
                    self.put(sandbox, greeted.client, greeted.pulse);
                    return Ok((answer, lost));
                }
                Err(ClientError::Guest(failure)) => {
                    self.put(sandbox, greeted.client, greeted.pulse);
                    return Err((GuestError::Refused(failure), lost));
                }
                Err(ClientError::Lost(_)) if fresh < ATTEMPTS => lost = true,
                Err(error) => return Err((GuestError::Lost(error.to_string()), true)),
            }
        }
    }

    /// Opens a file for reading, on a connection that stays with the caller.
    pub async fn read_file(&self, sandbox: &str, path: &str) -> Result<(Greeted, Entry), GuestError> {
        let mut fresh = 0;
        loop {
            let mut greeted = self.connect(sandbox, Wake::Yes).await?;
            fresh += usize::from(greeted.fresh);
            let step = greeted.client.read_file(path, ANSWER).await;
            if let Some(begun) = self.begun(sandbox, greeted, step, fresh) {
                return begun;
            }
        }
    }

    /// Announces a file, on a connection that stays with the caller.
    pub async fn write_file(
        &self,
        sandbox: &str,
        path: &str,
        size: u64,
        mode: u32,
    ) -> Result<(Greeted, ()), GuestError> {
        let mut fresh = 0;
        loop {
            let mut greeted = self.connect(sandbox, Wake::Yes).await?;
            fresh += usize::from(greeted.fresh);
            let step = greeted.client.write_file(path, size, mode, ANSWER).await;
            if let Some(begun) = self.begun(sandbox, greeted, step, fresh) {
                return begun;
            }
        }
    }

    /// Starts a listing, on a connection that stays with the caller; answers its first part.
    pub async fn list(&self, sandbox: &str, path: &str) -> Result<(Greeted, Option<Vec<Entry>>), GuestError> {
        let mut fresh = 0;
        loop {
            let mut greeted = self.connect(sandbox, Wake::Yes).await?;
            fresh += usize::from(greeted.fresh);
            let step = match greeted.client.list(path, ANSWER).await {
                Ok(()) => greeted.client.next_entries(PART).await,
                Err(error) => Err(error),
            };
            if let Some(begun) = self.begun(sandbox, greeted, step, fresh) {
                return begun;
            }
        }
    }

    /// What became of a first step; `None` when its connection broke and nothing was transferred: once more.
    fn begun<T>(
        &self,
        sandbox: &str,
        greeted: Greeted,
        step: Result<T, ClientError>,
        fresh: usize,
    ) -> Option<Result<(Greeted, T), GuestError>> {
        match step {
            Ok(answer) => Some(Ok((greeted, answer))),
            Err(ClientError::Guest(failure)) => {
                self.put(sandbox, greeted.client, greeted.pulse);
                Some(Err(GuestError::Refused(failure)))
            }
            Err(ClientError::Lost(_)) if fresh < ATTEMPTS => None,
            Err(error) => Some(Err(GuestError::Lost(error.to_string()))),
        }
    }

    fn take(&self, sandbox: &str) -> Option<Greeted> {
        if self.still.is(sandbox) {
            return None;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let of_sandbox = idle.get_mut(sandbox)?;
        while let Some(greeted) = of_sandbox.pop() {
            if greeted.pulse.looks_alive() {
                return Some(greeted);
            }
        }
        None
    }
}
