//! A world that keeps books and breaks on demand.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::PipeWriter,
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
    storage::{Fill, Owner, StorageBackend, TemplateInfo, TemplateState, Usage},
};
use pandastack_vmm::ports::{
    Answered, Guest, Hypervisor, Identification, Limits, Machine, Process, UnitState, Units, World,
};
use tokio::{sync::Notify, time::Instant};

#[derive(Default)]
pub struct Books {
    pub directories: BTreeMap<String, Option<Fill>>,
    pub units: BTreeMap<String, PipeWriter>,
    pub limited: BTreeSet<String>,
    pub attachments: BTreeSet<String>,
    pub guests: BTreeSet<String>,
    pub paused: BTreeSet<String>,
    pub machine_ids: BTreeMap<String, String>,
    pub captured: BTreeSet<String>,
    pub baked: bool,
    pub template_failed: Option<String>,
    pub violations: Vec<String>,
    pub log: Vec<String>,
}

pub struct Fake {
    pub books: Mutex<Books>,
    /// Calls with an effect that are still answered; then the daemon is as good as dead.
    pub budget: AtomicUsize,
    pub crashed: Notify,
    /// Calls whose log line starts with this fail.
    pub fails: Mutex<Option<String>>,
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
    }

    pub fn fail(&self, what: &str) {
        *self.fails.lock().unwrap() = Some(what.to_owned());
    }

    pub fn owners(&self) -> BTreeSet<String> {
        let books = self.books.lock().unwrap();
        books.directories.keys().chain(books.units.keys()).chain(&books.attachments).cloned().collect()
    }

    /// A call with an effect. It happens, or (budget used up) neither it nor anything after it does.
    async fn call<T>(&self, what: &str, id: &str, act: impl FnOnce(&mut Books) -> Result<T>) -> Result<T> {
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
        act(&mut books)
    }
}

fn template(books: &Books) -> TemplateInfo {
    TemplateInfo {
        name: "base".into(),
        aliases: vec![],
        description: String::new(),
        category: "base".into(),
        tools: vec![],
        vcpus: 1,
        memory_mib: 128,
        disk_mib: 1024,
        env: [("LANG".to_owned(), "C.UTF-8".to_owned())].into(),
        workdir: String::new(),
        warmup: "true".into(),
        size_bytes: 1,
        state: match (&books.template_failed, books.baked) {
            (Some(_), _) => TemplateState::Failed,
            (None, true) => TemplateState::Baked,
            (None, false) => TemplateState::Unbaked,
        },
        reason: books.template_failed.clone().unwrap_or_default(),
    }
}

/// A handle on the world, as one daemon has it.
#[derive(Clone)]
pub struct Handle(pub Arc<Fake>);

