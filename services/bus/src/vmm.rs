//! `ai.pandastack.vmm1`: the life of every sandbox.

use std::{collections::BTreeMap, future::Future, os::fd::OwnedFd as StdFd, sync::Arc};

use serde::{Deserialize, Serialize};
use zbus::{OwnedFd, Type, interface, object_server::SignalEmitter};

use crate::{
    Error, Result,
    quota::{Quota, Resource},
    storage::{SnapshotInfo, VolumeSnapshotInfo, VolumeSnapshotSpec, VolumeUse},
};

/// Well-known name of the daemon.
pub const NAME: &str = "ai.pandastack.vmm1";
/// Its only object.
pub const PATH: &str = "/ai/pandastack/vmm1";

/// What a caller wants to have.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct SandboxSpec {
    /// Tenant that owns the sandbox.
    pub workspace: String,
    /// Name of a template as the daemons call it, never an alias; the sandbox keeps its title.
    pub template: String,
    /// The caller's labels, `secret.` keys included.
    pub metadata: BTreeMap<String, String>,
    /// Seconds without a request after which the sandbox is deleted. At least 1.
    pub ttl_seconds: u64,
    /// Never deleted for idleness, and brought back after a power cut.
    pub persistent: bool,
    /// Size of the root disk in MiB; 0 means the template's.
    pub disk_mib: u64,
    /// Snapshot of the same workspace to start from; empty: the template's own. Its template and sizes win.
    #[serde(default)]
    pub snapshot: String,
    /// Volumes of the same workspace, in the order of their devices. Not together with a snapshot.
    #[serde(default)]
    pub volumes: Vec<VolumeUse>,
}

/// What a fork makes: one child.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct Child {
    /// Its labels; the parent's are not copied.
    pub metadata: BTreeMap<String, String>,
    /// Seconds without a request after which it is deleted. At least 1.
    pub ttl_seconds: u64,
    /// Exempt from the idle limit.
    pub persistent: bool,
}

/// What became of one child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Birth {
    /// Its id; empty when it could not be made.
    pub id: String,
    /// Why it could not be made; empty otherwise. Nothing of it is left then.
    pub error: String,
}

/// What became of a fork.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Fork {
    /// Names the capture that all children came from. Nobody can use it any more.
    pub snapshot: String,
    /// When that was, Unix milliseconds.
    pub unix_ms: u64,
    /// How long the parent's processors stood still, microseconds.
    pub paused_us: u64,
    /// In the order asked for. At least one was made.
    pub children: Vec<Birth>,
}

/// A volume as a sandbox sees it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Mount {
    /// Its name.
    pub name: String,
    /// Where the guest has it.
    pub path: String,
    /// Writes are refused by the host.
    pub read_only: bool,
    /// The sandbox's own clone, which ends with it: that of a fork's or a snapshot's child.
    pub private: bool,
}

/// Where a sandbox is in its life. The text form is the API's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// On disk, not yet answering.
    Creating,
    /// The guest answers.
    Running,
    /// Its processors stand still, its memory is held.
    Paused,
    /// Memory and disk are on storage; no process runs.
    Hibernated,
    /// Being taken down.
    Stopping,
    /// Its process is gone and it will not come back; `reason` says why. The record stays until it is deleted.
    Failed,
}

