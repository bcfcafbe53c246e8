//! One connection: greeting, then one request after the other.
//!
//! Knows the protocol and nothing about vsock: any stream will do.

use std::{io, sync::Arc, time::Duration};

use pandastack_protocol::{
    CHUNK, Code, Exec, Failure, Frame, Health, Hello, Kind, LOG_WAIT_MS, PROTOCOL, PROTOCOL_OLDEST, Request,
    Sessions, Started, Window, log_payload, output_payload,
};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{
    Agent, delete, files, forward, listening,
    log::Log,
    replay::Stream,
    session::{Next, Order, Session},
    transfer, volumes,
    wire::Wire,
    write,
};

/// A connection that has not greeted by then is closed.
const GREETING: Duration = Duration::from_secs(10);

/// Serves a connection to its end. The error says why it ended; the other side going away is one, too.
pub async fn serve<S>(stream: S, agent: Arc<Agent>) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let mut wire = Wire::new(stream);
    tokio::time::timeout(GREETING, greet(&mut wire)).await??;
    loop {
        let Frame { kind, payload } = wire.next_request().await?;
        match kind {
            Kind::Request => {}
            // What belonged to an activity that ended before it came.
            Kind::Stdin
            | Kind::StdinEnd
            | Kind::Ack
            | Kind::Signal
            | Kind::Resize
            | Kind::Data
            | Kind::DataEnd => {
                continue;
            }
            other => return wrong(&mut wire, other).await,
        }
        let request = match serde_json::from_slice(&payload) {
            Ok(request) => request,
            Err(error) => {
                let failure = misunderstood(&payload, &error);
                wire.answer::<()>(Err(failure)).await?;
                continue;
            }
        };
        match request {
            Request::Forward { port } => match forward::connect(port).await {
                Ok(tcp) => {
                    wire.send(Kind::Ready, &()).await?;
                    let (stream, rest) = wire.into_raw();
                    return forward::run(stream, &rest, tcp).await;
                }
                Err(failure) => wire.answer::<()>(Err(failure)).await?,
            },
            Request::Shutdown {} => {
                // Its failure is no reason to live on.
                agent.disks.sync().await.ok();
                wire.answer(Ok(())).await?;
                wire.outgoing.flush().await?;
                if let Err(failure) = agent.machine.shut_down() {
                    eprintln!("panda-agent: {failure}");
                }
            }
            other => request_answered(&mut wire, &agent, other).await?,
        }
    }
}

async fn greet<S: AsyncRead + AsyncWrite>(wire: &mut Wire<S>) -> io::Result<()> {
    let Frame { kind, payload } = wire.incoming.next().await?;
    if kind != Kind::Hello {
        return wrong(wire, kind).await;
    }
    let hello: Hello = serde_json::from_slice(&payload)?;
    if hello.proto < PROTOCOL_OLDEST {
        let message = format!("version {} is too old, {PROTOCOL_OLDEST} is the oldest spoken", hello.proto);
        wire.answer::<()>(Err(Failure { code: Code::Unsupported, message })).await?;
        return Err(io::ErrorKind::Unsupported.into());
    }
    let answer = Hello { proto: PROTOCOL, nonce: hello.nonce, agent: env!("CARGO_PKG_VERSION").to_owned() };
    // It goes out with the answer to a request that came along with the greeting.
    wire.outgoing.push_json(Kind::Hello, &answer)
}

/// A frame where it has no business: there is no way on.
pub async fn wrong<S: AsyncRead + AsyncWrite>(wire: &mut Wire<S>, kind: Kind) -> io::Result<()> {
    let message = format!("{kind:?} was not expected here");
    wire.answer::<()>(Err(Failure { code: Code::Invalid, message })).await?;
    Err(io::ErrorKind::InvalidData.into())
}

