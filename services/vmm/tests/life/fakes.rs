//! A world that keeps books and breaks on demand.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{PipeWriter, Write},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use pandastack_bus::{
    Error, Result, SandboxId,
    network::{Attachment, NetworkBackend},
    storage::{CaptureKind, Fill, SnapshotInfo, TemplateInfo, VolumeSnapshotInfo, VolumeUse},
};
use pandastack_protocol::Mount;
use pandastack_vmm::{
    console::{Place, Wanted},
    meter::Usage,
    ports::{Guest, Hypervisor, Identification, Limits, Machine, Memory, Process, UnitState, Units, World},
};
use tokio::{sync::Notify, time::Instant};

#[derive(Default)]
pub struct Books {
    pub directories: BTreeMap<String, Option<Fill>>,
    pub units: BTreeMap<String, PipeWriter>,
    pub limited: BTreeSet<String>,
    pub attachments: BTreeSet<String>,
    pub guests: BTreeSet<String>,
    pub machine_ids: BTreeMap<String, String>,
    pub captured: BTreeSet<String>,
    /// What a guest has in its memory: survives a capture and nothing else.
    pub minds: BTreeMap<String, String>,
    /// Guests whose processors stand still.
    pub paused: BTreeSet<String>,
    /// Guests that are copies and were not told yet who they are.
    pub copies: BTreeSet<String>,
    /// Captures under way, by machine.
    pub captures: BTreeMap<String, Capture>,
    pub snapshots: BTreeMap<String, Kept>,
    /// What a directory was filled from, if it was a snapshot.
    pub sources: BTreeMap<String, Kept>,
    /// Volumes by holder.
    pub holds: BTreeMap<String, Vec<VolumeUse>>,
    /// Snapshots of volumes, by id.
    pub kept: BTreeMap<String, VolumeSnapshotInfo>,
    /// Whose volumes are in a directory.
    pub inserted: BTreeMap<String, String>,
    pub mounts: BTreeMap<String, Vec<Mount>>,
    /// What all units together have used; each answer counts as 15 seconds.
    pub cpu_usec: u64,
    /// Consoles that are followed.
    pub consoles: Vec<(String, PipeWriter, Place)>,
    pub renewed: Vec<String>,
    pub baked: bool,
    pub template_failed: Option<String>,
    /// Beside `base`.
    pub more_templates: Vec<TemplateInfo>,
    pub violations: Vec<String>,
    pub log: Vec<String>,
}

#[derive(Default, Clone)]
pub struct Capture {
    pub written: Option<CaptureKind>,
    pub disks: bool,
    pub volumes: bool,
}

/// A snapshot with what is in it.
#[derive(Clone)]
pub struct Kept {
    pub info: SnapshotInfo,
    pub mind: String,
    pub machine_id: String,
    pub volumes: bool,
}

pub struct Fake {
    pub books: Mutex<Books>,
    /// Calls with an effect that are still answered; then the daemon is as good as dead.
    pub budget: AtomicUsize,
    pub crashed: Notify,
    /// Calls whose log line starts with this fail.
    pub fails: Mutex<Option<String>>,
    /// The n-th call with an effect from now on fails, once.
    pub fail_at: AtomicUsize,
    /// The process of a machine ends just after such a call for it.
    pub dies_after: Mutex<Option<String>>,
    /// Guests do not answer, for so many greetings.
    pub deaf: AtomicUsize,
    pub slow: AtomicBool,
}

