//! Who changed what: a line for every request of a workspace that is not a read.
//!
//! Owns: what is in such a line, that it is written soon and off the request's path, and how many are kept. Two files per
//! workspace, so that a busy one pushes out its own lines only. Refuses to know: queries, bodies, tokens.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
};

use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, oneshot};

/// Bytes of one of the two files.
const FILE_BYTES: u64 = 4 << 20;
/// Lines that wait to be written; more are lost, and that is told.
const WAITING: usize = 8192;
/// Lines written with one sync.
const TOGETHER: usize = 512;
/// Files open at once.
const OPEN: usize = 64;
/// Readers at once: each reads both files of a workspace.
const READERS: usize = 2;
/// Characters of a path.
const PATH_CHARS: usize = 300;
/// What of a token may be told.
const TOKEN_CHARS: usize = 12;

/// A line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Unix milliseconds.
    pub ts: u64,
    /// Id of the request.
    pub request_id: String,
    /// HTTP method.
    pub method: String,
    /// Path without a query.
    pub path: String,
    /// Status of the answer.
    pub status: u16,
}

enum Order {
    Write(String, Entry),
    /// Everything before it is written.
    Flush(oneshot::Sender<()>),
    /// A workspace and all of its lines go.
    Forget(String, oneshot::Sender<()>),
}

/// All lines of all workspaces.
#[derive(Debug)]
pub struct Audit {
    directory: PathBuf,
    orders: SyncSender<Order>,
    lost: AtomicU64,
    readers: Arc<Semaphore>,
}

impl Audit {
    /// Below `directory`, with a thread that writes for as long as this lives.
    ///
    /// # Errors
    /// There can be no such directory or thread.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let (orders, received) = sync_channel(WAITING);
        let writer = Writer { directory: directory.to_owned(), files: HashMap::new() };
        std::thread::Builder::new().name("audit".into()).spawn(move || writer.run(&received))?;
        let readers = Arc::new(Semaphore::new(READERS));
        Ok(Self { directory: directory.to_owned(), orders, lost: AtomicU64::new(0), readers })
    }

    /// Notes a request, without waiting.
    pub fn note(&self, workspace: &str, mut entry: Entry) {
        entry.path = told(&entry.path);
        if self.orders.try_send(Order::Write(workspace.to_owned(), entry)).is_err() {
            let lost = self.lost.fetch_add(1, Ordering::Relaxed) + 1;
            if lost.is_power_of_two() {
                tracing::error!(lost, "lines of the audit log are lost: the disk does not keep up");
            }
        }
    }

    /// The newest so many lines of a workspace since then, the newest first.
    pub async fn read(&self, workspace: &str, since_ms: u64, limit: usize) -> Vec<Entry> {
        self.order(Order::Flush).await;
        let Ok(_place) = self.readers.acquire().await else { return Vec::new() };
        let paths = files(&self.directory, workspace);
        let read = tokio::task::spawn_blocking(move || {
            let mut found = Vec::new();
            for path in paths {
                let text = match fs::read(path) {
                    Ok(text) => text,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    Err(error) => {
                        tracing::error!("the audit log cannot be read: {error}");
                        continue;
                    }
                };
                let lines = text.rsplit(|byte| *byte == b'\n');
                // What a power cut left of a line is passed over.
                let entries = lines.filter_map(|line| serde_json::from_slice::<Entry>(line).ok());
                found.extend(entries.take_while(|entry| entry.ts >= since_ms).take(limit - found.len()));
            }
            found
        });
        read.await.unwrap_or_default()
    }

    /// The workspace is gone: another one of its name has nothing to do with it.
    pub async fn forget(&self, workspace: &str) {
        self.order(|done| Order::Forget(workspace.to_owned(), done)).await;
    }

    async fn order(&self, order: impl FnOnce(oneshot::Sender<()>) -> Order) {
        let (done, is_done) = oneshot::channel();
        let (orders, order) = (self.orders.clone(), order(done));
        // A full queue is waited for, where that may block.
        let _ = tokio::task::spawn_blocking(move || orders.send(order)).await;
        let _ = is_done.await;
    }
}

/// A path as it may be told: bounded, with no token in it, however it is encoded.
fn told(path: &str) -> String {
    let segments = path.split('/').map(|segment| {
        let plain = percent_encoding::percent_decode_str(segment).decode_utf8_lossy();
        match plain.find("pds_") {
            Some(at) => {
                let token: String = plain[at..].chars().take(TOKEN_CHARS).collect();
                format!("{token}…")
            }
            None => segment.to_owned(),
        }
    });
    segments.collect::<Vec<_>>().join("/").chars().take(PATH_CHARS).collect()
}

/// The files of a workspace, the newer first. Its name is a DNS label; anything else would have no business in a path.
fn files(directory: &Path, workspace: &str) -> [PathBuf; 2] {
    let name: String = workspace.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
    [directory.join(format!("{name}.jsonl")), directory.join(format!("{name}.old.jsonl"))]
}

struct Writer {
    directory: PathBuf,
    files: HashMap<String, (File, u64)>,
}

