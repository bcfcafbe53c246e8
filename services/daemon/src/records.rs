//! Records that survive a power cut: one JSON file each is the truth, sled is an index in front of them.
//!
//! Owns: `<dir>/<key>.json`, `<dir>/.index` (sled), `<dir>/.lock`. Refuses to know: what a record means.
//!
//! A change is durable in its file before it is in the index, so the index can only be behind, never ahead: losing it
//! loses nothing. At the start it is compared with the files, and when it does not open or differs, it is moved aside
//! (`.index.bad`, the last one is kept) and made again. After an fsync failed, nobody knows what the disk holds: such
//! a store refuses every further change until it is opened again, and says so ([`Records::is_poisoned`]): its daemon ends.
//! Changes of one key are in turn; those of different keys wait for the disk side by side.
//!
//! Blocking: async code calls `put` and `remove` through `spawn_blocking`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io,
    marker::PhantomData,
    os::unix::fs::DirBuilderExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use serde::{Serialize, de::DeserializeOwned};

use crate::files;

/// How often [`until_poisoned`] looks.
const LOOK: Duration = Duration::from_secs(1);

/// Completes when one of a daemon's stores does not know any more what the disk holds; `is_poisoned` asks them. The daemon
/// then ends, and its next run goes on from the disk.
pub async fn until_poisoned(is_poisoned: impl Fn() -> bool) {
    while !is_poisoned() {
        tokio::time::sleep(LOOK).await;
    }
}

/// Largest record, bytes.
pub const RECORD_LIMIT: u64 = 1024 * 1024;
const INDEX_CACHE: u64 = 8 * 1024 * 1024;
const MODE: u32 = 0o600;
/// Locks for all keys: two keys rarely share one.
const TURNS: usize = 64;

/// A durable map from keys to values. Calls may come from many threads.
#[derive(Debug)]
pub struct Records<V> {
    directory: PathBuf,
    index: sled::Db,
    /// The index failed while in use: the files are read instead until the next start.
    index_lost: AtomicBool,
    /// An fsync failed.
    poisoned: AtomicBool,
    /// One is held while the file of a key and its index entry change.
    turns: [Mutex<()>; TURNS],
    _lock: Flock<File>,
    _value: PhantomData<fn() -> V>,
}

