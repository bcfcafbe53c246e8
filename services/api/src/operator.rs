//! Tenancy for `busctl`: `ai.pandastack.api1` over [`Tenancy`].

use std::sync::Arc;

use pandastack_bus::{
    Error, Result,
    api::{ApiBackend, TokenInfo},
    vmm::VmmProxy,
};

use crate::{
    audit::Audit,
    bus::again,
    tenancy::{Tenancy, TenancyError},
};

/// The backend of the bus interface.
#[derive(Debug)]
pub struct Operator {
    tenancy: Tenancy,
    audit: Arc<Audit>,
    vmm: VmmProxy<'static>,
}

impl Operator {
    /// Over these tenants; `vmm` knows whether a workspace still has sandboxes.
    pub fn new(tenancy: Tenancy, audit: Arc<Audit>, vmm: VmmProxy<'static>) -> Self {
        Self { tenancy, audit, vmm }
    }
}

fn bus(error: TenancyError) -> Error {
    match error {
        TenancyError::BadName | TenancyError::BadToken(_) | TenancyError::Permanent => {
            Error::InvalidArgument(error.to_string())
        }
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
        let sandboxes = again(|| self.vmm.list(name.clone())).await.map_err(|error| match error {
            Error::Bus(_) => {
                Error::NotReady("vmm does not answer, so nobody knows whether the workspace is empty".into())
            }
            other => other,
        })?;
        let count = sandboxes.len();
        if count > 0 {
            return Err(Error::WrongState(format!(
                "workspace {name} has {count} sandboxes; delete them first"
            )));
        }
        let gone = self.tenancy.delete_workspace(&name).await.map_err(bus)?;
        self.audit.forget(&name).await;
        tracing::info!(workspace = %name, "workspace deleted");
        Ok(gone)
    }

    async fn create_token(&self, workspace: String, label: String, expires_in_days: u32) -> Result<String> {
        let (token, _) = self.tenancy.create_token(&workspace, &label, expires_in_days).await.map_err(bus)?;
        tracing::info!(%workspace, token = token.prefix(), "token made");
        Ok(token.reveal().to_owned())
    }

    async fn list_tokens(&self, workspace: String) -> Result<Vec<TokenInfo>> {
        let info = |(prefix, record): (String, crate::tenancy::TokenRecord)| TokenInfo {
            prefix,
            workspace: record.workspace,
            label: record.label,
            created_unix_ms: record.created_unix_ms,
            expires_unix_ms: record.expires_unix_ms,
            last_used_unix_ms: record.last_used_unix_ms,
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
}
