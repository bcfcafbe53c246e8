//! `ai.pandastack.storage1`: templates, sandbox directories, disks and captures on XFS.

use std::{collections::BTreeMap, future::Future, sync::Arc};

use serde::{Deserialize, Serialize};
use zbus::{Type, interface, object_server::SignalEmitter};

use crate::Result;

/// Well-known name of the daemon.
pub const NAME: &str = "ai.pandastack.storage1";
/// Its only object.
pub const PATH: &str = "/ai/pandastack/storage1";

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
    /// Its name.
    pub name: String,
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
    /// The catalogue, by name.
    async fn templates(&self) -> Result<Vec<TemplateInfo>> {
        self.0.templates().await
    }

    /// One template by name or alias.
    async fn template(&self, name: String) -> Result<TemplateInfo> {
        self.0.template(name).await
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
