//! Lines out of what several programs wrote at the same time: pure, bounded, in the order of their ends.
//!
//! Refuses to know: where the bytes come from, how a line is shown.

use std::collections::{BTreeSet, VecDeque};

use pandastack_protocol::{LogPart, LogStream};

/// Bytes of a line at most; a longer one comes in pieces.
pub const LINE_LIMIT: usize = 16 << 10;
/// Unfinished lines that are held; of more, the oldest comes out as it is.
const OPEN_LIMIT: usize = 64;

/// A line, with its end if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When it began, Unix milliseconds.
    pub unix_ms: u64,
    /// Where it went.
    pub stream: LogStream,
    /// Position behind its last byte.
    pub end: u64,
    /// UTF-8; anything else is replaced.
    pub text: String,
}

/// Lines that are not complete yet, the oldest first.
#[derive(Debug, Default)]
pub struct Lines(VecDeque<Open>);

#[derive(Debug)]
struct Open {
    session: String,
    stream: LogStream,
    unix_ms: u64,
    end: u64,
    bytes: Vec<u8>,
}

impl Open {
    fn line(self) -> Line {
        let text = String::from_utf8_lossy(&self.bytes).into_owned();
        Line { unix_ms: self.unix_ms, stream: self.stream, end: self.end, text }
    }
}

impl Lines {
    /// The next line that comes of a part; takes it from the part's front. `None` when the part is used up.
    pub fn next(&mut self, part: &mut LogPart) -> Option<Line> {
        while !part.bytes.is_empty() {
            let known = |open: &Open| open.stream == part.stream && open.session == part.session;
            let at = match self.0.iter().position(known) {
                Some(at) => at,
                None if self.0.len() == OPEN_LIMIT => return self.0.pop_front().map(Open::line),
                None => {
                    self.0.push_back(Open {
                        session: part.session.clone(),
                        stream: part.stream,
                        unix_ms: part.unix_ms,
                        end: part.position,
                        bytes: Vec::new(),
                    });
                    self.0.len() - 1
                }
            };
            let open = &mut self.0[at];
            let room = LINE_LIMIT.saturating_sub(open.bytes.len());
            let window = &part.bytes[..part.bytes.len().min(room)];
            let newline = window.iter().position(|byte| *byte == b'\n');
            let length = newline.map_or(window.len(), |newline| newline + 1);
            open.bytes.extend_from_slice(&part.bytes.split_to(length));
            part.position = part.position.saturating_add(length as u64);
            open.end = part.position;
            if newline.is_some() {
                return self.0.remove(at).map(Open::line);
            }
            if open.bytes.len() >= LINE_LIMIT {
                return Some(cut(open));
            }
        }
        None
    }

    /// What is left of the oldest unfinished line.
    pub fn rest(&mut self) -> Option<Line> {
        self.0.pop_front().map(Open::line)
    }
}

/// A piece of a long line; a character that is not complete waits for the rest of it.
fn cut(open: &mut Open) -> Line {
    let rest = open.bytes.split_off(last_start(&open.bytes));
    let bytes = std::mem::replace(&mut open.bytes, rest);
    let end = open.end.saturating_sub(open.bytes.len() as u64);
    Open { session: String::new(), stream: open.stream, unix_ms: open.unix_ms, end, bytes }.line()
}

/// Where the last character begins, if it is cut; otherwise the end.
fn last_start(bytes: &[u8]) -> usize {
    let tail = bytes.len().saturating_sub(3);
    for at in (tail..bytes.len()).rev() {
        let need = match bytes[at] {
            0xC0..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF7 => 4,
            0x80..=0xBF => continue,
            _ => break,
        };
        return if bytes.len() - at < need { at } else { bytes.len() };
    }
    bytes.len()
}

/// The ends of the last so many lines: who reads twice knows the second time which they are.
#[derive(Debug)]
pub struct Tail {
    most: usize,
    ends: BTreeSet<u64>,
}

impl Tail {
    /// At most so many.
    pub fn new(most: usize) -> Self {
        Self { most, ends: BTreeSet::new() }
    }

