//! Storage and network over the bus, behind the traits that their daemons implement; and the world put together.
//!
//! Owns: nothing but proxies. Refuses to know: what the answers mean.

use std::os::fd::OwnedFd;

use pandastack_bus::{
    Result,
    network::{Attachment, NetworkBackend, NetworkProxy},
    quota::{Quota, Resource},
    storage::{
        CaptureKind, Fill, Owner, SnapshotInfo, SnapshotSpec, StorageBackend, StorageProxy, TemplateInfo,
        TemplateSpec, Usage, Verification, VolumeInfo, VolumeSnapshotInfo, VolumeSnapshotSpec, VolumeUse,
    },
    zbus::{self, Connection},
};

use crate::{agent::Agents, firecracker::Firecracker, ports::World, socket::Sockets, unit::SystemdUnits};

/// Storage, at the other end of the bus.
#[derive(Debug, Clone)]
pub struct RemoteStorage(pub StorageProxy<'static>);

impl StorageBackend for RemoteStorage {
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        self.0.templates().await
    }
    async fn template(&self, name: String) -> Result<TemplateInfo> {
        self.0.template(name).await
    }
    async fn find_template(&self, workspace: String, name: String) -> Result<TemplateInfo> {
        self.0.find_template(workspace, name).await
    }
    async fn adopt_template(
        &self,
        workspace: String,
        volume: String,
        spec: TemplateSpec,
    ) -> Result<TemplateInfo> {
        self.0.adopt_template(workspace, volume, spec).await
    }
    async fn publish_template(&self, id: String, replace: bool) -> Result<()> {
        self.0.publish_template(id, replace).await
    }
    async fn delete_template(&self, workspace: String, id: String) -> Result<bool> {
        self.0.delete_template(workspace, id).await
    }
    async fn clone_template(
        &self,
        template: String,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        self.0.clone_template(template, workspace, name, size_mib).await
    }
    async fn prepare(&self, id: String) -> Result<bool> {
        self.0.prepare(id).await
    }
    async fn fill(&self, id: String, template: String, fill: Fill, disk_mib: u64) -> Result<()> {
        self.0.fill(id, template, fill, disk_mib).await
    }
    async fn ensure_kernel(&self, id: String) -> Result<()> {
        self.0.ensure_kernel(id).await
    }
    async fn prepare_capture(&self, id: String) -> Result<()> {
        self.0.prepare_capture(id).await
    }
    async fn seal_template(&self, id: String, template: String) -> Result<()> {
        self.0.seal_template(id, template).await
    }
    async fn fail_template(&self, template: String, reason: String) -> Result<()> {
        self.0.fail_template(template, reason).await
    }
    async fn release(&self, id: String) -> Result<bool> {
        self.0.release(id).await
    }
    async fn begin_capture(&self, id: String) -> Result<CaptureKind> {
        self.0.begin_capture(id).await
    }
    async fn capture_disks(&self, id: String, volumes: bool) -> Result<()> {
        self.0.capture_disks(id, volumes).await
    }
    async fn commit_capture(&self, id: String, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        self.0.commit_capture(id, spec).await
    }
    async fn abort_capture(&self, id: String) -> Result<()> {
        self.0.abort_capture(id).await
    }
    async fn copy_snapshot(&self, from: String, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        self.0.copy_snapshot(from, spec).await
    }
    async fn fill_snapshot(&self, id: String, snapshot: String) -> Result<()> {
        self.0.fill_snapshot(id, snapshot).await
    }
    async fn snapshots(&self, workspace: String) -> Result<Vec<SnapshotInfo>> {
        self.0.snapshots(workspace).await
    }
    async fn snapshot(&self, snapshot: String) -> Result<SnapshotInfo> {
        self.0.snapshot(snapshot).await
    }
    async fn delete_snapshot(&self, snapshot: String) -> Result<bool> {
        self.0.delete_snapshot(snapshot).await
    }
    async fn verify_snapshot(&self, snapshot: String) -> Result<Verification> {
        self.0.verify_snapshot(snapshot).await
    }
    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        self.0.snapshot_volume(spec).await
    }
    async fn volume_snapshots(&self, workspace: String) -> Result<Vec<VolumeSnapshotInfo>> {
        self.0.volume_snapshots(workspace).await
    }
    async fn delete_volume_snapshot(&self, workspace: String, id: String) -> Result<bool> {
        self.0.delete_volume_snapshot(workspace, id).await
    }
    async fn restore_volume(
        &self,
        workspace: String,
        snapshot: String,
        name: String,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        self.0.restore_volume(workspace, snapshot, name, size_mib).await
    }
    async fn create_volume(&self, workspace: String, name: String, size_mib: u64) -> Result<VolumeInfo> {
        self.0.create_volume(workspace, name, size_mib).await
    }
    async fn volumes(&self, workspace: String) -> Result<Vec<VolumeInfo>> {
        self.0.volumes(workspace).await
    }
    async fn volume(&self, workspace: String, name: String) -> Result<VolumeInfo> {
        self.0.volume(workspace, name).await
    }
    async fn delete_volume(&self, workspace: String, name: String) -> Result<bool> {
        self.0.delete_volume(workspace, name).await
    }
    async fn grow_volume(&self, workspace: String, name: String, size_mib: u64) -> Result<VolumeInfo> {
        self.0.grow_volume(workspace, name, size_mib).await
    }
    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        self.0.set_quota(workspace, resource, limit).await
    }
    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        self.0.quotas(workspace).await
    }
    async fn hold_volumes(&self, sandbox: String, workspace: String, volumes: Vec<VolumeUse>) -> Result<()> {
        self.0.hold_volumes(sandbox, workspace, volumes).await
    }
    async fn drop_volumes(&self, sandbox: String) -> Result<()> {
        self.0.drop_volumes(sandbox).await
    }
    async fn insert_volumes(
        &self,
        id: String,
        sandbox: String,
        workspace: String,
        volumes: Vec<VolumeUse>,
    ) -> Result<()> {
        self.0.insert_volumes(id, sandbox, workspace, volumes).await
    }
    async fn owners(&self) -> Result<Vec<Owner>> {
        self.0.owners().await
    }
    async fn usage(&self) -> Result<Usage> {
        self.0.usage().await
    }
}

