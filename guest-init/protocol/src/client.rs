//! The host's side of a conversation, over any stream of bytes.
//!
//! Everything that comes back was written by a hostile guest: lengths are bounded by the decoder, JSON by its frame, and
//! time by the limits given here. A client that returned an error other than [`ClientError::Guest`] is of no further use.

use std::{pin::Pin, task::Poll, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    ACK_EVERY, CHUNK, Decoder, Entry, Exec, Exit, Failure, Frame, FrameError, Hello, Kind, PROTOCOL,
    PROTOCOL_OLDEST, REPLAY_BYTES, Request, STDIN_WINDOW, Started, Written, encode, split_output,
};

/// Why a conversation ended.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The guest refused the request; the connection is idle again and may be used on.
    #[error(transparent)]
    Guest(#[from] Failure),
    /// The connection is gone. Whether the request had an effect is unknown; a session can be attached to again.
    #[error("the connection to the guest is lost")]
    Lost(#[source] std::io::Error),
    /// What came is not this protocol.
    #[error("the guest does not speak the protocol: {0}")]
    Protocol(String),
    /// No answer in time.
    #[error("the guest did not answer in time")]
    Timeout,
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Protocol(error.to_string())
    }
}

impl From<std::io::Error> for ClientError {
    fn from(error: std::io::Error) -> Self {
        Self::Lost(error)
    }
}

/// A greeted connection.
#[derive(Debug)]
pub struct Client<S> {
    stream: S,
    decoder: Decoder,
    out: BytesMut,
    /// What the guest said of itself.
    pub hello: Hello,
}

/// What a session sends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// Bytes of standard output.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// The end; nothing follows.
    Exit(Exit),
}

/// An attached session. `next` hands out output; `into_client` gives the idle connection back after the exit.
#[derive(Debug)]
pub struct ExecStream<S> {
    client: Client<S>,
    /// What the guest said at the start.
    pub started: Started,
    offset: u64,
    acked: u64,
    keep: u64,
    ended: bool,
    input: Input,
}

/// Unacknowledged bytes with which the host may wait: half of what an agent that is short of memory keeps of a session
/// before it stops reading the program.
const WAIT_WITH: u64 = 16 << 10;
/// How long nothing may come before more than that is acknowledged although it was to be kept: the agent may be the one
/// that waits.
const QUIET: Duration = Duration::from_secs(1);