    /// There is a line that ends here.
    pub fn seen(&mut self, end: u64) {
        self.ends.insert(end);
        if self.ends.len() > self.most {
            self.ends.pop_first();
        }
    }

    /// The end of the first of them; `None` without any.
    pub fn first(&self) -> Option<u64> {
        self.ends.first().copied()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn part(session: usize, stream: LogStream, position: u64, bytes: &[u8]) -> LogPart {
        let bytes = Bytes::copy_from_slice(bytes);
        LogPart { position, unix_ms: position, session: format!("{session:020}"), stream, bytes }
    }

    fn lines(lines: &mut Lines, mut part: LogPart) -> Vec<Line> {
        std::iter::from_fn(|| lines.next(&mut part)).collect()
    }

    #[test]
    fn lines_end_where_they_end() {
        let mut held = Lines::default();
        let first = lines(&mut held, part(1, LogStream::Stdout, 10, b"a\nb"));
        assert_eq!((first.len(), &*first[0].text, first[0].end, first[0].unix_ms), (1, "a\n", 12, 10));
        assert_eq!(lines(&mut held, part(1, LogStream::Stderr, 13, b"x\n"))[0].text, "x\n");
        let second = lines(&mut held, part(1, LogStream::Stdout, 15, b"c\n"));
        assert_eq!((&*second[0].text, second[0].end, second[0].unix_ms), ("bc\n", 17, 10));
        assert_eq!(held.rest(), None);
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let text = "é€😀".repeat(LINE_LIMIT / 3);
        let mut held = Lines::default();
        let mut got = lines(&mut held, part(1, LogStream::Stdout, 0, text.as_bytes()));
        got.extend(held.rest());
        assert!(got.len() > 2 && got.iter().all(|line| line.text.len() <= LINE_LIMIT));
        assert_eq!(got.iter().map(|line| &*line.text).collect::<String>(), text);
    }

    proptest! {
        /// Whatever is written how: each stream of each session comes out whole, every line but the last with its end, and
        /// ends go up.
        #[test]
        fn nothing_is_lost_and_nothing_mixed(
            writes in prop::collection::vec(
                (0usize..80, any::<bool>(), prop::collection::vec(prop_oneof![Just(b'\n'), b'a'..=b'd'], 1..9)),
                0..200,
            ),
            most in 0usize..20,
        ) {
            let (mut held, mut got, mut position, mut tail) = (Lines::default(), Vec::new(), 0, Tail::new(most));
            let mut expected = std::collections::BTreeMap::<(usize, bool), String>::new();
            for (session, error, bytes) in writes {
                let stream = if error { LogStream::Stderr } else { LogStream::Stdout };
                expected.entry((session, error)).or_default().push_str(std::str::from_utf8(&bytes).unwrap());
                let before = got.len();
                // Which session it was is told by the text alone in the sum below.
                got.extend(lines(&mut held, part(session, stream, position, &bytes)));
                position += bytes.len() as u64;
                for line in &got[before..] {
                    prop_assert!(line.text.find('\n').is_none_or(|at| at + 1 == line.text.len()));
                }
            }
            got.extend(std::iter::from_fn(|| held.rest()));
            let mut ends: Vec<u64> = got.iter().map(|line| line.end).collect();
            ends.sort_unstable();
            prop_assert!(ends.windows(2).all(|pair| pair[0] < pair[1]));
            got.iter().for_each(|line| tail.seen(line.end));
            let cut = tail.first().unwrap_or(u64::MAX);
            prop_assert_eq!(ends.iter().filter(|end| **end >= cut).count(), most.min(ends.len()));
            for stream in [LogStream::Stdout, LogStream::Stderr] {
                let mut all: Vec<u8> = got.iter().filter(|line| line.stream == stream)
                    .flat_map(|line| line.text.bytes()).collect();
                let mut wanted: Vec<u8> = expected.iter()
                    .filter(|((_, error), _)| *error == (stream == LogStream::Stderr))
                    .flat_map(|(_, text)| text.bytes()).collect();
                all.sort_unstable();
                wanted.sort_unstable();
                prop_assert_eq!(all, wanted);
            }
        }
    }
}
