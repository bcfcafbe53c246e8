//! The output of a session that the host has not acknowledged: pure, bounded, counted.
//!
//! One sequence of bytes over both streams, numbered from 0. Owns the decision when to stop reading a program and what to
//! drop; refuses to know pipes, connections and time.

use std::collections::VecDeque;

use pandastack_protocol::{CHUNK, REPLAY_BYTES};

/// Which of a program's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, and everything of a terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a change of stream costs beside its bytes, so that alternating single bytes are bounded, too.
const SEGMENT_COST: usize = 16;

/// Kept output: `start..end`, of which everything below `start` was acknowledged or dropped.
#[derive(Debug)]
pub struct Replay {
    bytes: VecDeque<u8>,
    segments: VecDeque<(Stream, usize)>,
    start: u64,
    end: u64,
    dropped: u64,
    capacity: usize,
}

impl Default for Replay {
    fn default() -> Self {
        Self::new(REPLAY_BYTES)
    }
}

impl Replay {
    /// An empty buffer that holds `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), segments: VecDeque::new(), start: 0, end: 0, dropped: 0, capacity }
    }

    /// Changes the capacity; what is over it is dropped by the next [`Replay::push`], not now.
    pub fn set_capacity(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    /// How many bytes to read from the program now: 0 means back-pressure, which there is only while a host is attached.
    pub fn wanted(&self, attached: bool) -> usize {
        if attached { self.capacity.saturating_sub(self.weight() + SEGMENT_COST).min(CHUNK) } else { CHUNK }
    }

    /// Adds output; drops the oldest, and counts it, where there is no room.
    pub fn push(&mut self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        self.bytes.extend(bytes);
        self.end += bytes.len() as u64;
        match self.segments.back_mut() {
            Some((last, length)) if *last == stream => *length += bytes.len(),
            _ => self.segments.push_back((stream, bytes.len())),
        }
        while self.weight() > self.capacity && !self.bytes.is_empty() {
            let over = self.weight() - self.capacity;
            let first = self.segments.front().map_or(0, |(_, length)| *length);
            let count = over.min(first);
            self.release(count);
            self.dropped += count as u64;
        }
    }

    /// Forgets everything below `offset`, which the host has. An offset that was never sent counts as the end.
    pub fn ack(&mut self, offset: u64) {
        let offset = offset.min(self.end);
        if offset > self.start {
            self.release((offset - self.start) as usize);
        }
    }

    /// The first kept bytes at or after `offset`, of one stream, at most `limit`: their offset, stream and bytes.
    pub fn read(&self, offset: u64, limit: usize) -> Option<(u64, Stream, Vec<u8>)> {
        let offset = offset.max(self.start);
        let mut skip = usize::try_from(offset - self.start).ok()?;
        let mut position = skip;
        for (stream, length) in &self.segments {
            if skip < *length {
                let count = (length - skip).min(limit);
                let bytes = self.range(position, count);
                position += count;
                debug_assert!(position <= self.bytes.len());
                return Some((offset, *stream, bytes));
            }
            skip -= length;
        }
        None
    }

    /// Offset of the oldest byte kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of output in all.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Bytes lost because nobody took them in time.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Bytes of memory that count against the capacity.
    pub fn weight(&self) -> usize {
        self.bytes.len() + self.segments.len() * SEGMENT_COST
    }

    fn range(&self, from: usize, count: usize) -> Vec<u8> {
        let (front, back) = self.bytes.as_slices();
        let mut out = Vec::with_capacity(count);
        if from < front.len() {
            out.extend_from_slice(&front[from..(from + count).min(front.len())]);
        }
        let from = from.saturating_sub(front.len());
        out.extend_from_slice(&back[from..from + count - out.len()]);
        out
    }

    fn release(&mut self, count: usize) {
        self.bytes.drain(..count);
        self.start += count as u64;
        let mut left = count;
        while left > 0 {
            let Some((_, length)) = self.segments.front_mut() else { break };
            let now = left.min(*length);
            *length -= now;
            left -= now;
            if *length == 0 {
                self.segments.pop_front();
            }
        }
        if self.bytes.is_empty() && self.bytes.capacity() > CHUNK {
            self.bytes = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Push(bool, Vec<u8>),
        Ack(u64),
        Read(u64, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (any::<bool>(), prop::collection::vec(any::<u8>(), 0..300)).prop_map(|(e, b)| Step::Push(e, b)),
            (0u64..5000).prop_map(Step::Ack),
            (0u64..5000, 1usize..200).prop_map(|(o, l)| Step::Read(o, l)),
        ]
    }

    proptest! {
        /// Against the simplest model: everything ever pushed, in a list.
        #[test]
        fn behaves_like_a_list_of_all_bytes(
            capacity in 64usize..1000,
            steps in prop::collection::vec(step(), 0..80),
        ) {
            let mut replay = Replay::new(capacity);
            let mut all: Vec<(Stream, u8)> = Vec::new();
            let mut acked = 0;
            for step in steps {
                match step {
                    Step::Push(error, bytes) => {
                        let stream = if error { Stream::Stderr } else { Stream::Stdout };
                        let before = (replay.start(), replay.dropped());
                        replay.push(stream, &bytes);
                        all.extend(bytes.iter().map(|byte| (stream, *byte)));
                        prop_assert_eq!(replay.start() - before.0, replay.dropped() - before.1);
                    }
                    Step::Ack(offset) => {
                        replay.ack(offset);
                        acked = acked.max(offset.min(all.len() as u64));
                        prop_assert!(replay.start() >= acked);
                    }
                    Step::Read(offset, limit) => {
                        let from = offset.max(replay.start());
                        match replay.read(offset, limit) {
                            None => prop_assert!(from >= all.len() as u64),
                            Some((at, stream, bytes)) => {
                                prop_assert_eq!(at, from);
                                prop_assert!(!bytes.is_empty() && bytes.len() <= limit);
                                let expected = &all[at as usize..at as usize + bytes.len()];
                                prop_assert!(expected.iter().zip(&bytes).all(|(e, b)| e.0 == stream && e.1 == *b));
                            }
                        }
                    }
                }
                prop_assert_eq!(replay.end(), all.len() as u64);
                prop_assert!(replay.weight() <= capacity);
            }
        }

        /// What is read only as wanted while attached is never dropped.
        #[test]
        fn nothing_is_dropped_while_attached(
            capacity in 64usize..5000,
            sizes in prop::collection::vec((any::<bool>(), 0usize..3000, any::<bool>()), 0..80),
        ) {
            let mut replay = Replay::new(capacity);
            for (error, size, ack) in sizes {
                let size = size.min(replay.wanted(true));
                replay.push(if error { Stream::Stderr } else { Stream::Stdout }, &vec![7; size]);
                if ack {
                    replay.ack(replay.end());
                    prop_assert!(replay.wanted(true) > 0);
                }
            }
            prop_assert_eq!(replay.dropped(), 0);
        }
    }
}
