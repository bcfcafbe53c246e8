//! Snapshots of volumes: a volume's disk at one point in time, never written again, and volumes made of them.
//!
//! Owns `volume-snapshots/`. A snapshot shares its blocks with the volume, and does not need it: it stays when the volume
//! goes. Refuses to know what a guest still holds back, because whoever asks has seen to that.

use std::{collections::BTreeMap, fs, fs::File, os::unix::fs::MetadataExt};

use pandastack_bus::{
    SandboxId,
    storage::{VolumeInfo, VolumeSnapshotInfo, VolumeSnapshotSpec},
};
use pandastack_daemon::{chain, files};

use crate::{
    bake::now_unix_ms,
    error::{At, Result, StorageError},
    import::write_manifest,
    layout::{self, Layout},
    place::{Place, children, clone_grown, clone_open, open_regular, remove_tree},
    volume::Volumes,
    volume_index::{Index, Kept, VERSION, check, check_name, read},
};

/// Longest label, bytes.
const LABEL_LIMIT: usize = 256;
/// Of a disk that is never written again and that no sandbox sees.
const MODE: u32 = 0o400;

/// Reads all of them.
///
/// # Errors
/// The folder cannot be read. One whose manifest cannot be read stays and is logged.
pub(crate) fn read_all(layout: &Layout) -> Result<BTreeMap<SandboxId, Kept>> {
    let mut all = BTreeMap::new();
    for folder in children(&layout.volume_snapshots())? {
        let Some(id) = folder.file_name().and_then(|name| name.to_str()?.parse::<SandboxId>().ok()) else {
            continue;
        };
        files::remove_leftovers(&folder).at(&folder)?;
        match read::<Kept>(&folder.join(layout::MANIFEST)) {
            Ok(kept) if kept.version == VERSION && kept.spec.id == id.as_str() => drop(all.insert(id, kept)),
            Ok(kept) => {
                let version = kept.version;
                tracing::error!(volume_snapshot = %id, "not its manifest, or of unknown format {version}");
            }
            Err(error) => tracing::error!(volume_snapshot = %id, "{}", chain(&error)),
        }
    }
    Ok(all)
}

impl Index {
    fn kept(&self, workspace: &str, id: &SandboxId) -> Result<&Kept> {
        let found = self.snapshots.get(id).filter(|kept| kept.spec.workspace == workspace);
        found.ok_or_else(|| StorageError::NotFound(format!("volume snapshot {id} not found")))
    }

    /// The one that was made for this very request before.
    fn made(&self, id: &SandboxId, spec: &VolumeSnapshotSpec) -> Result<Option<&Kept>> {
        let same = |kept: &VolumeSnapshotSpec| {
            // Asked again, the guest may have been in another state.
            (&kept.workspace, &kept.volume, &kept.label) == (&spec.workspace, &spec.volume, &spec.label)
        };
        match self.snapshots.get(id) {
            None => Ok(None),
            Some(kept) if same(&kept.spec) => Ok(Some(kept)),
            Some(_) => Err(StorageError::Exists(format!("volume snapshot {id} is there already"))),
        }
    }
}

