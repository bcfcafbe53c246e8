//! `ai.pandastack.api1`: tenancy for the operator (`busctl call ai.pandastack.api1 …`).

use std::{future::Future, sync::Arc};

use serde::{Deserialize, Serialize};
use zbus::{Type, interface};

use crate::{
    Result,
    quota::{Quota, Resource},
};

/// Well-known name of the daemon.
pub const NAME: &str = "ai.pandastack.api1";
/// Its only object.
pub const PATH: &str = "/ai/pandastack/api1";

/// A token without its secret.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Type)]
pub struct TokenInfo {
    /// The first 12 characters of the token: its public name.
    pub prefix: String,
    /// Workspace it opens.
    pub workspace: String,
    /// Free text.
    pub label: String,
    /// Unix milliseconds.
    pub created_unix_ms: u64,
    /// Unix milliseconds; 0 means never.
    pub expires_unix_ms: u64,
    /// Unix milliseconds of its last use; 0 means not yet. May lag behind by a minute.
    pub last_used_unix_ms: u64,
    /// `full`, or `read`: it changes nothing.
    pub scope: String,
    /// The only sandbox that it is for; empty when it is for the whole workspace.
    pub sandbox: String,
}

/// How much a workspace may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Type)]
pub struct Rate {
    /// Requests per second.
    pub per_second: u32,
    /// Requests that it may have saved up.
    pub burst: u32,
    /// Calls of tools (MCP) in a minute.
    pub tool_calls: u32,
}

/// What the api daemon does for an operator; see the interface for the meaning of each method.
pub trait ApiBackend: Send + Sync + 'static {
    /// See [`Api`].
    fn create_workspace(&self, name: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Api`].
    fn list_workspaces(&self) -> impl Future<Output = Result<Vec<String>>> + Send;
    /// See [`Api`].
    fn delete_workspace(&self, name: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Api`].
    fn create_token(
        &self,
        workspace: String,
        label: String,
        expires_in_days: u32,
    ) -> impl Future<Output = Result<String>> + Send;
    /// See [`Api`].
    fn create_scoped_token(
        &self,
        workspace: String,
        label: String,
        expires_in_days: u32,
        scope: String,
        sandbox: String,
    ) -> impl Future<Output = Result<String>> + Send;
    /// See [`Api`].
    fn list_tokens(&self, workspace: String) -> impl Future<Output = Result<Vec<TokenInfo>>> + Send;
    /// See [`Api`].
    fn revoke_token(&self, prefix: String) -> impl Future<Output = Result<bool>> + Send;
    /// See [`Api`].
    fn set_quota(
        &self,
        workspace: String,
        resource: Resource,
        limit: u64,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Api`].
    fn remove_quota(&self, workspace: String, resource: Resource) -> impl Future<Output = Result<()>> + Send;
    /// See [`Api`].
    fn quotas(&self, workspace: String) -> impl Future<Output = Result<Vec<Quota>>> + Send;
    /// See [`Api`].
    fn set_rate(
        &self,
        workspace: String,
        per_second: u32,
        burst: u32,
        tool_calls: u32,
    ) -> impl Future<Output = Result<()>> + Send;
    /// See [`Api`].
    fn rate(&self, workspace: String) -> impl Future<Output = Result<Rate>> + Send;
}

/// The interface `ai.pandastack.api1.Manager` over any backend.
#[derive(Debug)]
pub struct Api<B>(pub Arc<B>);

#[interface(
    name = "ai.pandastack.api1.Manager",
    proxy(default_service = "ai.pandastack.api1", default_path = "/ai/pandastack/api1")
)]
impl<B: ApiBackend> Api<B> {
    /// Makes a workspace (a DNS label of at most 40 characters). Answers whether it is new.
    async fn create_workspace(&self, name: String) -> Result<bool> {
        self.0.create_workspace(name).await
    }

    /// All workspaces, by name.
    async fn list_workspaces(&self) -> Result<Vec<String>> {
        self.0.list_workspaces().await
    }

    /// Removes a workspace and its tokens; refused while it has sandboxes, snapshots or volumes. Answers whether it was there.
    async fn delete_workspace(&self, name: String) -> Result<bool> {
        self.0.delete_workspace(name).await
    }

    /// Makes a token and answers it in full: the only time it is shown. `expires_in_days` 0 means never.
    async fn create_token(&self, workspace: String, label: String, expires_in_days: u32) -> Result<String> {
        self.0.create_token(workspace, label, expires_in_days).await
    }

    /// As `CreateToken`, for a token that may not do everything: `scope` is `full` or `read`; `sandbox` the only sandbox that it
    /// is for, or empty.
    async fn create_scoped_token(
        &self,
        workspace: String,
        label: String,
        expires_in_days: u32,
        scope: String,
        sandbox: String,
    ) -> Result<String> {
        self.0.create_scoped_token(workspace, label, expires_in_days, scope, sandbox).await
    }

    /// The tokens of a workspace; of all for the empty name.
    async fn list_tokens(&self, workspace: String) -> Result<Vec<TokenInfo>> {
        self.0.list_tokens(workspace).await
    }

    /// Revokes a token by its prefix. Answers whether it was there; it opens nothing from then on.
    async fn revoke_token(&self, prefix: String) -> Result<bool> {
        self.0.revoke_token(prefix).await
    }
    /// Sets how much a workspace may have, durably: `sandboxes`, `vcpus`, `memory_mib`, `disk_mib`, `snapshots`, `volumes` or
    /// `volume_mib`. 0: none. What is there already stays.
    async fn set_quota(&self, workspace: String, resource: Resource, limit: u64) -> Result<()> {
        self.0.set_quota(workspace, resource, limit).await
    }

    /// Takes such a limit away.
    async fn remove_quota(&self, workspace: String, resource: Resource) -> Result<()> {
        self.0.remove_quota(workspace, resource).await
    }

    /// What a workspace may have of each (-1: no limit), and has.
    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        self.0.quotas(workspace).await
    }

    /// Sets how much a workspace may ask, from now on: requests per second, requests that it may have saved up, calls of tools
    /// (MCP) in a minute. All three 0: what holds for every workspace again.
    async fn set_rate(&self, workspace: String, per_second: u32, burst: u32, tool_calls: u32) -> Result<()> {
        self.0.set_rate(workspace, per_second, burst, tool_calls).await
    }

    /// How much a workspace may ask.
    async fn rate(&self, workspace: String) -> Result<Rate> {
        self.0.rate(workspace).await
    }
}
