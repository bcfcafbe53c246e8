//! `ai.pandastack.storage1`: templates, sandbox directories, disks and captures on XFS.

use std::{collections::BTreeMap, future::Future, sync::Arc};

use serde::{Deserialize, Serialize};
use zbus::{Type, interface, object_server::SignalEmitter};

use crate::{
    Result,
    quota::{Quota, Resource},
};

pub use crate::template::{BUILDS, TemplateInfo, TemplateSpec, TemplateState};
pub use crate::volume::{VolumeInfo, VolumeSnapshotInfo, VolumeSnapshotSpec, VolumeUse};

/// Well-known name of the daemon.
pub const NAME: &str = "ai.pandastack.storage1";
/// Its only object.
pub const PATH: &str = "/ai/pandastack/storage1";

/// What machines are configured with before they boot, as 16 hexadecimal digits of its SHA-256: vmm's test says when it changed,
/// and what it is then. It is in the key of every bake, because a restored machine has the configuration it was baked with.
pub const MACHINE_FORM: &str = "da227512df717fd7";

/// What fills the directory of a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "lowercase")]
pub enum Fill {
    /// `mem` and `state` of the bake linked in, `root.img` a reflink of the disk that belongs to them. For a restore.
    Baked,
    /// `root.img` a reflink of the template's pristine disk, `vmlinux` and `initrd.img` linked in. For a first boot.
    Pristine,
}

/// What a capture is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// A tenant's: kept until it is deleted.
    Snapshot,
    /// Between a fork and its children: whoever made it deletes it.
    Fork,
    /// What a hibernated sandbox consists of: goes when it is awake or deleted.
    Hibernation,
}

/// What a capture becomes; the caller's part of its manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct SnapshotSpec {
    /// Its id, chosen by the caller, of the form of [`crate::SandboxId`].
    pub id: String,
    /// Tenant that owns it.
    pub workspace: String,
    /// Sandbox that it was taken of.
    pub sandbox: String,
    /// What it is for.
    pub purpose: Purpose,
    /// Template that the sandbox came from; may be gone by now.
    pub template: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Root disk in MiB.
    pub disk_mib: u64,
    /// Environment of every exec.
    pub env: BTreeMap<String, String>,
    /// Where an exec starts; empty: at home, as in captures of older versions.
    #[serde(default)]
    pub workdir: String,
    /// Volumes of the sandbox, in the order of their devices: for a tenant's snapshot and a fork their files are in the
    /// capture, too.
    pub volumes: Vec<VolumeUse>,
}

/// A capture on storage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct SnapshotInfo {
    /// What its maker said.
    pub spec: SnapshotSpec,
    /// Bytes on the data partition that its files have; blocks shared with others count.
    pub size_bytes: u64,
    /// Unix milliseconds.
    pub created_unix_ms: u64,
    /// Why it cannot be restored on this machine as it is (another processor, damaged); empty when it can.
    pub unusable: String,
}

/// What Firecracker has to write for a capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "lowercase")]
pub enum CaptureKind {
    /// The pages that changed since the machine was restored or captured last, over a copy of what it was then.
    Diff,
    /// All of it: what the machine was then is not known.
    Full,
}

/// What a check of a snapshot found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Memory, state and disks are what was captured.
    Whole,
    /// They are not; it is refused from now on, until a check finds it whole.
    Damaged,
    /// It has no hash tree (yet): only its state and the lengths of its files were compared, and those are right.
    Unhashed,
}

/// What became of a check of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Verification {
    /// In a word.
    pub verdict: Verdict,
    /// The files that are not what they were.
    pub files: Vec<String>,
    /// Why it cannot be restored, or cannot be checked; empty otherwise.
    pub reason: String,
}

/// Space on the data partition, bytes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct Usage {
    /// Size of the file system.
    pub total_bytes: u64,
    /// Free for us.
    pub free_bytes: u64,
    /// Kept back: below it nothing new is made.
    pub reserve_bytes: u64,
}

