//! What happened to all sandboxes, numbered, also to those that are gone.
//!
//! Owns: the one order of events and their numbers, how many are kept, their spill to disk. A number is given when an event
//! becomes visible, so who has read up to one has seen everything before it: reading on from there misses nothing and repeats
//! nothing. Refuses to know: what an event means.
//!
//! The truth about a sandbox is its record, which has its last events, too. This is appended without a sync: a crash of the
//! daemon loses nothing, and after a power cut the records fill in what they have.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pandastack_bus::{
    SandboxId,
    vmm::{HistoryPage, HistoryQuery, HistoryRow},
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::record::Record;

/// Events kept of one workspace, and of all.
const KEPT_EACH: usize = 4000;
const KEPT: usize = 40_000;
/// Events in one answer at most.
const PAGE: usize = 1000;
/// Bytes of one file; there are two of them.
const FILE_BYTES: u64 = 8 << 20;
const FILES: [&str; 2] = ["events.jsonl", "events.old.jsonl"];

/// Somebody may want to know that there is more: workspace and sandbox.
pub type Hint = (String, String);

/// All events.
#[derive(Debug)]
pub struct History {
    state: Mutex<State>,
    hints: mpsc::UnboundedSender<Hint>,
}

#[derive(Debug, Default)]
struct State {
    rows: VecDeque<HistoryRow>,
    each: HashMap<String, usize>,
    last: u64,
    /// How many events of each record are in here.
    told: HashMap<String, u64>,
    spill: Option<Spill>,
}

/// A line of a file.
#[derive(Debug, Serialize, Deserialize)]
struct Line {
    row: HistoryRow,
    /// Which of its record's events it is, counted from 1; 0 for one that no record has.
    #[serde(default)]
    of_record: u64,
}

#[derive(Debug)]
struct Spill {
    directory: PathBuf,
    file: File,
    bytes: u64,
    broken: bool,
}

impl History {
    /// Reads what the last run left in `directory`. One that is not usable is worth a warning, not the daemon.
    pub fn open(directory: &Path, hints: mpsc::UnboundedSender<Hint>) -> Self {
        let mut state = State::default();
        if let Err(error) = state.load(directory) {
            tracing::warn!("earlier events are lost, and new ones are kept in memory only: {error}");
        }
        Self { state: Mutex::new(state), hints }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over what durable records have and the files do not: at the start.
    pub fn fill_in<'a>(&self, records: impl Iterator<Item = &'a Record>) {
        let mut missing: Vec<(&Record, u64)> = Vec::new();
        let mut state = self.state();
        for record in records.filter(|record| record.sandbox().is_some_and(|inner| inner.born)) {
            let told = state.told.get(record.id.as_str()).copied().unwrap_or_default();
            missing.extend((told + 1..=record.noted()).map(|number| (record, number)));
        }
        missing.sort_by_key(|(record, number)| record.event(*number).map_or(0, |event| event.unix_ms));
        for (record, number) in missing {
            state.of_record(record, number, BTreeMap::new());
        }
    }

    /// A record is durable: its new events may be told. `more` says more about the last of them.
    pub fn durable(&self, record: &Record, more: &BTreeMap<String, String>) {
        let Some(inner) = record.sandbox().filter(|inner| inner.born) else { return };
        let mut state = self.state();
        let told = state.told.get(record.id.as_str()).copied().unwrap_or_default();
        let last = record.noted();
        for number in told + 1..=last {
            let more = if number == last { more.clone() } else { BTreeMap::new() };
            state.of_record(record, number, more);
        }
        if told < last {
            // Nobody listens: then nobody needs a hint.
            let _ = self.hints.send((inner.spec.workspace.clone(), record.id.to_string()));
        }
    }

    /// Something that no record keeps.
    pub fn append(
        &self,
        unix_ms: u64,
        workspace: &str,
        sandbox: &SandboxId,
        kind: &str,
        payload: BTreeMap<String, String>,
    ) {
        let mut state = self.state();
        let row = HistoryRow {
            seq: 0,
            unix_ms,
            workspace: workspace.to_owned(),
            sandbox: sandbox.to_string(),
            kind: kind.to_owned(),
            payload,
        };
        state.put(row, 0);
        let _ = self.hints.send((workspace.to_owned(), sandbox.to_string()));
    }

    /// A sandbox is gone for good: that is the last of it.
    pub fn gone(&self, unix_ms: u64, record: &Record) {
        let Some(inner) = record.sandbox().filter(|inner| inner.born) else { return };
        self.durable(record, &BTreeMap::new());
        self.append(unix_ms, &inner.spec.workspace, &record.id, "sandbox.deleted", BTreeMap::new());
        self.state().told.remove(record.id.as_str());
    }

