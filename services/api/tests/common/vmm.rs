//! A vmm that only remembers.

use std::{
    collections::{BTreeMap, HashMap},
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use guest_init::agent::{Agent, machine::Machine, serve};
use pandastack_api::tenancy::now_ms;
use pandastack_bus::{
    Error, Result, SandboxId,
    storage::{Purpose, SnapshotInfo},
    vmm::{
        Birth, Capacity, Child, Event, Fork, Mount, SandboxInfo, SandboxSpec, State, Vmm, VmmBackend,
        unknown_sandbox,
    },
    zbus::{self, object_server::SignalEmitter},
};
use pandastack_protocol::{Defaults, Failure, Identity};
use tokio::{net::UnixStream, task::JoinHandle};

use super::storage::Shelf;

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
    fn mount(&self, _: &[pandastack_protocol::Mount]) -> std::result::Result<(), Failure> {
        Ok(())
    }
    fn remember_defaults(&self, _: &Defaults) {}
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
    /// How often a hibernated sandbox was woken.
    pub woken: AtomicUsize,
    /// What every wake answers instead of working.
    pub wake_failure: Mutex<Option<Error>>,
    /// Ids of the snapshots that were asked for, in order.
    pub snapshots_asked: Mutex<Vec<String>>,
    /// Places of the children that no fork can make.
    pub stillborn: Mutex<Vec<usize>>,
    /// What the next fork answers instead of working.
    pub fork_failure: Mutex<Option<Error>>,
    /// Sandboxes that cannot be deleted.
    pub undeletable: Mutex<Vec<String>>,
    forks: Mutex<HashMap<String, (Vec<Child>, Fork)>>,
    shelf: Arc<Shelf>,
    relays: Mutex<HashMap<String, Vec<JoinHandle<()>>>>,
    agent: Arc<Agent>,
    bus: OnceLock<zbus::Connection>,
}

impl FakeVmm {
    pub fn new(shelf: Arc<Shelf>) -> Arc<Self> {
        Arc::new(Self {
            sandboxes: Mutex::default(),
            requests: Mutex::default(),
            touched: Mutex::default(),
            opened: AtomicUsize::new(0),
            failures: Mutex::default(),
            create_delay: Mutex::default(),
            woken: AtomicUsize::new(0),
            wake_failure: Mutex::default(),
            snapshots_asked: Mutex::default(),
            stillborn: Mutex::default(),
            fork_failure: Mutex::default(),
            undeletable: Mutex::default(),
            forks: Mutex::default(),
            shelf,
            relays: Mutex::default(),
            agent: Agent::new(NoMachine, None),
            bus: OnceLock::new(),
        })
    }

    /// Cuts every connection into every guest.
    pub fn cut(&self) {
        self.relays.lock().unwrap().drain().flat_map(|(_, relays)| relays).for_each(|relay| relay.abort());
    }

    /// From now on changes are told on this connection.
    pub fn tell_on(&self, bus: &zbus::Connection) {
        self.bus.set(bus.clone()).unwrap();
    }

