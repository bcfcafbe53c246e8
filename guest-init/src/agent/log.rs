//! What the programs of all sessions wrote, for whoever looks later: bounded, counted, in order.
//!
//! One sequence of bytes over all sessions and streams, numbered from 0. Owns what is kept and what is dropped; refuses to know
//! lines, pipes and connections.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use pandastack_protocol::{CHUNK, LOG_BYTES, LOG_HEAD, LOG_PAGE, LogEnd, LogPart, LogStream};
use tokio::sync::watch;

use super::replay::Stream;

/// What a part costs beside its bytes, so that alternating single bytes are bounded, too.
const PART_COST: usize = 64;
/// What one program writes within this is one part.
const TOGETHER_MS: u64 = 1000;
/// Parts in one page at most.
const PAGE_PARTS: usize = 1024;

/// The log of a guest.
#[derive(Debug)]
pub struct Log {
    life: u64,
    ring: Mutex<Ring>,
    changed: watch::Sender<()>,
}

impl Default for Log {
    fn default() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { life: (now.as_nanos() as u64).max(1), ring: Mutex::default(), changed: watch::channel(()).0 }
    }
}

impl Log {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes from now on.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// A page from `position` of this life on, of all sessions or one.
    pub fn page(&self, life: u64, position: u64, session: &str) -> (Vec<LogPart>, LogEnd) {
        let ring = self.ring();
        // What another life counted means nothing here.
        let position = if life != 0 && life != self.life { 0 } else { position };
        let (parts, next) = ring.read(position, session);
        let end = LogEnd { life: self.life, start: ring.start, next, end: ring.end() };
        (parts, end)
    }
}

/// The pen of one session.
#[derive(Debug)]
pub struct Writer {
    log: Arc<Log>,
    session: Arc<str>,
    /// Streams that are in the middle of a line.
    open: Mutex<[bool; 2]>,
}

impl Writer {
    /// For this session.
    pub fn new(log: Arc<Log>, session: &str) -> Self {
        Self { log, session: session.into(), open: Mutex::default() }
    }

    /// Adds what the session's programs wrote.
    pub fn write(&self, stream: Stream, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open[usize::from(stream == Stream::Stderr)] = *last != b'\n';
        self.add(stream, bytes);
    }

    /// Ends unfinished lines: nobody is there who would.
    pub fn finish(&self) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (stream, open) in [Stream::Stdout, Stream::Stderr].into_iter().zip(open.iter_mut()) {
            if std::mem::take(open) {
                self.add(stream, b"\n");
            }
        }
    }

    fn add(&self, stream: Stream, bytes: &[u8]) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stream = match stream {
            Stream::Stdout => LogStream::Stdout,
            Stream::Stderr => LogStream::Stderr,
        };
        self.log.ring().push(&self.session, stream, now.as_millis() as u64, bytes);
        self.log.changed.send_replace(());
    }
}

/// What is kept: `start..start + bytes.len()`.
#[derive(Debug)]
struct Ring {
    bytes: VecDeque<u8>,
    parts: VecDeque<Part>,
    start: u64,
    capacity: usize,
}

#[derive(Debug)]
struct Part {
    session: Arc<str>,
    stream: LogStream,
    unix_ms: u64,
    length: usize,
}

impl Default for Ring {
    fn default() -> Self {
        Self::new(LOG_BYTES)
    }
}