impl Fake {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            books: Mutex::new(Books { baked: true, ..Books::default() }),
            budget: AtomicUsize::new(usize::MAX),
            crashed: Notify::new(),
            fails: Mutex::new(None),
            fail_at: AtomicUsize::new(0),
            dies_after: Mutex::new(None),
            deaf: AtomicUsize::new(0),
            slow: AtomicBool::new(false),
        })
    }

    /// Power is cut: processes and links are gone.
    pub fn cut_power(&self) {
        let mut books = self.books.lock().unwrap();
        books.units.clear();
        books.attachments.clear();
        books.guests.clear();
        books.paused.clear();
        // The memory of a machine is lost; what is in its directory stays, an unfinished capture, too.
        books.minds.clear();
    }

    pub fn fail(&self, what: &str) {
        *self.fails.lock().unwrap() = Some(what.to_owned());
    }

    pub fn owners(&self) -> BTreeSet<String> {
        let books = self.books.lock().unwrap();
        books.directories.keys().chain(books.units.keys()).chain(&books.attachments).cloned().collect()
    }

    /// A call with an effect. It happens, or (budget used up) neither it nor anything after it does.
    pub async fn call<T>(
        &self,
        what: &str,
        id: &str,
        act: impl FnOnce(&mut Books) -> Result<T>,
    ) -> Result<T> {
        if self.slow.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let left = self.budget.load(Ordering::SeqCst);
        if left == 0 {
            self.crashed.notify_one();
            return std::future::pending().await;
        }
        if left != usize::MAX {
            self.budget.store(left - 1, Ordering::SeqCst);
        }
        let mut books = self.books.lock().unwrap();
        books.log.push(format!("{what} {id}"));
        if self.fails.lock().unwrap().as_deref() == Some(what) {
            return Err(Error::Internal(format!("{what} is broken")));
        }
        let fail_at = self.fail_at.load(Ordering::SeqCst);
        self.fail_at.store(fail_at.saturating_sub(1), Ordering::SeqCst);
        if fail_at == 1 {
            return Err(Error::Internal(format!("{what} fails this time")));
        }
        let done = act(&mut books);
        if self.dies_after.lock().unwrap().as_deref() == Some(what) {
            books.units.remove(id);
        }
        done
    }
}

/// A handle on the world, as one daemon has it.
#[derive(Clone)]
pub struct Handle(pub Arc<Fake>);

impl NetworkBackend for Handle {
    async fn attach(&self, id: String, _process: OwnedFd) -> Result<Attachment> {
        self.0
            .call("attach", &id, |books| {
                if !books.units.contains_key(&id) {
                    return Err(Error::WrongState("no process".into()));
                }
                books.attachments.insert(id.clone());
                Ok(Attachment { id: id.clone(), address: "10.200.0.7".into(), link: "l".into() })
            })
            .await
    }
    async fn detach(&self, id: String) -> Result<bool> {
        self.0.call("detach", &id, |books| Ok(books.attachments.remove(&id))).await
    }
    async fn owners(&self) -> Result<Vec<Attachment>> {
        let books = self.0.books.lock().unwrap();
        let row = |id: &String| Attachment { id: id.clone(), address: String::new(), link: String::new() };
        Ok(books.attachments.iter().map(row).collect())
    }
}