    /// What is asked for, oldest first, and up to where that is everything.
    pub fn page(&self, query: &HistoryQuery) -> HistoryPage {
        let state = self.state();
        let wanted = |row: &&HistoryRow| {
            (query.workspace.is_empty() || row.workspace == query.workspace)
                && (query.sandbox.is_empty() || row.sandbox == query.sandbox)
                && (query.kinds.is_empty() || query.kinds.contains(&row.kind))
                && row.unix_ms >= query.since_unix_ms
        };
        let limit = (query.limit as usize).min(PAGE);
        let first = state.rows.partition_point(|row| row.seq <= query.after);
        let later = state.rows.range(first..);
        if query.newest {
            let mut rows: Vec<HistoryRow> = later.rev().filter(wanted).take(limit).cloned().collect();
            rows.reverse();
            return HistoryPage { rows, position: state.last.max(query.after) };
        }
        let mut rows: Vec<HistoryRow> = later.filter(wanted).take(limit + 1).cloned().collect();
        let more = rows.len() > limit;
        rows.truncate(limit);
        let end = rows.last().filter(|_| more).map_or(state.last, |row| row.seq);
        HistoryPage { rows, position: end.max(query.after) }
    }
}

impl State {
    fn load(&mut self, directory: &Path) -> io::Result<()> {
        fs::create_dir_all(directory)?;
        for name in FILES.iter().rev() {
            let text = match fs::read(directory.join(name)) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            // What a power cut left of a line, or of a page, is passed over.
            for line in text.split(|byte| *byte == b'\n') {
                if let Ok(line) = serde_json::from_slice::<Line>(line)
                    && line.row.seq > self.last
                {
                    self.add(line);
                }
            }
        }
        let file = OpenOptions::new().create(true).append(true).open(directory.join(FILES[0]))?;
        let bytes = file.metadata()?.len();
        let mut spill = Spill { directory: directory.to_owned(), file, bytes, broken: false };
        // A line that was cut must not take the next one with it.
        spill.write(b"\n");
        self.spill = Some(spill);
        Ok(())
    }

    /// An event of a record, numbered from 1 in its life; one that the record does not have any more is passed over.
    fn of_record(&mut self, record: &Record, number: u64, more: BTreeMap<String, String>) {
        self.told.insert(record.id.to_string(), number);
        let (Some(event), Some(inner)) = (record.event(number), record.sandbox()) else { return };
        let mut payload = more;
        if !event.detail.is_empty() {
            payload.insert("detail".into(), event.detail.clone());
        }
        let row = HistoryRow {
            seq: 0,
            unix_ms: event.unix_ms,
            workspace: inner.spec.workspace.clone(),
            sandbox: record.id.to_string(),
            kind: event.kind.clone(),
            payload,
        };
        self.put(row, number);
    }

    /// Numbers a row. The clock is in the number, so that it goes up even if a power cut took the last ones away.
    fn put(&mut self, mut row: HistoryRow, of_record: u64) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        row.seq = (self.last + 1).max(now.as_micros() as u64);
        let line = Line { row, of_record };
        if let Some(spill) = &mut self.spill
            && let Ok(mut text) = serde_json::to_vec(&line)
        {
            text.push(b'\n');
            spill.write(&text);
        }
        self.add(line);
    }

    fn add(&mut self, line: Line) {
        let Line { row, of_record } = line;
        self.last = row.seq;
        match (&*row.kind, of_record) {
            ("sandbox.deleted", _) => drop(self.told.remove(&row.sandbox)),
            (_, 0) => {}
            (_, number) => drop(self.told.insert(row.sandbox.clone(), number)),
        }
        let each = self.each.entry(row.workspace.clone()).or_default();
        *each += 1;
        let crowded = (*each > KEPT_EACH).then(|| row.workspace.clone());
        self.rows.push_back(row);
        // Whoever makes many events loses own ones.
        let oldest = match crowded {
            Some(workspace) => self.rows.iter().position(|row| row.workspace == workspace),
            None => (self.rows.len() > KEPT).then_some(0),
        };
        if let Some(gone) = oldest.and_then(|at| self.rows.remove(at))
            && let Some(each) = self.each.get_mut(&gone.workspace)
        {
            *each -= 1;
            if *each == 0 {
                self.each.remove(&gone.workspace);
            }
        }
    }
}

impl Spill {
    /// Appends, as well as the disk lets it: the records have what counts.
    fn write(&mut self, text: &[u8]) {
        let written = self.turn().and_then(|()| self.file.write_all(text));
        match written {
            Ok(()) => {
                self.bytes += text.len() as u64;
                self.broken = false;
            }
            Err(error) => {
                if !std::mem::replace(&mut self.broken, true) {
                    tracing::warn!("events are kept in memory only: {error}");
                }
            }
        }
    }

    /// A full file becomes the old one.
    fn turn(&mut self) -> io::Result<()> {
        if self.bytes < FILE_BYTES {
            return Ok(());
        }
        let [present, old] = FILES.map(|name| self.directory.join(name));
        fs::rename(&present, old)?;
        self.file = OpenOptions::new().create(true).append(true).open(present)?;
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
