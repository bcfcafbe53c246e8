//! Talking to the agent in a guest: dialling, identity, and the few requests that vmm makes itself.
//!
//! Owns: the `CONNECT` line of Firecracker's vsock and the repetition until a restored guest answers. Refuses to know:
//! frames and messages (the protocol crate), what a caller does with a stream it was handed.

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::{FutureExt, StreamExt, stream::FuturesUnordered};
use pandastack_bus::{Error, Result, SandboxId};
use pandastack_protocol::{
    Client, ClientError, Code, Defaults, Exec, ExecEvent, Identity, Mount, PORT, Request, Sessions, Unique,
};
use serde::de::IgnoredAny;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

use crate::{
    ports::{Guest, Identification},
    record::hex,
    socket::{Sockets, VSOCK},
};

/// Until a second connection is tried beside the first one; twice that until the third, and so on. A connection that was there
/// before the guest noticed that it was restored is never answered, and nothing says so; a guest that is only slow answers
/// the first one, whatever is tried beside it.
const BESIDE: Duration = Duration::from_millis(150);
/// A guest that refuses connections for longer than this after a capture has no agent any more.
const SETTLING: Duration = Duration::from_secs(4);
/// Between two attempts to connect.
const REDIAL: Duration = Duration::from_millis(10);
/// Requests that only change settings.
const SHORT: Duration = Duration::from_secs(10);
/// Writing everything dirty to the disk, growing a file system.
const DISK: Duration = Duration::from_secs(60);
/// A template's warm-up command; importing a whole data stack under emulation takes minutes.
const WARM_UP: Duration = Duration::from_secs(900);
/// A greeting and a connection within the guest, which tries three addresses, five seconds each at most; less than the bus
/// waits for a reply.
const FORWARD: Duration = Duration::from_secs(22);
/// Longest `OK <port>` line.
const LINE: usize = 32;

/// The agents of all sandboxes.
#[derive(Debug, Clone)]
pub struct Agents {
    sockets: Sockets,
}

impl Agents {
    /// Dials through these sockets.
    pub fn new(sockets: Sockets) -> Self {
        Self { sockets }
    }

    /// A stream to the agent on which nothing was spoken yet.
    async fn dial(&self, id: &SandboxId) -> io::Result<UnixStream> {
        let mut stream = self.sockets.connect(id, VSOCK).await?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
        let mut line = Vec::with_capacity(LINE);
        while !line.ends_with(b"\n") {
            // The guest is silent until it is greeted, so the line ends what there is to read.
            let mut rest = [0; LINE];
            let room = LINE - line.len();
            let count = match room {
                0 => 0,
                _ => stream.read(&mut rest[..room]).await?,
            };
            if count == 0 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            line.extend_from_slice(&rest[..count]);
            if line.iter().position(|byte| *byte == b'\n').is_some_and(|end| end + 1 != line.len()) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the guest spoke before it was greeted",
                ));
            }
        }
        if line.starts_with(b"OK ") {
            return Ok(stream);
        }
        Err(io::Error::new(io::ErrorKind::InvalidData, "this is not Firecracker's vsock"))
    }

    async fn greet(
        &self,
        id: &SandboxId,
        limit: Duration,
    ) -> std::result::Result<Client<UnixStream>, ClientError> {
        let stream = timeout(limit, self.dial(id)).await.map_err(|_| ClientError::Timeout)??;
        Client::greet(stream, random_u64(), limit).await
    }

    /// Greets the guest and makes this request, at best in one breath: each turn costs a guest that was just restored many
    /// first touches of its memory. A `second` connection asks only once it was greeted: had the first one arrived, it would
    /// have been answered by then, so nothing is done twice. Answers when it was done.
    async fn introduce(
        &self,
        id: &SandboxId,
        request: &impl Fn() -> Request,
        deadline: Instant,
        second: bool,
    ) -> std::result::Result<Instant, ClientError> {
        let stream = timeout_at(deadline, self.dial(id)).await.map_err(|_| ClientError::Timeout)??;
        let left = deadline.saturating_duration_since(Instant::now());
        if second {
            let mut client = Client::greet(stream, random_u64(), left).await?;
            client.call::<IgnoredAny>(&request(), left).await?;
        } else {
            Client::greet_and_call::<IgnoredAny>(stream, random_u64(), &request(), left).await?;
        }
        Ok(Instant::now())
    }

    async fn call(&self, id: &SandboxId, request: &Request, limit: Duration) -> Result<()> {
        let mut client = self.greet(id, SHORT).await.map_err(|error| unreachable(&error))?;
        client.call::<IgnoredAny>(request, limit).await.map_err(|error| unreachable(&error))?;
        Ok(())
    }
}