    /// A change of state, allowed from some states, that is told to who listens.
    pub async fn turn(&self, id: &str, from: &[State], to: State) -> Result<SandboxInfo> {
        let info = self.change(id, |_| ())?;
        if info.state == to {
            return Ok(info);
        }
        if !from.contains(&info.state) {
            return Err(Error::WrongState(format!("the sandbox is {}", info.state.as_str())));
        }
        if to == State::Hibernated {
            let relays = self.relays.lock().unwrap().remove(id);
            relays.into_iter().flatten().for_each(|relay| relay.abort());
        }
        let info = self.change(id, |info| info.state = to)?;
        if let Some(bus) = self.bus.get() {
            let emitter = SignalEmitter::new(bus, pandastack_bus::vmm::PATH).unwrap();
            let told = Vmm::<Self>::changed(&emitter, id, &info.workspace, to.as_str(), info.generation);
            told.await.unwrap();
        }
        Ok(info)
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
        self.shelf.hold(&id, &spec)?;
        self.requests.lock().unwrap().insert(request, (id.clone(), spec.clone()));
        let mounts = spec.volumes.iter().map(|volume| Mount {
            name: volume.name.clone(),
            path: format!("/mnt/{}", volume.name),
            read_only: volume.read_only,
            private: false,
        });
        let info = SandboxInfo {
            mounts: mounts.collect(),
            snapshot: spec.snapshot,
            parent: String::new(),
            machine: id.clone(),
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
        if self.undeletable.lock().unwrap().contains(&id) {
            return Err(Error::Timeout("its process does not end".into()));
        }
        self.shelf.release(&id);
        Ok(self.sandboxes.lock().unwrap().remove(&id).is_some())
    }

    async fn set_ttl(&self, id: String, ttl_seconds: u64) -> Result<SandboxInfo> {
        self.change(&id, |info| info.ttl_seconds = ttl_seconds)
    }

    async fn set_persistent(&self, id: String, persistent: bool) -> Result<SandboxInfo> {
        self.change(&id, |info| info.persistent = persistent)
    }

    async fn set_label(&self, id: String, key: String, value: String) -> Result<SandboxInfo> {
        self.fail()?;
        self.change(&id, |info| match value.is_empty() {
            true => drop(info.metadata.remove(&key)),
            false => drop(info.metadata.insert(key, value)),
        })
    }

    async fn touch(&self, ids: Vec<String>) -> Result<()> {
        self.touched.lock().unwrap().extend(ids);
        Ok(())
    }

    async fn open_agent(&self, id: String, wake: bool) -> Result<OwnedFd> {
        self.fail()?;
        match self.change(&id, |_| ())?.state {
            State::Hibernated if wake => drop(self.wake(id.clone()).await?),
            State::Running => {}
            state => return Err(Error::WrongState(format!("no agent while {}", state.as_str()))),
        }
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
        self.relays.lock().unwrap().entry(id).or_default().push(relay);
        Ok(near.into())
    }

    async fn pause(&self, id: String) -> Result<SandboxInfo> {
        self.turn(&id, &[State::Running], State::Paused).await
    }

    async fn resume(&self, id: String) -> Result<SandboxInfo> {
        self.turn(&id, &[State::Paused], State::Running).await
    }

    async fn hibernate(&self, id: String) -> Result<SandboxInfo> {
        self.fail()?;
        self.turn(&id, &[State::Running, State::Paused], State::Hibernated).await
    }

    async fn wake(&self, id: String) -> Result<SandboxInfo> {
        if let Some(error) = self.wake_failure.lock().unwrap().clone() {
            return Err(error);
        }
        if self.change(&id, |_| ())?.state == State::Hibernated {
            self.woken.fetch_add(1, Ordering::Relaxed);
        }
        self.turn(&id, &[State::Hibernated], State::Running).await
    }

    async fn hibernate_all(&self) -> Result<Vec<String>> {
        Err(Error::NotReady("nobody shuts this down".into()))
    }

    async fn snapshot(&self, id: String, snapshot: String) -> Result<SnapshotInfo> {
        self.snapshots_asked.lock().unwrap().push(snapshot.clone());
        self.fail()?;
        Ok(self.shelf.capture(snapshot, &self.change(&id, |_| ())?, Purpose::Snapshot))
    }

    async fn fork(&self, request: String, id: String, children: Vec<Child>) -> Result<Fork> {
        let delay = *self.create_delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        if let Some(error) = self.fork_failure.lock().unwrap().take() {
            return Err(error);
        }
        let parent = self.change(&id, |_| ())?;
        if let Some((wished, fork)) = self.forks.lock().unwrap().get(&request) {
            return match *wished == children {
                true => Ok(fork.clone()),
                false => Err(Error::Exists("this request was made before, for something else".into())),
            };
        }
        let born = children.iter().enumerate().map(|(index, child)| {
            if self.stillborn.lock().unwrap().contains(&index) {
                return Birth { id: String::new(), error: "no memory for it".into() };
            }
            let info = SandboxInfo {
                id: SandboxId::random().to_string(),
                metadata: child.metadata.clone(),
                ttl_seconds: child.ttl_seconds,
                persistent: child.persistent,
                boot_mode: "fork".into(),
                parent: id.clone(),
                state: State::Running,
                ..parent.clone()
            };
            let birth = Birth { id: info.id.clone(), error: String::new() };
            self.sandboxes.lock().unwrap().insert(info.id.clone(), info);
            birth
        });
        let born: Vec<Birth> = born.collect();
        if born.iter().all(|birth| birth.id.is_empty()) {
            return Err(Error::NoCapacity("no compute capacity available".into()));
        }
        let snapshot = SandboxId::random().to_string();
        let fork = Fork { snapshot, unix_ms: now_ms(), paused_us: 900, children: born };
        self.forks.lock().unwrap().insert(request, (children, fork.clone()));
        Ok(fork)
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
