//! A storage that only remembers.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use pandastack_api::tenancy::now_ms;
use pandastack_bus::{
    Error, Result,
    quota::{Quota, Resource},
    storage::{
        CaptureKind, Fill, Owner, Purpose, SnapshotInfo, SnapshotSpec, StorageBackend, TemplateInfo,
        TemplateSpec, TemplateState, Usage, Verification, VolumeInfo, VolumeSnapshotInfo, VolumeSnapshotSpec,
        VolumeUse,
    },
    vmm::{SandboxInfo, SandboxSpec},
};
use pandastack_daemon::quotas::{Limits, admit, lines};

/// A storage with two templates that counts how often it is asked for one.
pub struct FakeStorage {
    pub asked: AtomicUsize,
    pub shelf: Arc<Shelf>,
}

/// What lies on storage.
#[derive(Default)]
pub struct Shelf {
    pub snapshots: Mutex<BTreeMap<String, SnapshotInfo>>,
    pub volumes: Mutex<BTreeMap<(String, String), VolumeInfo>>,
    /// Snapshots of volumes, by id.
    pub kept: Mutex<BTreeMap<String, VolumeSnapshotInfo>>,
    /// Limits by workspace and resource; those of vmm, too.
    pub limits: Mutex<BTreeMap<String, Limits>>,
    /// Those of workspaces, by id.
    pub templates: Mutex<BTreeMap<String, TemplateInfo>>,
    /// Why none of them can be baked.
    pub bake_failure: Mutex<Option<String>>,
    /// No space is left.
    pub full: AtomicBool,
}

impl Shelf {
    /// Captures a sandbox; the same id again is the same capture.
    pub fn capture(&self, id: String, of: &SandboxInfo, purpose: Purpose) -> SnapshotInfo {
        let mut all = self.snapshots.lock().unwrap();
        let number = all.len() as u64;
        let spec = SnapshotSpec {
            id: id.clone(),
            workspace: of.workspace.clone(),
            sandbox: of.id.clone(),
            purpose,
            template: of.template.clone(),
            vcpus: of.vcpus,
            memory_mib: of.memory_mib,
            disk_mib: of.disk_mib,
            env: BTreeMap::new(),
            workdir: String::new(),
            volumes: Vec::new(),
        };
        let made = SnapshotInfo {
            spec,
            size_bytes: 1 << 30,
            created_unix_ms: 1_767_323_045_250 + number,
            unusable: String::new(),
        };
        all.entry(id).or_insert(made).clone()
    }

    /// Attaches the volumes of a sandbox, all or none.
    pub fn hold(&self, sandbox: &str, spec: &SandboxSpec) -> Result<()> {
        let mut all = self.volumes.lock().unwrap();
        let key = |volume: &VolumeUse| (spec.workspace.clone(), volume.name.clone());
        for volume in &spec.volumes {
            let held = all.get(&key(volume)).ok_or_else(|| unknown(&volume.name))?;
            if !volume.read_only && !held.holders.is_empty() {
                return Err(Error::WrongState(format!("volume {:?} is attached", volume.name)));
            }
        }
        for volume in &spec.volumes {
            all.get_mut(&key(volume)).unwrap().holders.push(sandbox.to_owned());
        }
        Ok(())
    }

    /// Takes a snapshot of a volume; the same id again is the same snapshot.
    pub fn keep(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        let key = (spec.workspace.clone(), spec.volume.clone());
        let volume = self.volumes.lock().unwrap().get(&key).cloned().ok_or_else(|| unknown(&spec.volume))?;
        if self.full.load(Ordering::Relaxed) {
            return Err(Error::NoSpace("below the reserve".into()));
        }
        let mut all = self.kept.lock().unwrap();
        let created_unix_ms = 1_767_323_045_250 + all.len() as u64;
        let used = all.values().filter(|kept| kept.spec.workspace == spec.workspace).count() as u64;
        self.admit(&spec.workspace, Resource::Volumes, used + 1, 1)?;
        let made = VolumeSnapshotInfo { size_mib: volume.size_mib, used_bytes: 1, created_unix_ms, spec };
        Ok(all.entry(made.spec.id.clone()).or_insert(made).clone())
    }

    /// Sets a limit, or takes it away.
    pub fn limit(&self, workspace: String, resource: Resource, limit: i64) {
        let mut all = self.limits.lock().unwrap();
        let limits = all.entry(workspace).or_default();
        match u64::try_from(limit) {
            Ok(limit) => drop(limits.insert(resource, limit)),
            Err(_) => drop(limits.remove(&resource)),
        }
    }

    /// Whether a workspace that has so much may get more.
    pub fn admit(&self, workspace: &str, resource: Resource, used: u64, more: u64) -> Result<()> {
        admit(&self.limits_of(workspace), resource, used, more)
    }

    /// The limits of a workspace.
    pub fn limits_of(&self, workspace: &str) -> Limits {
        self.limits.lock().unwrap().get(workspace).cloned().unwrap_or_default()
    }