impl Units for Handle {
    async fn start(&self, id: &SandboxId) -> Result<Process> {
        self.0
            .call("start", id.as_str(), |books| {
                if !books.directories.contains_key(id.as_str()) {
                    return Err(Error::Internal("nothing to bind".into()));
                }
                let (reader, writer) = std::io::pipe().unwrap();
                books.units.insert(id.to_string(), writer);
                Ok(Arc::new(reader.into()))
            })
            .await
    }
    async fn process(&self, id: &SandboxId) -> Result<Option<Process>> {
        if self.0.fails.lock().unwrap().as_deref() == Some("process") {
            return Err(Error::Timeout("process is broken".into()));
        }
        let mut books = self.0.books.lock().unwrap();
        if !books.units.contains_key(id.as_str()) {
            return Ok(None);
        }
        let (reader, writer) = std::io::pipe().unwrap();
        books.units.insert(id.to_string(), writer);
        Ok(Some(Arc::new(reader.into())))
    }
    async fn stop(&self, id: &SandboxId) -> Result<bool> {
        self.0
            .call("stop", id.as_str(), |books| {
                books.guests.remove(id.as_str());
                books.paused.remove(id.as_str());
                books.minds.remove(id.as_str());
                Ok(books.units.remove(id.as_str()).is_some())
            })
            .await
    }
    async fn limit(&self, id: &SandboxId, limits: Limits) -> Result<()> {
        assert!(limits.memory_bytes > 128 << 20);
        self.0
            .call("limit", id.as_str(), |books| {
                books.limited.insert(id.to_string());
                Ok(())
            })
            .await
    }
    async fn list(&self) -> Result<Vec<UnitState>> {
        let books = self.0.books.lock().unwrap();
        Ok(books.units.keys().map(|id| UnitState { id: id.parse().unwrap(), alive: true }).collect())
    }
    async fn anonymous(&self, _: &SandboxId) -> Option<u64> {
        Some(1 << 20)
    }
    async fn usage(&self, id: &SandboxId) -> Option<Usage> {
        let mut books = self.0.books.lock().unwrap();
        if !books.units.contains_key(id.as_str()) {
            return None;
        }
        books.cpu_usec += 15_000_000;
        Some(Usage { cpu_usec: books.cpu_usec, memory_bytes: 1 << 20, ..Usage::default() })
    }
    async fn console(&self, id: &SandboxId, wanted: Wanted, place: Place) -> Result<OwnedFd> {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writeln!(writer, "{id} {wanted:?}").unwrap();
        // Read for as long as the machine is there.
        if wanted.follow {
            self.0.books.lock().unwrap().consoles.push((id.to_string(), writer, place));
        }
        Ok(reader.into())
    }
    async fn obituary(&self, _id: &SandboxId) -> String {
        "the guest switched itself off".into()
    }
}

impl Hypervisor for Handle {
    async fn await_api(&self, id: &SandboxId) -> Result<()> {
        self.0.call("await", id.as_str(), |_| Ok(())).await
    }
    async fn load(&self, id: &SandboxId) -> Result<()> {
        self.run("load", id, Fill::Baked).await
    }
    async fn boot(&self, id: &SandboxId, _machine: Machine) -> Result<()> {
        self.run("boot", id, Fill::Pristine).await
    }
    async fn capture(&self, id: &SandboxId) -> Result<()> {
        self.0
            .call("capture", id.as_str(), |books| {
                books.captured.insert(id.to_string());
                Ok(())
            })
            .await
    }
    async fn renew_drive(&self, id: &SandboxId, drive: &str) -> Result<()> {
        let line = format!("{id} {drive}");
        self.0
            .call("renew", id.as_str(), |books| {
                books.renewed.push(line);
                Ok(())
            })
            .await
    }
    async fn is_paused(&self, id: &SandboxId) -> Result<bool> {
        let books = self.0.books.lock().unwrap();
        match books.guests.contains(id.as_str()) {
            true => Ok(books.paused.contains(id.as_str())),
            false => Err(Error::Internal("no machine".into())),
        }
    }
    async fn pause(&self, id: &SandboxId) -> Result<()> {
        self.turn("pause", id, true).await
    }
    async fn resume(&self, id: &SandboxId) -> Result<()> {
        self.turn("resume", id, false).await
    }
    async fn write_capture(&self, id: &SandboxId, kind: CaptureKind, _: Memory) -> Result<()> {
        self.0
            .call("write", id.as_str(), |books| {
                if !books.paused.contains(id.as_str()) {
                    books.violations.push(format!("{id} is captured while it runs"));
                }
                match books.captures.get_mut(id.as_str()) {
                    Some(capture) => capture.written = Some(kind),
                    None => return Err(Error::Internal("no files to write to".into())),
                }
                Ok(())
            })
            .await
    }
}