/// A sandbox as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct SandboxInfo {
    /// See [`crate::SandboxId`].
    pub id: String,
    /// Owner.
    pub workspace: String,
    /// Template it came from.
    pub template: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Root disk in MiB.
    pub disk_mib: u64,
    /// Where it is in its life.
    pub state: State,
    /// One sentence on why it is `failed`; empty otherwise.
    pub reason: String,
    /// The caller's labels.
    pub metadata: BTreeMap<String, String>,
    /// Idle limit in seconds.
    pub ttl_seconds: u64,
    /// Seconds since the last request that concerned it.
    pub idle_seconds: u64,
    /// Exempt from the idle limit.
    pub persistent: bool,
    /// Outside IPv4 address; empty while it has none.
    pub guest_ip: String,
    /// `snapshot` for a restored guest, `fork` for a child of a fork, `wake` for one that was woken, `cold` for one that was
    /// booted again after a power cut.
    pub boot_mode: String,
    /// Milliseconds from accepting the request to the guest's first answer.
    pub boot_ms: u64,
    /// Creation time, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Counts every change of this sandbox.
    pub generation: u64,
    /// Snapshot that it was created from; empty otherwise.
    pub snapshot: String,
    /// Sandbox that it was forked from; empty otherwise.
    pub parent: String,
    /// Unit instance that runs it, and directory of its disk: its own id until it is woken for the first time. Of a failed
    /// sandbox, those it had. Empty while it is hibernated.
    pub machine: String,
    /// Volumes it has.
    pub mounts: Vec<Mount>,
}

/// What is left to give away.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct Capacity {
    /// Sandboxes that have a record.
    pub sandboxes: u32,
    /// Of these, running.
    pub running: u32,
    /// Prepared slots waiting for a request.
    pub slots: u32,
    /// Slots that are kept ready when nothing else is to be done.
    pub slots_wanted: u32,
    /// Memory available on the host, MiB.
    pub memory_available_mib: u64,
    /// Memory kept back for the host, MiB. Below it creates are refused.
    pub memory_reserve_mib: u64,
    /// Creates that succeeded since the daemon started.
    pub creates_total: u64,
    /// Creates that were refused or failed since the daemon started.
    pub create_failures_total: u64,
}

/// Something that happened to a sandbox, newest last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Event {
    /// Unix milliseconds.
    pub unix_ms: u64,
    /// For example `sandbox.running`, `sandbox.deleted`, `vm.died`, `recover.cold_boot`.
    pub kind: String,
    /// One sentence; may be empty.
    pub detail: String,
}

/// One of the events of all sandboxes, with its place among them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct HistoryRow {
    /// Goes up by at least 1; never used twice.
    pub seq: u64,
    /// When it happened, Unix milliseconds.
    pub unix_ms: u64,
    /// Tenant of the sandbox.
    pub workspace: String,
    /// The sandbox, which may be gone.
    pub sandbox: String,
    /// As [`Event::kind`].
    pub kind: String,
    /// More about it; `detail` is [`Event::detail`].
    pub payload: BTreeMap<String, String>,
}

/// Which events are wanted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct HistoryQuery {
    /// Of this workspace; empty: of all.
    pub workspace: String,
    /// Of this sandbox; empty: of all.
    pub sandbox: String,
    /// Of these kinds; empty: of all.
    pub kinds: Vec<String>,
    /// Only those with a larger `seq`.
    pub after: u64,
    /// Only those that happened then or later, Unix milliseconds.
    pub since_unix_ms: u64,
    /// So many at most; an answer has 1000 at most.
    pub limit: u32,
    /// If more are there than wanted, the newest; otherwise the oldest.
    pub newest: bool,
}

/// Some events, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct HistoryPage {
    /// What was asked for.
    pub rows: Vec<HistoryRow>,
    /// Whoever asks for what is `after` this misses nothing and gets nothing twice.
    pub position: u64,
}

/// Numbers over time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct Series {
    /// What was measured.
    pub name: String,
    /// Unix seconds and the mean of the step that begins there; steps without a measurement are left out.
    pub points: Vec<(u64, f64)>,
}

