//! Tenancy for `busctl`: `ai.pandastack.api1` over [`Tenancy`].

use std::sync::Arc;

use pandastack_bus::{
    Error, Result, SandboxId,
    api::{ApiBackend, Rate, TokenInfo},
    quota::{Quota, Resource},
    storage::StorageProxy,
    vmm::{VmmProxy, unknown_sandbox},
};

use crate::{
    app::App,
    audit::Audit,
    builds::Builds,
    bus::again,
    limit,
    scope::{Grant, Scope},
    tenancy::{NewToken, Tenancy, TenancyError},
};

/// The backend of the bus interface.
#[derive(Debug)]
pub struct Operator {
    tenancy: Tenancy,
    audit: Arc<Audit>,
    builds: Arc<Builds>,
    vmm: VmmProxy<'static>,
    storage: StorageProxy<'static>,
}

impl Operator {
    /// Over these tenants; the other daemons know whether a workspace still has anything.
    pub fn new(app: &App) -> Self {
        Self {
            tenancy: app.tenancy.clone(),
            audit: Arc::clone(&app.audit),
            builds: Arc::clone(&app.builds),
            vmm: app.vmm.clone(),
            storage: app.storage.clone(),
        }
    }

    /// What a workspace has; whoever gets its name next must not find anything.
    async fn has(&self, workspace: &str) -> Result<Vec<String>> {
        let name = || workspace.to_owned();
        let (sandboxes, snapshots, volumes, kept, templates) = tokio::join!(
            again(|| self.vmm.list(name())),
            again(|| self.storage.snapshots(name())),
            again(|| self.storage.volumes(name())),
            again(|| self.storage.volume_snapshots(name())),
            again(|| self.storage.templates()),
        );
        let unknown = |error| match error {
            Error::Bus(_) => Error::NotReady(
                "a daemon does not answer, so nobody knows whether the workspace is empty".into(),
            ),
            other => other,
        };
        let counts = [
            (sandboxes.map_err(unknown)?.len(), "sandboxes"),
            (snapshots.map_err(unknown)?.len(), "snapshots"),
            (volumes.map_err(unknown)?.len(), "volumes"),
            (kept.map_err(unknown)?.len(), "snapshots of volumes"),
            (
                templates.map_err(unknown)?.iter().filter(|info| info.workspace == workspace).count(),
                "templates",
            ),
            (
                self.builds.list(workspace).iter().filter(|build| !build.stage.is_over()).count(),
                "builds under way",
            ),
        ];
        let there = counts.iter().filter(|(count, _)| *count > 0);
        Ok(there.map(|(count, what)| format!("{count} {what}")).collect())
    }
}

/// Limits and use of a workspace, of all that is made anywhere.
pub async fn quotas(
    vmm: &VmmProxy<'static>,
    storage: &StorageProxy<'static>,
    workspace: &str,
) -> Result<Vec<Quota>> {
    let (made, kept) =
        tokio::join!(again(|| vmm.quotas(workspace.into())), again(|| storage.quotas(workspace.into())));
    Ok([made?, kept?].concat())
}

impl Operator {
    fn known(&self, workspace: &str) -> Result<()> {
        match self.tenancy.has_workspace(workspace) {
            true => Ok(()),
            false => Err(bus(TenancyError::NoWorkspace(workspace.chars().take(64).collect()))),
        }
    }

    /// Each daemon keeps the limits of what it makes. Below 0: none.
    async fn limit(&self, workspace: &str, resource: Resource, limit: i64) -> Result<()> {
        if Resource::OF_VMM.contains(&resource) {
            again(|| self.vmm.set_quota(workspace.into(), resource, limit)).await
        } else {
            again(|| self.storage.set_quota(workspace.into(), resource, limit)).await
        }
    }

    async fn make_token(&self, workspace: String, wish: NewToken) -> Result<String> {
        let (token, _) = self.tenancy.create_token(&workspace, wish).await.map_err(bus)?;
        tracing::info!(%workspace, token = token.prefix(), "token made");
        Ok(token.reveal().to_owned())
    }
}

fn bus(error: TenancyError) -> Error {
    match error {
        TenancyError::BadName
        | TenancyError::BadToken(_)
        | TenancyError::NotWhole
        | TenancyError::BadRate
        | TenancyError::Permanent => Error::InvalidArgument(error.to_string()),
        TenancyError::NoWorkspace(_) => Error::NotFound(error.to_string()),
        TenancyError::TooMany => Error::WrongState(error.to_string()),
        TenancyError::Records(cause) => {
            tracing::error!(error = %cause, "the tenants' records cannot be changed");
            Error::Internal("the records cannot be changed; the journal says why".into())
        }
    }
}

