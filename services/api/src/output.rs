//! What a command wrote, made fit for clients: pure functions, no input or output.
//!
//! Owns: UTF-8 across chunk borders, ASCII-only JSON, event framing, the cap on collected output.
//! Refuses to know: where the bytes come from.

use std::{
    collections::HashMap,
    fmt::Write,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of each stream that a plain exec returns at most; the rest is read and thrown away.
pub const STREAM_CAP: usize = 16 << 20;
/// Bytes of collected output that all execs of this process hold together at most.
pub const TOTAL_CAP: usize = 512 << 20;
const BLOCK: usize = 64 << 10;

/// Decodes a stream of bytes chunk by chunk: a character cut by a chunk border is held back, anything invalid becomes
/// U+FFFD exactly as if the whole had been decoded at once.
#[derive(Debug, Default)]
pub struct Utf8 {
    held: Vec<u8>,
}

impl Utf8 {
    /// The text of what is complete so far.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        let joined;
        let mut rest = if self.held.is_empty() {
            bytes
        } else {
            joined = [self.held.as_slice(), bytes].concat();
            self.held.clear();
            joined.as_slice()
        };
        let mut text = String::with_capacity(rest.len());
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    return text;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    match error.error_len() {
                        Some(length) => {
                            text.push('\u{FFFD}');
                            rest = &after[length..];
                        }
                        None => {
                            self.held = after.to_vec();
                            return text;
                        }
                    }
                }
            }
        }
    }

    /// Bytes that are held back.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// What was held back, at the end of the stream.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.held).is_empty() { String::new() } else { '\u{FFFD}'.to_string() }
    }
}