/// What the vmm daemon does; see the interface for the meaning of each method.
pub trait VmmBackend: Send + Sync + 'static {
    /// See [`Vmm`].
    fn create(&self, request: String, spec: SandboxSpec) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn get(&self, id: String) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn list(&self, workspace: String) -> impl Future<Output = Result<Vec<SandboxInfo>>> + Send;
    /// See [`Vmm`].
    fn delete(&self, id: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Vmm`].
    fn set_ttl(&self, id: String, ttl_seconds: u64) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn set_persistent(
        &self,
        id: String,
        persistent: bool,
    ) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn set_label(
        &self,
        id: String,
        key: String,
        value: String,
    ) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn touch(&self, ids: Vec<String>) -> impl Future<Output = Result<()>> + Send;
    /// See [`Vmm`].
    fn open_agent(&self, id: String, wake: bool) -> impl Future<Output = Result<StdFd>> + Send;
    /// See [`Vmm`].
    fn open_port(
        &self,
        id: String,
        port: u16,
        wake: bool,
    ) -> impl Future<Output = Result<(StdFd, Vec<u8>)>> + Send;
    /// See [`Vmm`].
    fn open_console(
        &self,
        id: String,
        lines: u32,
        since: u64,
        follow: bool,
    ) -> impl Future<Output = Result<StdFd>> + Send;
    /// See [`Vmm`].
    fn pause(&self, id: String) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn resume(&self, id: String) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn hibernate(&self, id: String) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn wake(&self, id: String) -> impl Future<Output = Result<SandboxInfo>> + Send;
    /// See [`Vmm`].
    fn hibernate_all(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
    /// See [`Vmm`].
    fn snapshot(&self, id: String, snapshot: String) -> impl Future<Output = Result<SnapshotInfo>> + Send;
    /// See [`Vmm`].
    fn snapshot_volume(
        &self,
        spec: VolumeSnapshotSpec,
    ) -> impl Future<Output = Result<VolumeSnapshotInfo>> + Send;
    /// See [`Vmm`].
    fn fork(
        &self,
        request: String,
        id: String,
        children: Vec<Child>,
    ) -> impl Future<Output = Result<Fork>> + Send;
    /// See [`Vmm`].
    fn set_quota(
        &self,
        workspace: String,
        resource: Resource,
        limit: i64,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Vmm`].
    fn quotas(&self, workspace: String) -> impl Future<Output = Result<Vec<Quota>>> + Send;
    /// See [`Vmm`].
    fn events(&self, id: String) -> impl Future<Output = Result<Vec<Event>>> + Send;
    /// See [`Vmm`].
    fn history(&self, query: HistoryQuery) -> impl Future<Output = Result<HistoryPage>> + Send;
    /// See [`Vmm`].
    fn metrics(
        &self,
        workspace: String,
        id: String,
        from: u64,
        to: u64,
        step: u32,
    ) -> impl Future<Output = Result<Vec<Series>>> + Send;
    /// See [`Vmm`].
    fn capacity(&self) -> impl Future<Output = Result<Capacity>> + Send;
    /// See [`Vmm`].
    fn create_timings(&self, id: String) -> impl Future<Output = Result<Vec<(String, u64)>>> + Send;
}

/// The interface `ai.pandastack.vmm1.Manager` over any backend.
#[derive(Debug)]
pub struct Vmm<B>(pub Arc<B>);

#[interface(
    name = "ai.pandastack.vmm1.Manager",
    proxy(default_service = "ai.pandastack.vmm1", default_path = "/ai/pandastack/vmm1")
)]
impl<B: VmmBackend> Vmm<B> {
    /// Makes a sandbox and returns when its guest accepts commands. `request` is the caller's name for this wish: the
    /// same request answers with the same sandbox, however often it is asked. An empty request is never remembered.
    async fn create(&self, request: String, spec: SandboxSpec) -> Result<SandboxInfo> {
        self.0.create(request, spec).await
    }

    /// One sandbox. Does not count as activity.
    async fn get(&self, id: String) -> Result<SandboxInfo> {
        self.0.get(id).await
    }

    /// The sandboxes of a workspace, oldest first; of all workspaces for the empty name.
    async fn list(&self, workspace: String) -> Result<Vec<SandboxInfo>> {
        self.0.list(workspace).await
    }

    /// Deletes a sandbox with everything it has. Answers whether it was there; returns when it is gone for good.
    async fn delete(&self, id: String) -> Result<bool> {
        self.0.delete(id).await
    }