impl Writer {
    fn run(mut self, orders: &Receiver<Order>) {
        while let Ok(first) = orders.recv() {
            let mut lines = HashMap::<String, Vec<u8>>::new();
            let mut last = None;
            for order in std::iter::once(first).chain(orders.try_iter()).take(TOGETHER) {
                match order {
                    Order::Write(workspace, entry) => {
                        let text = lines.entry(workspace).or_default();
                        if serde_json::to_writer(&mut *text, &entry).is_ok() {
                            text.push(b'\n');
                        }
                    }
                    other => {
                        last = Some(other);
                        break;
                    }
                }
            }
            for (workspace, text) in lines {
                if let Err(error) = self.append(&workspace, &text) {
                    tracing::error!(workspace, "lines of the audit log are lost: {error}");
                    self.files.remove(&workspace);
                }
            }
            match last {
                Some(Order::Flush(done)) => {
                    // Whoever asked may have gone.
                    let _ = done.send(());
                }
                Some(Order::Forget(workspace, done)) => {
                    self.files.remove(&workspace);
                    for path in files(&self.directory, &workspace) {
                        if let Err(error) = fs::remove_file(path)
                            && error.kind() != io::ErrorKind::NotFound
                        {
                            tracing::error!(workspace, "its audit log stays: {error}");
                        }
                    }
                    let _ = done.send(());
                }
                Some(Order::Write(..)) | None => {}
            }
        }
    }

    fn append(&mut self, workspace: &str, text: &[u8]) -> io::Result<()> {
        let [present, old] = files(&self.directory, workspace);
        if self.files.get(workspace).is_some_and(|(_, bytes)| *bytes >= FILE_BYTES) {
            self.files.remove(workspace);
            fs::rename(&present, old)?;
        }
        if self.files.len() >= OPEN && !self.files.contains_key(workspace) {
            self.files.clear();
        }
        if !self.files.contains_key(workspace) {
            let mut file = OpenOptions::new().create(true).append(true).open(&present)?;
            // A line that a power cut left must not take the next one with it.
            file.write_all(b"\n")?;
            let bytes = file.metadata()?.len();
            self.files.insert(workspace.to_owned(), (file, bytes));
        }
        if let Some((file, bytes)) = self.files.get_mut(workspace) {
            file.write_all(text)?;
            file.sync_data()?;
            *bytes += text.len() as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(ts: u64, path: &str) -> Entry {
        Entry { ts, request_id: "r".into(), method: "POST".into(), path: path.into(), status: 201 }
    }

    #[test]
    fn no_token_is_told() {
        let token = format!("pds_{}", "0123456789abcdef".repeat(2));
        for path in [
            format!("/v1/me/tokens/{token}"),
            format!("/v1/me/tokens/%70ds%5f{}", &token[4..]),
            format!("/v1/x/a{token}"),
            format!("/{token}/y"),
        ] {
            let told = told(&path);
            assert!(told.contains("pds_01234567…") && !told.contains("012345678"), "{told}");
        }
        assert_eq!(told("/v1/sandboxes/abc%20d/fs"), "/v1/sandboxes/abc%20d/fs");
        assert_eq!(told(&"/x".repeat(1000)).chars().count(), PATH_CHARS);
        assert_eq!(files(Path::new("/d"), "../a")[0], Path::new("/d/a.jsonl"));
    }

    #[tokio::test]
    async fn lines_survive_and_are_each_workspaces_own() {
        let directory = tempfile::tempdir().unwrap();
        let audit = Audit::open(directory.path()).unwrap();
        (1..=5).for_each(|ts| audit.note("a", entry(ts, &format!("/{ts}"))));
        audit.note("b", entry(9, "/b"));
        let read = audit.read("a", 3, 2).await;
        assert_eq!(read.iter().map(|entry| entry.ts).collect::<Vec<_>>(), [5, 4]);
        drop(audit);
        // A power cut in the middle of a line.
        let mut file = OpenOptions::new().append(true).open(&files(directory.path(), "a")[0]).unwrap();
        file.write_all(b"{\"ts\":6,").unwrap();

        let audit = Audit::open(directory.path()).unwrap();
        audit.note("a", entry(7, "/7"));
        let read = audit.read("a", 0, 100).await;
        assert_eq!(read.iter().map(|entry| entry.ts).collect::<Vec<_>>(), [7, 5, 4, 3, 2, 1]);
        assert_eq!(audit.read("b", 0, 100).await.len(), 1);
        audit.forget("a").await;
        assert!(audit.read("a", 0, 100).await.is_empty());
        assert_eq!(audit.read("b", 0, 100).await.len(), 1);
    }

    #[tokio::test]
    async fn two_files_bound_it_and_the_newest_stay() {
        let directory = tempfile::tempdir().unwrap();
        let path = "/x".repeat(PATH_CHARS);
        let mut writer = Writer { directory: directory.path().to_owned(), files: HashMap::new() };
        let mut text = serde_json::to_vec(&entry(0, &path)).unwrap();
        text.push(b'\n');
        let many = text.repeat(2000);
        for _ in 0..20 {
            writer.append("a", &many).unwrap();
        }
        let mut last = serde_json::to_vec(&entry(77, "/last")).unwrap();
        last.push(b'\n');
        writer.append("a", &last).unwrap();
        let sizes: u64 =
            fs::read_dir(directory.path()).unwrap().map(|f| f.unwrap().metadata().unwrap().len()).sum();
        assert!(sizes < 2 * (FILE_BYTES + many.len() as u64), "{sizes}");
        drop(writer);
        let audit = Audit::open(directory.path()).unwrap();
        assert_eq!(audit.read("a", 0, 1).await[0].ts, 77);
    }
}
