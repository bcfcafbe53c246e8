//! What is counted per workspace. Each thing is bounded, durably, by the daemon that makes it.

use serde::{Deserialize, Serialize};
use zbus::Type;

/// What a workspace may have so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "snake_case")]
pub enum Resource {
    /// Sandboxes, whatever their state.
    Sandboxes,
    /// Their virtual processors, together.
    Vcpus,
    /// Their memory, together.
    MemoryMib,
    /// Their root disks as promised, together.
    DiskMib,
    /// Snapshots.
    Snapshots,
    /// Volumes.
    Volumes,
    /// Volumes as promised, together.
    VolumeMib,
}

impl Resource {
    /// Those that vmm makes.
    pub const OF_VMM: [Self; 5] =
        [Self::Sandboxes, Self::Vcpus, Self::MemoryMib, Self::DiskMib, Self::Snapshots];
    /// Those that storage makes.
    pub const OF_STORAGE: [Self; 2] = [Self::Volumes, Self::VolumeMib];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sandboxes => "sandboxes",
            Self::Vcpus => "vcpus",
            Self::MemoryMib => "memory_mib",
            Self::DiskMib => "disk_mib",
            Self::Snapshots => "snapshots",
            Self::Volumes => "volumes",
            Self::VolumeMib => "volume_mib",
        }
    }
}

/// How much of something a workspace may have, and has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Quota {
    /// Of what.
    pub resource: Resource,
    /// At most so much; -1: no limit.
    pub limit: i64,
    /// So much is there.
    pub used: u64,
}

impl Quota {
    /// With a limit, or none.
    pub fn new(resource: Resource, limit: Option<u64>, used: u64) -> Self {
        Self { resource, limit: limit.map_or(-1, |limit| i64::try_from(limit).unwrap_or(i64::MAX)), used }
    }

    /// The limit, if there is one.
    pub fn limit(&self) -> Option<u64> {
        u64::try_from(self.limit).ok()
    }
}
