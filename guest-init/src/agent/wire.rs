//! Frames over a stream, for the agent: one half reads, the other writes, neither waits for the other.

use std::io;

use bytes::BytesMut;
use pandastack_protocol::{CHUNK, Decoder, Failure, Frame, Kind, encode};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};

/// A connection.
pub struct Wire<S> {
    /// What comes in.
    pub incoming: Incoming<S>,
    /// What goes out.
    pub outgoing: Outgoing<S>,
}

/// The reading half.
pub struct Incoming<S> {
    stream: ReadHalf<S>,
    decoder: Decoder,
}

/// The writing half, with what is encoded and not sent.
pub struct Outgoing<S> {
    stream: WriteHalf<S>,
    buffer: BytesMut,
}

impl<S: AsyncRead + AsyncWrite> Wire<S> {
    /// Frames over `stream`.
    pub fn new(stream: S) -> Self {
        let (read, write) = tokio::io::split(stream);
        Self {
            incoming: Incoming { stream: read, decoder: Decoder::new() },
            outgoing: Outgoing { stream: write, buffer: BytesMut::new() },
        }
    }

    /// The stream itself, and the bytes that were read from it and belong to no frame.
    pub fn into_raw(self) -> (S, BytesMut)
    where
        S: Unpin,
    {
        (self.incoming.stream.unsplit(self.outgoing.stream), self.incoming.decoder.into_rest())
    }

    /// The next frame; what waits to be sent goes out first if that one has to be waited for.
    pub async fn next_request(&mut self) -> io::Result<Frame> {
        if let Some(frame) = self.incoming.ready()? {
            return Ok(frame);
        }
        self.outgoing.flush().await?;
        self.incoming.next().await
    }

    /// Sends one JSON frame.
    pub async fn send(&mut self, kind: Kind, message: &impl Serialize) -> io::Result<()> {
        self.outgoing.push_json(kind, message)?;
        self.outgoing.flush().await
    }

    /// Sends how a request ended.
    pub async fn answer<T: Serialize>(&mut self, result: Result<T, Failure>) -> io::Result<()> {
        match result {
            Ok(value) => self.send(Kind::Done, &value).await,
            Err(failure) => self.send(Kind::Error, &bounded(failure)).await,
        }
    }
}

impl<S: AsyncRead> Incoming<S> {
    /// A frame that is here already.
    fn ready(&mut self) -> io::Result<Option<Frame>> {
        self.decoder.next_frame().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    /// The next frame; an error at the end of the stream and when what comes is not the protocol. Cancel-safe.
    pub async fn next(&mut self) -> io::Result<Frame> {
        loop {
            if let Some(frame) = self.ready()? {
                return Ok(frame);
            }
            let buffer = self.decoder.buffer();
            buffer.reserve(16 << 10);
            if self.stream.read_buf(buffer).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

impl<S: AsyncWrite> Outgoing<S> {
    /// Encodes a frame to be sent.
    pub fn push(&mut self, kind: Kind, payload: &[u8]) {
        encode(kind, payload, &mut self.buffer);
    }

    /// Encodes a JSON frame to be sent.
    pub fn push_json(&mut self, kind: Kind, message: &impl Serialize) -> io::Result<()> {
        let payload = serde_json::to_vec(message)?;
        if payload.len() > pandastack_protocol::MAX_PAYLOAD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        self.push(kind, &payload);
        Ok(())
    }

    /// Whether something waits to be sent.
    pub fn is_waiting(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Whether enough waits for now.
    pub fn is_full(&self) -> bool {
        self.buffer.len() >= CHUNK
    }

    /// Sends some of what waits. Cancel-safe.
    pub async fn write(&mut self) -> io::Result<()> {
        if self.stream.write_buf(&mut self.buffer).await? == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        Ok(())
    }

    /// Sends all of what waits.
    pub async fn flush(&mut self) -> io::Result<()> {
        while self.is_waiting() {
            self.write().await?;
        }
        self.stream.flush().await
    }
}

fn bounded(failure: Failure) -> Failure {
    const LONGEST: usize = 1 << 10;
    let mut message = failure.message;
    if message.len() > LONGEST {
        let end = (0..=LONGEST - 4).rev().find(|at| message.is_char_boundary(*at)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    Failure { message, ..failure }
}
