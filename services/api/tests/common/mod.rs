//! An appliance in one process: the real server, a vmm and a storage that only remember, and the real agent as every
//! guest, behind relays that a test can cut.
#![allow(dead_code)]

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use guest_init::agent::{Agent, machine::Machine, serve};
use pandastack_api::{
    app::App,
    auth::Token,
    gate::Gate,
    listener, routes,
    tenancy::{Tenancy, now_ms},
};
use pandastack_bus::{
    Error, Result, SandboxId,
    storage::{Fill, Owner, Storage, StorageBackend, TemplateInfo, TemplateState, Usage},
    vmm::{Capacity, Event, SandboxInfo, SandboxSpec, State, Vmm, VmmBackend, unknown_sandbox},
    zbus,
};
use pandastack_protocol::{Defaults, Failure, Identity};
use tokio::{
    net::{TcpListener, UnixStream},
    task::JoinHandle,
};

/// The token of the default workspace.
pub const TOKEN: &str = "pds_0123456789abcdef0123456789abcdef";

struct NoMachine;

impl Machine for NoMachine {
    fn identify(&self, _: &Identity) -> std::result::Result<(), Failure> {
        Ok(())
    }
    fn grow_root(&self) -> std::result::Result<(), Failure> {
        Ok(())
    }
    fn shut_down(&self) -> std::result::Result<(), Failure> {
        Ok(())
    }
    fn remembered_defaults(&self) -> Defaults {
        Defaults::default()
    }
}

/// A vmm that only remembers.
pub struct FakeVmm {
    pub sandboxes: Mutex<BTreeMap<String, SandboxInfo>>,
    /// Names of creates, with what was wished then.
    pub requests: Mutex<HashMap<String, (String, SandboxSpec)>>,
    pub touched: Mutex<Vec<String>>,
    pub opened: AtomicUsize,
    /// What the next calls answer instead of working.
    pub failures: Mutex<Vec<Error>>,
    pub create_delay: Mutex<Duration>,
    relays: Mutex<Vec<JoinHandle<()>>>,
    agent: Arc<Agent>,
}

impl FakeVmm {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            sandboxes: Mutex::default(),
            requests: Mutex::default(),
            touched: Mutex::default(),
            opened: AtomicUsize::new(0),
            failures: Mutex::default(),
            create_delay: Mutex::default(),
            relays: Mutex::default(),
            agent: Agent::new(NoMachine, None),
        })
    }

    /// Cuts every connection into every guest.
    pub fn cut(&self) {
        self.relays.lock().unwrap().drain(..).for_each(|relay| relay.abort());
    }

    fn fail(&self) -> Result<()> {
        self.failures.lock().unwrap().pop().map_or(Ok(()), Err)
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut SandboxInfo)) -> Result<SandboxInfo> {
        let mut all = self.sandboxes.lock().unwrap();
        let info = all.get_mut(id).ok_or_else(|| unknown_sandbox(id))?;
        change(info);
        Ok(info.clone())
    }
}

impl VmmBackend for FakeVmm {
    async fn create(&self, request: String, spec: SandboxSpec) -> Result<SandboxInfo> {
        let delay = *self.create_delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        self.fail()?;
        if let Some((id, wished)) = self.requests.lock().unwrap().get(&request) {
            if *wished != spec {
                return Err(Error::Exists("this request was made before, for something else".into()));
            }
            return self.sandboxes.lock().unwrap().get(id).cloned().ok_or_else(|| unknown_sandbox(id));
        }
        let id = SandboxId::random().to_string();
        self.requests.lock().unwrap().insert(request, (id.clone(), spec.clone()));
        let info = SandboxInfo {
            id: id.clone(),
            workspace: spec.workspace,
            template: spec.template,
            vcpus: 2,
            memory_mib: 512,
            disk_mib: if spec.disk_mib == 0 { 4096 } else { spec.disk_mib },
            state: State::Running,
            reason: String::new(),
            metadata: spec.metadata,
            ttl_seconds: spec.ttl_seconds,
            idle_seconds: 0,
            persistent: spec.persistent,
            guest_ip: "10.200.0.2".into(),
            boot_mode: "snapshot".into(),
            boot_ms: 12,
            created_unix_ms: now_ms(),
            generation: 1,
        };
        self.sandboxes.lock().unwrap().insert(id.clone(), info.clone());
        Ok(info)
    }

    async fn get(&self, id: String) -> Result<SandboxInfo> {
        self.fail()?;
        self.change(&id, |_| ())
    }

    async fn list(&self, workspace: String) -> Result<Vec<SandboxInfo>> {
        let all = self.sandboxes.lock().unwrap();
        Ok(all.values().filter(|i| workspace.is_empty() || i.workspace == workspace).cloned().collect())
    }

    async fn delete(&self, id: String) -> Result<bool> {
        self.fail()?;
        Ok(self.sandboxes.lock().unwrap().remove(&id).is_some())
    }