/// Tells a request of a newer host from nonsense.
fn misunderstood(payload: &[u8], error: &serde_json::Error) -> Failure {
    #[derive(serde::Deserialize)]
    struct Named {
        op: String,
    }
    const KNOWN: [&str; 18] = [
        "identity",
        "exec",
        "attach",
        "sessions",
        "kill",
        "log",
        "read_file",
        "write_file",
        "list",
        "stat",
        "delete",
        "forward",
        "ports",
        "sync",
        "grow_root",
        "mount",
        "health",
        "shutdown",
    ];
    match serde_json::from_slice::<Named>(payload) {
        Ok(named) if !KNOWN.contains(&named.op.as_str()) => {
            Failure { code: Code::Unsupported, message: format!("this agent does not know {:?}", named.op) }
        }
        _ => Failure { code: Code::Invalid, message: format!("the request does not parse: {error}") },
    }
}

async fn request_answered<S>(wire: &mut Wire<S>, agent: &Arc<Agent>, request: Request) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    match request {
        Request::Exec(exec) => start(wire, agent, exec).await,
        Request::Attach { session, offset } => match agent.sessions.find(&session) {
            Ok(session) => follow(wire, &session, offset).await,
            Err(failure) => wire.answer::<()>(Err(failure)).await,
        },
        Request::Sessions {} => {
            // What would not fit into a frame is left out, oldest first.
            let mut sessions = agent.sessions.list();
            const LONGEST: usize = 512;
            let excess = sessions.len().saturating_sub(LONGEST);
            sessions.drain(..excess);
            wire.answer(Ok(Sessions { sessions })).await
        }
        Request::Kill { session } => {
            let result = agent.sessions.find(&session).map(|session| session.kill());
            wire.answer(result).await
        }
        Request::Log { position, life, session, wait_ms } => {
            read_log(wire, &agent.log, (life, position), &session, Duration::from_millis(wait_ms)).await
        }
        Request::ReadFile { path } => transfer::read_file(wire, path).await,
        Request::WriteFile { path, size, mode } => transfer::write_file(wire, path, size, mode).await,
        Request::List { path } => transfer::list(wire, path).await,
        Request::Stat { path } => {
            let result = blocking(move || files::stat(&files::checked(&path)?)).await;
            wire.answer(result).await
        }
        Request::Delete { path } => {
            let result = blocking(move || delete::delete(&files::checked(&path)?)).await;
            wire.answer(result).await
        }
        Request::Identity(identity) => {
            let result = agent.identify(identity);
            wire.answer(result).await
        }
        Request::Ports {} => {
            let result = blocking(|| Ok(listening::ports())).await;
            wire.answer(result).await
        }
        Request::Sync {} => {
            let result = agent.disks.sync().await;
            wire.answer(result).await
        }
        Request::GrowRoot {} => {
            let agent = agent.clone();
            let result = blocking(move || agent.machine.grow_root()).await;
            wire.answer(result).await
        }
        Request::Mount { mounts } => {
            let agent = agent.clone();
            let result = blocking(move || {
                volumes::check(&mounts)?;
                agent.machine.mount(&mounts)
            });
            let result = result.await;
            wire.answer(result).await
        }
        Request::Health {} => {
            let result = health(agent).await;
            wire.answer(result).await
        }
        Request::Forward { .. } | Request::Shutdown {} => Ok(()),
    }
}

/// Answers `Log`: waits until there is something of this session, or for so long.
async fn read_log<S: AsyncRead + AsyncWrite>(
    wire: &mut Wire<S>,
    log: &Log,
    (mut life, mut position): (u64, u64),
    session: &str,
    wait: Duration,
) -> io::Result<()> {
    let mut changes = log.watch();
    let deadline = tokio::time::Instant::now() + wait.min(Duration::from_millis(LOG_WAIT_MS));
    loop {
        changes.mark_unchanged();
        let (parts, end) = log.page(life, position, session);
        // What others wrote is passed over once.
        (life, position) = (end.life, end.next);
        let now = tokio::time::Instant::now();
        if !parts.is_empty() || now >= deadline {
            for part in parts {
                let payload =
                    log_payload(part.position, part.unix_ms, &part.session, part.stream, &part.bytes);
                wire.outgoing.push(Kind::Data, &payload.unwrap_or_default());
            }
            return wire.answer(Ok(end)).await;
        }
        tokio::select! {
            _ = changes.changed() => {}
            () = tokio::time::sleep_until(deadline) => {}
            frame = wire.incoming.next() => match frame?.kind {
                Kind::Stdin | Kind::StdinEnd | Kind::Ack | Kind::Signal | Kind::Resize => {}
                Kind::Data | Kind::DataEnd => {}
                other => return wrong(wire, other).await,
            },
        }
    }
}

