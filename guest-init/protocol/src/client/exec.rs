//! An attached session: output and its acknowledgement, input within its window.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Client, ClientError, parse, unexpected};
use crate::{
    ACK_EVERY, CHUNK, Exit, Failure, Kind, REPLAY_BYTES, STDIN_WINDOW, Started, encode, split_output,
};

/// Unacknowledged bytes with which the host may wait: half of what an agent that is short of memory keeps of a session
/// before it stops reading the program.
const WAIT_WITH: u64 = 16 << 10;
/// How long nothing may come before more than that is acknowledged although it was to be kept: the agent may be the one
/// that waits.
const QUIET: Duration = Duration::from_secs(1);
/// How long nothing may come before the last acknowledgement is said again: a guest whose connections a capture cut does not
/// tell, but refuses what it is sent.
const PROBE: Duration = Duration::from_secs(2);

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

/// Standard input on its way: what was given and not sent, and how much of what was sent is not taken yet.
#[derive(Debug, Default)]
struct Input {
    queue: BytesMut,
    end: bool,
    sent: u64,
    taken: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> ExecStream<S> {
    pub(super) fn new(client: Client<S>, started: Started) -> Self {
        let offset = started.offset;
        let input = Input { sent: started.stdin, taken: started.stdin, ..Input::default() };
        Self { client, started, offset, acked: offset, keep: 0, ended: false, input }
    }

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
            let keeps_much = self.offset - self.acked > WAIT_WITH;
            let patience = if keeps_much { QUIET } else { PROBE };
            match tokio::time::timeout(patience, self.client.exchange(more)).await {
                Ok(exchanged) => exchanged?,
                Err(_) if keeps_much => self.ack(WAIT_WITH),
                Err(_) => encode(Kind::Ack, &self.acked.to_le_bytes(), &mut self.client.out),
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

    /// Bytes of standard input, counted from the session's start, that the program took or will never take.
    pub fn stdin_taken(&self) -> u64 {
        self.input.taken
    }

    /// Queues a signal to every process of the session; 9 kills its whole cgroup. Travels like standard input, before it.
    pub fn signal(&mut self, signal: u32) {
        encode(Kind::Signal, &signal.to_le_bytes(), &mut self.client.out);
    }

    /// Queues the size of the terminal. Travels like standard input, before it.
    pub fn resize(&mut self, window: crate::Window) {
        let mut payload = window.rows.to_le_bytes().to_vec();
        payload.extend_from_slice(&window.cols.to_le_bytes());
        encode(Kind::Resize, &payload, &mut self.client.out);
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
