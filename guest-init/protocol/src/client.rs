//! The host's side of a conversation, over any stream of bytes.
//!
//! Everything that comes back was written by a hostile guest: lengths are bounded by the decoder, JSON by its frame, and
//! time by the limits given here. A client that returned an error other than [`ClientError::Guest`] is of no further use.

mod exec;

use std::{pin::Pin, task::Poll, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use self::exec::{ExecEvent, ExecStream};
use crate::{
    CHUNK, Decoder, Entry, Exec, Failure, Frame, FrameError, Hello, Kind, LOG_PAGE, LogEnd, LogPart,
    PROTOCOL, PROTOCOL_OLDEST, Request, Started, Written, encode, split_log,
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

/// A page of the log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogPage {
    /// What was written, in order.
    pub parts: Vec<LogPart>,
    /// Where it is.
    pub end: LogEnd,
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

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Client<S> {
    /// Greets the agent. `nonce` should be random.
    pub async fn greet(stream: S, nonce: u64, limit: Duration) -> Result<Self, ClientError> {
        let mut client = Self::new(stream, nonce)?;
        within(limit, async {
            client.flush().await?;
            client.greeted().await
        })
        .await?;
        Ok(client)
    }

    /// Greets the agent and asks for something in the same breath: a guest that was just restored wakes up once for it,
    /// and not twice. The request must be one that may come again.
    pub async fn greet_and_call<T: DeserializeOwned>(
        stream: S,
        nonce: u64,
        request: &Request,
        limit: Duration,
    ) -> Result<(Self, T), ClientError> {
        let mut client = Self::new(stream, nonce)?;
        let answer = within(limit, async {
            client.send_json(Kind::Request, request).await?;
            client.greeted().await?;
            client.done().await
        });
        let answer = answer.await?;
        Ok((client, answer))
    }

    /// A client whose greeting waits to be sent.
    fn new(stream: S, nonce: u64) -> Result<Self, ClientError> {
        let hello = Hello { proto: PROTOCOL, nonce, agent: String::new() };
        let mut client = Self { stream, decoder: Decoder::new(), out: BytesMut::new(), hello: hello.clone() };
        client.push_json(Kind::Hello, &hello)?;
        Ok(client)
    }

    async fn greeted(&mut self) -> Result<(), ClientError> {
        let answer: Hello = match self.receive().await? {
            Frame { kind: Kind::Hello, payload } => parse(&payload)?,
            Frame { kind: Kind::Error, payload } => return Err(parse::<Failure>(&payload)?.into()),
            other => return Err(unexpected(&other)),
        };
        if answer.nonce != self.hello.nonce {
            return Err(ClientError::Protocol("greeting of another time".into()));
        }
        if answer.proto < PROTOCOL_OLDEST {
            return Err(ClientError::Protocol(format!("version {} is too old", answer.proto)));
        }
        self.hello = answer;
        Ok(())
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
            Ok(started) => Ok(ExecStream::new(self, started)),
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
            Ok(started) => Ok(ExecStream::new(self, started)),
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

    /// A page of the log. The limit must be longer than the request waits.
    pub async fn log(&mut self, request: &Request, limit: Duration) -> Result<LogPage, ClientError> {
        within(limit, async {
            self.send_json(Kind::Request, request).await?;
            let (mut parts, mut bytes) = (Vec::new(), 0);
            loop {
                match self.receive().await? {
                    Frame { kind: Kind::Data, payload } => {
                        bytes += payload.len();
                        if bytes > 2 * LOG_PAGE {
                            return Err(ClientError::Protocol("a page of the log is too long".into()));
                        }
                        parts.push(split_log(payload)?);
                    }
                    Frame { kind: Kind::Done, payload } => {
                        return Ok(LogPage { parts, end: parse(&payload)? });
                    }
                    Frame { kind: Kind::Error, payload } => return Err(parse::<Failure>(&payload)?.into()),
                    other => return Err(unexpected(&other)),
                }
            }
        })
        .await
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
        self.push_json(kind, message)?;
        self.flush().await
    }

    fn push_json<T: serde::Serialize>(&mut self, kind: Kind, message: &T) -> Result<(), ClientError> {
        let payload =
            serde_json::to_vec(message).map_err(|error| ClientError::Protocol(error.to_string()))?;
        if payload.len() > crate::MAX_PAYLOAD {
            return Err(
                Failure { code: crate::Code::Invalid, message: "the request is over 1 MiB".into() }.into()
            );
        }
        encode(kind, &payload, &mut self.out);
        Ok(())
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