    /// Detaches them.
    pub fn release(&self, sandbox: &str) {
        let mut all = self.volumes.lock().unwrap();
        all.values_mut().for_each(|volume| volume.holders.retain(|holder| holder != sandbox));
    }
}

fn unknown(name: &str) -> Error {
    Error::NotFound(format!("volume {name:?} not found"))
}

impl StorageBackend for FakeStorage {
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        let one = |name: &str, alias: &str| TemplateInfo {
            name: name.into(),
            title: name.into(),
            workspace: String::new(),
            hidden: name == "builder",
            created_unix_ms: 0,
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
        let mut all =
            vec![one("code-interpreter", "python"), one("base", "ubuntu-24.04"), one("builder", "b")];
        all.extend(self.shelf.templates.lock().unwrap().values().cloned());
        Ok(all)
    }

    async fn find_template(&self, workspace: String, name: String) -> Result<TemplateInfo> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let all = self.templates().await?;
        let mut seen = all.into_iter().filter(|one| !one.hidden);
        let own = |one: &TemplateInfo| one.workspace == workspace && one.title == name;
        let for_all = |one: &TemplateInfo| {
            one.workspace.is_empty() && (one.name == name || one.aliases.contains(&name))
        };
        seen.find(|one| own(one) || for_all(one))
            .ok_or_else(|| Error::NotFound(format!("template {name:?} not found")))
    }

    async fn adopt_template(
        &self,
        workspace: String,
        volume: String,
        spec: TemplateSpec,
    ) -> Result<TemplateInfo> {
        let disk = self.volume(workspace, volume).await?;
        if !disk.holders.is_empty() {
            return Err(Error::WrongState("a sandbox has the volume".into()));
        }
        let failure = self.shelf.bake_failure.lock().unwrap().clone();
        let made = TemplateInfo {
            name: spec.id.clone(),
            title: spec.title,
            workspace: spec.workspace,
            hidden: true,
            created_unix_ms: now_ms(),
            aliases: Vec::new(),
            category: "custom".into(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_mib: disk.size_mib,
            env: spec.env,
            workdir: spec.workdir,
            state: if failure.is_some() { TemplateState::Failed } else { TemplateState::Baked },
            reason: failure.unwrap_or_default(),
            ..self.template("base".into()).await?
        };
        self.shelf.templates.lock().unwrap().insert(spec.id, made.clone());
        Ok(made)
    }

    async fn publish_template(&self, id: String, replace: bool) -> Result<()> {
        let mut all = self.shelf.templates.lock().unwrap();
        let made = all.get(&id).cloned().ok_or_else(|| Error::NotFound(id.clone()))?;
        let same =
            |one: &TemplateInfo| one.title == made.title && one.workspace == made.workspace && !one.hidden;
        if !replace && all.values().any(same) {
            return Err(Error::Exists("template already exists".into()));
        }
        all.retain(|_, one| !same(one));
        all.insert(id, TemplateInfo { hidden: false, ..made });
        Ok(())
    }

    async fn delete_template(&self, workspace: String, id: String) -> Result<bool> {
        let mut all = self.shelf.templates.lock().unwrap();
        Ok(all.get(&id).is_some_and(|one| one.workspace == workspace) && all.remove(&id).is_some())
    }

    async fn clone_template(
        &self,
        template: String,
        workspace: String,
        name: String,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        let disk_mib = self.template(template).await?.disk_mib;
        self.create_volume(workspace, name, size_mib.max(disk_mib)).await
    }

    async fn template(&self, name: String) -> Result<TemplateInfo> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let all = self.templates().await?;
        all.into_iter()
            .find(|template| template.name == name || template.aliases.contains(&name))
            .ok_or_else(|| Error::NotFound(format!("template {name:?} not found")))
    }

    async fn usage(&self) -> Result<Usage> {
        let free_bytes = if self.shelf.full.load(Ordering::Relaxed) { 5 } else { 1 << 36 };
        Ok(Usage { total_bytes: 1 << 40, free_bytes, reserve_bytes: 7 })
    }

    async fn snapshots(&self, workspace: String) -> Result<Vec<SnapshotInfo>> {
        let mut found: Vec<SnapshotInfo> = self.shelf.snapshots.lock().unwrap().values().cloned().collect();
        found.retain(|info| workspace.is_empty() || info.spec.workspace == workspace);
        found.sort_by_key(|info| std::cmp::Reverse(info.created_unix_ms));
        Ok(found)
    }

    async fn snapshot(&self, snapshot: String) -> Result<SnapshotInfo> {
        let all = self.shelf.snapshots.lock().unwrap();
        all.get(&snapshot).cloned().ok_or_else(|| Error::NotFound(format!("snapshot {snapshot:?} not found")))
    }

    async fn delete_snapshot(&self, snapshot: String) -> Result<bool> {
        Ok(self.shelf.snapshots.lock().unwrap().remove(&snapshot).is_some())
    }

    async fn create_volume(&self, workspace: String, name: String, size_mib: u64) -> Result<VolumeInfo> {
        if self.shelf.full.load(Ordering::Relaxed) {
            return Err(Error::NoSpace("below the reserve".into()));
        }
        let info = VolumeInfo {
            workspace: workspace.clone(),
            name: name.clone(),
            size_mib,
            used_bytes: 0,
            created_unix_ms: now_ms(),
            holders: Vec::new(),
        };
        let mut all = self.shelf.volumes.lock().unwrap();
        let used = all.keys().filter(|(whose, _)| *whose == workspace).count() as u64;
        self.shelf.admit(&workspace, Resource::Volumes, used, 1)?;
        match all.entry((workspace, name)) {
            Entry::Occupied(_) => Err(Error::Exists("volume is there".into())),
            Entry::Vacant(place) => Ok(place.insert(info).clone()),
        }
    }

    async fn volumes(&self, workspace: String) -> Result<Vec<VolumeInfo>> {
        let all = self.shelf.volumes.lock().unwrap();
        Ok(all.values().filter(|info| workspace.is_empty() || info.workspace == workspace).cloned().collect())
    }

    async fn volume(&self, workspace: String, name: String) -> Result<VolumeInfo> {
        let all = self.shelf.volumes.lock().unwrap();
        all.get(&(workspace, name.clone())).cloned().ok_or_else(|| unknown(&name))
    }

    async fn delete_volume(&self, workspace: String, name: String) -> Result<bool> {
        let mut all = self.shelf.volumes.lock().unwrap();
        let key = (workspace, name);
        if all.get(&key).is_some_and(|info| !info.holders.is_empty()) {
            return Err(Error::WrongState("a sandbox has the volume".into()));
        }
        Ok(all.remove(&key).is_some())
    }

    async fn grow_volume(&self, workspace: String, name: String, size_mib: u64) -> Result<VolumeInfo> {
        let mut all = self.shelf.volumes.lock().unwrap();
        let info = all.get_mut(&(workspace, name.clone())).ok_or_else(|| unknown(&name))?;
        if !info.holders.is_empty() {
            return Err(Error::WrongState("a sandbox has the volume".into()));
        }
        if size_mib < info.size_mib {
            return Err(Error::InvalidArgument("a volume only grows".into()));
        }
        info.size_mib = size_mib;
        Ok(info.clone())
    }

    async fn verify_snapshot(&self, _: String) -> Result<Verification> {
        Err(Error::NotReady("api may not ask this".into()))
    }

    async fn snapshot_volume(&self, _: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        Err(Error::NotReady("api may not ask this".into()))
    }

    async fn volume_snapshots(&self, workspace: String) -> Result<Vec<VolumeSnapshotInfo>> {
        let mut found: Vec<_> = self.shelf.kept.lock().unwrap().values().cloned().collect();
        found.retain(|info| workspace.is_empty() || info.spec.workspace == workspace);
        found.sort_by_key(|info| std::cmp::Reverse(info.created_unix_ms));
        Ok(found)
    }

    async fn delete_volume_snapshot(&self, workspace: String, id: String) -> Result<bool> {
        let mut all = self.shelf.kept.lock().unwrap();
        Ok(all.get(&id).is_some_and(|kept| kept.spec.workspace == workspace) && all.remove(&id).is_some())
    }

    async fn restore_volume(
        &self,
        workspace: String,
        snapshot: String,
        name: String,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        let found = self.volume_snapshots(workspace.clone()).await?;
        if !found.iter().any(|kept| kept.spec.id == snapshot) {
            return Err(Error::NotFound("volume snapshot not found".into()));
        }
        self.create_volume(workspace, name, size_mib).await
    }

    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        assert!(Resource::OF_STORAGE.contains(&resource));
        self.shelf.limit(workspace, resource, limit);
        Ok(())
    }

    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        let volumes = self.volumes(workspace.clone()).await?;
        let mib = volumes.iter().map(|volume| volume.size_mib).sum();
        let used = [(Resource::Volumes, volumes.len() as u64), (Resource::VolumeMib, mib)];
        Ok(lines(&self.shelf.limits_of(&workspace), used))
    }

    async fn begin_capture(&self, _: String) -> Result<CaptureKind> {
        Err(Error::NotReady(String::new()))
    }
    async fn capture_disks(&self, _: String, _: bool) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn commit_capture(&self, _: String, _: SnapshotSpec) -> Result<SnapshotInfo> {
        Err(Error::NotReady(String::new()))
    }
    async fn abort_capture(&self, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn copy_snapshot(&self, _: String, _: SnapshotSpec) -> Result<SnapshotInfo> {
        Err(Error::NotReady(String::new()))
    }
    async fn fill_snapshot(&self, _: String, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn hold_volumes(&self, _: String, _: String, _: Vec<VolumeUse>) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn drop_volumes(&self, _: String) -> Result<()> {
        Err(Error::NotReady(String::new()))
    }
    async fn insert_volumes(&self, _: String, _: String, _: String, _: Vec<VolumeUse>) -> Result<()> {
        Err(Error::NotReady(String::new()))
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