impl Volumes {
    /// Makes one, durably and all at once; whoever has the volume goes on with it. The same again: nothing to do. The caller is
    /// alone with its id.
    ///
    /// # Errors
    /// [`StorageError::Invalid`], [`StorageError::NotFound`], [`StorageError::Refused`], [`StorageError::NoSpace`];
    /// [`StorageError::Exists`] when the id is that of another one.
    pub(crate) fn snapshot(
        &self,
        place: &Place,
        id: &SandboxId,
        spec: VolumeSnapshotSpec,
    ) -> Result<VolumeSnapshotInfo> {
        check_name(&spec.workspace, &spec.volume)?;
        if spec.label.len() > LABEL_LIMIT || spec.label.contains('\0') {
            return Err(StorageError::Invalid(format!(
                "a label has at most {LABEL_LIMIT} bytes, none of them 0"
            )));
        }
        let (source, size_mib) = {
            let index = self.lock();
            if let Some(kept) = index.made(id, &spec)? {
                return Ok(describe(&place.layout, kept));
            }
            let volume = index.find(&spec.workspace, &spec.volume)?;
            index.admit(&self.quotas, &spec.workspace, 1, volume.manifest.size_mib)?;
            // Open, it is there whatever becomes of its name.
            let disk = open_regular(&place.layout.volume(&volume.id).join(layout::DISK))?;
            (disk, volume.manifest.size_mib)
        };
        place.admit_bytes(size_mib << 20)?;
        let staged = place.stage("volume-snapshot")?;
        let path = staged.path().join(layout::DISK);
        clone_open(&source, &path, MODE)?.sync_all().at(&path)?;
        let kept = Kept { version: VERSION, spec, size_mib, created_unix_ms: now_unix_ms() };
        write_manifest(staged.path(), &kept)?;
        let mut index = self.lock();
        // Others may have been faster.
        index.admit(&self.quotas, &kept.spec.workspace, 1, size_mib)?;
        staged.commit(&place.layout.volume_snapshot(id))?;
        let info = describe(&place.layout, &kept);
        index.snapshots.insert(id.clone(), kept);
        Ok(info)
    }

    /// Those of a workspace, newest first; of all workspaces for the empty name.
    pub(crate) fn snapshots(&self, layout: &Layout, workspace: &str) -> Vec<VolumeSnapshotInfo> {
        let index = self.lock();
        let wanted = index.snapshots.values();
        let wanted = wanted.filter(|kept| workspace.is_empty() || kept.spec.workspace == workspace);
        let mut all: Vec<_> = wanted.map(|kept| describe(layout, kept)).collect();
        all.sort_by(|a, b| b.created_unix_ms.cmp(&a.created_unix_ms).then_with(|| a.spec.id.cmp(&b.spec.id)));
        all
    }

    /// Makes one vanish, durably, then makes room. Answers whether it was there.
    ///
    /// # Errors
    /// [`StorageError::Incomplete`]: it has vanished, but some of it still takes up space.
    pub(crate) fn delete_snapshot(&self, place: &Place, workspace: &str, id: &SandboxId) -> Result<bool> {
        let trashed = {
            let mut index = self.lock();
            if index.kept(workspace, id).is_err() {
                return Ok(false);
            }
            let trashed = place.discard(&place.layout.volume_snapshot(id))?;
            index.snapshots.remove(id);
            trashed
        };
        let failures = trashed.map(|path| remove_tree(&path)).unwrap_or_default();
        if failures.is_empty() { Ok(true) } else { Err(StorageError::Incomplete(failures)) }
    }

    /// Makes a volume that shares its blocks, durably; `size_mib` 0: of the same size. What is in it is the guest's to grow.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]; [`StorageError::Invalid`] when it would be smaller; otherwise as [`Volumes::create`].
    pub(crate) fn restore(
        &self,
        place: &Place,
        workspace: &str,
        snapshot: &SandboxId,
        name: &str,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        let (source, least): (File, u64) = {
            let index = self.lock();
            let least = index.kept(workspace, snapshot)?.size_mib;
            (open_regular(&place.layout.volume_snapshot(snapshot).join(layout::DISK))?, least)
        };
        let size_mib = if size_mib == 0 { least } else { size_mib };
        check(workspace, name, size_mib.max(least))?;
        if size_mib < least {
            return Err(StorageError::Invalid(format!(
                "the snapshot has {least} MiB, and a volume of it is never smaller"
            )));
        }
        self.make(place, workspace, name, size_mib, |path| clone_grown(&source, path, 0o600, size_mib << 20))
    }
}

fn describe(layout: &Layout, kept: &Kept) -> VolumeSnapshotInfo {
    // An id that is in the index has the form of one.
    let found = kept
        .spec
        .id
        .parse()
        .ok()
        .and_then(|id| fs::symlink_metadata(layout.volume_snapshot(&id).join(layout::DISK)).ok());
    VolumeSnapshotInfo {
        spec: kept.spec.clone(),
        size_mib: kept.size_mib,
        used_bytes: found.map_or(0, |found| found.blocks() * 512),
        created_unix_ms: kept.created_unix_ms,
    }
}
