//! The bus interface `ai.pandastack.edge1`: each method as its sentence in `pandastack_bus::edge` says.

use pandastack_bus::{
    Result,
    edge::{EdgeBackend, Minted, PreviewInfo, PreviewSpec},
};
use pandastack_proxy::Live;

use crate::previews::{Previews, now_unix};

/// The tokens, as the bus sees them.
#[derive(Debug)]
pub struct Backend {
    /// The tokens.
    pub previews: Previews,
    /// What is under way.
    pub live: Live,
    /// Where previews are served, as the operator says.
    pub base_url: String,
    /// Port of plain HTTP.
    pub http_port: u16,
}

impl EdgeBackend for Backend {
    async fn mint(&self, spec: PreviewSpec) -> Result<Minted> {
        let (token, info) = self.previews.mint(spec, now_unix()).await?;
        Ok(Minted { token, info, base_url: self.base_url.clone(), http_port: self.http_port })
    }

    async fn revoke(&self, workspace: String, sandbox: String, id: String) -> Result<bool> {
        let revoked = self.previews.revoke(&workspace, &sandbox, &id, now_unix()).await?;
        let Some(id) = revoked else { return Ok(false) };
        let cut = self.live.end(&id);
        tracing::info!(preview = id, cut, "a preview was revoked");
        Ok(true)
    }

    async fn list(&self, workspace: String, sandbox: String) -> Result<Vec<PreviewInfo>> {
        Ok(self.previews.good(&workspace, &sandbox, now_unix()))
    }

    async fn connections(&self) -> Result<u32> {
        Ok(u32::try_from(self.live.count()).unwrap_or(u32::MAX))
    }
}