/// Runs what blocks where it may.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Failure { code: Code::Internal, message: error.to_string() }),
    }
}

async fn start<S: AsyncRead + AsyncWrite>(
    wire: &mut Wire<S>,
    agent: &Arc<Agent>,
    exec: Exec,
) -> io::Result<()> {
    match agent.sessions.start(exec, agent.defaults()).await {
        Ok(session) => follow(wire, &session, 0).await,
        Err(failure) => wire.answer::<()>(Err(failure)).await,
    }
}

/// Detaches whatever way the connection ends.
struct Attachment<'a> {
    session: &'a Session,
    number: u64,
}

impl Drop for Attachment<'_> {
    fn drop(&mut self) {
        self.session.detach(self.number);
    }
}

/// Sends a session's output from `offset` on until its end, and passes on what the host sends.
async fn follow<S>(wire: &mut Wire<S>, session: &Session, offset: u64) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite,
{
    let mut changes = session.watch();
    let (number, mut offset, dropped, stdin) = session.attach(offset);
    let attachment = Attachment { session, number };
    let started = Started { session: session.id.clone(), pid: session.pid, offset, dropped, stdin };
    wire.outgoing.push_json(Kind::Started, &started)?;
    let mut taken = 0;
    loop {
        changes.mark_unchanged();
        while !wire.outgoing.is_full() {
            match session.next(number, offset, taken, CHUNK) {
                Next::Output(at, stream, bytes) => {
                    let kind = match stream {
                        Stream::Stdout => Kind::Stdout,
                        Stream::Stderr => Kind::Stderr,
                    };
                    wire.outgoing.push(kind, &output_payload(at, &bytes));
                    offset = at + bytes.len() as u64;
                }
                Next::StdinTaken(count) => {
                    wire.outgoing.push(Kind::StdinTaken, &count.to_le_bytes());
                    taken = count;
                }
                Next::Exit(exit) => {
                    wire.outgoing.push_json(Kind::Exit, &exit)?;
                    wire.outgoing.flush().await?;
                    drop(attachment);
                    return Ok(());
                }
                Next::TakenOver => return Err(io::ErrorKind::ConnectionAborted.into()),
                Next::Nothing => break,
            }
        }
        let waiting = wire.outgoing.is_waiting();
        tokio::select! {
            result = wire.outgoing.write(), if waiting => result?,
            frame = wire.incoming.next() => {
                let frame = frame?;
                let kind = frame.kind;
                if !passed_on(session, &frame) {
                    return wrong(wire, kind).await;
                }
            }
            _ = changes.changed() => {}
        }
    }
}

/// Does what the host says about a session; answers whether it may say that.
fn passed_on(session: &Session, frame: &Frame) -> bool {
    let payload = &frame.payload;
    match frame.kind {
        Kind::Stdin => return session.stdin(payload).is_ok(),
        Kind::StdinEnd => session.stdin_end(),
        Kind::Ack => match payload[..].try_into() {
            Ok(bytes) => session.ack(u64::from_le_bytes(bytes)),
            Err(_) => return false,
        },
        Kind::Signal => match payload[..].try_into().map(u32::from_le_bytes) {
            Ok(9) => session.kill(),
            Ok(number) => session.order(Order::Signal(number.cast_signed())),
            Err(_) => return false,
        },
        Kind::Resize => match payload[..] {
            [a, b, c, d] => {
                let (rows, cols) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                session.order(Order::Resize(Window { rows, cols }));
            }
            _ => return false,
        },
        // Left over from an upload that ended early.
        Kind::Data | Kind::DataEnd => {}
        _ => return false,
    }
    true
}

async fn health(agent: &Agent) -> Result<Health, Failure> {
    let sessions = agent.sessions.running() as u32;
    blocking(move || {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory =
            memory.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next());
        Ok(Health {
            unix_nanos: now.as_nanos() as u64,
            memory_available_kib: memory.and_then(|text| text.parse().ok()).unwrap_or(0),
            disk_free_bytes: write::root_free().unwrap_or(0),
            sessions,
        })
    })
    .await
}
