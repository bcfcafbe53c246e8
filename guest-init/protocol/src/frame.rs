//! Frames: pure encoding and decoding, no input or output.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::MAX_PAYLOAD;

/// What a frame is. The numbers are the wire and never change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON [`crate::Hello`].
    Hello = 1,
    /// JSON [`crate::Request`].
    Request = 2,
    /// The guest is ready for, or about to send, data; JSON that depends on the request.
    Ready = 3,
    /// Terminal: success; JSON that depends on the request.
    Done = 4,
    /// Terminal: JSON [`crate::Failure`].
    Error = 5,
    /// JSON [`crate::Started`].
    Started = 6,
    /// Terminal: JSON [`crate::Exit`].
    Exit = 7,
    /// Bytes for the program.
    Stdin = 16,
    /// No more of them.
    StdinEnd = 17,
    /// `u64` offset, bytes.
    Stdout = 18,
    /// `u64` offset, bytes.
    Stderr = 19,
    /// `u64`: every byte of output below it was received.
    Ack = 20,
    /// `u32` signal number for the session's processes.
    Signal = 21,
    /// `u16` rows, `u16` columns.
    Resize = 22,
    /// `u64`: bytes of standard input, counted from the session's start, that the program took or will never take.
    StdinTaken = 23,
    /// Bytes of a file, a listing or a log.
    Data = 32,
    /// No more of them.
    DataEnd = 33,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        const ALL: [Kind; 17] = [
            Kind::Hello,
            Kind::Request,
            Kind::Ready,
            Kind::Done,
            Kind::Error,
            Kind::Started,
            Kind::Exit,
            Kind::Stdin,
            Kind::StdinEnd,
            Kind::Stdout,
            Kind::Stderr,
            Kind::Ack,
            Kind::Signal,
            Kind::Resize,
            Kind::StdinTaken,
            Kind::Data,
            Kind::DataEnd,
        ];
        ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub payload: Bytes,
}

/// The other side does not speak this protocol; the connection is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A length over [`MAX_PAYLOAD`].
    #[error("frame of {0} bytes is over the limit")]
    TooLong(u64),
    /// An output frame shorter than its offset.
    #[error("output frame without an offset")]
    ShortOutput,
    /// A part of a log without its head, or with one that means nothing.
    #[error("log frame without a proper head")]
    BadLog,
}

const HEADER: usize = 5;

/// Appends a frame. The payload must not be over [`MAX_PAYLOAD`] (senders cut at [`crate::CHUNK`]).
pub fn encode(kind: Kind, payload: &[u8], out: &mut BytesMut) {
    assert!(payload.len() <= MAX_PAYLOAD, "senders cut data into chunks");
    out.reserve(HEADER + payload.len());
    out.put_u8(kind as u8);
    out.put_u32_le(payload.len() as u32);
    out.put_slice(payload);
}

/// The payload of an output frame.
pub fn output_payload(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + bytes.len());
    payload.extend_from_slice(&offset.to_le_bytes());
    payload.extend_from_slice(bytes);
    payload
}

/// Offset and bytes of an output frame's payload.
pub fn split_output(mut payload: Bytes) -> Result<(u64, Bytes), FrameError> {
    if payload.len() < 8 {
        return Err(FrameError::ShortOutput);
    }
    let offset = payload.get_u64_le();
    Ok((offset, payload))
}

/// Bytes of a log payload before the text.
pub const LOG_HEAD: usize = 8 + 8 + 20 + 1;

/// Which of a program's outputs a part of the log came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What one program wrote, as a log keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPart {
    /// Position of its first byte in the log.
    pub position: u64,
    /// When that was written, Unix milliseconds on the guest's clock.
    pub unix_ms: u64,
    /// Session, 20 characters of `[a-z0-9]`.
    pub session: String,
    /// Where to.
    pub stream: LogStream,
    /// Bytes.
    pub bytes: Bytes,
}

/// The payload of a `Data` frame that answers `Log`: position and Unix milliseconds (`u64` little endian each), 20 bytes of
/// session id, 1 for standard output or 2 for standard error, then the bytes. `None` for a session id of another length.
pub fn log_payload(
    position: u64,
    unix_ms: u64,
    session: &str,
    stream: LogStream,
    bytes: &[u8],
) -> Option<Vec<u8>> {
    let session: [u8; 20] = session.as_bytes().try_into().ok()?;
    let mut payload = Vec::with_capacity(LOG_HEAD + bytes.len());
    payload.extend_from_slice(&position.to_le_bytes());
    payload.extend_from_slice(&unix_ms.to_le_bytes());
    payload.extend_from_slice(&session);
    payload.push(match stream {
        LogStream::Stdout => 1,
        LogStream::Stderr => 2,
    });
    payload.extend_from_slice(bytes);
    Some(payload)
}

/// What is in such a payload.
pub fn split_log(mut payload: Bytes) -> Result<LogPart, FrameError> {
    if payload.len() < LOG_HEAD {
        return Err(FrameError::BadLog);
    }
    let position = payload.get_u64_le();
    let unix_ms = payload.get_u64_le();
    let session = payload.split_to(20);
    if !session.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
        return Err(FrameError::BadLog);
    }
    let stream = match payload.get_u8() {
        1 => LogStream::Stdout,
        2 => LogStream::Stderr,
        _ => return Err(FrameError::BadLog),
    };
    let session = String::from_utf8_lossy(&session).into_owned();
    Ok(LogPart { position, unix_ms, session, stream, bytes: payload })
}

/// Cuts a stream of bytes into frames; holds at most one incomplete frame beside what is fed at once.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    skip: usize,
}

impl Decoder {
    /// A decoder at the start of a frame.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where to read bytes into.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Bytes that were read and belong to no frame yet: what follows when a connection turns raw.
    pub fn into_rest(self) -> BytesMut {
        self.buffer
    }

    /// The next whole frame, `None` until more bytes are there. Frames of unknown kinds are skipped without being held.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if self.skip > 0 {
                let now = self.skip.min(self.buffer.len());
                self.buffer.advance(now);
                self.skip -= now;
                if self.skip > 0 {
                    return Ok(None);
                }
            }
            if self.buffer.len() < HEADER {
                return Ok(None);
            }
            let length =
                u32::from_le_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]) as usize;
            if length > MAX_PAYLOAD {
                return Err(FrameError::TooLong(length as u64));
            }
            let Some(kind) = Kind::from_byte(self.buffer[0]) else {
                self.buffer.advance(HEADER);
                self.skip = length;
                continue;
            };
            if self.buffer.len() < HEADER + length {
                self.buffer.reserve(HEADER + length - self.buffer.len());
                return Ok(None);
            }
            self.buffer.advance(HEADER);
            return Ok(Some(Frame { kind, payload: self.buffer.split_to(length).freeze() }));
        }
    }
}
