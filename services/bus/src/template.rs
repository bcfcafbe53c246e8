//! What storage says of templates, and what a new one shall be.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zbus::Type;

/// The workspace in which builds of templates run. No tenant can have this name, because it is no DNS label.
pub const BUILDS: &str = "_builds";

/// How far a template is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
#[zvariant(signature = "s")]
#[serde(rename_all = "lowercase")]
pub enum TemplateState {
    /// Its root disk is being brought onto the data partition.
    Importing,
    /// The disk is there, the snapshot is not (or was made for another kernel, Firecracker or processor).
    Unbaked,
    /// Sandboxes can be restored from it.
    Baked,
    /// It cannot be used; the reason is in the journal and in `reason`.
    Failed,
}

/// A template as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct TemplateInfo {
    /// What the daemons call it: for a template of a workspace's own an id, which no user sees.
    pub name: String,
    /// What its users call it: the same as `name` for one that is for all.
    pub title: String,
    /// Owner; empty: it is for all.
    pub workspace: String,
    /// Not in any list, and nobody's to create from: it is for the appliance itself, or not finished.
    pub hidden: bool,
    /// When a workspace made it, Unix milliseconds; 0 for one that is for all.
    pub created_unix_ms: u64,
    /// Other names by which it may be asked for.
    pub aliases: Vec<String>,
    /// One sentence.
    pub description: String,
    /// `base`, `data`, `agents` or `custom`.
    pub category: String,
    /// Tools a user finds in it.
    pub tools: Vec<String>,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Root disk in MiB.
    pub disk_mib: u64,
    /// Environment of every exec.
    pub env: BTreeMap<String, String>,
    /// Where an exec starts.
    pub workdir: String,
    /// Shell command run before the capture; may be empty.
    pub warmup: String,
    /// Bytes its files take on the data partition.
    pub size_bytes: u64,
    /// How far it is.
    pub state: TemplateState,
    /// Why it failed; empty otherwise.
    pub reason: String,
}

/// What a template of a workspace's own shall be; its root disk is a volume.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Type)]
pub struct TemplateSpec {
    /// What the daemons call it, chosen by the caller, of the form of [`crate::SandboxId`].
    pub id: String,
    /// Owner.
    pub workspace: String,
    /// What its owner calls it: `[A-Za-z0-9._-]{1,64}`, neither `.` nor `..`.
    pub title: String,
    /// Virtual processors, 1 to 32.
    pub vcpus: u32,
    /// Guest memory in MiB, 64 to 1048576.
    pub memory_mib: u64,
    /// Environment of every exec.
    pub env: BTreeMap<String, String>,
    /// Where an exec starts; an absolute path.
    pub workdir: String,
}
