//! Snapshots: memory, state and disks of a sandbox at one point in time, sealed. None of these inodes is ever written
//! again, because guests map them; what is made from a snapshot has links to them or shares their blocks.
//!
//! Owns `snapshots/` and the index of it, which is read at the start. Refuses to know who may use which. A snapshot that
//! cannot be restored here stays and says why: it is somebody's.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::Duration,
};

use pandastack_bus::{SandboxId, storage::*};
use pandastack_daemon::{chain, files};
use tokio::sync::Notify;

use crate::{
    artefact,
    bake::now_unix_ms,
    capture, drive,
    error::{At, Result, StorageError},
    hashes,
    identity::Digest,
    layout::{self, Layout},
    mac::Signer,
    manifest::{Manifest, check},
    place::{Place, Staged, children, clone_file, exists, remove_tree},
    resident,
    sandbox::{self, Content},
    verify,
    volume::Volumes,
};

/// A snapshot in the index.
#[derive(Debug)]
pub struct Snapshot {
    pub(crate) id: SandboxId,
    /// `None` when it cannot be read.
    pub(crate) manifest: Option<Manifest>,
    /// As its manifest says.
    unusable: String,
    size_bytes: u64,
    /// Whether its state is what was captured: found out once, when it is first used.
    pub(crate) state_whole: Mutex<Option<bool>>,
    /// What the last check of its contents found wrong.
    pub(crate) damage: Mutex<Option<String>>,
    /// Whoever takes something from it reads under this lock, so that it does not go meanwhile.
    gone: RwLock<bool>,
}

/// All snapshots.
#[derive(Debug)]
pub struct Snapshots {
    index: RwLock<BTreeMap<SandboxId, Arc<Snapshot>>>,
    pub(crate) signer: Signer,
    processor: Digest,
    /// A snapshot was made.
    news: Notify,
}

impl Snapshots {
    /// Reads all of them.
    ///
    /// # Errors
    /// The folder cannot be read. One that is damaged is no error.
    pub fn open(layout: &Layout, signer: Signer, processor: Digest) -> Result<Self> {
        let all = Self { index: RwLock::default(), signer, processor, news: Notify::new() };
        let ids = children(&layout.snapshots())?.into_iter();
        for id in ids.filter_map(|path| path.file_name()?.to_str()?.parse::<SandboxId>().ok()) {
            let found = all.read(layout, &id);
            let why = found.why();
            if !why.is_empty() {
                tracing::warn!(snapshot = %id, "cannot be restored: {why}");
            }
            all.insert(found);
        }
        Ok(all)
    }

    /// Programs that some snapshot needs.
    pub fn programs(&self) -> BTreeSet<Digest> {
        let all = self.all();
        all.iter().filter_map(|found| Some(found.manifest.as_ref()?.firecracker.clone())).collect()
    }

    /// Tenants' snapshots of a workspace, newest first; all of whatever purpose for the empty name.
    pub fn list(&self, workspace: &str) -> Vec<SnapshotInfo> {
        let mut found: Vec<_> = self.all().iter().map(|snapshot| snapshot.info()).collect();
        if !workspace.is_empty() {
            found.retain(|info| info.spec.workspace == workspace && info.spec.purpose == Purpose::Snapshot);
        }
        found.sort_by(|a, b| {
            b.created_unix_ms.cmp(&a.created_unix_ms).then_with(|| a.spec.id.cmp(&b.spec.id))
        });
        found
    }

    /// One of them.
    ///
    /// # Errors
    /// [`StorageError::NotFound`].
    pub fn find(&self, id: &SandboxId) -> Result<Arc<Snapshot>> {
        let found = self.index.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        found.ok_or_else(|| not_found(id))
    }