/// Why a record was not read or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// Not a key: 1 to 128 of `A-Za-z0-9._-`, no dot in front. Use another one.
    #[error("not a key for a record: {0:?}")]
    InvalidKey(String),
    /// Another process or another [`Records`] has the directory open. Wait for it to end.
    #[error("{} is in use", .0.display())]
    Busy(PathBuf),
    /// The value cannot be written as JSON or is larger than [`RECORD_LIMIT`]. Nothing changed.
    #[error("the record {key:?} cannot be written as JSON")]
    Encode {
        /// Its key.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The disk is full: remove something. Nothing changed.
    #[error("no space is left for {}", path.display())]
    Full {
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read or written. Unless the store is poisoned by it, nothing changed.
    #[error("{}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An earlier fsync failed: what the disk holds is unknown. Restart the daemon to go on from what it really holds.
    #[error("an earlier write to {} did not reach the disk; nothing is changed any more until a restart", .0.display())]
    Poisoned(PathBuf),
}

/// What the files say: each record as it stands in its file, and what it means.
type Truth<V> = BTreeMap<String, (Vec<u8>, V)>;
type Result<T> = std::result::Result<T, RecordsError>;

impl<V: Serialize + DeserializeOwned + Clone> Records<V> {
    /// Opens (or makes) the store in `directory`. Leftovers of a crash are removed; a file that is not a record is
    /// renamed to `<name>.bad`, logged, and does not stop the rest.
    ///
    /// # Errors
    /// [`RecordsError::Busy`], or the directory cannot be read or written.
    pub fn open(directory: &Path) -> Result<Self> {
        let at = |source| RecordsError::Io { path: directory.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(at)?;
        let lock = lock(directory)?;
        let leftovers = files::remove_leftovers(directory).map_err(at)?;
        if leftovers > 0 {
            tracing::info!("{}: removed {leftovers} unfinished writes", directory.display());
        }
        let truth = scan::<V>(directory)?;
        let index = open_index(directory, &truth)?;
        Ok(Self {
            directory: directory.to_owned(),
            index,
            index_lost: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            turns: [const { Mutex::new(()) }; TURNS],
            _lock: lock,
            _value: PhantomData,
        })
    }

    /// The record of `key`, if there is one.
    ///
    /// # Errors
    /// [`RecordsError::InvalidKey`]; [`RecordsError::Io`] when the index failed and the file cannot be read either.
    pub fn get(&self, key: &str) -> Result<Option<V>> {
        check_key(key)?;
        match self.ask_index(|index| index.get(key)?.map(|bytes| parse(key, &bytes)).transpose()) {
            Some(answer) => Ok(answer),
            None => self.read(key),
        }
    }

    /// Sets the record of `key`. Durable when it returns.
    ///
    /// # Errors
    /// Nothing changed, except after a failed fsync: then the change may or may not be there after a restart, and
    /// every further one answers [`RecordsError::Poisoned`].
    pub fn put(&self, key: &str, value: &V) -> Result<()> {
        check_key(key)?;
        let encode = |source| RecordsError::Encode { key: key.to_owned(), source };
        let bytes = serde_json::to_vec(value).map_err(|error| encode(error.into()))?;
        if bytes.len() as u64 > RECORD_LIMIT {
            return Err(encode(format!("{} bytes are more than {RECORD_LIMIT}", bytes.len()).into()));
        }
        let _turn = self.turn(key)?;
        let path = self.path(key);
        files::write_staged(&path, &bytes, MODE).map_err(|failure| self.failed(path, failure))?;
        self.ask_index(|index| index.insert(key, bytes));
        Ok(())
    }

    /// Removes the record of `key`, durably. Answers whether it was there.
    ///
    /// # Errors
    /// As for [`Records::put`].
    pub fn remove(&self, key: &str) -> Result<bool> {
        check_key(key)?;
        let _turn = self.turn(key)?;
        let path = self.path(key);
        let was_there = files::remove_staged(&path).map_err(|failure| self.failed(path, failure))?;
        self.ask_index(|index| index.remove(key));
        Ok(was_there)
    }

    /// Whether an fsync failed: nothing is changed any more, and the daemon should end so that its next run goes on from
    /// what the disk really holds.
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    /// All records, by key.
    ///
    /// # Errors
    /// The index failed and the files cannot be read either.
    pub fn iter(&self) -> Result<Vec<(String, V)>> {
        let rows = self.ask_index(|index| {
            let row = |row: sled::Result<(sled::IVec, sled::IVec)>| {
                let (key, bytes) = row?;
                let key = String::from_utf8_lossy(&key).into_owned();
                let value = parse(&key, &bytes)?;
                Ok((key, value))
            };
            index.iter().map(row).collect()
        });
        match rows {
            Some(rows) => Ok(rows),
            None => {
                Ok(scan::<V>(&self.directory)?.into_iter().map(|(key, (_, value))| (key, value)).collect())
            }
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.directory.join(format!("{key}.json"))
    }

    fn read(&self, key: &str) -> Result<Option<V>> {
        let path = self.path(key);
        let read = files::read_limited(&path, RECORD_LIMIT)
            .and_then(|bytes| Ok(bytes.map(|bytes| serde_json::from_slice(&bytes)).transpose()?));
        read.map_err(|source| RecordsError::Io { path, source })
    }

    /// Asks the index; `None` when it is not usable (any more). The files hold the same.
    fn ask_index<T>(&self, ask: impl FnOnce(&sled::Db) -> sled::Result<T>) -> Option<T> {
        if self.index_lost.load(Ordering::SeqCst) {
            return None;
        }
        let reason = match catch_unwind(AssertUnwindSafe(|| ask(&self.index))) {
            Ok(Ok(answer)) => return Some(answer),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it panicked".to_owned(),
        };
        self.index_lost.store(true, Ordering::SeqCst);
        tracing::error!(
            "{}: the index failed and is made again at the next start: {reason}",
            self.directory.display()
        );
        None
    }

    /// The right to change a key's file and index entry.
    fn turn(&self, key: &str) -> Result<MutexGuard<'_, ()>> {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let at = usize::try_from(hasher.finish() % TURNS as u64).unwrap_or_default();
        let turn = self.turns[at].lock().unwrap_or_else(PoisonError::into_inner);
        if self.is_poisoned() { Err(RecordsError::Poisoned(self.directory.clone())) } else { Ok(turn) }
    }

    fn failed(&self, path: PathBuf, failure: files::Failure) -> RecordsError {
        let source = failure.error;
        if failure.in_doubt {
            self.poisoned.store(true, Ordering::SeqCst);
            tracing::error!("{}: an fsync failed, no more changes: {source}", path.display());
            return RecordsError::Io { path, source };
        }
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => RecordsError::Full { path, source },
            _ => RecordsError::Io { path, source },
        }
    }
}

fn lock(directory: &Path) -> Result<Flock<File>> {
    let path = directory.join(".lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| RecordsError::Io { path: path.clone(), source })?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        nix::errno::Errno::EWOULDBLOCK => RecordsError::Busy(directory.to_owned()),
        errno => RecordsError::Io { path, source: errno.into() },
    })
}

