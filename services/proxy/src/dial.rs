//! The way to a port of a guest: vmm asks the agent, the agent connects.
//!
//! Owns: that a hibernated sandbox is woken and the request waits for it, for a bounded time. Nothing of the request is sent
//! before the program behind the port has accepted, so every failure here may be tried again by whoever asked.

use std::{io::Cursor, os::unix::net::UnixStream as StdUnixStream, time::Duration};

use pandastack_bus::{
    Error as BusError,
    vmm::{SandboxInfo, State, VmmProxy},
};
use pandastack_daemon::retry::{again, never_sent};
use tokio::{
    io::{AsyncReadExt, Chain, Join, join},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::refusal::Refusal;

/// How long all of it may take, waking included.
pub const CONNECT: Duration = Duration::from_secs(60);
/// How often a guest that does not answer is tried: a capture resets every connection.
const ATTEMPTS: usize = 4;
const PAUSE: Duration = Duration::from_millis(150);
/// The guest's address where it has none of its own yet.
const LOOPBACK: &str = "127.0.0.1";

/// Bytes to and from a port.
pub type PortStream = Join<Chain<Cursor<Vec<u8>>, OwnedReadHalf>, OwnedWriteHalf>;

/// A connection to a port.
#[derive(Debug)]
pub struct Dialled {
    /// The connection.
    pub stream: PortStream,
    /// The guest's address.
    pub address: String,
}

/// Opens connections to ports.
#[derive(Debug, Clone)]
pub struct Dialer {
    vmm: VmmProxy<'static>,
}

/// What became of one attempt.
enum Attempt {
    Again(Refusal),
    Over(Refusal),
}

impl Dialer {
    /// Over vmm.
    pub fn new(vmm: VmmProxy<'static>) -> Self {
        Self { vmm }
    }

    /// Connects, waking the sandbox if it is hibernated.
    pub async fn dial(&self, sandbox: &SandboxInfo, port: u16) -> Result<Dialled, Refusal> {
        let within = tokio::time::timeout(CONNECT, self.attempts(&sandbox.id, port));
        let stream = match within.await {
            Ok(stream) => stream?,
            Err(_) => {
                return Err(Refusal::late(format!(
                    "the sandbox did not answer within {} seconds; nothing was sent to it",
                    CONNECT.as_secs()
                )));
            }
        };
        let mut address = sandbox.guest_ip.clone();
        if sandbox.state != State::Running || address.is_empty() {
            // It was woken, and has another one.
            address = self.vmm.get(sandbox.id.clone()).await.map(|info| info.guest_ip).unwrap_or_default();
        }
        let address = if address.is_empty() { LOOPBACK.to_owned() } else { address };
        Ok(Dialled { stream, address })
    }

    async fn attempts(&self, id: &str, port: u16) -> Result<PortStream, Refusal> {
        let mut left = ATTEMPTS;
        loop {
            match self.attempt(id, port).await {
                Ok(stream) => return Ok(stream),
                Err(Attempt::Over(refusal)) => return Err(refusal),
                Err(Attempt::Again(refusal)) => {
                    left -= 1;
                    if left == 0 {
                        return Err(refusal);
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    async fn attempt(&self, id: &str, port: u16) -> Result<PortStream, Attempt> {
        let (fd, first) = match again(|| self.vmm.open_port(id.to_owned(), port, true)).await {
            Ok(opened) => opened,
            Err(BusError::Refused(message)) => return Err(Attempt::Over(Refusal::upstream(&message))),
            Err(error) => return Err(self.not_opened(id, &error).await),
        };
        let stream = StdUnixStream::from(std::os::fd::OwnedFd::from(fd));
        let stream =
            stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream)).map_err(|error| {
                tracing::error!(sandbox = id, %error, "a stream into a guest cannot be used");
                Attempt::Over(not_ready())
            })?;
        let (read, write) = stream.into_split();
        Ok(join(Cursor::new(first).chain(read), write))
    }

    /// Why vmm opened nothing. A look at the state, as rarely as that happens.
    async fn not_opened(&self, id: &str, error: &BusError) -> Attempt {
        if matches!(error, BusError::NotFound(_)) {
            return Attempt::Over(Refusal::no_sandbox(id));
        }
        let state = match again(|| self.vmm.get(id.to_owned())).await {
            Ok(info) => info.state,
            Err(BusError::NotFound(_)) => return Attempt::Over(Refusal::no_sandbox(id)),
            Err(_) => return Attempt::Over(not_ready()),
        };
        match (state, error) {
            (State::Paused | State::Stopping | State::Failed, _) => {
                Attempt::Over(Refusal::not_running(state.as_str()))
            }
            // The bus waits less long than a wake may take; asked again, vmm goes on with the same one.
            (_, BusError::Bus(bus)) if !never_sent(bus) => Attempt::Again(not_ready()),
            (_, BusError::Bus(_)) => Attempt::Over(not_ready()),
            // It moved on meanwhile.
            (State::Running, _) => {
                Attempt::Again(Refusal::unavailable("guest_unreachable", "the guest does not answer"))
            }
            (State::Hibernated, BusError::Internal(text)) => {
                tracing::error!(sandbox = id, error = %text, "a daemon reports its own fault");
                Attempt::Over(Refusal::asleep("internal error; the operator's journal has it", true))
            }
            (State::Hibernated, error @ (BusError::WrongState(_) | BusError::InvalidArgument(_))) => {
                Attempt::Over(Refusal::asleep(&error.message(), true))
            }
            (State::Hibernated, error) => Attempt::Over(Refusal::asleep(&error.message(), false)),
            (State::Creating, _) => Attempt::Again(not_ready()),
        }
    }
}

fn not_ready() -> Refusal {
    Refusal::unavailable("not_ready", "the appliance is not ready for this request; try again soon")
}