/// Appends a JSON string literal of ASCII characters only.
pub fn ascii_json(text: &str, out: &mut String) {
    out.reserve(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

/// Appends a value as JSON of ASCII characters only.
pub fn ascii_object(value: &impl serde::Serialize, out: &mut String) {
    // Outside of its strings JSON is ASCII anyway, and within them an escape may stand for any character.
    for c in serde_json::to_string(value).unwrap_or_else(|_| "{}".into()).chars() {
        match c {
            ' '..='~' => out.push(c),
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
}

/// An event that carries text: `stdout`, `stderr`.
pub fn chunk_event(event: &str, text: &str) -> Bytes {
    let mut out = format!("event: {event}\ndata: {{\"chunk\":");
    ascii_json(text, &mut out);
    out.push_str("}\n\n");
    out.into()
}

/// As [`chunk_event`]; `offset` is that of the text's first byte in the output of both streams, `next` where to go on.
pub fn placed_event(event: &str, text: &str, offset: u64, next: u64) -> Bytes {
    let mut out = format!("event: {event}\ndata: {{\"offset\":{offset},\"next\":{next},\"chunk\":");
    ascii_json(text, &mut out);
    out.push_str("}\n\n");
    out.into()
}

/// Appends an event with a line of a log.
pub fn line_event(line: &str, out: &mut String) {
    out.push_str("event: line\ndata: {\"line\":");
    ascii_json(line, out);
    out.push_str("}\n\n");
}

/// An event of a session that carries numbers and plain ASCII only.
pub fn plain_event(event: &str, data: &serde_json::Value) -> Bytes {
    format!("event: {event}\ndata: {data}\n\n").into()
}

/// The terminal event of a command that ended.
pub fn exit_event(exit_code: i32, duration_ms: u64) -> Bytes {
    format!("event: exit\ndata: {{\"exit_code\":{exit_code},\"duration_ms\":{duration_ms}}}\n\n").into()
}

/// The terminal event of anything else.
pub fn error_event(message: &str) -> Bytes {
    let mut out = String::from("event: error\ndata: {\"error\":");
    ascii_json(message, &mut out);
    out.push_str("}\n\n");
    out.into()
}

/// A comment that keeps the connection busy.
pub const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// Memory for collected output, shared by every exec of the process. A workspace gets a quarter of it at most, so that one
/// cannot take the others' output away.
#[derive(Debug, Clone)]
pub struct Budget(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    total: Arc<Semaphore>,
    blocks_each: usize,
    shares: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(TOTAL_CAP)
    }
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: usize) -> Self {
        let blocks = bytes / BLOCK;
        let total = Arc::new(Semaphore::new(blocks));
        Self(Arc::new(Pool { total, blocks_each: blocks / 4, shares: Mutex::default() }))
    }

    /// The part that a workspace may use.
    pub fn of(&self, workspace: &str) -> Share {
        let mut shares = self.0.shares.lock().unwrap_or_else(PoisonError::into_inner);
        // Whose share is whole again need not be remembered.
        shares.retain(|_, share| Arc::strong_count(share) > 1);
        let own = shares
            .entry(workspace.to_owned())
            .or_insert_with(|| Arc::new(Semaphore::new(self.0.blocks_each)));
        Share { total: Arc::clone(&self.0.total), own: Arc::clone(own) }
    }
}

/// What a workspace may use of the budget.
#[derive(Debug, Clone)]
pub struct Share {
    total: Arc<Semaphore>,
    own: Arc<Semaphore>,
}

impl Share {
    fn block(&self) -> Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
        let own = Arc::clone(&self.own).try_acquire_owned().ok()?;
        Some((own, Arc::clone(&self.total).try_acquire_owned().ok()?))
    }
}

/// One collected stream.
#[derive(Debug)]
pub struct Collected {
    bytes: BytesMut,
    permits: Vec<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
    share: Share,
    cap: usize,
    /// Something was thrown away.
    pub truncated: bool,
}

impl Collected {
    /// Nothing yet, at most `cap` bytes.
    pub fn new(share: &Share, cap: usize) -> Self {
        Self { bytes: BytesMut::new(), permits: Vec::new(), share: share.clone(), cap, truncated: false }
    }

    /// Keeps what fits.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.truncated || bytes.is_empty() {
            self.truncated |= !bytes.is_empty();
            return;
        }
        let mut room = self.cap - self.bytes.len();
        let wanted = self.bytes.len() + bytes.len().min(room);
        // The first block is free: short output is whole, whatever others do.
        while (self.permits.len() + 1) * BLOCK < wanted {
            match self.share.block() {
                Some(block) => self.permits.push(block),
                None => {
                    room = ((self.permits.len() + 1) * BLOCK).saturating_sub(self.bytes.len()).min(room);
                    break;
                }
            }
        }
        self.truncated = bytes.len() > room;
        self.bytes.put_slice(&bytes[..bytes.len().min(room)]);
    }

    /// Appends text of ours, beyond any cap.
    pub fn note(&mut self, text: &str) {
        if !self.bytes.is_empty() && !self.bytes.ends_with(b"\n") {
            self.bytes.put_u8(b'\n');
        }
        self.bytes.put_slice(text.as_bytes());
    }

    /// How much there is.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What there is.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The text as pieces of the inside of a JSON string literal, in order, none of them large.
    pub fn json_pieces(&self) -> impl Iterator<Item = String> + '_ {
        let mut decoder = Utf8::default();
        let mut parts = self.bytes.chunks(BLOCK);
        let mut ended = false;
        std::iter::from_fn(move || {
            if ended {
                return None;
            }
            let text = match parts.next() {
                Some(part) => decoder.push(part),
                None => {
                    ended = true;
                    decoder.finish()
                }
            };
            let mut out = String::new();
            ascii_json(&text, &mut out);
            Some(out[1..out.len() - 1].to_owned())
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn events_are_these_bytes() {
        assert_eq!(chunk_event("stdout", "hi\n"), "event: stdout\ndata: {\"chunk\":\"hi\\n\"}\n\n");
        assert_eq!(
            chunk_event("stderr", "\u{85}\u{2028}é\u{1F600}\u{7f}\r"),
            "event: stderr\ndata: {\"chunk\":\"\\u0085\\u2028\\u00e9\\ud83d\\ude00\\u007f\\r\"}\n\n"
        );
        let mut line = String::new();
        line_event("é\n", &mut line);
        assert_eq!(line, "event: line\ndata: {\"line\":\"\\u00e9\\n\"}\n\n");
        assert_eq!(exit_event(3, 6), "event: exit\ndata: {\"exit_code\":3,\"duration_ms\":6}\n\n");
        assert_eq!(error_event("command timeout"), "event: error\ndata: {\"error\":\"command timeout\"}\n\n");
    }

    #[test]
    fn the_budget_truncates_and_comes_back() {
        let budget = Budget::new(8 * BLOCK);
        let mut one = Collected::new(&budget.of("a"), STREAM_CAP);
        one.push(&vec![b'x'; 4 * BLOCK]);
        assert_eq!((one.len(), one.truncated), (3 * BLOCK, true));

        drop(one);
        let mut two = Collected::new(&budget.of("a"), STREAM_CAP);
        two.push(&vec![b'x'; 3 * BLOCK]);
        assert!(!two.truncated);
        let mut short = Collected::new(&budget.of("a"), 10);
        short.push(b"0123456789");
        assert!(!short.truncated);
        short.push(b"!");
        assert_eq!((short.len(), short.truncated), (10, true));
    }

    #[test]
    fn a_workspace_cannot_take_the_others_output_away() {
        let budget = Budget::new(8 * BLOCK);
        let greedy: Vec<Collected> = (0..20)
            .map(|_| {
                let mut collected = Collected::new(&budget.of("greedy"), STREAM_CAP);
                collected.push(&vec![b'x'; 4 * BLOCK]);
                collected
            })
            .collect();
        assert!(greedy.iter().all(|collected| collected.len() >= BLOCK));
        assert_eq!(greedy.iter().map(Collected::len).sum::<usize>(), 22 * BLOCK);

        let mut other = Collected::new(&budget.of("other"), STREAM_CAP);
        other.push(&vec![b'x'; 3 * BLOCK]);
        assert!(!other.truncated);
    }

    proptest! {
        #[test]
        fn any_cut_decodes_like_the_whole(
            bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0xC0u8..=0xF8, 0x80u8..=0xBF], 0..64),
            cuts in proptest::collection::vec(0usize..64, 0..6),
        ) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let (mut decoder, mut text, mut from) = (Utf8::default(), String::new(), 0);
            for cut in cuts {
                text.push_str(&decoder.push(&bytes[from..cut]));
                from = cut;
            }
            text.push_str(&decoder.finish());
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }

        #[test]
        fn json_is_ascii_and_means_the_text(text in any::<String>()) {
            let mut out = String::new();
            ascii_json(&text, &mut out);
            prop_assert!(out.bytes().all(|b| (b' '..=b'~').contains(&b)));
            prop_assert_eq!(serde_json::from_str::<String>(&out).unwrap(), text.clone());
            let mut object = String::new();
            ascii_object(&[&text], &mut object);
            prop_assert!(object.bytes().all(|b| (b' '..=b'~').contains(&b)));
            prop_assert_eq!(serde_json::from_str::<[String; 1]>(&object).unwrap(), [text]);
        }

        #[test]
        fn pieces_join_to_one_literal(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut collected = Collected::new(&Budget::new(BLOCK).of("a"), STREAM_CAP);
            collected.push(&bytes);
            let literal = format!("\"{}\"", collected.json_pieces().collect::<String>());
            prop_assert_eq!(
                serde_json::from_str::<String>(&literal).unwrap(),
                String::from_utf8_lossy(&bytes).into_owned()
            );
        }
    }
}