impl Ring {
    fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), parts: VecDeque::new(), start: 0, capacity }
    }

    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn weight(&self) -> usize {
        self.bytes.len() + self.parts.len() * PART_COST
    }

    fn push(&mut self, session: &Arc<str>, stream: LogStream, unix_ms: u64, bytes: &[u8]) {
        for bytes in bytes.chunks(CHUNK) {
            self.bytes.extend(bytes);
            let last = self.parts.back_mut().filter(|last| {
                Arc::ptr_eq(&last.session, session)
                    && last.stream == stream
                    && unix_ms.abs_diff(last.unix_ms) < TOGETHER_MS
                    && last.length + bytes.len() <= CHUNK
            });
            match last {
                Some(last) => last.length += bytes.len(),
                None => {
                    let session = Arc::clone(session);
                    self.parts.push_back(Part { session, stream, unix_ms, length: bytes.len() });
                }
            }
            while self.weight() > self.capacity && self.drop_oldest() {}
        }
    }

    /// Drops what is too much of the oldest part, to the end of a line if it has one.
    fn drop_oldest(&mut self) -> bool {
        let over = self.weight().saturating_sub(self.capacity);
        let Some(first) = self.parts.front_mut() else { return false };
        let most = first.length;
        let rest = self.bytes.range(over.clamp(1, most) - 1..most);
        let count = rest.take_while(|byte| **byte != b'\n').count() + over.clamp(1, most);
        let count = count.min(most);
        first.length -= count;
        if first.length == 0 {
            self.parts.pop_front();
        }
        self.bytes.drain(..count);
        self.start += count as u64;
        true
    }

    /// A page from `position` on, and where the next one begins.
    fn read(&self, position: u64, session: &str) -> (Vec<LogPart>, u64) {
        let from = if position > self.end() { self.start } else { position.max(self.start) };
        let mut skip = (from - self.start) as usize;
        let (mut parts, mut next, mut offset, mut room) = (Vec::new(), from, 0, LOG_PAGE);
        for part in &self.parts {
            let begin = offset;
            offset += part.length;
            if skip >= part.length {
                skip -= part.length;
                continue;
            }
            let begin = begin + std::mem::take(&mut skip);
            if session.is_empty() || *part.session == *session {
                if room <= LOG_HEAD || parts.len() == PAGE_PARTS {
                    break;
                }
                let length = (offset - begin).min(room - LOG_HEAD);
                room -= length + LOG_HEAD;
                parts.push(LogPart {
                    position: self.start + begin as u64,
                    unix_ms: part.unix_ms,
                    session: part.session.to_string(),
                    stream: part.stream,
                    bytes: self.bytes.range(begin..begin + length).copied().collect(),
                });
                next = self.start + (begin + length) as u64;
                if begin + length < offset {
                    break;
                }
            } else {
                next = self.start + offset as u64;
            }
        }
        (parts, next)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sessions() -> [Arc<str>; 3] {
        ["aaaaaaaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbbbbbbb", "cccccccccccccccccccc"].map(Into::into)
    }

    #[test]
    fn a_program_that_ends_within_a_line_gets_its_newline() {
        let log = Arc::<Log>::default();
        let writer = Writer::new(Arc::clone(&log), "aaaaaaaaaaaaaaaaaaaa");
        writer.write(Stream::Stdout, b"a\n");
        writer.write(Stream::Stderr, b"b");
        writer.finish();
        writer.finish();
        let (parts, end) = log.page(0, 0, "");
        let text: Vec<_> = parts.iter().map(|part| (part.stream, &part.bytes[..])).collect();
        assert_eq!(text, [(LogStream::Stdout, &b"a\n"[..]), (LogStream::Stderr, b"b\n")]);
        assert_eq!((end.start, end.next, end.end), (0, 4, 4));
        assert_eq!(log.page(end.life, 4, "").0, []);
        assert_eq!(log.page(end.life + 1, 4, "").0.len(), 2, "another life begins at its start");
    }

    #[test]
    fn what_is_dropped_goes_by_lines() {
        let mut ring = Ring::new(PART_COST + 10);
        let [a, ..] = sessions();
        ring.push(&a, LogStream::Stdout, 0, b"12345\n789\n");
        ring.push(&a, LogStream::Stdout, 0, b"x");
        let (parts, next) = ring.read(0, "");
        assert_eq!((parts[0].position, &parts[0].bytes[..], next), (6, &b"789\nx"[..], 11));
    }

    proptest! {
        /// Whoever reads page by page gets every byte that is still there once, in order, with its session and stream.
        #[test]
        fn pages_are_what_was_written(
            writes in prop::collection::vec((0usize..3, any::<bool>(), 0usize..600, 0u64..3000), 0..60),
            capacity in 200usize..20_000,
            only in prop::option::of(0usize..3),
            starts in prop::collection::vec(0u64..40_000, 1..4),
        ) {
            let all = sessions();
            let mut ring = Ring::new(capacity);
            let (mut model, mut now) = (Vec::new(), 0);
            for (session, error, length, later) in writes {
                now += later;
                let stream = if error { LogStream::Stderr } else { LogStream::Stdout };
                let bytes: Vec<u8> =
                    (0..length).map(|i| if i % 37 == 36 { b'\n' } else { (model.len() + i) as u8 }).collect();
                model.extend(bytes.iter().map(|byte| (session, stream, *byte)));
                ring.push(&all[session], stream, now, &bytes);
                prop_assert!(ring.weight() <= capacity);
                prop_assert_eq!(ring.end(), model.len() as u64);
            }
            let filter = only.map_or("", |only| &all[only]);
            for start in starts {
                let mut position = start;
                let first = if start > ring.end() { ring.start } else { start.max(ring.start) };
                let mut got = Vec::new();
                loop {
                    let (parts, next) = ring.read(position, filter);
                    for part in &parts {
                        let session = all.iter().position(|id| **id == *part.session).unwrap_or(9);
                        let at = part.position..;
                        got.extend(at.zip(&part.bytes).map(|(at, byte)| (at, session, part.stream, *byte)));
                    }
                    if next == ring.end() {
                        break;
                    }
                    prop_assert!(next > position || position > ring.end() || position < ring.start);
                    position = next;
                }
                let expected: Vec<_> = model
                    .iter()
                    .enumerate()
                    .skip(first as usize)
                    .filter(|(_, (session, ..))| only.is_none_or(|only| only == *session))
                    .map(|(at, (session, stream, byte))| (at as u64, *session, *stream, *byte))
                    .collect();
                prop_assert_eq!(got, expected);
            }
        }
    }
}