    async fn set_ttl(&self, id: String, ttl_seconds: u64) -> Result<SandboxInfo> {
        self.change(&id, |info| info.ttl_seconds = ttl_seconds)
    }

    async fn set_persistent(&self, id: String, persistent: bool) -> Result<SandboxInfo> {
        self.change(&id, |info| info.persistent = persistent)
    }

    async fn touch(&self, ids: Vec<String>) -> Result<()> {
        self.touched.lock().unwrap().extend(ids);
        Ok(())
    }

    async fn open_agent(&self, id: String) -> Result<OwnedFd> {
        self.fail()?;
        self.change(&id, |_| ())?;
        self.opened.fetch_add(1, Ordering::Relaxed);
        let (near, far) = StdUnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let mut far = UnixStream::from_std(far).unwrap();
        let (mut middle, guest) = UnixStream::pair().unwrap();
        let agent = Arc::clone(&self.agent);
        tokio::spawn(async move { serve(guest, agent).await });
        let relay = tokio::spawn(async move {
            let _ = tokio::io::copy_bidirectional(&mut far, &mut middle).await;
        });
        self.relays.lock().unwrap().push(relay);
        Ok(near.into())
    }

    async fn events(&self, _: String) -> Result<Vec<Event>> {
        Ok(Vec::new())
    }

    async fn capacity(&self) -> Result<Capacity> {
        self.fail()?;
        let count = self.sandboxes.lock().unwrap().len() as u32;
        Ok(Capacity { sandboxes: count, running: count, slots: 3, ..Capacity::default() })
    }

    async fn create_timings(&self, _: String) -> Result<Vec<(String, u64)>> {
        Err(Error::NotReady("there is no machine here".into()))
    }
}

/// A storage with two templates that counts how often it is asked for one.
#[derive(Default)]
pub struct FakeStorage {
    pub asked: AtomicUsize,
}

impl StorageBackend for FakeStorage {
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        let one = |name: &str, alias: &str| TemplateInfo {
            name: name.into(),
            aliases: vec![alias.into()],
            description: "A template.".into(),
            category: "base".into(),
            tools: vec!["git".into()],
            vcpus: 2,
            memory_mib: 512,
            disk_mib: 4096,
            env: BTreeMap::new(),
            workdir: "/root".into(),
            warmup: String::new(),
            size_bytes: 1 << 30,
            state: TemplateState::Baked,
            reason: String::new(),
        };
        Ok(vec![one("code-interpreter", "python"), one("base", "ubuntu-24.04")])
    }

    async fn template(&self, name: String) -> Result<TemplateInfo> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let all = self.templates().await?;
        all.into_iter()
            .find(|template| template.name == name || template.aliases.contains(&name))
            .ok_or_else(|| Error::NotFound(format!("template {name:?} not found")))
    }

    async fn usage(&self) -> Result<Usage> {
        Ok(Usage::default())
    }

    async fn prepare(&self, _: String) -> Result<bool> {
        Err(Error::NotReady(String::new()))
    }
    async fn fill(&self, _: String, _: String, _: Fill, _: u64) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn ensure_kernel(&self, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn prepare_capture(&self, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn seal_template(&self, _: String, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn fail_template(&self, _: String, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn release(&self, _: String) -> Result<bool> {
        Err(Error::NotReady(String::new()))
    }
    async fn owners(&self) -> Result<Vec<Owner>> {
        Ok(Vec::new())
    }
}

/// Everything, running.
pub struct Appliance {
    pub address: SocketAddr,
    pub vmm: Arc<FakeVmm>,
    pub storage: Arc<FakeStorage>,
    pub app: Arc<App>,
    pub daemons: zbus::Connection,
    _state: tempfile::TempDir,
}

impl Appliance {
    /// Starts one on a free port.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    /// Starts one.
    pub async fn start_at(address: &str) -> Self {
        let vmm = FakeVmm::new();
        let storage = Arc::new(FakeStorage::default());
        let (one, two) = StdUnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let (daemons, bus) = tokio::join!(
            zbus::connection::Builder::unix_stream(one)
                .server(guid)
                .p2p()
                .serve_at(pandastack_bus::vmm::PATH, Vmm(Arc::clone(&vmm)))
                .serve_at(pandastack_bus::storage::PATH, Storage(Arc::clone(&storage)))
                .build(),
            zbus::connection::Builder::unix_stream(two).p2p().build(),
        );
        let (daemons, bus) = (daemons.unwrap(), bus.unwrap());
        let state = tempfile::tempdir().unwrap();
        let tenancy = Tenancy::open(state.path()).unwrap();
        tenancy.first_boot(Token::parse(TOKEN), |_| unreachable!("a preset is there")).await.unwrap();
        let app = App::new(&bus, tenancy).await.unwrap();
        app.start().await.unwrap();
        let gate = Gate::new(Arc::clone(&app), routes::all(&app));
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(listener::serve(listener, gate, std::future::pending()));
        Self { address, vmm, storage, app, daemons, _state: state }
    }
}