/// A sandbox directory that exists.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Owner {
    /// The sandbox id.
    pub id: String,
    /// Bytes on the data partition that are not shared, where known.
    pub bytes: u64,
}

/// What the storage daemon does; see the interface for the meaning of each method.
pub trait StorageBackend: Send + Sync + 'static {
    /// See [`Storage`].
    fn templates(&self) -> impl Future<Output = Result<Vec<TemplateInfo>>> + Send;
    /// See [`Storage`].
    fn template(&self, name: String) -> impl Future<Output = Result<TemplateInfo>> + Send;
    /// See [`Storage`].
    fn find_template(
        &self,
        workspace: String,
        name: String,
    ) -> impl Future<Output = Result<TemplateInfo>> + Send;
    /// See [`Storage`].
    fn adopt_template(
        &self,
        workspace: String,
        volume: String,
        spec: TemplateSpec,
    ) -> impl Future<Output = Result<TemplateInfo>> + Send;
    /// See [`Storage`].
    fn publish_template(&self, id: String, replace: bool) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn delete_template(&self, workspace: String, id: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Storage`].
    fn prepare(&self, id: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Storage`].
    fn fill(
        &self,
        id: String,
        template: String,
        fill: Fill,
        disk_mib: u64,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn ensure_kernel(&self, id: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn prepare_capture(&self, id: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn seal_template(&self, id: String, template: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn fail_template(&self, template: String, reason: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn release(&self, id: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Storage`].
    fn begin_capture(&self, id: String) -> impl Future<Output = Result<CaptureKind>> + Send;
    /// See [`Storage`].
    fn capture_disks(&self, id: String, volumes: bool) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn commit_capture(
        &self,
        id: String,
        spec: SnapshotSpec,
    ) -> impl Future<Output = Result<SnapshotInfo>> + Send;
    /// See [`Storage`].
    fn abort_capture(&self, id: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn copy_snapshot(
        &self,
        from: String,
        spec: SnapshotSpec,
    ) -> impl Future<Output = Result<SnapshotInfo>> + Send;
    /// See [`Storage`].
    fn fill_snapshot(&self, id: String, snapshot: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn snapshots(&self, workspace: String) -> impl Future<Output = Result<Vec<SnapshotInfo>>> + Send;
    /// See [`Storage`].
    fn snapshot(&self, snapshot: String) -> impl Future<Output = Result<SnapshotInfo>> + Send;
    /// See [`Storage`].
    fn delete_snapshot(&self, snapshot: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Storage`].
    fn verify_snapshot(&self, snapshot: String) -> impl Future<Output = Result<Verification>> + Send;
    /// See [`Storage`].
    fn create_volume(
        &self,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> impl Future<Output = Result<VolumeInfo>> + Send;
    /// See [`Storage`].
    fn clone_template(
        &self,
        template: String,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> impl Future<Output = Result<VolumeInfo>> + Send;
    /// See [`Storage`].
    fn volumes(&self, workspace: String) -> impl Future<Output = Result<Vec<VolumeInfo>>> + Send;
    /// See [`Storage`].
    fn volume(&self, workspace: String, name: String) -> impl Future<Output = Result<VolumeInfo>> + Send;
    /// See [`Storage`].
    fn delete_volume(&self, workspace: String, name: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Storage`].
    fn grow_volume(
        &self,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> impl Future<Output = Result<VolumeInfo>> + Send;
    /// See [`Storage`].
    fn snapshot_volume(
        &self,
        spec: VolumeSnapshotSpec,
    ) -> impl Future<Output = Result<VolumeSnapshotInfo>> + Send;
    /// See [`Storage`].
    fn volume_snapshots(
        &self,
        workspace: String,
    ) -> impl Future<Output = Result<Vec<VolumeSnapshotInfo>>> + Send;
    /// See [`Storage`].
    fn delete_volume_snapshot(
        &self,
        workspace: String,
        id: String,
    ) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Storage`].
    fn restore_volume(
        &self,
        workspace: String,
        snapshot: String,
        name: String,
        size_mib: u64,
    ) -> impl Future<Output = Result<VolumeInfo>> + Send;
    /// See [`Storage`].
    fn set_quota(
        &self,
        workspace: String,
        resource: Resource,
        limit: i64,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn quotas(&self, workspace: String) -> impl Future<Output = Result<Vec<Quota>>> + Send;
    /// See [`Storage`].
    fn hold_volumes(
        &self,
        sandbox: String,
        workspace: String,
        volumes: Vec<VolumeUse>,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn drop_volumes(&self, sandbox: String) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn insert_volumes(
        &self,
        id: String,
        sandbox: String,
        workspace: String,
        volumes: Vec<VolumeUse>,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Storage`].
    fn owners(&self) -> impl Future<Output = Result<Vec<Owner>>> + Send;
    /// See [`Storage`].
    fn usage(&self) -> impl Future<Output = Result<Usage>> + Send;
}

/// The interface `ai.pandastack.storage1.Manager` over any backend.
#[derive(Debug)]
pub struct Storage<B>(pub Arc<B>);

#[interface(
    name = "ai.pandastack.storage1.Manager",
    proxy(default_service = "ai.pandastack.storage1", default_path = "/ai/pandastack/storage1")
)]
impl<B: StorageBackend> Storage<B> {
    /// The catalogue, by name, hidden ones included.
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        self.0.templates().await
    }

    /// One template by name or alias, whosever it is; hidden ones, too.
    async fn template(&self, name: String) -> Result<TemplateInfo> {
        self.0.template(name).await
    }

    /// The template that a workspace means by a name: its own of that title, otherwise the one for all of that name or
    /// alias. Never a hidden one.
    async fn find_template(&self, workspace: String, name: String) -> Result<TemplateInfo> {
        self.0.find_template(workspace, name).await
    }

    /// Makes a template of a volume that no sandbox has, durably and all at once; the volume stays. It is hidden, and has to be
    /// baked, until it is published. `Exists` when one for all has that name; `Quota` when the workspace has as many as it may
    /// have; `NoSpace`. The same template again: nothing to do.
    async fn adopt_template(
        &self,
        workspace: String,
        volume: String,
        spec: TemplateSpec,
    ) -> Result<TemplateInfo> {
        self.0.adopt_template(workspace, volume, spec).await
    }

    /// Makes a baked template one that its workspace sees, durably and all at once, in the place of the one that had its title if
    /// `replace` says so; otherwise `Exists`. What was made from the other one goes on. Idempotent.
    async fn publish_template(&self, id: String, replace: bool) -> Result<()> {
        self.0.publish_template(id, replace).await
    }

    /// Deletes a template of this workspace's own, finished or not; what was made from it goes on. Answers whether it was there.
    async fn delete_template(&self, workspace: String, id: String) -> Result<bool> {
        self.0.delete_template(workspace, id).await
    }

    /// Makes the directory of a sandbox with what an empty Firecracker process needs (its binary, `s/`). Idempotent;
    /// answers whether anything was made.
    async fn prepare(&self, id: String) -> Result<bool> {
        self.0.prepare(id).await
    }

    /// Fills a prepared directory from a template. `disk_mib` 0 means the template's size; a larger disk is grown, a
    /// smaller one refused.
    async fn fill(&self, id: String, template: String, fill: Fill, disk_mib: u64) -> Result<()> {
        self.0.fill(id, template, fill, disk_mib).await
    }

    /// Links `vmlinux` and `initrd.img` into a directory whose root disk is kept, so that it can be booted cold.
    async fn ensure_kernel(&self, id: String) -> Result<()> {
        self.0.ensure_kernel(id).await
    }

    /// Makes empty, writable `mem` and `state` files for a capture.
    async fn prepare_capture(&self, id: String) -> Result<()> {
        self.0.prepare_capture(id).await
    }

    /// Takes `mem`, `state` and `root.img` of a stopped sandbox as the bake of a template, durably and all at once.
    async fn seal_template(&self, id: String, template: String) -> Result<()> {
        self.0.seal_template(id, template).await
    }

    /// Records that a template could not be baked.
    async fn fail_template(&self, template: String, reason: String) -> Result<()> {
        self.0.fail_template(template, reason).await
    }

    /// Removes the directory of a sandbox. Its process must be gone. Answers whether it was there.
    async fn release(&self, id: String) -> Result<bool> {
        self.0.release(id).await
    }

    /// Makes ready for a capture of a sandbox: flushes its disks, makes `c.mem` (for a diff, a reflink of the memory file
    /// that it runs on) and an empty `c.state`, both writable for Firecracker, and makes durable that what it runs on is
    /// not known any more, because a capture clears the record of what changed. Only [`Storage::commit_capture`] makes it
    /// known again.
    async fn begin_capture(&self, id: String) -> Result<CaptureKind> {
        self.0.begin_capture(id).await
    }

    /// Reflinks the root disk, and its volumes if asked for, while the processors stand still. Everything that the guest
    /// flushed, and that Firecracker wrote, is in them.
    async fn capture_disks(&self, id: String, volumes: bool) -> Result<()> {
        self.0.capture_disks(id, volumes).await
    }

    /// Makes what was captured a snapshot, durably and all at once, and its memory what the sandbox runs on. The same
    /// snapshot again: nothing to do. Off the path, its hash tree is computed.
    async fn commit_capture(&self, id: String, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        self.0.commit_capture(id, spec).await
    }

    /// Removes what an unfinished capture left. Idempotent.
    async fn abort_capture(&self, id: String) -> Result<()> {
        self.0.abort_capture(id).await
    }

    /// Makes another snapshot with the same contents: a tenant's snapshot of a hibernated sandbox. The volumes that `spec`
    /// names and `from` does not contain are cloned as they are.
    async fn copy_snapshot(&self, from: String, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        self.0.copy_snapshot(from, spec).await
    }

    /// Fills a prepared directory from a snapshot: memory and state linked, disks (and its clones of volumes) reflinked.
    /// `WrongState` with a sentence when it cannot be restored here. Idempotent.
    async fn fill_snapshot(&self, id: String, snapshot: String) -> Result<()> {
        self.0.fill_snapshot(id, snapshot).await
    }

    /// Tenants' snapshots of a workspace, newest first; for the empty name every capture of whatever purpose.
    async fn snapshots(&self, workspace: String) -> Result<Vec<SnapshotInfo>> {
        self.0.snapshots(workspace).await
    }

    /// One snapshot of whatever purpose.
    async fn snapshot(&self, snapshot: String) -> Result<SnapshotInfo> {
        self.0.snapshot(snapshot).await
    }

    /// Deletes a snapshot; what was made from it is not concerned. Answers whether it was there.
    async fn delete_snapshot(&self, snapshot: String) -> Result<bool> {
        self.0.delete_snapshot(snapshot).await
    }

    /// Compares a snapshot with its hash tree and its manifest, and answers what it found. One that is not what was captured is
    /// refused from then on, also after a restart, until a later check finds it whole. In the background way, so that it takes
    /// minutes per GiB (`busctl --timeout`), one after the other; a caller that does not wait changes nothing about it.
    /// `NotFound`, also when it is deleted meanwhile.
    async fn verify_snapshot(&self, snapshot: String) -> Result<Verification> {
        self.0.verify_snapshot(snapshot).await
    }

    /// Makes a volume with an empty file system. `Exists` when the name is taken; `NoSpace`.
    async fn create_volume(&self, workspace: String, name: String, size_mib: u64) -> Result<VolumeInfo> {
        self.0.create_volume(workspace, name, size_mib).await
    }

    /// Makes a volume that is a clone of a template's root disk as it was before its first boot, hidden or not; it is grown to
    /// `size_mib` if that is more. `Exists` when the name is taken; `NotReady` while the disk is being imported; `NoSpace`.
    async fn clone_template(
        &self,
        template: String,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        self.0.clone_template(template, workspace, name, size_mib).await
    }

    /// The volumes of a workspace by name; of all workspaces for the empty name.
    async fn volumes(&self, workspace: String) -> Result<Vec<VolumeInfo>> {
        self.0.volumes(workspace).await
    }

    /// One volume.
    async fn volume(&self, workspace: String, name: String) -> Result<VolumeInfo> {
        self.0.volume(workspace, name).await
    }

    /// Deletes a volume. `WrongState` while a sandbox holds it. Answers whether it was there.
    async fn delete_volume(&self, workspace: String, name: String) -> Result<bool> {
        self.0.delete_volume(workspace, name).await
    }

    /// Makes a volume larger; a guest sees it at its next mount. `WrongState` while a sandbox holds it, `InvalidArgument`
    /// when it would shrink.
    async fn grow_volume(&self, workspace: String, name: String, size_mib: u64) -> Result<VolumeInfo> {
        self.0.grow_volume(workspace, name, size_mib).await
    }

    /// Makes a snapshot of a volume, durably and all at once, whoever has it; vmm sees to it that a guest holds nothing back. It
    /// counts as a volume of that size, and stays when the volume goes. The same id again: nothing to do. `NotFound`; `Quota`;
    /// `NoSpace`; `Exists` when the id is that of another one.
    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        self.0.snapshot_volume(spec).await
    }

    /// Snapshots of volumes of a workspace, newest first; of all workspaces for the empty name.
    async fn volume_snapshots(&self, workspace: String) -> Result<Vec<VolumeSnapshotInfo>> {
        self.0.volume_snapshots(workspace).await
    }

    /// Deletes a snapshot of a volume of this workspace; volumes made of it are not concerned. Answers whether it was there.
    async fn delete_volume_snapshot(&self, workspace: String, id: String) -> Result<bool> {
        self.0.delete_volume_snapshot(workspace, id).await
    }

    /// Makes a volume that shares the blocks of a snapshot of this workspace; `size_mib` 0: as large, more: grown, less:
    /// `InvalidArgument`. `Exists` when the name is taken; `Quota`; `NoSpace`.
    async fn restore_volume(
        &self,
        workspace: String,
        snapshot: String,
        name: String,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        self.0.restore_volume(workspace, snapshot, name, size_mib).await
    }

    /// Sets how much a workspace may have of `volumes` or `volume_mib`, durably; below 0: no limit. What is there already
    /// stays.
    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        self.0.set_quota(workspace, resource, limit).await
    }

    /// What a workspace may have of each, and has.
    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        self.0.quotas(workspace).await
    }

    /// Records durably that a sandbox has these volumes, all or none: many readers, or one writer. `WrongState` names the
    /// volume that somebody else has; `InvalidArgument` when there are more than four of a kind. Idempotent.
    async fn hold_volumes(&self, sandbox: String, workspace: String, volumes: Vec<VolumeUse>) -> Result<()> {
        self.0.hold_volumes(sandbox, workspace, volumes).await
    }

    /// Records that a sandbox has no volumes any more. Idempotent.
    async fn drop_volumes(&self, sandbox: String) -> Result<()> {
        self.0.drop_volumes(sandbox).await
    }

    /// Puts volumes that `sandbox` holds in the place of the placeholder drives in the directory `id`, before the load: the
    /// n-th writable one as `w<n>.img`, the n-th read-only one as `r<n>.img`, counted from 0 in the order given.
    async fn insert_volumes(
        &self,
        id: String,
        sandbox: String,
        workspace: String,
        volumes: Vec<VolumeUse>,
    ) -> Result<()> {
        self.0.insert_volumes(id, sandbox, workspace, volumes).await
    }

    /// Every sandbox directory that exists, for reconciliation.
    async fn owners(&self) -> Result<Vec<Owner>> {
        self.0.owners().await
    }

    /// Space on the data partition.
    async fn usage(&self) -> Result<Usage> {
        self.0.usage().await
    }

    /// A template changed its state.
    #[zbus(signal)]
    pub async fn template_changed(emitter: &SignalEmitter<'_>, name: &str, state: &str) -> zbus::Result<()>;
}
