//! Storage, as far as the conductor can tell it from the real one.

use std::collections::BTreeMap;

use pandastack_bus::{
    Error, Result,
    quota::{Quota, Resource},
    storage::{
        CaptureKind, Fill, Owner, SnapshotInfo, SnapshotSpec, StorageBackend, TemplateInfo, TemplateSpec,
        TemplateState, Usage, Verification, VolumeInfo, VolumeSnapshotInfo, VolumeSnapshotSpec, VolumeUse,
    },
};

use crate::fakes::{Books, Capture, Handle, Kept};

fn template(books: &Books) -> TemplateInfo {
    TemplateInfo {
        name: "base".into(),
        title: "base".into(),
        workspace: String::new(),
        hidden: false,
        created_unix_ms: 0,
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

fn info(spec: SnapshotSpec) -> SnapshotInfo {
    SnapshotInfo { spec, size_bytes: 1, created_unix_ms: 1, unusable: String::new() }
}

impl StorageBackend for Handle {
    async fn set_quota(&self, _: String, _: Resource, _: i64) -> Result<()> {
        Err(Error::NotReady("vmm sets no limits elsewhere".into()))
    }
    async fn quotas(&self, _: String) -> Result<Vec<Quota>> {
        Err(Error::NotReady("vmm asks for no limits elsewhere".into()))
    }
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        let books = self.0.books.lock().unwrap();
        Ok([vec![template(&books)], books.more_templates.clone()].concat())
    }
    async fn template(&self, name: String) -> Result<TemplateInfo> {
        let found = self.templates().await?.into_iter().find(|template| template.name == name);
        found.ok_or(Error::NotFound(name))
    }
    async fn find_template(&self, _: String, name: String) -> Result<TemplateInfo> {
        Err(Error::NotFound(name))
    }
    async fn adopt_template(&self, _: String, _: String, _: TemplateSpec) -> Result<TemplateInfo> {
        Err(Error::Internal("vmm makes no templates".into()))
    }
    async fn publish_template(&self, _: String, _: bool) -> Result<()> {
        Err(Error::Internal("vmm publishes no templates".into()))
    }
    async fn delete_template(&self, _: String, _: String) -> Result<bool> {
        Err(Error::Internal("vmm deletes no templates".into()))
    }
    async fn clone_template(&self, _: String, _: String, _: String, _: u64) -> Result<VolumeInfo> {
        Err(Error::Internal("vmm makes no volumes".into()))
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
        self.0
            .call("kernel", &id, |books| {
                books.captures.remove(&id);
                Ok(())
            })
            .await
    }
    async fn prepare_capture(&self, id: String) -> Result<()> {
        self.0.call("prepare_capture", &id, |_| Ok(())).await
    }
    async fn seal_template(&self, id: String, template: String) -> Result<()> {
        self.0
            .call("seal", &id, |books| {
                if books.units.contains_key(&id) || !books.captured.contains(&id) {
                    books.violations.push(format!("sealed {id} while it runs or without a capture"));
                }
                match books.more_templates.iter_mut().find(|one| one.name == template) {
                    Some(one) => one.state = TemplateState::Baked,
                    None => books.baked = true,
                }
                Ok(())
            })
            .await
    }
    async fn fail_template(&self, template: String, reason: String) -> Result<()> {
        self.0
            .call("fail_template", "", |books| {
                match books.more_templates.iter_mut().find(|one| one.name == template) {
                    Some(one) => (one.state, one.reason) = (TemplateState::Failed, reason),
                    None => books.template_failed = Some(reason),
                }
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
                books.inserted.remove(&id);
                books.sources.remove(&id);
                books.captures.remove(&id);
                Ok(books.directories.remove(&id).is_some())
            })
            .await
    }
    async fn begin_capture(&self, id: String) -> Result<CaptureKind> {
        self.0
            .call("begin", &id, |books| {
                if books.captures.insert(id.clone(), Capture::default()).is_some() {
                    books.violations.push(format!("two captures of {id} at once"));
                }
                Ok(CaptureKind::Diff)
            })
            .await
    }
    async fn capture_disks(&self, id: String, volumes: bool) -> Result<()> {
        self.0
            .call("disks", &id, |books| {
                if !books.paused.contains(&id) {
                    books.violations.push(format!("the disks of {id} are captured while it runs"));
                }
                match books.captures.get_mut(&id) {
                    Some(capture) => (capture.disks, capture.volumes) = (true, volumes),
                    None => return Err(Error::WrongState("no capture".into())),
                }
                Ok(())
            })
            .await
    }
    async fn commit_capture(&self, id: String, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        self.0
            .call("commit", &id, |books| {
                let whole = |capture: &Capture| capture.written.is_some() && capture.disks;
                let Some(capture) = books.captures.remove(&id).filter(whole) else {
                    return Err(Error::WrongState("no whole capture".into()));
                };
                let of = |map: &BTreeMap<String, String>| map.get(&id).cloned().unwrap_or_default();
                let kept = Kept {
                    info: info(spec),
                    mind: of(&books.minds),
                    machine_id: of(&books.machine_ids),
                    volumes: capture.volumes,
                };
                books.snapshots.insert(kept.info.spec.id.clone(), kept.clone());
                Ok(kept.info)
            })
            .await
    }
    async fn abort_capture(&self, id: String) -> Result<()> {
        self.0
            .call("abort", &id, |books| {
                books.captures.remove(&id);
                Ok(())
            })
            .await
    }
    async fn copy_snapshot(&self, from: String, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        self.0
            .call("copy", &from, |books| {
                let source =
                    books.snapshots.get(&from).cloned().ok_or_else(|| Error::NotFound(from.clone()))?;
                let kept = Kept { info: info(spec), volumes: true, ..source };
                books.snapshots.insert(kept.info.spec.id.clone(), kept.clone());
                Ok(kept.info)
            })
            .await
    }
    async fn fill_snapshot(&self, id: String, snapshot: String) -> Result<()> {
        self.0
            .call("fill_snapshot", &id, |books| {
                let kept = books.snapshots.get(&snapshot).cloned().ok_or(Error::NotFound(snapshot))?;
                let slot = books.directories.get_mut(&id).ok_or_else(|| Error::NotFound(id.clone()))?;
                *slot = Some(Fill::Baked);
                books.sources.insert(id.clone(), kept);
                Ok(())
            })
            .await
    }
    async fn snapshots(&self, workspace: String) -> Result<Vec<SnapshotInfo>> {
        let books = self.0.books.lock().unwrap();
        let all = books.snapshots.values().map(|kept| kept.info.clone());
        Ok(all.filter(|info| workspace.is_empty() || info.spec.workspace == workspace).collect())
    }
    async fn snapshot(&self, snapshot: String) -> Result<SnapshotInfo> {
        let books = self.0.books.lock().unwrap();
        books.snapshots.get(&snapshot).map(|kept| kept.info.clone()).ok_or(Error::NotFound(snapshot))
    }
    async fn delete_snapshot(&self, snapshot: String) -> Result<bool> {
        self.0
            .call("delete_snapshot", &snapshot, |books| Ok(books.snapshots.remove(&snapshot).is_some()))
            .await
    }
    async fn verify_snapshot(&self, _: String) -> Result<Verification> {
        Err(Error::Internal("vmm checks no snapshots".into()))
    }
    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        let name = spec.volume.clone();
        self.0
            .call("keep", &name, |books| {
                if let Some(kept) = books.kept.get(&spec.id) {
                    return Ok(kept.clone());
                }
                if spec.volume == "missing" {
                    return Err(Error::NotFound("volume missing not found".into()));
                }
                let made = VolumeSnapshotInfo { spec, size_mib: 1, used_bytes: 1, created_unix_ms: 1 };
                books.kept.insert(made.spec.id.clone(), made.clone());
                Ok(made)
            })
            .await
    }
    async fn volume_snapshots(&self, _: String) -> Result<Vec<VolumeSnapshotInfo>> {
        Err(Error::Internal("vmm lists no snapshots of volumes".into()))
    }
    async fn delete_volume_snapshot(&self, _: String, _: String) -> Result<bool> {
        Err(Error::Internal("vmm deletes no snapshots of volumes".into()))
    }
    async fn restore_volume(&self, _: String, _: String, _: String, _: u64) -> Result<VolumeInfo> {
        Err(Error::Internal("vmm makes no volumes".into()))
    }
    async fn create_volume(&self, _: String, _: String, _: u64) -> Result<VolumeInfo> {
        Err(Error::Internal("vmm makes no volumes".into()))
    }
    async fn volumes(&self, _workspace: String) -> Result<Vec<VolumeInfo>> {
        let books = self.0.books.lock().unwrap();
        let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (holder, volumes) in &books.holds {
            volumes
                .iter()
                .for_each(|volume| all.entry(volume.name.clone()).or_default().push(holder.clone()));
        }
        let row = |(name, holders)| VolumeInfo {
            workspace: "w".into(),
            name,
            size_mib: 1,
            used_bytes: 1,
            created_unix_ms: 1,
            holders,
        };
        Ok(all.into_iter().map(row).collect())
    }
    async fn volume(&self, workspace: String, name: String) -> Result<VolumeInfo> {
        let all = self.volumes(workspace.clone()).await?;
        let found = all.into_iter().find(|one| one.name == name && one.workspace == workspace);
        found.ok_or(Error::NotFound(name))
    }
    async fn delete_volume(&self, _: String, _: String) -> Result<bool> {
        Err(Error::Internal("vmm deletes no volumes".into()))
    }
    async fn grow_volume(&self, _: String, _: String, _: u64) -> Result<VolumeInfo> {
        Err(Error::Internal("vmm grows no volumes".into()))
    }
    async fn hold_volumes(&self, sandbox: String, _workspace: String, volumes: Vec<VolumeUse>) -> Result<()> {
        self.0
            .call("hold", &sandbox, |books| {
                let others =
                    || books.holds.iter().filter(|(holder, _)| **holder != sandbox).flat_map(|(_, all)| all);
                for volume in &volumes {
                    if volume.name == "missing" {
                        return Err(Error::NotFound("volume missing not found".into()));
                    }
                    let same = |other: &&VolumeUse| other.name == volume.name;
                    if others().filter(same).any(|other| !(other.read_only && volume.read_only)) {
                        return Err(Error::WrongState(format!("volume {} is in use", volume.name)));
                    }
                }
                books.holds.insert(sandbox.clone(), volumes);
                Ok(())
            })
            .await
    }
    async fn drop_volumes(&self, sandbox: String) -> Result<()> {
        self.0
            .call("drop", &sandbox, |books| {
                let open = |(machine, holder): (&String, &String)| {
                    *holder == sandbox && books.units.contains_key(machine)
                };
                if books.inserted.iter().any(open) {
                    books.violations.push(format!("the volumes of {sandbox} are dropped under its process"));
                }
                books.holds.remove(&sandbox);
                Ok(())
            })
            .await
    }
    async fn insert_volumes(
        &self,
        id: String,
        sandbox: String,
        _workspace: String,
        _volumes: Vec<VolumeUse>,
    ) -> Result<()> {
        self.0
            .call("insert", &id, |books| {
                books.inserted.insert(id.clone(), sandbox);
                Ok(())
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