impl StorageBackend for Handle {
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        Ok(vec![template(&self.0.books.lock().unwrap())])
    }
    async fn template(&self, name: String) -> Result<TemplateInfo> {
        match name.as_str() {
            "base" => Ok(template(&self.0.books.lock().unwrap())),
            _ => Err(Error::NotFound(name)),
        }
    }
    async fn prepare(&self, id: String) -> Result<bool> {
        self.0
            .call("prepare", &id, |books| {
                books.directories.entry(id.clone()).or_default();
                Ok(true)
            })
            .await
    }
    async fn fill(&self, id: String, _template: String, fill: Fill, _disk_mib: u64) -> Result<()> {
        self.0
            .call("fill", &id, |books| match books.directories.get_mut(&id) {
                Some(slot) => {
                    *slot = Some(fill);
                    Ok(())
                }
                None => Err(Error::NotFound(id.clone())),
            })
            .await
    }
    async fn ensure_kernel(&self, id: String) -> Result<()> {
        self.0.call("kernel", &id, |_| Ok(())).await
    }
    async fn prepare_capture(&self, id: String) -> Result<()> {
        self.0.call("prepare_capture", &id, |_| Ok(())).await
    }
    async fn seal_template(&self, id: String, _template: String) -> Result<()> {
        self.0
            .call("seal", &id, |books| {
                if books.units.contains_key(&id) || !books.captured.contains(&id) {
                    books.violations.push(format!("sealed {id} while it runs or without a capture"));
                }
                books.baked = true;
                Ok(())
            })
            .await
    }
    async fn fail_template(&self, _template: String, reason: String) -> Result<()> {
        self.0
            .call("fail_template", "", |books| {
                books.template_failed = Some(reason);
                Ok(())
            })
            .await
    }
    async fn release(&self, id: String) -> Result<bool> {
        self.0
            .call("release", &id, |books| {
                if books.units.contains_key(&id) {
                    books.violations.push(format!("released {id} under its process"));
                }
                Ok(books.directories.remove(&id).is_some())
            })
            .await
    }
    async fn owners(&self) -> Result<Vec<Owner>> {
        let books = self.0.books.lock().unwrap();
        Ok(books.directories.keys().map(|id| Owner { id: id.clone(), bytes: 0 }).collect())
    }
    async fn usage(&self) -> Result<Usage> {
        Ok(Usage { total_bytes: 1 << 40, free_bytes: 1 << 39, reserve_bytes: 1 << 30 })
    }
}

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
    async fn pause(&self, id: &SandboxId) -> Result<()> {
        self.0
            .call("pause", id.as_str(), |books| {
                if !books.guests.remove(id.as_str()) {
                    books.violations.push(format!("pause of {id}, which does not run"));
                }
                books.paused.insert(id.to_string());
                Ok(())
            })
            .await
    }
    async fn resume(&self, id: &SandboxId) -> Result<()> {
        self.0
            .call("resume", id.as_str(), |books| {
                if !books.paused.remove(id.as_str()) {
                    books.violations.push(format!("resume of {id}, which is not paused"));
                }
                books.guests.insert(id.to_string());
                Ok(())
            })
            .await
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
    async fn renew_disk(&self, id: &SandboxId) -> Result<()> {
        self.0.call("renew", id.as_str(), |_| Ok(())).await
    }
}

impl Handle {
    async fn run(&self, what: &str, id: &SandboxId, fill: Fill) -> Result<()> {
        self.0
            .call(what, id.as_str(), |books| {
                let id = id.to_string();
                let filled = books.directories.get(&id).copied().flatten();
                let good = if fill == Fill::Baked { filled == Some(fill) } else { filled.is_some() };
                if !good || !books.units.contains_key(&id) || !books.limited.contains(&id) {
                    books.violations.push(format!("{what} of {id} without files, process or limits"));
                }
                books.guests.insert(id);
                Ok(())
            })
            .await
    }
}

impl Guest for Handle {
    async fn identify(&self, id: &SandboxId, who: &Identification, _deadline: Instant) -> Result<Answered> {
        let deaf = &self.0.deaf;
        if deaf.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(Error::GuestUnreachable("it is deaf".into()));
        }
        self.0
            .call("identify", id.as_str(), |books| {
                if !books.guests.contains(id.as_str()) {
                    return Err(Error::GuestUnreachable("no guest".into()));
                }
                if let Some(machine_id) = &who.machine_id {
                    let before = books.machine_ids.insert(id.to_string(), machine_id.clone());
                    if before.is_some_and(|before| before != *machine_id) {
                        books.violations.push(format!("{id} is somebody else now"));
                    }
                }
                Ok(Answered { hello: Instant::now(), identified: Instant::now() })
            })
            .await
    }
    async fn grow_root(&self, id: &SandboxId) -> Result<()> {
        self.0.call("grow", id.as_str(), |_| Ok(())).await
    }
    async fn warm_up(&self, id: &SandboxId, _command: &str) -> Result<()> {
        self.0.call("warm_up", id.as_str(), |_| Ok(())).await
    }
    async fn open(&self, _id: &SandboxId) -> Result<OwnedFd> {
        Ok(std::io::pipe().unwrap().0.into())
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