/// What the files say. Those that are no records are moved aside.
fn scan<V: DeserializeOwned>(directory: &Path) -> Result<Truth<V>> {
    let at = |source| RecordsError::Io { path: directory.to_owned(), source };
    let mut truth = BTreeMap::new();
    for entry in fs::read_dir(directory).map_err(at)? {
        let entry = entry.map_err(at)?;
        let name = entry.file_name();
        let Some(stem) = name.to_str().and_then(|name| name.strip_suffix(".json")) else { continue };
        if stem.starts_with('.') {
            continue;
        }
        let path = entry.path();
        let judged = check_key(stem).map_err(|error| error.to_string()).and_then(|()| {
            match files::read_limited(&path, RECORD_LIMIT) {
                Ok(Some(bytes)) => match serde_json::from_slice::<V>(&bytes) {
                    Ok(value) => Ok((bytes, value)),
                    Err(error) => Err(error.to_string()),
                },
                Ok(None) => Err("it vanished".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        });
        match judged {
            Ok(record) => drop(truth.insert(stem.to_owned(), record)),
            Err(reason) => {
                tracing::error!("{}: moved aside, not a record: {reason}", path.display());
                let mut aside = path.clone().into_os_string();
                aside.push(".bad");
                fs::rename(&path, aside).map_err(at)?;
                files::sync_dir(directory).map_err(at)?;
            }
        }
    }
    Ok(truth)
}

fn open_index<V>(directory: &Path, truth: &Truth<V>) -> Result<sled::Db> {
    let path = directory.join(".index");
    if path.exists() {
        match guarded(|| open_sled(&path).and_then(|index| Ok(same(&index, truth)?.then_some(index)))) {
            Ok(Some(index)) => return Ok(index),
            Ok(None) => tracing::info!("{}: the index is behind its files; made again", directory.display()),
            Err(reason) => tracing::warn!("{}: the index is made again: {reason}", directory.display()),
        }
        move_aside(&path).map_err(|source| RecordsError::Io { path: path.clone(), source })?;
    }
    guarded(|| {
        let index = open_sled(&path)?;
        for (key, (bytes, _)) in truth {
            index.insert(key, bytes.as_slice())?;
        }
        Ok(index)
    })
    .map_err(|reason| RecordsError::Io { path, source: io::Error::other(reason) })
}

fn open_sled(path: &Path) -> sled::Result<sled::Db> {
    sled::Config::new().path(path).cache_capacity(INDEX_CACHE).flush_every_ms(None).open()
}

fn same<V>(index: &sled::Db, truth: &Truth<V>) -> sled::Result<bool> {
    let mut expected = truth.iter();
    for row in index.iter() {
        let (key, bytes) = row?;
        match expected.next() {
            Some((wanted, (value, _))) if key == wanted.as_bytes() && bytes == value.as_slice() => {}
            _ => return Ok(false),
        }
    }
    Ok(expected.next().is_none())
}

/// sled may panic on what it finds on disk; that is one more way in which an index can be unusable.
fn guarded<T>(work: impl FnOnce() -> sled::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(_) => Err("it panicked".to_owned()),
    }
}

fn move_aside(path: &Path) -> io::Result<()> {
    let aside = path.with_file_name(".index.bad");
    for old in [fs::remove_dir_all(&aside), fs::remove_file(&aside)] {
        if let Err(error) = old
            && !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        {
            return Err(error);
        }
    }
    fs::rename(path, aside)
}

fn parse<V: DeserializeOwned>(key: &str, bytes: &[u8]) -> sled::Result<V> {
    // Everything in the index was parsed when it came in: this means that the index rots.
    serde_json::from_slice(bytes).map_err(|error| sled::Error::Unsupported(format!("row {key}: {error}")))
}

fn check_key(key: &str) -> Result<()> {
    let good = (1..=128).contains(&key.len())
        && !key.starts_with('.')
        && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if good { Ok(()) } else { Err(RecordsError::InvalidKey(key.chars().take(160).collect())) }
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