impl Handle {
    async fn run(&self, what: &str, id: &SandboxId, fill: Fill) -> Result<()> {
        self.0
            .call(what, id.as_str(), |books| {
                let id = id.to_string();
                let filled = books.directories.get(&id).copied().flatten();
                // What was inserted belongs to one that still holds it.
                if let Some(holder) = books.inserted.get(&id)
                    && !books.holds.contains_key(holder)
                {
                    books.violations.push(format!("{what} of {id} with volumes that nobody holds"));
                }
                let good = if fill == Fill::Baked { filled == Some(fill) } else { filled.is_some() };
                if !good || !books.units.contains_key(&id) || !books.limited.contains(&id) {
                    books.violations.push(format!("{what} of {id} without files, process or limits"));
                }
                if let Some(kept) = books.sources.get(&id).cloned().filter(|_| fill == Fill::Baked) {
                    books.minds.insert(id.clone(), kept.mind);
                    books.machine_ids.insert(id.clone(), kept.machine_id);
                    books.copies.insert(id.clone());
                }
                books.guests.insert(id);
                Ok(())
            })
            .await
    }

    async fn turn(&self, what: &str, id: &SandboxId, pause: bool) -> Result<()> {
        self.0
            .call(what, id.as_str(), |books| {
                if !books.guests.contains(id.as_str()) {
                    return Err(Error::Internal("no machine".into()));
                }
                match pause {
                    true => books.paused.insert(id.to_string()),
                    false => books.paused.remove(id.as_str()),
                };
                Ok(())
            })
            .await
    }
}

impl Guest for Handle {
    async fn identify(&self, id: &SandboxId, who: &Identification, _deadline: Instant) -> Result<Instant> {
        let deaf = &self.0.deaf;
        if deaf.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(Error::GuestUnreachable("it is deaf".into()));
        }
        self.0
            .call("identify", id.as_str(), |books| {
                if !books.guests.contains(id.as_str()) {
                    return Err(Error::GuestUnreachable("no guest".into()));
                }
                // Who is woken stays who it is.
                if who.machine_id.is_none() {
                    books.copies.remove(id.as_str());
                }
                if let Some(machine_id) = &who.machine_id {
                    let before = books.machine_ids.insert(id.to_string(), machine_id.clone());
                    let copy = books.copies.remove(id.as_str());
                    if copy && before.as_ref() == Some(machine_id) {
                        books.violations.push(format!("{id} is as unique as what it was copied from"));
                    }
                    if !copy && before.is_some_and(|before| before != *machine_id) {
                        books.violations.push(format!("{id} is somebody else now"));
                    }
                }
                Ok(Instant::now())
            })
            .await
    }
    async fn grow_root(&self, id: &SandboxId) -> Result<()> {
        self.0.call("grow", id.as_str(), |_| Ok(())).await
    }
    async fn sync(&self, id: &SandboxId, _limit: Duration) -> Result<()> {
        self.0.call("sync", id.as_str(), |_| Ok(())).await
    }
    async fn mount(&self, id: &SandboxId, mounts: Vec<Mount>) -> Result<()> {
        self.0
            .call("mount", id.as_str(), |books| {
                books.mounts.insert(id.to_string(), mounts);
                Ok(())
            })
            .await
    }
    async fn warm_up(&self, id: &SandboxId, _command: &str) -> Result<()> {
        self.0.call("warm_up", id.as_str(), |_| Ok(())).await
    }
    async fn open(&self, id: &SandboxId) -> Result<OwnedFd> {
        if !self.0.books.lock().unwrap().guests.contains(id.as_str()) {
            return Err(Error::GuestUnreachable("no guest".into()));
        }
        Ok(std::io::pipe().unwrap().0.into())
    }
    async fn forward(&self, id: &SandboxId, port: u16) -> Result<(OwnedFd, Vec<u8>)> {
        Ok((self.open(id).await?, port.to_string().into_bytes()))
    }
}

impl World for Handle {
    type Storage = Self;
    type Network = Self;
    type Units = Self;
    type Hypervisor = Self;
    type Guest = Self;

    fn storage(&self) -> &Self {
        self
    }
    fn network(&self) -> &Self {
        self
    }
    fn units(&self) -> &Self {
        self
    }
    fn hypervisor(&self) -> &Self {
        self
    }
    fn guest(&self) -> &Self {
        self
    }
}
