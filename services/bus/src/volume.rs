//! Values about volumes and their snapshots, as storage, vmm and api speak of them.

use serde::{Deserialize, Serialize};
use zbus::Type;

/// A volume that a sandbox asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct VolumeUse {
    /// Its name within the workspace.
    pub name: String,
    /// Writes are refused by the host.
    pub read_only: bool,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct VolumeInfo {
    /// Owner.
    pub workspace: String,
    /// Its name: `[A-Za-z0-9._-]{1,64}`, neither `.` nor `..`.
    pub name: String,
    /// Size in MiB.
    pub size_mib: u64,
    /// Bytes it takes on the data partition.
    pub used_bytes: u64,
    /// Unix milliseconds.
    pub created_unix_ms: u64,
    /// Sandboxes that have it; one at most if it is held for writing.
    pub holders: Vec<String>,
}

/// What a snapshot of a volume shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct VolumeSnapshotSpec {
    /// Its id, chosen by the caller, of the form of [`crate::SandboxId`].
    pub id: String,
    /// Owner.
    pub workspace: String,
    /// Name that the volume has at that time.
    pub volume: String,
    /// What its owner wants to know of it; at most 256 bytes, may be empty.
    pub label: String,
    /// Nothing was held back by a guest that could write to the volume. Otherwise it is what a power cut would leave.
    pub synced: bool,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct VolumeSnapshotInfo {
    /// What its maker said.
    pub spec: VolumeSnapshotSpec,
    /// Size of the volume then, MiB.
    pub size_mib: u64,
    /// Bytes it takes on the data partition; blocks shared with others count.
    pub used_bytes: u64,
    /// Unix milliseconds.
    pub created_unix_ms: u64,
}
