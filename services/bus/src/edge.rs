//! `ai.pandastack.edge1`: signed previews, and what the edge carries.

use std::{future::Future, sync::Arc};

use serde::{Deserialize, Serialize};
use zbus::{Type, interface};

use crate::Result;

/// Well-known name of the daemon.
pub const NAME: &str = "ai.pandastack.edge1";
/// Its only object.
pub const PATH: &str = "/ai/pandastack/edge1";

/// What a preview token shall allow. The caller has made sure that the sandbox is the workspace's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct PreviewSpec {
    /// Owner of the sandbox.
    pub workspace: String,
    /// The sandbox.
    pub sandbox: String,
    /// TCP port in it.
    pub port: u16,
    /// Seconds for which it is good: 1 to 604800.
    pub ttl_seconds: u64,
    /// Paths that it allows, each with everything below it; none: all. Absolute, without `|` and `,`.
    pub paths: Vec<String>,
}

/// A preview token without its secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct PreviewInfo {
    /// Its public name: 16 hexadecimal digits.
    pub id: String,
    /// Owner of the sandbox.
    pub workspace: String,
    /// The sandbox.
    pub sandbox: String,
    /// TCP port in it.
    pub port: u16,
    /// Paths that it allows; none: all.
    pub paths: Vec<String>,
    /// Unix seconds.
    pub created_unix: u64,
    /// Unix seconds from which on it allows nothing.
    pub expires_unix: u64,
}

/// A preview token that was just made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct Minted {
    /// All of it: the only time it is shown.
    pub token: String,
    /// What it is.
    pub info: PreviewInfo,
    /// Where previews are served, as the operator says; empty: on [`Minted::http_port`] of whatever host the caller knows.
    pub base_url: String,
    /// Port of plain HTTP.
    pub http_port: u16,
}

/// What the edge daemon does for api and an operator; see the interface for the meaning of each method.
pub trait EdgeBackend: Send + Sync + 'static {
    /// See [`Edge`].
    fn mint(&self, spec: PreviewSpec) -> impl Future<Output = Result<Minted>> + Send;
    /// See [`Edge`].
    fn revoke(
        &self,
        workspace: String,
        sandbox: String,
        id: String,
    ) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Edge`].
    fn list(
        &self,
        workspace: String,
        sandbox: String,
    ) -> impl Future<Output = Result<Vec<PreviewInfo>>> + Send;
    /// See [`Edge`].
    fn connections(&self) -> impl Future<Output = Result<u32>> + Send;
}

/// The interface `ai.pandastack.edge1.Manager` over any backend.
#[derive(Debug)]
pub struct Edge<B>(pub Arc<B>);

#[interface(
    name = "ai.pandastack.edge1.Manager",
    proxy(default_service = "ai.pandastack.edge1", default_path = "/ai/pandastack/edge1")
)]
impl<B: EdgeBackend> Edge<B> {
    /// Makes a preview token and answers it in full: the only time it is shown. `Quota` when the workspace has too many.
    async fn mint(&self, spec: PreviewSpec) -> Result<Minted> {
        self.0.mint(spec).await
    }

    /// Revokes a token by its public name or by all of it: durable, and what goes on with it is cut before this returns. An empty
    /// workspace or sandbox stands for any. Answers whether it was there and good.
    async fn revoke(&self, workspace: String, sandbox: String, id: String) -> Result<bool> {
        self.0.revoke(workspace, sandbox, id).await
    }

    /// The tokens that are good now, oldest first. An empty workspace or sandbox stands for any.
    async fn list(&self, workspace: String, sandbox: String) -> Result<Vec<PreviewInfo>> {
        self.0.list(workspace, sandbox).await
    }

    /// How many requests and tunnels are carried right now.
    async fn connections(&self) -> Result<u32> {
        self.0.connections().await
    }
}