/// The network daemon, at the other end of the bus.
#[derive(Debug, Clone)]
pub struct RemoteNetwork(pub NetworkProxy<'static>);

impl NetworkBackend for RemoteNetwork {
    async fn attach(&self, id: String, process: OwnedFd) -> Result<Attachment> {
        self.0.attach(id, process.into()).await
    }
    async fn detach(&self, id: String) -> Result<bool> {
        self.0.detach(id).await
    }
    async fn owners(&self) -> Result<Vec<Attachment>> {
        self.0.owners().await
    }
}

/// The appliance.
#[derive(Debug, Clone)]
pub struct Appliance {
    storage: RemoteStorage,
    network: RemoteNetwork,
    units: SystemdUnits,
    firecracker: Firecracker,
    agents: Agents,
}

impl Appliance {
    /// Connects to everybody. Nobody is waited for: a daemon that is not up yet is started by the first call.
    ///
    /// # Errors
    /// PID 1 cannot be reached.
    pub async fn connect(bus: &Connection, sockets: Sockets) -> zbus::Result<Self> {
        Ok(Self {
            storage: RemoteStorage(StorageProxy::new(bus).await?),
            network: RemoteNetwork(NetworkProxy::new(bus).await?),
            units: SystemdUnits::connect(bus, sockets.clone()).await?,
            firecracker: Firecracker::new(sockets.clone()),
            agents: Agents::new(sockets),
        })
    }
}

impl World for Appliance {
    type Storage = RemoteStorage;
    type Network = RemoteNetwork;
    type Units = SystemdUnits;
    type Hypervisor = Firecracker;
    type Guest = Agents;

    fn storage(&self) -> &RemoteStorage {
        &self.storage
    }
    fn network(&self) -> &RemoteNetwork {
        &self.network
    }
    fn units(&self) -> &SystemdUnits {
        &self.units
    }
    fn hypervisor(&self) -> &Firecracker {
        &self.firecracker
    }
    fn guest(&self) -> &Agents {
        &self.agents
    }
}
