//! `ai.pandastack.network1`: the attachment of each sandbox to the world.

use std::{future::Future, os::fd::OwnedFd as StdFd, sync::Arc};

use serde::{Deserialize, Serialize};
use zbus::{OwnedFd, Type, interface};

use crate::Result;

/// Well-known name of the daemon.
pub const NAME: &str = "ai.pandastack.network1";
/// Its only object.
pub const PATH: &str = "/ai/pandastack/network1";

/// How a sandbox is attached.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Attachment {
    /// Owner: the sandbox id.
    pub id: String,
    /// Outside IPv4 address, unique on this appliance; the guest itself always has the same baked one.
    pub address: String,
    /// Name of the host's end of its link.
    pub link: String,
}

/// What the network daemon does; see the interface for the meaning of each method.
pub trait NetworkBackend: Send + Sync + 'static {
    /// See [`Network`].
    fn attach(&self, id: String, process: StdFd) -> impl Future<Output = Result<Attachment>> + Send;
    /// See [`Network`].
    fn detach(&self, id: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Network`].
    fn owners(&self) -> impl Future<Output = Result<Vec<Attachment>>> + Send;
}

/// The interface `ai.pandastack.network1.Manager` over any backend.
#[derive(Debug)]
pub struct Network<B>(pub Arc<B>);

#[interface(
    name = "ai.pandastack.network1.Manager",
    proxy(default_service = "ai.pandastack.network1", default_path = "/ai/pandastack/network1")
)]
impl<B: NetworkBackend> Network<B> {
    /// Attaches the network namespace of a process (a pidfd of the sandbox unit's main process): tap, link, address,
    /// translation, policy. Idempotent: the same id keeps its address, a new process of it gets a new link.
    async fn attach(&self, id: String, process: OwnedFd) -> Result<Attachment> {
        self.0.attach(id, process.into()).await
    }

    /// Takes the attachment away and gives its address back. Answers whether there was one.
    async fn detach(&self, id: String) -> Result<bool> {
        self.0.detach(id).await
    }

    /// Every attachment on record, for reconciliation.
    async fn owners(&self) -> Result<Vec<Attachment>> {
        self.0.owners().await
    }
}
