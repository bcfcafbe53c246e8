//! The verbs of the bus, each as one call of what does it: alone with what it changes, in a task of its own.

use pandastack_bus::{
    self as bus,
    quota::{Quota, Resource},
    storage::*,
};

use crate::{
    capture,
    manager::{Manager, id_of},
    sandbox,
};

/// Longest reason of a failure that is kept, characters.
const REASON_LIMIT: usize = 1000;

impl StorageBackend for Manager {
    async fn templates(&self) -> bus::Result<Vec<TemplateInfo>> {
        Ok(self.inner.entries().iter().map(|entry| entry.info()).collect())
    }

    async fn template(&self, name: String) -> bus::Result<TemplateInfo> {
        Ok(self.inner.find(&name)?.info())
    }

    async fn find_template(&self, workspace: String, name: String) -> bus::Result<TemplateInfo> {
        Ok(self.inner.meant(&workspace, &name)?)
    }

    async fn adopt_template(
        &self,
        workspace: String,
        volume: String,
        spec: TemplateSpec,
    ) -> bus::Result<TemplateInfo> {
        self.run("adopt_template", move |inner| inner.adopt(&workspace, &volume, spec)).await
    }

    async fn publish_template(&self, id: String, replace: bool) -> bus::Result<()> {
        self.run("publish_template", move |inner| inner.publish(&id, replace)).await
    }

    async fn delete_template(&self, workspace: String, id: String) -> bus::Result<bool> {
        self.run("delete_template", move |inner| inner.delete_own(&workspace, &id)).await
    }

    async fn prepare(&self, id: String) -> bus::Result<bool> {
        self.with(&id, "prepare", |inner, id| sandbox::prepare(&inner.place, id, &inner.artefacts)).await
    }

    async fn fill(&self, id: String, template: String, fill: Fill, disk_mib: u64) -> bus::Result<()> {
        self.with(&id, "fill", move |inner, id| inner.fill(id, &template, fill, disk_mib)).await
    }

    async fn ensure_kernel(&self, id: String) -> bus::Result<()> {
        self.with(&id, "ensure_kernel", |inner, id| {
            sandbox::ensure_kernel(&inner.place, id, &inner.artefacts)
        })
        .await
    }

    async fn prepare_capture(&self, id: String) -> bus::Result<()> {
        self.with(&id, "prepare_capture", |inner, id| sandbox::prepare_capture(&inner.place, id)).await
    }

    async fn seal_template(&self, id: String, template: String) -> bus::Result<()> {
        self.with(&id, "seal_template", move |inner, id| inner.seal(id, &template)).await
    }

    async fn fail_template(&self, template: String, reason: String) -> bus::Result<()> {
        let entry = self.inner.find(&template)?;
        let reason: String = reason.chars().take(REASON_LIMIT).collect();
        tracing::error!(template = %entry.name(), "could not be baked: {reason}");
        self.inner.change(&entry, |progress| progress.failure = Some(reason));
        Ok(())
    }

    async fn release(&self, id: String) -> bus::Result<bool> {
        self.with(&id, "release", |inner, id| sandbox::release(&inner.place, id)).await
    }

    async fn begin_capture(&self, id: String) -> bus::Result<CaptureKind> {
        self.with(&id, "begin_capture", |inner, id| capture::begin(&inner.place, id)).await
    }

    async fn capture_disks(&self, id: String, volumes: bool) -> bus::Result<()> {
        self.with(&id, "capture_disks", move |inner, id| capture::disks(&inner.place, id, volumes)).await
    }

    async fn commit_capture(&self, id: String, spec: SnapshotSpec) -> bus::Result<SnapshotInfo> {
        let snapshot = spec.id.clone();
        self.with_both(&id, &snapshot, "commit_capture", move |inner, id| {
            inner.snapshots.commit(&inner.place, id, spec)
        })
        .await
    }

    async fn abort_capture(&self, id: String) -> bus::Result<()> {
        self.with(&id, "abort_capture", |inner, id| capture::abort(&inner.place, id)).await
    }

    async fn copy_snapshot(&self, from: String, spec: SnapshotSpec) -> bus::Result<SnapshotInfo> {
        let (from, snapshot) = (id_of(&from)?, spec.id.clone());
        self.with_snapshot(&snapshot, "copy_snapshot", move |inner, _| {
            inner.snapshots.copy(&inner.place, &inner.volumes, &from, spec)
        })
        .await
    }

    async fn fill_snapshot(&self, id: String, snapshot: String) -> bus::Result<()> {
        let snapshot = id_of(&snapshot)?;
        self.with(&id, "fill_snapshot", move |inner, id| inner.snapshots.fill(&inner.place, id, &snapshot))
            .await
    }

    async fn snapshots(&self, workspace: String) -> bus::Result<Vec<SnapshotInfo>> {
        Ok(self.inner.snapshots.list(&workspace))
    }