impl Guest for Agents {
    async fn identify(
        &self,
        id: &SandboxId,
        identification: &Identification,
        deadline: Instant,
    ) -> Result<Instant> {
        let request = || Request::Identity(identity(id, identification));
        let mut attempts = FuturesUnordered::new();
        let (mut pause, mut beside) = (Duration::from_millis(1), BESIDE);
        let mut next = Instant::now();
        let mut last = String::from("it was never reached");
        loop {
            tokio::select! {
                Some(outcome) = attempts.next() => match outcome {
                    Ok(answered) => return Ok(answered),
                    // It answered and said no: a repetition would not make it unique.
                    Err(ClientError::Guest(failure)) => {
                        return Err(Error::GuestUnreachable(format!("the guest refused its identity: {failure}")));
                    }
                    // Right after a restore a connection can be accepted and then closed by the pending reset.
                    Err(error) => {
                        last = pandastack_daemon::chain(&error);
                        if attempts.is_empty() {
                            next = Instant::now() + pause;
                            pause = (pause * 2).min(Duration::from_millis(100));
                        }
                    }
                },
                () = sleep_until(next.min(deadline)) => {
                    if Instant::now() >= deadline {
                        return Err(Error::GuestUnreachable(format!("the guest did not answer in time: {last}")));
                    }
                    let second = !attempts.is_empty();
                    if second {
                        beside *= 2;
                    }
                    attempts.push(self.introduce(id, &request, deadline, second).boxed());
                    next = Instant::now() + beside;
                }
            }
        }
    }

    async fn grow_root(&self, id: &SandboxId) -> Result<()> {
        self.call(id, &Request::GrowRoot {}, DISK).await
    }

    async fn sync(&self, id: &SandboxId, limit: Duration) -> Result<()> {
        timeout(limit, self.call(id, &Request::Sync {}, limit))
            .await
            .unwrap_or_else(|_| Err(Error::GuestUnreachable("the guest did not sync in time".into())))
    }

    async fn mount(&self, id: &SandboxId, mounts: Vec<Mount>) -> Result<()> {
        self.call(id, &Request::Mount { mounts }, DISK).await
    }

    async fn warm_up(&self, id: &SandboxId, command: &str) -> Result<()> {
        if !command.trim().is_empty() {
            timeout(WARM_UP + SHORT, self.run(id, command))
                .await
                .map_err(|_| Error::Timeout("the warm-up command did not end".into()))??;
        }
        let mut client = self.greet(id, SHORT).await.map_err(|error| unreachable(&error))?;
        let open: Sessions =
            client.call(&Request::Sessions {}, SHORT).await.map_err(|error| unreachable(&error))?;
        for session in open.sessions.iter().filter(|session| session.exit.is_none()) {
            let kill = Request::Kill { session: session.session.clone() };
            client.call::<IgnoredAny>(&kill, SHORT).await.map_err(|error| unreachable(&error))?;
        }
        client.call::<IgnoredAny>(&Request::Sync {}, DISK).await.map_err(|error| unreachable(&error))?;
        drop(client);
        // The guest notices the end of the last connection before its memory is taken.
        sleep(Duration::from_millis(500)).await;
        Ok(())
    }

    async fn open(&self, id: &SandboxId) -> Result<OwnedFd> {
        handed_out(self.settled(id).await?)
    }