    /// Publishes what was captured of the machine `id`. The caller is alone with both.
    ///
    /// # Errors
    /// [`StorageError::Exists`] when another one has its id; [`StorageError::WrongState`] when there is no whole capture.
    pub fn commit(&self, place: &Place, id: &SandboxId, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        let (name, _) = check(&spec)?;
        if let Some(found) = self.made(&name, &spec)? {
            // The answer was lost, or we were ended before the end.
            settle(place, id, &place.layout.snapshot(&name));
            return Ok(found.info());
        }
        let folder = sandbox::existing(&place.layout, id)?;
        let firecracker = artefact::adopt(place, &folder.join(layout::FIRECRACKER))?;
        // A fork's children are machines that run: a power cut ends them, and no other copy is ever made of it.
        let durable = spec.purpose != Purpose::Fork;
        let collected = capture::collect(place, id, &folder, spec.memory_mib, durable)?;
        let capture::Collected { staged, files, state } = collected;
        let manifest = Manifest::new(spec, self.processor.clone(), firecracker, state, files);
        let found = self.publish(place, &name, manifest, staged)?;
        settle(place, id, &place.layout.snapshot(&name));
        Ok(found.info())
    }

    /// Makes another one with the same contents; volumes that are not in it are cloned as they are, so its sandbox must
    /// have them and not run. The caller is alone with the new one.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]; [`StorageError::WrongState`] when `from` is damaged or the sandbox does not have a volume;
    /// [`StorageError::NoSpace`].
    pub fn copy(
        &self,
        place: &Place,
        volumes: &Volumes,
        from: &SandboxId,
        spec: SnapshotSpec,
    ) -> Result<SnapshotInfo> {
        let (name, sandbox) = check(&spec)?;
        if let Some(found) = self.made(&name, &spec)? {
            return Ok(found.info());
        }
        let source = self.find(from)?;
        let _stays = source.stay()?;
        let manifest = source.usable(&place.layout)?;
        let fits = |spec: &SnapshotSpec| (spec.vcpus, spec.memory_mib, spec.disk_mib);
        if fits(&spec) != fits(&manifest.spec) {
            return Err(StorageError::Invalid("a copy has the size of what it is a copy of".into()));
        }
        place.admit()?;
        let drives = drive::assign(&spec.volumes)?.into_iter();
        let missing = drives.filter(|(_, drive)| !manifest.files.contains_key(*drive));
        let disks = volumes.disks(&place.layout, &sandbox, &spec.workspace, missing)?;
        let staged = place.stage("copy")?;
        let folder = place.layout.snapshot(from);
        let mut files = manifest.files.clone();
        for file in files.keys() {
            // Never written again, so a link is as good as a copy.
            fs::hard_link(folder.join(file), staged.path().join(file)).at(&folder)?;
        }
        for (from, file) in disks {
            let to = staged.path().join(file);
            let clone = clone_file(&from, &to, 0o400)?;
            clone.sync_all().at(&to)?;
            files.insert(file.to_owned(), clone.metadata().at(&to)?.len());
        }
        let mut manifest = manifest.clone();
        (manifest.spec, manifest.created_unix_ms, manifest.files) = (spec, now_unix_ms(), files);
        self.publish(place, &name, manifest, staged).map(|found| found.info())
    }

    /// Fills a prepared directory. The caller is alone with it.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]; [`StorageError::WrongState`] when it cannot be restored here, or as [`sandbox::fill`].
    pub fn fill(&self, place: &Place, id: &SandboxId, snapshot: &SandboxId) -> Result<()> {
        let found = self.find(snapshot)?;
        let _stays = found.stay()?;
        let manifest = found.usable(&place.layout)?;
        let folder = place.layout.snapshot(snapshot);
        resident::recall(folder.clone());
        let drives = layout::drives().filter(|name| manifest.files.contains_key(*name));
        let content = Content {
            disk: folder.join(layout::ROOT),
            disk_bytes: 0,
            links: [layout::MEM, layout::STATE].map(|file| (folder.join(file), file)).to_vec(),
            drives: drives.map(|name| (folder.join(name), name)).collect(),
            record: format!("snapshot {snapshot}"),
        };
        sandbox::fill(place, id, &manifest.firecracker, &content).map(drop)
    }