    async fn snapshot(&self, snapshot: String) -> bus::Result<SnapshotInfo> {
        Ok(self.inner.snapshots.find(&id_of(&snapshot)?)?.info())
    }

    async fn delete_snapshot(&self, snapshot: String) -> bus::Result<bool> {
        self.with_snapshot(&snapshot, "delete_snapshot", |inner, id| inner.snapshots.delete(&inner.place, id))
            .await
    }

    async fn verify_snapshot(&self, snapshot: String) -> bus::Result<Verification> {
        self.verify(&snapshot).await
    }

    async fn create_volume(&self, workspace: String, name: String, size_mib: u64) -> bus::Result<VolumeInfo> {
        self.run("create_volume", move |inner| {
            inner.volumes.create(&inner.place, &workspace, &name, size_mib)
        })
        .await
    }

    async fn clone_template(
        &self,
        template: String,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> bus::Result<VolumeInfo> {
        self.run("clone_template", move |inner| inner.clone_template(&template, &workspace, &name, size_mib))
            .await
    }

    async fn volumes(&self, workspace: String) -> bus::Result<Vec<VolumeInfo>> {
        self.run("volumes", move |inner| Ok(inner.volumes.list(&inner.place.layout, &workspace))).await
    }

    async fn volume(&self, workspace: String, name: String) -> bus::Result<VolumeInfo> {
        self.run("volume", move |inner| inner.volumes.info(&inner.place.layout, &workspace, &name)).await
    }

    async fn delete_volume(&self, workspace: String, name: String) -> bus::Result<bool> {
        self.run("delete_volume", move |inner| inner.volumes.delete(&inner.place, &workspace, &name)).await
    }

    async fn grow_volume(&self, workspace: String, name: String, size_mib: u64) -> bus::Result<VolumeInfo> {
        self.run("grow_volume", move |inner| inner.volumes.grow(&inner.place, &workspace, &name, size_mib))
            .await
    }

    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> bus::Result<VolumeSnapshotInfo> {
        let id = spec.id.clone();
        self.with_snapshot(&id, "snapshot_volume", move |inner, id| {
            inner.volumes.snapshot(&inner.place, id, spec)
        })
        .await
    }

    async fn volume_snapshots(&self, workspace: String) -> bus::Result<Vec<VolumeSnapshotInfo>> {
        self.run("volume_snapshots", move |inner| {
            Ok(inner.volumes.snapshots(&inner.place.layout, &workspace))
        })
        .await
    }

    async fn delete_volume_snapshot(&self, workspace: String, id: String) -> bus::Result<bool> {
        self.with_snapshot(&id, "delete_volume_snapshot", move |inner, id| {
            inner.volumes.delete_snapshot(&inner.place, &workspace, id)
        })
        .await
    }

    async fn restore_volume(
        &self,
        workspace: String,
        snapshot: String,
        name: String,
        size_mib: u64,
    ) -> bus::Result<VolumeInfo> {
        let snapshot = id_of(&snapshot)?;
        self.run("restore_volume", move |inner| {
            inner.volumes.restore(&inner.place, &workspace, &snapshot, &name, size_mib)
        })
        .await
    }

    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> bus::Result<()> {
        self.run("set_quota", move |inner| inner.volumes.set_quota(&workspace, resource, limit)).await
    }

    async fn quotas(&self, workspace: String) -> bus::Result<Vec<Quota>> {
        self.run("quotas", move |inner| Ok(inner.volumes.quotas(&workspace))).await
    }

    async fn hold_volumes(
        &self,
        sandbox: String,
        workspace: String,
        volumes: Vec<VolumeUse>,
    ) -> bus::Result<()> {
        let sandbox = id_of(&sandbox)?;
        self.run("hold_volumes", move |inner| {
            inner.volumes.hold(&inner.place, &sandbox, &workspace, &volumes)
        })
        .await
    }

    async fn drop_volumes(&self, sandbox: String) -> bus::Result<()> {
        let sandbox = id_of(&sandbox)?;
        self.run("drop_volumes", move |inner| inner.volumes.drop_of(&inner.place, &sandbox)).await
    }

    async fn insert_volumes(
        &self,
        id: String,
        sandbox: String,
        workspace: String,
        volumes: Vec<VolumeUse>,
    ) -> bus::Result<()> {
        let sandbox = id_of(&sandbox)?;
        self.with(&id, "insert_volumes", move |inner, id| {
            inner.volumes.insert(&inner.place, id, &sandbox, &workspace, &volumes)
        })
        .await
    }

    async fn owners(&self) -> bus::Result<Vec<Owner>> {
        self.run("owners", |inner| sandbox::owners(&inner.place.layout)).await
    }

    async fn usage(&self) -> bus::Result<Usage> {
        self.run("usage", |inner| inner.place.usage()).await
    }
}
