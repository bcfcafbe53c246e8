//! Conversations with the agents in the guests.
//!
//! Owns: a few greeted connections per sandbox, their renewal, sessions that outlive a connection.
//! Refuses to know: HTTP, who may do what. Everything a guest says is bounded in size and time by the protocol's client.
//!
//! ```text
//!   vmm.open_agent ──► greet ──► idle ──► one activity ──► idle
//!                                  └── EOF, error, old age ──► dropped, the next one is opened on demand
//! ```

mod session;
mod stream;

pub use session::Session;
pub use stream::{AgentStream, Pulse};

use std::{
    collections::HashMap,
    os::unix::net::UnixStream as StdUnixStream,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use pandastack_bus::vmm::VmmProxy;
use pandastack_protocol::{Client, ClientError, Entry, Failure, Request};
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::{
    bus::again,
    problem::{Effect, Problem},
};

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

/// Why the guest did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GuestError {
    /// It said no. Nothing of the request remains.
    #[error(transparent)]
    Refused(Failure),
    /// No connection could be had. Nothing was asked.
    #[error("{0:?}")]
    Bus(pandastack_bus::Error),
    /// It was asked and did not answer, or not in our language. Whether it did something is unknown.
    #[error("the guest does not answer: {0}")]
    Lost(String),
}

impl GuestError {
    /// For a request that only reads.
    pub fn reading(self, sandbox: &str) -> Problem {
        match self {
            Self::Refused(failure) => Problem::from_file_failure(&failure),
            Self::Bus(error) => Problem::about(sandbox, &error, Effect::None),
            Self::Lost(_) => Problem::unavailable("guest_unreachable", "the guest does not answer"),
        }
    }

    /// For a request that changes something.
    pub fn changing(self, sandbox: &str) -> Problem {
        match self {
            Self::Lost(_) => Problem::gave_up(
                "guest_unreachable",
                "the guest does not answer; whether the request had an effect is unknown",
            ),
            other => other.reading(sandbox),
        }
    }

    /// For the start of a command.
    pub fn starting(self, sandbox: &str) -> Problem {
        match self {
            Self::Refused(failure) => Problem::from_start_failure(&failure),
            Self::Bus(error) => match Problem::about(sandbox, &error, Effect::None) {
                problem if problem.status == http::StatusCode::GATEWAY_TIMEOUT => {
                    Problem::unavailable("guest_unreachable", "the guest is not reachable")
                }
                problem => problem,
            },
            Self::Lost(_) => Problem::gave_up(
                "guest_unreachable",
                "the guest does not answer; whether the command was started is unknown",
            ),
        }
    }
}

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
}

impl Guests {
    /// No connections yet.
    pub fn new(vmm: VmmProxy<'static>) -> Arc<Self> {
        Arc::new(Self { vmm, idle: Mutex::default() })
    }

    /// An idle connection, or a new one.
    pub async fn connect(&self, sandbox: &str) -> Result<Greeted, GuestError> {
        match self.take(sandbox) {
            Some(greeted) => Ok(greeted),
            None => self.open(sandbox).await,
        }
    }

    /// A new connection.
    pub async fn open(&self, sandbox: &str) -> Result<Greeted, GuestError> {
        let mut last = String::new();
        // A connection can be accepted and reset right after a restore: greet again.
        for _ in 0..3 {
            let fd = again(|| self.vmm.open_agent(sandbox.to_owned())).await.map_err(GuestError::Bus)?;
            let stream = StdUnixStream::from(std::os::fd::OwnedFd::from(fd));
            let stream = stream
                .set_nonblocking(true)
                .and_then(|()| UnixStream::from_std(stream))
                .map_err(|error| GuestError::Bus(pandastack_bus::Error::Internal(error.to_string())))?;
            let (stream, pulse) = AgentStream::new(stream);
            let mut nonce = [0u8; 8];
            getrandom::fill(&mut nonce).expect("the kernel's random generator answers");
            match Client::greet(stream, u64::from_le_bytes(nonce), GREETING).await {
                Ok(client) => return Ok(Greeted { client, pulse, since: Instant::now(), fresh: true }),
                Err(ClientError::Guest(failure)) => return Err(GuestError::Refused(failure)),
                Err(error) => last = error.to_string(),
            }
        }
        tracing::warn!(sandbox, error = %last, "the agent does not answer the greeting");
        Err(GuestError::Bus(pandastack_bus::Error::GuestUnreachable("the guest does not answer".into())))
    }