/// Standard input on its way: what was given and not sent, and how much of what was sent is not taken yet.
#[derive(Debug, Default)]
struct Input {
    queue: BytesMut,
    end: bool,
    sent: u64,
    taken: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Client<S> {
    /// Greets the agent. `nonce` should be random.
    pub async fn greet(stream: S, nonce: u64, limit: Duration) -> Result<Self, ClientError> {
        let hello = Hello { proto: PROTOCOL, nonce, agent: String::new() };
        let mut client = Self { stream, decoder: Decoder::new(), out: BytesMut::new(), hello: hello.clone() };
        within(limit, async {
            client.send_json(Kind::Hello, &hello).await?;
            let answer: Hello = match client.receive().await? {
                Frame { kind: Kind::Hello, payload } => parse(&payload)?,
                Frame { kind: Kind::Error, payload } => return Err(parse::<Failure>(&payload)?.into()),
                other => return Err(unexpected(&other)),
            };
            if answer.nonce != nonce {
                return Err(ClientError::Protocol("greeting of another time".into()));
            }
            if answer.proto < PROTOCOL_OLDEST {
                return Err(ClientError::Protocol(format!("version {} is too old", answer.proto)));
            }
            client.hello = answer;
            Ok(())
        })
        .await?;
        Ok(client)
    }

    /// A request whose answer is one `Done`.
    pub async fn call<T: DeserializeOwned>(
        &mut self,
        request: &Request,
        limit: Duration,
    ) -> Result<T, ClientError> {
        within(limit, async {
            self.send_json(Kind::Request, request).await?;
            self.done().await
        })
        .await
    }

    /// Starts a session. The limit is for the start, not for the command.
    pub async fn exec(
        mut self,
        exec: Exec,
        limit: Duration,
    ) -> Result<ExecStream<S>, (Option<Self>, ClientError)> {
        match self.start(&Request::Exec(exec), limit).await {
            Ok(started) => Ok(self.into_exec(started)),
            Err(error @ ClientError::Guest(_)) => Err((Some(self), error)),
            Err(error) => Err((None, error)),
        }
    }

    /// Goes on with a session from `offset` on.
    pub async fn attach(
        mut self,
        session: &str,
        offset: u64,
        limit: Duration,
    ) -> Result<ExecStream<S>, (Option<Self>, ClientError)> {
        let request = Request::Attach { session: session.to_owned(), offset };
        match self.start(&request, limit).await {
            Ok(started) => Ok(self.into_exec(started)),
            Err(error @ ClientError::Guest(_)) => Err((Some(self), error)),
            Err(error) => Err((None, error)),
        }
    }

    /// Opens a file for reading; then [`Client::read_chunk`] until it answers `None`.
    pub async fn read_file(&mut self, path: &str, limit: Duration) -> Result<Entry, ClientError> {
        within(limit, async {
            self.send_json(Kind::Request, &Request::ReadFile { path: path.to_owned() }).await?;
            self.ready().await
        })
        .await
    }

    /// The next bytes of a file or listing; `None` at its end.
    pub async fn read_chunk(&mut self, limit: Duration) -> Result<Option<Bytes>, ClientError> {
        within(limit, async {
            match self.receive().await? {
                Frame { kind: Kind::Data, payload } => Ok(Some(payload)),
                Frame { kind: Kind::Done, .. } => Ok(None),
                Frame { kind: Kind::Error, payload } => Err(parse::<Failure>(&payload)?.into()),
                other => Err(unexpected(&other)),
            }
        })
        .await
    }

    /// Announces a file of `size` bytes; then [`Client::write_chunk`] for exactly these, then [`Client::write_end`].
    pub async fn write_file(
        &mut self,
        path: &str,
        size: u64,
        mode: u32,
        limit: Duration,
    ) -> Result<(), ClientError> {
        within(limit, async {
            self.send_json(Kind::Request, &Request::WriteFile { path: path.to_owned(), size, mode }).await?;
            self.ready::<serde::de::IgnoredAny>().await.map(drop)
        })
        .await
    }

    /// Sends bytes of a file.
    pub async fn write_chunk(&mut self, bytes: &[u8], limit: Duration) -> Result<(), ClientError> {
        within(limit, async {
            for chunk in bytes.chunks(CHUNK) {
                self.send(Kind::Data, chunk).await?;
            }
            Ok(())
        })
        .await
    }

    /// Ends a file; answers when it is in place and on disk.
    pub async fn write_end(&mut self, limit: Duration) -> Result<Written, ClientError> {
        within(limit, async {
            self.send(Kind::DataEnd, &[]).await?;
            self.done().await
        })
        .await
    }

    /// Starts a listing; then [`Client::next_entries`] until it answers `None`.
    pub async fn list(&mut self, path: &str, limit: Duration) -> Result<(), ClientError> {
        within(limit, self.send_json(Kind::Request, &Request::List { path: path.to_owned() })).await
    }

    /// The next part of a listing; `None` at its end.
    pub async fn next_entries(&mut self, limit: Duration) -> Result<Option<Vec<Entry>>, ClientError> {
        match self.read_chunk(limit).await? {
            Some(bytes) => parse(&bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Turns the connection into a raw one to a TCP port of the guest. The second value was read already and comes first.
    pub async fn forward(mut self, port: u16, limit: Duration) -> Result<(S, BytesMut), ClientError> {
        within(limit, async {
            self.send_json(Kind::Request, &Request::Forward { port }).await?;
            self.ready::<serde::de::IgnoredAny>().await.map(drop)
        })
        .await?;
        Ok((self.stream, self.decoder.into_rest()))
    }

    async fn start(&mut self, request: &Request, limit: Duration) -> Result<Started, ClientError> {
        within(limit, async {
            self.send_json(Kind::Request, request).await?;
            match self.receive().await? {
                Frame { kind: Kind::Started, payload } => parse(&payload),
                Frame { kind: Kind::Error, payload } => Err(parse::<Failure>(&payload)?.into()),
                other => Err(unexpected(&other)),
            }
        })
        .await
    }

    fn into_exec(self, started: Started) -> ExecStream<S> {
        let offset = started.offset;
        let input = Input { sent: started.stdin, taken: started.stdin, ..Input::default() };
        ExecStream { client: self, started, offset, acked: offset, keep: 0, ended: false, input }
    }

    async fn ready<T: DeserializeOwned>(&mut self) -> Result<T, ClientError> {
        match self.receive().await? {
            Frame { kind: Kind::Ready, payload } => parse(&payload),
            Frame { kind: Kind::Error, payload } => Err(parse::<Failure>(&payload)?.into()),
            other => Err(unexpected(&other)),
        }
    }

    async fn done<T: DeserializeOwned>(&mut self) -> Result<T, ClientError> {
        match self.receive().await? {
            Frame { kind: Kind::Done, payload } => parse(&payload),
            Frame { kind: Kind::Error, payload } => Err(parse::<Failure>(&payload)?.into()),
            other => Err(unexpected(&other)),
        }
    }

    async fn send_json<T: serde::Serialize>(&mut self, kind: Kind, message: &T) -> Result<(), ClientError> {
        let payload =
            serde_json::to_vec(message).map_err(|error| ClientError::Protocol(error.to_string()))?;
        if payload.len() > crate::MAX_PAYLOAD {
            return Err(
                Failure { code: crate::Code::Invalid, message: "the request is over 1 MiB".into() }.into()
            );
        }
        self.send(kind, &payload).await
    }

    /// Sends a frame after what is left of earlier ones: giving up half-way never tears a frame.
    async fn send(&mut self, kind: Kind, payload: &[u8]) -> Result<(), ClientError> {
        encode(kind, payload, &mut self.out);
        self.flush().await
    }

    async fn flush(&mut self) -> Result<(), ClientError> {
        while !self.out.is_empty() {
            if self.stream.write_buf(&mut self.out).await? == 0 {
                return Err(ClientError::Lost(std::io::ErrorKind::WriteZero.into()));
            }
        }
        Ok(())
    }

    /// Writes what is left of `out` and reads, whichever goes; returns when there are new bytes in the decoder, or
    /// when nothing is left to write and `more` says that there is more to say. Cancel-safe.
    async fn exchange(&mut self, more: bool) -> Result<(), ClientError> {
        let Self { stream, decoder, out, .. } = self;
        std::future::poll_fn(|context| {
            while !out.is_empty() {
                match Pin::new(&mut *stream).poll_write(context, out) {
                    Poll::Ready(Ok(0)) => {
                        return Poll::Ready(Err(ClientError::Lost(std::io::ErrorKind::WriteZero.into())));
                    }
                    Poll::Ready(Ok(written)) => out.advance(written),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
                    Poll::Pending => break,
                }
            }
            if out.is_empty() && more {
                return Poll::Ready(Ok(()));
            }
            let buffer = decoder.buffer();
            buffer.reserve(CHUNK);
            match std::pin::pin!(stream.read_buf(buffer)).poll(context) {
                Poll::Ready(Ok(0)) => {
                    Poll::Ready(Err(ClientError::Lost(std::io::ErrorKind::UnexpectedEof.into())))
                }
                Poll::Ready(Ok(_)) => Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => Poll::Ready(Err(error.into())),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// The next frame. Cancel-safe: bytes already read stay in the decoder.
    async fn receive(&mut self) -> Result<Frame, ClientError> {
        loop {
            if let Some(frame) = self.decoder.next_frame()? {
                return Ok(frame);
            }
            let buffer = self.decoder.buffer();
            buffer.reserve(CHUNK);
            if self.stream.read_buf(buffer).await? == 0 {
                return Err(ClientError::Lost(std::io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ExecStream<S> {
    /// What comes next; sends queued standard input meanwhile. Cancel-safe.
    pub async fn next(&mut self) -> Result<ExecEvent, ClientError> {
        loop {
            if self.offset - self.acked >= self.keep + ACK_EVERY {
                self.ack(self.keep);
            }
            while let Some(frame) = self.client.decoder.next_frame()? {
                match frame.kind {
                    Kind::Stdout => return Ok(ExecEvent::Stdout(self.output(frame.payload)?)),
                    Kind::Stderr => return Ok(ExecEvent::Stderr(self.output(frame.payload)?)),
                    Kind::StdinTaken => self.taken(&frame.payload)?,
                    Kind::Exit => {
                        let exit = parse(&frame.payload)?;
                        self.ended = true;
                        return Ok(ExecEvent::Exit(exit));
                    }
                    Kind::Error => return Err(parse::<Failure>(&frame.payload)?.into()),
                    _ => return Err(unexpected(&frame)),
                }
            }
            if self.client.out.is_empty() {
                self.input_frames();
            }
            let more = self.input_ready();
            if self.offset - self.acked >= WAIT_WITH {
                self.ack(self.keep);
            }
            if self.offset - self.acked <= WAIT_WITH {
                self.client.exchange(more).await?;
            } else if let Ok(exchanged) = tokio::time::timeout(QUIET, self.client.exchange(more)).await {
                exchanged?;
            } else {
                self.ack(WAIT_WITH);
            }
        }
    }

    /// Leaves the last so many bytes unacknowledged, as far as the agent can keep them: whoever attaches again can have
    /// them once more.
    pub fn keep(&mut self, bytes: u64) {
        self.keep = bytes.min(REPLAY_BYTES as u64 / 2);
    }

    /// Acknowledges all but the last `keep` bytes.
    fn ack(&mut self, keep: u64) {
        let to = self.offset.saturating_sub(keep);
        if to > self.acked {
            self.acked = to;
            encode(Kind::Ack, &to.to_le_bytes(), &mut self.client.out);
        }
    }

    /// Offset of the byte that comes next: where to attach again.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Queues bytes for the program's standard input. They travel while [`ExecStream::next`] is waited for, as the
    /// program takes them; [`ExecStream::stdin_queued`] says how many wait.
    pub fn stdin(&mut self, bytes: &[u8]) {
        self.input.queue.extend_from_slice(bytes);
    }

    /// Ends standard input after what is queued.
    pub fn stdin_end(&mut self) {
        self.input.end = true;
    }

    /// Bytes of standard input that were not sent yet.
    pub fn stdin_queued(&self) -> usize {
        self.input.queue.len()
    }

    /// Sends a signal to every process of the session; 9 kills its whole cgroup.
    pub async fn signal(&mut self, signal: u32) -> Result<(), ClientError> {
        self.client.send(Kind::Signal, &signal.to_le_bytes()).await
    }

    /// Tells the size of the terminal.
    pub async fn resize(&mut self, window: crate::Window) -> Result<(), ClientError> {
        let mut payload = window.rows.to_le_bytes().to_vec();
        payload.extend_from_slice(&window.cols.to_le_bytes());
        self.client.send(Kind::Resize, &payload).await
    }

    /// The idle connection, once the exit has been received; `None` before.
    pub fn into_client(self) -> Option<Client<S>> {
        self.ended.then_some(self.client)
    }

    fn input_ready(&self) -> bool {
        let Input { queue, end, sent, taken } = &self.input;
        if queue.is_empty() { *end } else { sent.saturating_sub(*taken) < STDIN_WINDOW }
    }

    /// Encodes what the window allows, one frame at a time, so that an acknowledgement never waits long behind input.
    fn input_frames(&mut self) {
        if !self.input_ready() {
            return;
        }
        let Input { queue, end, sent, taken } = &mut self.input;
        let room = STDIN_WINDOW.saturating_sub(sent.saturating_sub(*taken));
        let length = queue.len().min(CHUNK).min(room as usize);
        if length > 0 {
            encode(Kind::Stdin, &queue.split_to(length), &mut self.client.out);
            *sent += length as u64;
        }
        if queue.is_empty() && *end {
            *end = false;
            encode(Kind::StdinEnd, &[], &mut self.client.out);
        }
    }

    fn taken(&mut self, payload: &[u8]) -> Result<(), ClientError> {
        let bytes = payload.try_into().map_err(|_| ClientError::Protocol("a count is 8 bytes".into()))?;
        let taken = u64::from_le_bytes(bytes);
        if taken > self.input.sent {
            return Err(ClientError::Protocol("the program took input that was not sent".into()));
        }
        self.input.taken = self.input.taken.max(taken);
        Ok(())
    }

    fn output(&mut self, payload: Bytes) -> Result<Bytes, ClientError> {
        let (offset, bytes) = split_output(payload)?;
        if offset < self.offset {
            return Err(ClientError::Protocol("output goes backwards".into()));
        }
        self.offset = offset.saturating_add(bytes.len() as u64);
        Ok(bytes)
    }
}

async fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    tokio::time::timeout(limit, work).await.unwrap_or(Err(ClientError::Timeout))
}

fn parse<T: DeserializeOwned>(payload: &[u8]) -> Result<T, ClientError> {
    serde_json::from_slice(payload)
        .map_err(|error| ClientError::Protocol(format!("a message does not parse: {error}")))
}

fn unexpected(frame: &Frame) -> ClientError {
    ClientError::Protocol(format!("{:?} was not expected here", frame.kind))
}
