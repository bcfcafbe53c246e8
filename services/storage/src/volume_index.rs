//! What there is of volumes and their snapshots, and who has them. Values only: reads a file, changes none.
//!
//! Refuses to know: how any of it comes or goes.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use pandastack_bus::{
    SandboxId,
    quota::Resource,
    storage::{VolumeInfo, VolumeSnapshotSpec, VolumeUse},
};
use pandastack_daemon::{
    files,
    quotas::{self, Quotas},
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{At, Result, StorageError},
    hold::{Held, Holds},
    layout::{self, Layout},
    template::TemplateName,
    volume::SIZE_LIMIT_MIB,
};

/// Form of what is on disk.
pub(crate) const VERSION: u32 = 1;
const LIMIT: u64 = 64 * 1024;

/// What a volume is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub version: u32,
    pub workspace: String,
    pub name: String,
    pub size_mib: u64,
    pub created_unix_ms: u64,
}

/// A volume.
#[derive(Debug)]
pub(crate) struct Volume {
    pub id: SandboxId,
    pub manifest: Manifest,
}

/// What a snapshot of a volume is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Kept {
    pub version: u32,
    pub spec: VolumeSnapshotSpec,
    pub size_mib: u64,
    pub created_unix_ms: u64,
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// By workspace and name.
    pub volumes: BTreeMap<(String, String), Volume>,
    pub holds: Holds,
    /// They outlive the volumes that they are of.
    pub snapshots: BTreeMap<SandboxId, Kept>,
}

/// A volume and the drive that it is to be.
pub(crate) type Assigned<'a> = (&'a VolumeUse, &'static str);

impl Index {
    /// What a workspace has. A snapshot of a volume counts as a volume of its size: in the end it may take as much.
    pub fn used(&self, workspace: &str) -> [(Resource, u64); 2] {
        let theirs = self.volumes.values().filter(|volume| volume.manifest.workspace == workspace);
        let sizes = theirs.map(|volume| volume.manifest.size_mib);
        let kept = self.snapshots.values().filter(|kept| kept.spec.workspace == workspace);
        let sizes = sizes.chain(kept.map(|kept| kept.size_mib));
        let (count, mib) = sizes.fold((0, 0u64), |(count, sum), mib| (count + 1, sum.saturating_add(mib)));
        [(Resource::Volumes, count), (Resource::VolumeMib, mib)]
    }

    /// Whether a workspace may have so many more volumes, and MiB of them.
    pub fn admit(&self, quotas: &Quotas, workspace: &str, volumes: u64, mib: u64) -> Result<()> {
        let limits = quotas.of(workspace);
        let pairs = self.used(workspace).into_iter().zip([volumes, mib]);
        let check = |((resource, used), more)| quotas::admit(&limits, resource, used, more);
        pairs.into_iter().try_for_each(check).map_err(StorageError::Refused)
    }

    /// A volume.
    pub fn find(&self, workspace: &str, name: &str) -> Result<&Volume> {
        self.volumes.get(&key(workspace, name)).ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            StorageError::NotFound(format!("volume {shown:?} not found"))
        })
    }

    /// What the bus is told of one.
    pub fn info(&self, layout: &Layout, workspace: &str, name: &str) -> Result<VolumeInfo> {
        Ok(self.describe(layout, self.find(workspace, name)?))
    }

    /// As [`Index::info`].
    pub fn describe(&self, layout: &Layout, volume: &Volume) -> VolumeInfo {
        let found = fs::symlink_metadata(layout.volume(&volume.id).join(layout::DISK));
        let Manifest { workspace, name, size_mib, created_unix_ms, .. } = volume.manifest.clone();
        VolumeInfo {
            workspace,
            name,
            size_mib,
            used_bytes: found.map_or(0, |found| found.blocks() * 512),
            created_unix_ms,
            holders: self.holds.of(&volume.id).into_iter().map(ToString::to_string).collect(),
        }
    }

    /// Refuses one that a sandbox has.
    pub fn unused(&self, volume: &Volume) -> Result<()> {
        match self.holds.of(&volume.id).first() {
            None => Ok(()),
            Some(sandbox) => {
                let name = &volume.manifest.name;
                Err(StorageError::WrongState(format!("volume {name:?} is used by sandbox {sandbox}")))
            }
        }
    }

    /// What a record of holds has of it.
    pub fn held(&self, workspace: &str, volume: &VolumeUse) -> Result<Held> {
        let id = self.find(workspace, &volume.name)?.id.clone();
        Ok(Held { volume: id, read_only: volume.read_only })
    }

    /// See [`crate::volume::Volumes::disks`].
    pub fn disks<'a>(
        &self,
        layout: &Layout,
        sandbox: &SandboxId,
        workspace: &str,
        volumes: impl IntoIterator<Item = Assigned<'a>>,
    ) -> Result<Vec<(PathBuf, &'static str)>> {
        let disk = |(volume, drive): Assigned<'a>| {
            let held = self.held(workspace, volume)?;
            if self.holds.has(sandbox, &held) {
                return Ok((layout.volume(&held.volume).join(layout::DISK), drive));
            }
            let name = &volume.name;
            Err(StorageError::WrongState(format!("sandbox {sandbox} does not hold volume {name:?} so")))
        };
        volumes.into_iter().map(disk).collect()
    }
}

/// Where a volume is in the index.
pub(crate) fn key(workspace: &str, name: &str) -> (String, String) {
    (workspace.to_owned(), name.to_owned())
}

/// Refuses what no volume can be.
pub(crate) fn check(workspace: &str, name: &str, size_mib: u64) -> Result<()> {
    check_name(workspace, name)?;
    if !(1..=SIZE_LIMIT_MIB).contains(&size_mib) {
        return Err(StorageError::Invalid(format!("a volume has 1 to {SIZE_LIMIT_MIB} MiB")));
    }
    Ok(())
}

/// Refuses what no volume can be called.
pub(crate) fn check_name(workspace: &str, name: &str) -> Result<()> {
    // A template's name is made by the same rule.
    let why = match name.parse::<TemplateName>() {
        Err(_) => "a volume's name has 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'",
        Ok(_) if workspace.is_empty() || workspace.len() > 256 => "a volume belongs to a workspace",
        Ok(_) => return Ok(()),
    };
    Err(StorageError::Invalid(why.into()))
}

/// Reads a record.
pub(crate) fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let missing = || std::io::Error::from(std::io::ErrorKind::NotFound);
    let bytes = files::read_limited(path, LIMIT).and_then(|bytes| bytes.ok_or_else(missing)).at(path)?;
    serde_json::from_slice(&bytes).map_err(std::io::Error::from).at(path)
}