impl ApiBackend for Operator {
    async fn create_workspace(&self, name: String) -> Result<bool> {
        let new = self.tenancy.create_workspace(&name).await.map_err(bus)?;
        tracing::info!(workspace = %name, new, "workspace");
        Ok(new)
    }

    async fn list_workspaces(&self) -> Result<Vec<String>> {
        Ok(self.tenancy.workspaces())
    }

    async fn delete_workspace(&self, name: String) -> Result<bool> {
        if !self.tenancy.has_workspace(&name) {
            return Ok(false);
        }
        let has = self.has(&name).await?;
        if !has.is_empty() {
            let has = has.join(", ");
            return Err(Error::WrongState(format!("workspace {name} has {has}; delete them first")));
        }
        // Whoever gets its name next starts without limits.
        for resource in Resource::OF_VMM.into_iter().chain(Resource::OF_STORAGE) {
            self.limit(&name, resource, -1).await?;
        }
        let gone = self.tenancy.delete_workspace(&name).await.map_err(bus)?;
        self.audit.forget(&name).await;
        self.builds.forget(&name).await.map_err(|error| {
            tracing::error!(error = %pandastack_daemon::chain(&error), "builds of a deleted workspace stay on record");
            Error::Internal("its records of builds cannot be removed; the journal says why".into())
        })?;
        tracing::info!(workspace = %name, "workspace deleted");
        Ok(gone)
    }

    async fn create_token(&self, workspace: String, label: String, expires_in_days: u32) -> Result<String> {
        self.make_token(workspace, NewToken { label, expires_in_days, grant: Grant::default() }).await
    }

    async fn create_scoped_token(
        &self,
        workspace: String,
        label: String,
        expires_in_days: u32,
        scope: String,
        sandbox: String,
    ) -> Result<String> {
        let scope = Scope::parse(&scope)
            .ok_or_else(|| Error::InvalidArgument("a scope is `full` or `read`".into()))?;
        let sandbox = match sandbox.as_str() {
            "" => None,
            text => Some(text.parse::<SandboxId>().map_err(|_| unknown_sandbox(text))?.to_string()),
        };
        self.make_token(workspace, NewToken { label, expires_in_days, grant: Grant { scope, sandbox } }).await
    }

    async fn list_tokens(&self, workspace: String) -> Result<Vec<TokenInfo>> {
        let info = |(prefix, record): (String, crate::tenancy::TokenRecord)| TokenInfo {
            prefix,
            workspace: record.workspace,
            label: record.label,
            created_unix_ms: record.created_unix_ms,
            expires_unix_ms: record.expires_unix_ms,
            last_used_unix_ms: record.last_used_unix_ms,
            scope: record.grant.scope.as_str().into(),
            sandbox: record.grant.sandbox.unwrap_or_default(),
        };
        Ok(self.tenancy.tokens(&workspace).into_iter().map(info).collect())
    }

    async fn revoke_token(&self, prefix: String) -> Result<bool> {
        // The whole token is as good a name as its prefix.
        let prefix: String = prefix.chars().take(12).collect();
        let there = self.tenancy.revoke(&prefix, "").await.map_err(bus)?;
        tracing::info!(token = %prefix, there, "token revoked");
        Ok(there)
    }
    async fn set_quota(&self, workspace: String, resource: Resource, limit: u64) -> Result<()> {
        self.known(&workspace)?;
        let limit = i64::try_from(limit).map_err(|_| {
            Error::InvalidArgument("the limit is too large; RemoveQuota takes it away".into())
        })?;
        self.limit(&workspace, resource, limit).await?;
        tracing::info!(%workspace, resource = resource.as_str(), limit, "quota");
        Ok(())
    }

    async fn remove_quota(&self, workspace: String, resource: Resource) -> Result<()> {
        self.known(&workspace)?;
        self.limit(&workspace, resource, -1).await?;
        tracing::info!(%workspace, resource = resource.as_str(), "no quota");
        Ok(())
    }

    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        self.known(&workspace)?;
        quotas(&self.vmm, &self.storage, &workspace).await
    }

    async fn set_rate(&self, workspace: String, per_second: u32, burst: u32, tool_calls: u32) -> Result<()> {
        let given = limit::Rate { per_second, burst, tool_calls };
        let given = ((per_second, burst, tool_calls) != (0, 0, 0)).then_some(given);
        self.tenancy.set_rate(&workspace, given).await.map_err(bus)?;
        tracing::info!(%workspace, per_second, burst, tool_calls, "rate");
        Ok(())
    }

    async fn rate(&self, workspace: String) -> Result<Rate> {
        self.known(&workspace)?;
        let limit::Rate { per_second, burst, tool_calls } = self.tenancy.rate(&workspace);
        Ok(Rate { per_second, burst, tool_calls })
    }
}
