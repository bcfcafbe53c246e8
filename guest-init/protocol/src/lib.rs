//! The vsock wire between the host and the agent in the guest.
//!
//! Owns the frame format, every message, their limits, and the host's side of a conversation. Refuses to know what an
//! exec or a file is to anybody: no processes, no HTTP, no D-Bus.
//!
//! # A connection
//!
//! The host dials (Firecracker's host socket, `CONNECT 52`), the guest listens on [`PORT`].
//!
//! ```text
//! host                               guest
//!  Hello{proto, nonce}        ──►
//!                             ◄──   Hello{proto, nonce, agent}       the connection is now greeted and idle
//!  Request(json)              ──►
//!                             ◄──   … frames of the answer, ending in exactly one terminal frame:
//!                                     Done, Exit or Error            the connection is idle again
//! ```
//!
//! The first request need not wait for the guest's `Hello`.
//!
//! One activity at a time per connection, so the kernel gives flow control and cancellation. Only [`Request::Forward`]
//! takes the connection for good: after its `Ready` the bytes are raw in both directions. While idle the guest ignores
//! frames that belong to an activity that ended before they arrived (`Stdin`, `StdinEnd`, `Ack`, `Signal`, `Data`, `DataEnd`).
//!
//! # A frame
//!
//! `kind: u8`, `length: u32` little endian, then `length` bytes, at most [`MAX_PAYLOAD`]. Unknown kinds are skipped, unknown
//! JSON fields ignored: both sides may be of different ages. **Every protocol version ever shipped stays supported**,
//! because old snapshots hold old agents; the golden bytes in `tests/` are the proof.
//!
//! # Sessions
//!
//! An exec is a session in the guest, not a connection. Its output is one sequence of bytes over both streams, counted
//! from 0; every [`Kind::Stdout`]/[`Kind::Stderr`] payload starts with the offset of its first byte (`u64` little endian).
//! The guest keeps what the host has not acknowledged ([`Kind::Ack`], payload `u64`: everything below it was received)
//! in a buffer of [`REPLAY_BYTES`]: full means back-pressure while a host is attached, and dropping of the oldest bytes,
//! counted, while none is. A lost connection leaves the session; [`Request::Attach`] goes on at an offset. What the host
//! wants ended it ends with [`Request::Kill`] or [`Kind::Signal`].
//!
//! Sessions outlive captures. In the guest that was captured and in one that woke ([`Identity::unique`] absent) they wait
//! for their hosts [`ORPHAN_SECONDS`] of guest time from then on. In a copy (`unique` present) those that run are
//! detached from then on: anybody may attach, nobody has to.
//!
//! Standard input has a window: the host has at most [`STDIN_WINDOW`] bytes on the way that [`Kind::StdinTaken`] has not
//! reported. So the guest never has to stop reading a connection, and acknowledgements and signals always get through.
//! [`Started::stdin`] says where input goes on after an `Attach`.

//! # The log
//!
//! Beside its replay buffer, which belongs to whoever is attached, everything that programs write to their pipes goes into one
//! log of [`LOG_BYTES`] over all sessions, one sequence of bytes counted from 0, the oldest dropped first. It is in the guest's
//! memory, so captures, copies and hibernation keep it; a boot begins a new *life* of it. Terminals stay out of it. A program
//! that ends in the middle of a line gets a newline there. [`Request::Log`] reads a page at a position.

mod client;
mod frame;
mod message;

pub use client::{Client, ClientError, ExecEvent, ExecStream, LogPage};
pub use frame::{
    Decoder, Frame, FrameError, Kind, LOG_HEAD, LogPart, LogStream, encode, log_payload, output_payload,
    split_log, split_output,
};
pub use message::*;

/// vsock port the agent listens on.
pub const PORT: u32 = 52;
/// Newest version of this protocol.
pub const PROTOCOL: u16 = 1;
/// Oldest version still spoken.
pub const PROTOCOL_OLDEST: u16 = 1;
/// Bytes of payload in one frame at most.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Bytes of file or process data that a sender puts into one frame.
pub const CHUNK: usize = 64 << 10;
/// Bytes of output that a session keeps for re-attachment.
pub const REPLAY_BYTES: usize = 1 << 20;
/// Bytes of log that a guest keeps.
pub const LOG_BYTES: usize = 1 << 20;
/// Bytes of parts, heads included, in one page of the log at most.
pub const LOG_PAGE: usize = 128 << 10;
/// Milliseconds that a reader of the log can be made to wait for something new.
pub const LOG_WAIT_MS: u64 = 30_000;
/// The host acknowledges at least once in this many bytes.
pub const ACK_EVERY: u64 = 128 << 10;
/// Bytes of standard input that may be on their way to a program.
pub const STDIN_WINDOW: u64 = 256 << 10;
/// Seconds for which a session that did not ask to be detached runs on without a host attached.
pub const ORPHAN_SECONDS: u64 = 60;