    /// Sets the idle limit in seconds; `WrongState` while the sandbox is being made or recovered. Counts as activity.
    async fn set_ttl(&self, id: String, ttl_seconds: u64) -> Result<SandboxInfo> {
        self.0.set_ttl(id, ttl_seconds).await
    }

    /// Exempts from the idle limit, or no longer; `WrongState` while the sandbox is being made or recovered.
    async fn set_persistent(&self, id: String, persistent: bool) -> Result<SandboxInfo> {
        self.0.set_persistent(id, persistent).await
    }

    /// Sets one of its labels (1 to 64 bytes; its value 1 to 256), or takes it away for an empty value; `WrongState` while the
    /// sandbox is being made or recovered, `Quota` when it has as many labels as it may have. Counts as activity.
    async fn set_label(&self, id: String, key: String, value: String) -> Result<SandboxInfo> {
        self.0.set_label(id, key, value).await
    }

    /// Says that these sandboxes were used just now. Unknown ids are ignored.
    async fn touch(&self, ids: Vec<String>) -> Result<()> {
        self.0.touch(ids).await
    }

    /// A connected stream to the guest's agent, nothing spoken on it yet. Counts as activity. A hibernated sandbox is woken
    /// first if `wake` says so, once for however many callers; otherwise, and while it is paused, `WrongState`. One that is
    /// booted again after its machine was lost is waited for, `NotReady` after 20 seconds.
    async fn open_agent(&self, id: String, wake: bool) -> Result<OwnedFd> {
        Ok(self.0.open_agent(id, wake).await?.into())
    }

    /// A stream to what listens on a TCP port of the guest (its loopback or its own address), and what that said first.
    /// Otherwise as `OpenAgent`; `Refused` when nothing listens there.
    async fn open_port(&self, id: String, port: u16, wake: bool) -> Result<(OwnedFd, Vec<u8>)> {
        let (stream, first) = self.0.open_port(id, port, wake).await?;
        Ok((stream.into(), first))
    }

    /// The serial console of a sandbox as text to be read from a pipe: the last so many lines, not older than `since` (Unix
    /// seconds), of the machine that runs it or ran it last. With `follow` what comes, too, until that machine ends.
    /// Does not count as activity. `NoCapacity` when too many are read at once.
    async fn open_console(&self, id: String, lines: u32, since: u64, follow: bool) -> Result<OwnedFd> {
        Ok(self.0.open_console(id, lines, since, follow).await?.into())
    }

    /// Stops the processors; memory is kept, the process stays. Paused already: nothing to do. `WrongState` otherwise.
    async fn pause(&self, id: String) -> Result<SandboxInfo> {
        self.0.pause(id).await
    }

    /// Lets the processors of a paused sandbox go on. Running already: nothing to do. `WrongState` otherwise.
    async fn resume(&self, id: String) -> Result<SandboxInfo> {
        self.0.resume(id).await
    }

    /// Puts memory and disk onto storage and ends the process. Hibernated already: nothing to do. `WrongState` while it is
    /// neither running nor paused. When it fails, the sandbox is as before.
    async fn hibernate(&self, id: String) -> Result<SandboxInfo> {
        self.0.hibernate(id).await
    }

    /// Brings a hibernated sandbox back, once for however many callers. Running already: nothing to do. When it fails, it
    /// stays hibernated. `WrongState` while it is paused.
    async fn wake(&self, id: String) -> Result<SandboxInfo> {
        self.0.wake(id).await
    }

    /// Hibernates every persistent sandbox that runs, some at a time; for a clean shutdown. Slots are taken down, and no
    /// creates are taken any more. Answers one sentence for each that could not be hibernated. May take minutes.
    async fn hibernate_all(&self) -> Result<Vec<String>> {
        self.0.hibernate_all().await
    }