    async fn forward(&self, id: &SandboxId, port: u16) -> Result<(OwnedFd, Vec<u8>)> {
        let connect = async {
            let stream = self.settled(id).await?;
            let client =
                Client::greet(stream, random_u64(), FORWARD).await.map_err(|error| unreachable(&error))?;
            match client.forward(port, FORWARD).await {
                Ok((stream, first)) => Ok((handed_out(stream)?, first.to_vec())),
                Err(ClientError::Guest(failure)) if failure.code == Code::Refused => {
                    Err(Error::Refused(format!("nothing listens on port {port}")))
                }
                Err(ClientError::Guest(failure)) => Err(Error::Refused(failure.message)),
                Err(error) => Err(unreachable(&error)),
            }
        };
        timeout(FORWARD, connect)
            .await
            .unwrap_or_else(|_| Err(Error::GuestUnreachable("the guest does not answer".into())))
    }
}

impl Agents {
    /// As [`Self::dial`], for a guest that may have been captured or restored just now: it still has to notice that its old
    /// connections are gone, and refuses new ones meanwhile. Nothing was asked of it yet.
    async fn settled(&self, id: &SandboxId) -> Result<UnixStream> {
        let deadline = Instant::now() + SHORT;
        let settled = Instant::now() + SETTLING;
        loop {
            match timeout_at(deadline, self.dial(id)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())) {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset && Instant::now() < settled => {
                    sleep(REDIAL).await;
                }
                Err(error) => {
                    return Err(Error::GuestUnreachable(format!("the guest cannot be reached: {error}")));
                }
            }
        }
    }

    /// Runs a shell command to its end; its failure is ours, with the last of its output.
    async fn run(&self, id: &SandboxId, command: &str) -> Result<()> {
        let client = self.greet(id, SHORT).await.map_err(|error| unreachable(&error))?;
        let exec = Exec {
            session: SandboxId::random().to_string(),
            argv: ["/bin/sh", "-c", command].map(str::to_owned).to_vec(),
            timeout_ms: WARM_UP.as_millis() as u64,
            // What it says would be in the log of every sandbox.
            unlogged: true,
            ..Exec::default()
        };
        let mut stream = client.exec(exec, SHORT).await.map_err(|(_, error)| unreachable(&error))?;
        let mut tail: Vec<u8> = Vec::new();
        loop {
            match stream.next().await.map_err(|error| unreachable(&error))? {
                ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes) => {
                    tail.extend_from_slice(&bytes);
                    tail.drain(..tail.len().saturating_sub(400));
                }
                ExecEvent::Exit(exit) if exit.code == 0 => return Ok(()),
                ExecEvent::Exit(exit) => {
                    let said = String::from_utf8_lossy(&tail).trim().to_owned();
                    return Err(Error::GuestUnreachable(format!(
                        "the warm-up command ended with {}: {said}",
                        exit.code
                    )));
                }
            }
        }
    }
}

/// Without the runtime that dialled it.
fn handed_out(stream: UnixStream) -> Result<OwnedFd> {
    Ok(stream.into_std().map_err(|error| Error::Internal(error.to_string()))?.into())
}

fn identity(id: &SandboxId, identification: &Identification) -> Identity {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut entropy = [0u8; 64];
    fill(&mut entropy);
    Identity {
        unix_nanos: now.as_nanos() as u64,
        entropy: hex(&entropy),
        unique: identification.machine_id.as_ref().map(|machine_id| Unique {
            sandbox: id.to_string(),
            machine_id: machine_id.clone(),
            boot_id: boot_id(),
            hostname: format!("sb-{}", &id.as_str()[..12]),
        }),
        defaults: Some(Defaults { env: identification.env.clone(), workdir: identification.workdir.clone() }),
    }
}

/// A random machine id: 32 hexadecimal digits.
pub fn machine_id() -> String {
    hex(&uuid())
}

fn boot_id() -> String {
    let text = hex(&uuid());
    format!("{}-{}-{}-{}-{}", &text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..])
}

/// A random UUID, version 4.
fn uuid() -> [u8; 16] {
    let mut bytes = [0; 16];
    fill(&mut bytes);
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}

fn random_u64() -> u64 {
    let mut bytes = [0; 8];
    fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

fn fill(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("the kernel's random generator answers once the machine is up");
}

fn unreachable(error: &ClientError) -> Error {
    Error::GuestUnreachable(pandastack_daemon::chain(error))
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