    /// Gives an idle connection back.
    pub fn put(&self, sandbox: &str, client: Client<AgentStream>, pulse: Pulse) {
        if !pulse.looks_alive() {
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
            if let Ok(greeted) = this.open(&sandbox).await {
                this.put(&sandbox, greeted.client, greeted.pulse);
            }
        });
    }

    /// The sandbox is gone, or its connections are of no use any more.
    pub fn forget(&self, sandbox: &str) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).remove(sandbox);
    }

    /// Drops what was idle for long or is broken.
    pub fn sweep(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, idle| {
            idle.retain(|greeted| greeted.since.elapsed() < IDLE_FOR && greeted.pulse.looks_alive());
            !idle.is_empty()
        });
    }

    /// A request whose answer is one message. The second value: an earlier attempt was lost and may have had its effect.
    pub async fn call<T: DeserializeOwned>(
        &self,
        sandbox: &str,
        request: &Request,
    ) -> Result<(T, bool), (GuestError, bool)> {
        let mut lost = false;
        loop {
            let mut greeted = self.connect(sandbox).await.map_err(|error| (error, lost))?;
            match greeted.client.call(request, ANSWER).await {
                Ok(answer) => {
                    self.put(sandbox, greeted.client, greeted.pulse);
                    return Ok((answer, lost));
                }
                Err(ClientError::Guest(failure)) => {
                    self.put(sandbox, greeted.client, greeted.pulse);
                    return Err((GuestError::Refused(failure), lost));
                }
                Err(ClientError::Lost(_)) if !greeted.fresh => lost = true,
                Err(error) => return Err((GuestError::Lost(error.to_string()), true)),
            }
        }
    }

    /// Opens a file for reading, on a connection that stays with the caller.
    pub async fn read_file(&self, sandbox: &str, path: &str) -> Result<(Greeted, Entry), GuestError> {
        loop {
            let mut greeted = self.connect(sandbox).await?;
            let step = greeted.client.read_file(path, ANSWER).await;
            if let Some(begun) = self.begun(sandbox, greeted, step) {
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
        loop {
            let mut greeted = self.connect(sandbox).await?;
            let step = greeted.client.write_file(path, size, mode, ANSWER).await;
            if let Some(begun) = self.begun(sandbox, greeted, step) {
                return begun;
            }
        }
    }

    /// Starts a listing, on a connection that stays with the caller; answers its first part.
    pub async fn list(&self, sandbox: &str, path: &str) -> Result<(Greeted, Option<Vec<Entry>>), GuestError> {
        loop {
            let mut greeted = self.connect(sandbox).await?;
            let step = match greeted.client.list(path, ANSWER).await {
                Ok(()) => greeted.client.next_entries(PART).await,
                Err(error) => Err(error),
            };
            if let Some(begun) = self.begun(sandbox, greeted, step) {
                return begun;
            }
        }
    }

    /// What became of a first step; `None` when it met a broken idle connection and nothing was transferred: once more.
    fn begun<T>(
        &self,
        sandbox: &str,
        greeted: Greeted,
        step: Result<T, ClientError>,
    ) -> Option<Result<(Greeted, T), GuestError>> {
        match step {
            Ok(answer) => Some(Ok((greeted, answer))),
            Err(ClientError::Guest(failure)) => {
                self.put(sandbox, greeted.client, greeted.pulse);
                Some(Err(GuestError::Refused(failure)))
            }
            Err(ClientError::Lost(_)) if !greeted.fresh => None,
            Err(error) => Some(Err(GuestError::Lost(error.to_string()))),
        }
    }

    fn take(&self, sandbox: &str) -> Option<Greeted> {
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