    /// Makes one vanish, durably, then makes room. Answers whether it was there. The caller is alone with it.
    ///
    /// # Errors
    /// [`StorageError::Incomplete`]: it has vanished, but some of it still takes up space.
    pub fn delete(&self, place: &Place, id: &SandboxId) -> Result<bool> {
        let Ok(found) = self.find(id) else { return Ok(false) };
        let trashed = {
            let mut gone = found.gone.write().unwrap_or_else(PoisonError::into_inner);
            let trashed = place.discard(&place.layout.snapshot(id))?;
            *gone = true;
            self.index.write().unwrap_or_else(PoisonError::into_inner).remove(id);
            trashed
        };
        let failures = trashed.map(|path| remove_tree(&path)).unwrap_or_default();
        if failures.is_empty() { Ok(true) } else { Err(StorageError::Incomplete(failures)) }
    }

    /// Completes when a snapshot was made since the last time.
    pub async fn news(&self) {
        self.news.notified().await;
    }

    /// Tenants' snapshots whose hash tree is not there.
    pub fn unhashed(&self, layout: &Layout) -> Vec<Arc<Snapshot>> {
        let mut all = self.all();
        all.retain(|found| {
            let tenant = |manifest: &Manifest| manifest.spec.purpose == Purpose::Snapshot;
            found.why().is_empty()
                && found.manifest.as_ref().is_some_and(tenant)
                && !exists(&layout.snapshot(&found.id).join(layout::HASHES))
        });
        all
    }

    /// Computes the hash tree of one, durably, and gives up when it goes meanwhile. See [`hashes::compute`] for `rest`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn hash(
        &self,
        layout: &Layout,
        found: &Snapshot,
        mut rest: impl FnMut(Duration) -> bool,
    ) -> Result<()> {
        let Some(manifest) = &found.manifest else { return Ok(()) };
        let folder = layout.snapshot(&found.id);
        // The state has a digest in the manifest.
        let names = manifest.files.keys().map(String::as_str).filter(|name| *name != layout::STATE);
        let goes_on = |took| rest(took) && found.stay().is_ok();
        let computed = hashes::compute(found.id.as_str(), &folder, names, goes_on);
        let Ok(_stays) = found.stay() else { return Ok(()) };
        match computed {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            computed => {
                let path = folder.join(layout::HASHES);
                let document = self.signer.sign(hashes::KIND, &computed.at(&folder)?).at(&path)?;
                files::write_atomic(&path, &document, 0o600).at(&path)
            }
        }
    }

    fn all(&self) -> Vec<Arc<Snapshot>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn insert(&self, snapshot: Snapshot) -> Arc<Snapshot> {
        let snapshot = Arc::new(snapshot);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        index.insert(snapshot.id.clone(), Arc::clone(&snapshot));
        snapshot
    }

    /// The one that was made for this very request before.
    fn made(&self, id: &SandboxId, spec: &SnapshotSpec) -> Result<Option<Arc<Snapshot>>> {
        let Ok(found) = self.find(id) else { return Ok(None) };
        if found.manifest.as_ref().is_some_and(|manifest| manifest.spec == *spec) {
            Ok(Some(found))
        } else {
            Err(StorageError::Exists(format!("snapshot {id} is there already")))
        }
    }

    fn publish(
        &self,
        place: &Place,
        id: &SandboxId,
        manifest: Manifest,
        staged: Staged,
    ) -> Result<Arc<Snapshot>> {
        manifest.write(staged.path(), &self.signer)?;
        let target = place.layout.snapshot(id);
        staged.commit(&target)?;
        let made = self.insert(Snapshot {
            id: id.clone(),
            size_bytes: blocks(&target),
            manifest: Some(manifest),
            unusable: String::new(),
            state_whole: Mutex::new(Some(true)),
            damage: Mutex::default(),
            gone: RwLock::new(false),
        });
        self.news.notify_one();
        Ok(made)
    }

    fn read(&self, layout: &Layout, id: &SandboxId) -> Snapshot {
        let folder = layout.snapshot(id);
        let (manifest, unusable) = match Manifest::read(&folder, &self.signer) {
            Ok((manifest, authentic)) => {
                let why = manifest.why_unusable(layout, id, &self.processor, authentic);
                (Some(manifest), why.unwrap_or_default())
            }
            Err(error) => {
                tracing::error!(snapshot = %id, "{}", chain(&error));
                (None, "its manifest cannot be read")
            }
        };
        Snapshot {
            id: id.clone(),
            manifest,
            unusable: unusable.to_owned(),
            size_bytes: blocks(&folder),
            state_whole: Mutex::default(),
            damage: Mutex::new(verify::known_damage(&folder)),
            gone: RwLock::new(false),
        }
    }
}