    /// Captures memory and disks at one point in time, durably; the sandbox runs on. `snapshot` is the new snapshot's id,
    /// chosen by the caller (as for [`crate::SandboxId`]): the same one again waits for, and answers with, the same
    /// snapshot, so that a caller whose patience ended may repeat it. A hibernated sandbox stays so and its image is
    /// taken. A paused one stays paused.
    async fn snapshot(&self, id: String, snapshot: String) -> Result<SnapshotInfo> {
        self.0.snapshot(id, snapshot).await
    }

    /// Takes a snapshot of a volume of a workspace on storage. A guest that may write to it writes out first what it holds back;
    /// it runs on, and nothing else happens to its sandbox meanwhile. `synced` of `spec` means nothing; that of the answer says
    /// whether the guest could. The same id again waits for, and answers with, the same snapshot.
    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        self.0.snapshot_volume(spec).await
    }

    /// Captures a sandbox once and makes children of it side by side, each unique, with memory and disk of that moment; the
    /// parent runs on. 1 to 16 children. The same request answers with the same children; an empty one is never
    /// remembered. Fails as a whole, with nothing left, when no child could be made.
    async fn fork(&self, request: String, id: String, children: Vec<Child>) -> Result<Fork> {
        self.0.fork(request, id, children).await
    }

    /// Sets how much a workspace may have of `sandboxes`, `vcpus`, `memory_mib`, `disk_mib` or `snapshots`, durably; below 0: no
    /// limit of its own. What is there already stays.
    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        self.0.set_quota(workspace, resource, limit).await
    }

    /// What a workspace may have of each, and has.
    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        self.0.quotas(workspace).await
    }

    /// What happened to a sandbox, oldest first, a bounded number.
    async fn events(&self, id: String) -> Result<Vec<Event>> {
        self.0.events(id).await
    }

    /// Events of all sandboxes, also of those that are gone, a bounded number per workspace.
    async fn history(&self, query: HistoryQuery) -> Result<HistoryPage> {
        self.0.history(query).await
    }

    /// What a sandbox, or for the empty id all of a workspace together, took of the host between two Unix seconds, in steps of
    /// so many seconds. What is older is coarser; a restart begins anew.
    async fn metrics(
        &self,
        workspace: String,
        id: String,
        from: u64,
        to: u64,
        step: u32,
    ) -> Result<Vec<Series>> {
        self.0.metrics(workspace, id, from, to, step).await
    }

    /// What is left to give away.
    async fn capacity(&self) -> Result<Capacity> {
        self.0.capacity().await
    }

    /// What each step of making this sandbox took, microseconds by name in order; for `make bench`. The steps up to
    /// `await_api_us` made its slot, before the request. Empty once the daemon was restarted. (The bare restore that a create
    /// is compared with is measured by a program of its own: vmm may not start machines itself.)
    async fn create_timings(&self, id: String) -> Result<Vec<(String, u64)>> {
        self.0.create_timings(id).await
    }

    /// A sandbox changed; gone when the state is empty. `generation` lets a listener notice what it missed.
    #[zbus(signal)]
    pub async fn changed(
        emitter: &SignalEmitter<'_>,
        id: &str,
        workspace: &str,
        state: &str,
        generation: u64,
    ) -> zbus::Result<()>;

    /// A capture of this sandbox cut every stream into its guest, which nothing on them says. What is opened from now on is good.
    #[zbus(signal)]
    pub async fn captured(emitter: &SignalEmitter<'_>, id: &str) -> zbus::Result<()>;

    /// `History` has more about this sandbox. A hint only: what counts is what `History` answers.
    #[zbus(signal)]
    pub async fn happened(emitter: &SignalEmitter<'_>, workspace: &str, id: &str) -> zbus::Result<()>;
}

impl State {
    /// The API's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Hibernated => "hibernated",
            Self::Stopping => "stopping",
            Self::Failed => "failed",
        }
    }
}

/// The error for an id that nobody has.
pub fn unknown_sandbox(id: &str) -> Error {
    let shown: String = id.chars().take(64).collect();
    Error::NotFound(format!("sandbox {shown:?} not found"))
}
