//! A vmm that only remembers.

use std::{
    collections::{BTreeMap, HashMap},
    io::Write,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use guest_init::agent::{Agent, machine::Inert, serve};
use pandastack_api::tenancy::now_ms;
use pandastack_bus::{
    Error, Result, SandboxId,
    quota::{Quota, Resource},
    storage::{Purpose, SnapshotInfo, VolumeSnapshotInfo, VolumeSnapshotSpec},
    vmm::{
        Birth, Capacity, Child, Event, Fork, HistoryPage, HistoryQuery, HistoryRow, Mount, SandboxInfo,
        SandboxSpec, Series, State, Vmm, VmmBackend, unknown_sandbox,
    },
    zbus::{self, object_server::SignalEmitter},
};
use pandastack_daemon::quotas::lines;
use pandastack_protocol::{Client, ClientError};
use tokio::{net::UnixStream, sync::Notify, task::JoinHandle};

use super::storage::Shelf;

/// Far longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(20);

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
    /// What happened.
    pub history: Mutex<Vec<HistoryRow>>,
    /// Whether nobody is told of it.
    pub mute: AtomicBool,
    /// Consoles that are followed.
    pub consoles: Mutex<Vec<std::io::PipeWriter>>,
    /// Whether no guest can be talked to, whatever its state.
    pub shut: AtomicBool,
    /// Sandboxes that cannot be deleted.
    pub undeletable: Mutex<Vec<String>>,
    forks: Mutex<HashMap<String, (Vec<Child>, Fork)>>,
    shelf: Arc<Shelf>,
    relays: Mutex<HashMap<String, Vec<JoinHandle<()>>>>,
    captured: Arc<Notify>,
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
            history: Mutex::default(),
            mute: AtomicBool::new(false),
            consoles: Mutex::default(),
            shut: AtomicBool::new(false),
            undeletable: Mutex::default(),
            forks: Mutex::default(),
            shelf,
            relays: Mutex::default(),
            captured: Arc::default(),
            agent: Agent::new(Inert, None),
            bus: OnceLock::new(),
        })
    }

    /// Cuts every connection into every guest; nothing goes through them any more when this returns.
    pub async fn cut(&self) {
        let relays: Vec<_> = self.relays.lock().unwrap().drain().flat_map(|(_, relays)| relays).collect();
        for relay in relays {
            relay.abort();
            let _ = relay.await;
        }
    }

    /// As a capture does: nothing goes through the connections of before, nothing on them says so, and vmm tells.
    pub async fn capture(&self, id: &str) {
        self.captured.notify_waiters();
        let bus = self.bus.get().unwrap();
        let emitter = SignalEmitter::new(bus, pandastack_bus::vmm::PATH).unwrap();
        Vmm::<Self>::captured(&emitter, id).await.unwrap();
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
        let before = info.state;
        let info = self.change(id, |info| info.state = to)?;
        let kind = match (before, to) {
            (_, State::Paused) => "sandbox.paused",
            (_, State::Hibernated) => "sandbox.hibernated",
            (State::Paused, _) => "sandbox.resumed",
            _ => "sandbox.woken",
        };
        self.happen(&info, kind).await;
        if let Some(bus) = self.bus.get() {
            let emitter = SignalEmitter::new(bus, pandastack_bus::vmm::PATH).unwrap();
            let told = Vmm::<Self>::changed(&emitter, id, &info.workspace, to.as_str(), info.generation);
            told.await.unwrap();
        }
        Ok(info)
    }

    fn count(&self, workspace: &str) -> u64 {
        self.sandboxes.lock().unwrap().values().filter(|info| info.workspace == workspace).count() as u64
    }

    fn admit(&self, workspace: &str, more: u64) -> Result<()> {
        self.shelf.admit(workspace, Resource::Sandboxes, self.count(workspace), more)
    }

    /// Something happens to a sandbox.
    pub async fn happen(&self, info: &SandboxInfo, kind: &str) {
        {
            let mut all = self.history.lock().unwrap();
            let seq = all.last().map_or(1, |row| row.seq + 2);
            let payload = BTreeMap::from([
                ("boot_ms".to_owned(), info.boot_ms.to_string()),
                ("boot_mode".to_owned(), info.boot_mode.clone()),
                ("template".to_owned(), info.template.clone()),
            ]);
            let (workspace, sandbox) = (info.workspace.clone(), info.id.clone());
            all.push(HistoryRow {
                seq,
                unix_ms: now_ms(),
                workspace,
                sandbox,
                kind: kind.to_owned(),
                payload,
            });
        }
        if let Some(bus) = self.bus.get().filter(|_| !self.mute.load(Ordering::Relaxed)) {
            let emitter = SignalEmitter::new(bus, pandastack_bus::vmm::PATH).unwrap();
            Vmm::<Self>::happened(&emitter, &info.workspace, &info.id).await.unwrap();
        }
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
        self.admit(&spec.workspace, 1)?;
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
        self.happen(&info, "sandbox.running").await;
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
        let gone = self.sandboxes.lock().unwrap().remove(&id);
        if let Some(info) = &gone {
            self.happen(info, "sandbox.deleted").await;
        }
        Ok(gone.is_some())
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
            _ if self.shut.load(Ordering::Relaxed) => {
                return Err(Error::WrongState("no agent in this test".into()));
            }
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
        let captured = Arc::clone(&self.captured);
        let relay = tokio::spawn(async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut far, &mut middle) => {}
                () = captured.notified() => std::future::pending().await,
            }
        });
        self.relays.lock().unwrap().entry(id).or_default().push(relay);
        Ok(near.into())
    }

    async fn open_port(&self, id: String, port: u16, wake: bool) -> Result<(OwnedFd, Vec<u8>)> {
        let near = StdUnixStream::from(self.open_agent(id, wake).await?);
        near.set_nonblocking(true).unwrap();
        let near = UnixStream::from_std(near).unwrap();
        let client = Client::greet(near, 1, PATIENCE).await.unwrap();
        match client.forward(port, PATIENCE).await {
            Ok((stream, first)) => Ok((stream.into_std().unwrap().into(), first.to_vec())),
            Err(ClientError::Guest(_)) => Err(Error::Refused(format!("nothing listens on port {port}"))),
            Err(error) => Err(Error::GuestUnreachable(error.to_string())),
        }
    }

    async fn open_console(&self, id: String, lines: u32, since: u64, follow: bool) -> Result<OwnedFd> {
        self.fail()?;
        self.change(&id, |_| ())?;
        let (reader, mut writer) = std::io::pipe().unwrap();
        write!(writer, "boot \u{1b}[0mé\nlines={lines} since={since} follow={follow}\n").unwrap();
        if follow {
            self.consoles.lock().unwrap().push(writer);
        }
        Ok(reader.into())
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

    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        self.snapshots_asked.lock().unwrap().push(spec.id.clone());
        self.fail()?;
        self.shelf.keep(VolumeSnapshotSpec { synced: true, ..spec })
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
        self.admit(&parent.workspace, children.len() as u64)?;
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

    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        assert!(Resource::OF_VMM.contains(&resource));
        self.shelf.limit(workspace, resource, limit);
        Ok(())
    }

    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        let all = self.list(workspace.clone()).await?;
        let snapshots = self.shelf.snapshots.lock().unwrap();
        let snapshots = snapshots.values().filter(|info| info.spec.workspace == workspace).count() as u64;
        let used = [
            (Resource::Sandboxes, all.len() as u64),
            (Resource::Vcpus, all.iter().map(|info| u64::from(info.vcpus)).sum()),
            (Resource::MemoryMib, all.iter().map(|info| info.memory_mib).sum()),
            (Resource::DiskMib, all.iter().map(|info| info.disk_mib).sum()),
            (Resource::Snapshots, snapshots),
        ];
        Ok(lines(&self.shelf.limits_of(&workspace), used))
    }

    async fn history(&self, query: HistoryQuery) -> Result<HistoryPage> {
        self.fail()?;
        let all = self.history.lock().unwrap();
        let wanted = |row: &&HistoryRow| {
            row.seq > query.after
                && row.unix_ms >= query.since_unix_ms
                && row.workspace == query.workspace
                && (query.sandbox.is_empty() || row.sandbox == query.sandbox)
                && (query.kinds.is_empty() || query.kinds.contains(&row.kind))
        };
        let mut rows: Vec<HistoryRow> = all.iter().filter(wanted).cloned().collect();
        let surplus = rows.len().saturating_sub(query.limit as usize);
        let mut position = all.last().map_or(0, |row| row.seq).max(query.after);
        match query.newest {
            true => drop(rows.drain(..surplus)),
            false if surplus > 0 => {
                rows.truncate(query.limit as usize);
                position = rows.last().map_or(query.after, |row| row.seq);
            }
            false => {}
        }
        Ok(HistoryPage { rows, position })
    }

    async fn events(&self, _: String) -> Result<Vec<Event>> {
        Ok(Vec::new())
    }

    async fn metrics(
        &self,
        workspace: String,
        id: String,
        from: u64,
        to: u64,
        step: u32,
    ) -> Result<Vec<Series>> {
        self.fail()?;
        if !id.is_empty() {
            self.change(&id, |_| ())?;
        }
        let name = format!("{workspace} {id} {} {step}", to - from);
        Ok(vec![Series { name, points: vec![(from, 1.5)] }])
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