impl Snapshot {
    /// Its id.
    pub fn id(&self) -> &SandboxId {
        &self.id
    }

    /// What the bus is told.
    pub fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            spec: self.manifest.as_ref().map_or_else(|| nobody(&self.id), |manifest| manifest.spec.clone()),
            size_bytes: self.size_bytes,
            created_unix_ms: self.manifest.as_ref().map_or(0, |manifest| manifest.created_unix_ms),
            unusable: self.why(),
        }
    }

    /// Why it cannot be restored, as far as is known; empty when it can.
    pub(crate) fn why(&self) -> String {
        if !self.unusable.is_empty() {
            return self.unusable.clone();
        }
        if let Some(found) = &*self.damage.lock().unwrap_or_else(PoisonError::into_inner) {
            return found.clone();
        }
        match *self.state_whole.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(false) => DAMAGED_STATE.into(),
            _ => String::new(),
        }
    }

    /// Whether its state is what was captured.
    pub(crate) fn is_state_whole(&self, folder: &Path, manifest: &Manifest) -> bool {
        let length = manifest.files.get(layout::STATE).copied().unwrap_or(0);
        let bytes = files::read_limited(&folder.join(layout::STATE), length).ok().flatten();
        bytes.is_some_and(|bytes| Digest::of(&bytes) == manifest.state)
    }

    /// It stays until the guard is dropped.
    pub(crate) fn stay(&self) -> Result<std::sync::RwLockReadGuard<'_, bool>> {
        let gone = self.gone.read().unwrap_or_else(PoisonError::into_inner);
        if *gone { Err(not_found(&self.id)) } else { Ok(gone) }
    }

    fn usable(&self, layout: &Layout) -> Result<&Manifest> {
        let refuse = |why: &str| {
            Err(StorageError::WrongState(format!("snapshot {} cannot be restored: {why}", self.id)))
        };
        let why = self.why();
        let Some(manifest) = self.manifest.as_ref().filter(|_| why.is_empty()) else {
            return refuse(&why);
        };
        let mut whole = self.state_whole.lock().unwrap_or_else(PoisonError::into_inner);
        let look = || self.is_state_whole(&layout.snapshot(&self.id), manifest);
        if *whole.get_or_insert_with(look) { Ok(manifest) } else { refuse(DAMAGED_STATE) }
    }
}

pub(crate) const DAMAGED_STATE: &str = "the state of its machine is damaged";

/// What is told of one of which nothing is known.
fn nobody(id: &SandboxId) -> SnapshotSpec {
    SnapshotSpec {
        id: id.to_string(),
        workspace: String::new(),
        sandbox: String::new(),
        purpose: Purpose::Snapshot,
        template: String::new(),
        vcpus: 0,
        memory_mib: 0,
        disk_mib: 0,
        env: BTreeMap::new(),
        workdir: String::new(),
        volumes: Vec::new(),
    }
}

fn not_found(id: &SandboxId) -> StorageError {
    StorageError::NotFound(format!("snapshot {id} not found"))
}

/// A snapshot is there all the same: without its memory in place the machine's next capture is a full one.
fn settle(place: &Place, id: &SandboxId, folder: &Path) {
    if let Err(error) = capture::settle(place, id, folder) {
        tracing::error!(sandbox = %id, "the next capture will be a full one: {}", chain(&error));
    }
}

fn blocks(folder: &Path) -> u64 {
    let files = children(folder).unwrap_or_default();
    files.iter().filter_map(|path| fs::symlink_metadata(path).ok()).map(|found| found.blocks() * 512).sum()
}
