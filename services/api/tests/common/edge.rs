//! An edge that only remembers.

use std::sync::Mutex;

use pandastack_bus::{
    Result,
    edge::{EdgeBackend, Minted, PreviewInfo, PreviewSpec},
};

/// An edge that only remembers.
#[derive(Default)]
pub struct FakeEdge {
    pub previews: Mutex<Vec<PreviewInfo>>,
}

impl EdgeBackend for FakeEdge {
    async fn mint(&self, spec: PreviewSpec) -> Result<Minted> {
        let mut previews = self.previews.lock().unwrap();
        let info = PreviewInfo {
            id: format!("{:016x}", previews.len()),
            workspace: spec.workspace,
            sandbox: spec.sandbox,
            port: spec.port,
            paths: spec.paths,
            created_unix: 1000,
            expires_unix: 1000 + spec.ttl_seconds,
        };
        previews.push(info.clone());
        Ok(Minted { token: format!("p.{}", info.id), info, base_url: String::new(), http_port: 8081 })
    }

    async fn revoke(&self, workspace: String, sandbox: String, id: String) -> Result<bool> {
        let mut previews = self.previews.lock().unwrap();
        let before = previews.len();
        previews.retain(|info| info.id != id || info.workspace != workspace || info.sandbox != sandbox);
        Ok(previews.len() < before)
    }

    async fn list(&self, workspace: String, sandbox: String) -> Result<Vec<PreviewInfo>> {
        let previews = self.previews.lock().unwrap();
        let own = previews.iter().filter(|info| info.workspace == workspace && info.sandbox == sandbox);
        Ok(own.cloned().collect())
    }

    async fn connections(&self) -> Result<u32> {
        Ok(0)
    }
}
