//! A cgroup for every session, from a pool.
//!
//! Making and removing a cgroup with controllers costs more than the fork, so an empty one is used again. Its name is
//! therefore not the session's. Where there is no writable cgroup2 (tests), a session is its process group instead:
//! then a process that made a session of its own escapes kills and timeouts.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use nix::{
    sys::signal::{Signal, kill, killpg},
    unistd::Pid,
};

/// Empty cgroups kept for later.
const POOL: usize = 16;

/// The parent of all sessions' cgroups.
#[derive(Debug)]
pub struct Cgroups {
    root: Option<PathBuf>,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    free: Vec<Cgroup>,
    next: u64,
}

/// A cgroup that nobody else uses. Give it back with [`Cgroups::release`].
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    directory: File,
    events: File,
    memory: Option<File>,
    /// Kills by the kernel for lack of memory, in the cgroup's whole life so far.
    oom_before: u64,
}

impl Cgroups {
    /// Sessions below `root`, an existing cgroup without processes; `None` for process groups only. Empty leftovers of an
    /// earlier agent are used again, others are left alone: what users run outlives the agent.
    pub fn new(root: Option<PathBuf>) -> Arc<Self> {
        let mut pool = Pool::default();
        let entries = root.as_ref().and_then(|root| fs::read_dir(root).ok());
        for entry in entries.into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_prefix('s')?.parse::<u64>().ok())
            else {
                continue;
            };
            pool.next = pool.next.max(number + 1);
            if let Ok(cgroup) = Cgroup::open(entry.path())
                && pool.free.len() < POOL
                && cgroup.is_empty()
            {
                pool.free.push(cgroup);
            }
        }
        Arc::new(Self { root, pool: Mutex::new(pool) })
    }

    /// An empty cgroup; `None` where there are no cgroups.
    pub fn take(&self) -> io::Result<Option<Cgroup>> {
        let Some(root) = &self.root else { return Ok(None) };
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(mut cgroup) = pool.free.pop() {
            // A user may have moved something in meanwhile: then it is no longer ours to give.
            if cgroup.is_empty() {
                cgroup.oom_before = cgroup.oom_kills();
                return Ok(Some(cgroup));
            }
        }
        loop {
            let path = root.join(format!("s{}", pool.next));
            pool.next += 1;
            match fs::create_dir(&path) {
                Ok(()) => return Cgroup::open(path).map(Some),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes back a cgroup that is empty, or removes it.
    pub fn release(&self, cgroup: Cgroup) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.free.len() < POOL && cgroup.is_pristine() {
            pool.free.push(cgroup);
        } else {
            drop(pool);
            cgroup.remove();
        }
    }
}

impl Cgroup {
    fn open(path: PathBuf) -> io::Result<Self> {
        let directory = File::open(&path)?;
        let events = File::open(path.join("cgroup.events"))?;
        let memory = File::open(path.join("memory.events")).ok();
        let mut cgroup = Self { path, directory, events, memory, oom_before: 0 };
        cgroup.oom_before = cgroup.oom_kills();
        Ok(cgroup)
    }

    /// The directory, for `CLONE_INTO_CGROUP`.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Whether no process is in it or below it.
    pub fn is_empty(&self) -> bool {
        field(&self.events, "populated") == Some(0)
    }

    /// Whether the kernel killed something in it for lack of memory since it was taken.
    pub fn had_oom(&self) -> bool {
        self.oom_kills() > self.oom_before
    }

    /// Kills every process in it and below it, at once.
    pub fn kill(&self) -> io::Result<()> {
        fs::OpenOptions::new().write(true).open(self.path.join("cgroup.kill"))?.write_all(b"1")
    }

    /// Sends a signal to every process in it and below it. A process that forks meanwhile may be missed.
    pub fn signal(&self, signal: Signal) {
        signal_below(&self.path, signal, 0);
    }

    fn oom_kills(&self) -> u64 {
        self.memory.as_ref().and_then(|file| field(file, "oom_kill")).unwrap_or(0)
    }

    /// Empty, and as it was made: no cgroups below it, not frozen.
    fn is_pristine(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        self.is_empty()
            && field(&self.events, "frozen") == Some(0)
            && self.directory.metadata().is_ok_and(|metadata| metadata.nlink() == 2)
    }

    fn remove(self) {
        remove_below(&self.path, 0);
    }
}

fn signal_below(path: &Path, signal: Signal, depth: usize) {
    let mut text = String::new();
    let read =
        File::open(path.join("cgroup.procs")).and_then(|file| file.take(1 << 20).read_to_string(&mut text));
    if read.is_ok() {
        for pid in text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0) {
            // It may have ended since.
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
    for child in children(path, depth) {
        signal_below(&child, signal, depth + 1);
    }
}

fn remove_below(path: &Path, depth: usize) {
    for child in children(path, depth) {
        remove_below(&child, depth + 1);
    }
    let _ = fs::remove_dir(path);
}

fn children(path: &Path, depth: usize) -> Vec<PathBuf> {
    const DEPTH: usize = 16;
    if depth >= DEPTH {
        return Vec::new();
    }
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// A number from a file of `name number` lines.
fn field(file: &File, name: &str) -> Option<u64> {
    let mut buffer = [0; 512];
    let length = file.read_at(&mut buffer, 0).ok()?;
    let text = std::str::from_utf8(&buffer[..length]).ok()?;
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(' ')?;
        (key == name).then(|| value.parse().ok()).flatten()
    })
}

/// Everything that belongs to a session, with or without a cgroup.
#[derive(Debug)]
pub struct Group {
    cgroups: Arc<Cgroups>,
    cgroup: Option<Cgroup>,
    leader: Pid,
}

impl Group {
    /// The processes of a session whose first process is `leader`.
    pub fn new(cgroups: Arc<Cgroups>, cgroup: Option<Cgroup>, leader: u32) -> Self {
        Self { cgroups, cgroup, leader: Pid::from_raw(leader.cast_signed()) }
    }

    /// Kills everything.
    pub fn kill(&self) {
        let killed = self.cgroup.as_ref().is_some_and(|cgroup| cgroup.kill().is_ok());
        if !killed {
            let _ = killpg(self.leader, Signal::SIGKILL);
        }
    }

    /// Sends a signal to everything.
    pub fn signal(&self, signal: Signal) {
        match &self.cgroup {
            _ if signal == Signal::SIGKILL => self.kill(),
            Some(cgroup) => cgroup.signal(signal),
            None => {
                let _ = killpg(self.leader, signal);
            }
        }
    }

    /// Whether nothing runs any more.
    pub fn is_empty(&self) -> bool {
        match &self.cgroup {
            Some(cgroup) => cgroup.is_empty(),
            None => killpg(self.leader, None) == Err(nix::errno::Errno::ESRCH),
        }
    }

    /// Whether the kernel killed something of it for lack of memory.
    pub fn had_oom(&self) -> bool {
        self.cgroup.as_ref().is_some_and(Cgroup::had_oom)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(cgroup) = self.cgroup.take() {
            self.cgroups.release(cgroup);
        }
    }
}
