//! The private interfaces as an operator's `busctl introspect` shows them. A change here is a change of the interface:
//! it has to be meant. `UPDATE_GOLDEN=1 cargo test -p pandastack-bus --features p2p` writes the files anew.

#![cfg(feature = "p2p")]

use std::{future::Future, os::fd::OwnedFd, os::unix::net::UnixStream, path::Path, sync::Arc};

use pandastack_bus::{
    Error, Result, api, edge, network,
    quota::{Quota, Resource},
    storage, vmm, zbus,
};

/// Answers everything with the same refusal: only the shape of the interface is looked at.
struct Nobody;

async fn no<T>() -> Result<T> {
    Err(Error::NotFound("nobody is here".into()))
}

impl vmm::VmmBackend for Nobody {
    fn set_quota(&self, _: String, _: Resource, _: i64) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn quotas(&self, _: String) -> impl Future<Output = Result<Vec<Quota>>> + Send {
        no()
    }
    fn create(
        &self,
        _: String,
        _: vmm::SandboxSpec,
    ) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn get(&self, _: String) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn list(&self, _: String) -> impl Future<Output = Result<Vec<vmm::SandboxInfo>>> + Send {
        no()
    }
    fn delete(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn set_ttl(&self, _: String, _: u64) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn set_persistent(&self, _: String, _: bool) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn set_label(
        &self,
        _: String,
        _: String,
        _: String,
    ) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn touch(&self, _: Vec<String>) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn open_agent(&self, _: String, _: bool) -> impl Future<Output = Result<OwnedFd>> + Send {
        no()
    }
    fn open_port(
        &self,
        _: String,
        _: u16,
        _: bool,
    ) -> impl Future<Output = Result<(OwnedFd, Vec<u8>)>> + Send {
        no()
    }
    fn open_console(
        &self,
        _: String,
        _: u32,
        _: u64,
        _: bool,
    ) -> impl Future<Output = Result<OwnedFd>> + Send {
        no()
    }
    fn pause(&self, _: String) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn resume(&self, _: String) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn hibernate(&self, _: String) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn wake(&self, _: String) -> impl Future<Output = Result<vmm::SandboxInfo>> + Send {
        no()
    }
    fn hibernate_all(&self) -> impl Future<Output = Result<Vec<String>>> + Send {
        no()
    }
    fn snapshot(&self, _: String, _: String) -> impl Future<Output = Result<storage::SnapshotInfo>> + Send {
        no()
    }
    fn snapshot_volume(
        &self,
        _: storage::VolumeSnapshotSpec,
    ) -> impl Future<Output = Result<storage::VolumeSnapshotInfo>> + Send {
        no()
    }
    fn fork(
        &self,
        _: String,
        _: String,
        _: Vec<vmm::Child>,
    ) -> impl Future<Output = Result<vmm::Fork>> + Send {
        no()
    }
    fn events(&self, _: String) -> impl Future<Output = Result<Vec<vmm::Event>>> + Send {
        no()
    }
    fn history(&self, _: vmm::HistoryQuery) -> impl Future<Output = Result<vmm::HistoryPage>> + Send {
        no()
    }
    fn metrics(
        &self,
        _: String,
        _: String,
        _: u64,
        _: u64,
        _: u32,
    ) -> impl Future<Output = Result<Vec<vmm::Series>>> + Send {
        no()
    }
    fn capacity(&self) -> impl Future<Output = Result<vmm::Capacity>> + Send {
        no()
    }
    fn create_timings(&self, _: String) -> impl Future<Output = Result<Vec<(String, u64)>>> + Send {
        no()
    }
}

impl storage::StorageBackend for Nobody {
    fn set_quota(&self, _: String, _: Resource, _: i64) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn quotas(&self, _: String) -> impl Future<Output = Result<Vec<Quota>>> + Send {
        no()
    }
    fn templates(&self) -> impl Future<Output = Result<Vec<storage::TemplateInfo>>> + Send {
        no()
    }
    fn template(&self, _: String) -> impl Future<Output = Result<storage::TemplateInfo>> + Send {
        no()
    }
    fn find_template(
        &self,
        _: String,
        _: String,
    ) -> impl Future<Output = Result<storage::TemplateInfo>> + Send {
        no()
    }
    fn adopt_template(
        &self,
        _: String,
        _: String,
        _: storage::TemplateSpec,
    ) -> impl Future<Output = Result<storage::TemplateInfo>> + Send {
        no()
    }
    fn publish_template(&self, _: String, _: bool) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn delete_template(&self, _: String, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn clone_template(
        &self,
        _: String,
        _: String,
        _: String,
        _: u64,
    ) -> impl Future<Output = Result<storage::VolumeInfo>> + Send {
        no()
    }
    fn prepare(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn fill(
        &self,
        _: String,
        _: String,
        _: storage::Fill,
        _: u64,
    ) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn ensure_kernel(&self, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn prepare_capture(&self, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn seal_template(&self, _: String, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn fail_template(&self, _: String, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn release(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn begin_capture(&self, _: String) -> impl Future<Output = Result<storage::CaptureKind>> + Send {
        no()
    }
    fn capture_disks(&self, _: String, _: bool) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn commit_capture(
        &self,
        _: String,
        _: storage::SnapshotSpec,
    ) -> impl Future<Output = Result<storage::SnapshotInfo>> + Send {
        no()
    }
    fn abort_capture(&self, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn copy_snapshot(
        &self,
        _: String,
        _: storage::SnapshotSpec,
    ) -> impl Future<Output = Result<storage::SnapshotInfo>> + Send {
        no()
    }
    fn fill_snapshot(&self, _: String, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn snapshots(&self, _: String) -> impl Future<Output = Result<Vec<storage::SnapshotInfo>>> + Send {
        no()
    }
    fn snapshot(&self, _: String) -> impl Future<Output = Result<storage::SnapshotInfo>> + Send {
        no()
    }
    fn delete_snapshot(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn verify_snapshot(&self, _: String) -> impl Future<Output = Result<storage::Verification>> + Send {
        no()
    }
    fn snapshot_volume(
        &self,
        _: storage::VolumeSnapshotSpec,
    ) -> impl Future<Output = Result<storage::VolumeSnapshotInfo>> + Send {
        no()
    }
    fn volume_snapshots(
        &self,
        _: String,
    ) -> impl Future<Output = Result<Vec<storage::VolumeSnapshotInfo>>> + Send {
        no()
    }
    fn delete_volume_snapshot(&self, _: String, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn restore_volume(
        &self,
        _: String,
        _: String,
        _: String,
        _: u64,
    ) -> impl Future<Output = Result<storage::VolumeInfo>> + Send {
        no()
    }
    fn create_volume(
        &self,
        _: String,
        _: String,
        _: u64,
    ) -> impl Future<Output = Result<storage::VolumeInfo>> + Send {
        no()
    }
    fn volumes(&self, _: String) -> impl Future<Output = Result<Vec<storage::VolumeInfo>>> + Send {
        no()
    }
    fn volume(&self, _: String, _: String) -> impl Future<Output = Result<storage::VolumeInfo>> + Send {
        no()
    }
    fn delete_volume(&self, _: String, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn grow_volume(
        &self,
        _: String,
        _: String,
        _: u64,
    ) -> impl Future<Output = Result<storage::VolumeInfo>> + Send {
        no()
    }
    fn hold_volumes(
        &self,
        _: String,
        _: String,
        _: Vec<storage::VolumeUse>,
    ) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn drop_volumes(&self, _: String) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn insert_volumes(
        &self,
        _: String,
        _: String,
        _: String,
        _: Vec<storage::VolumeUse>,
    ) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn owners(&self) -> impl Future<Output = Result<Vec<storage::Owner>>> + Send {
        no()
    }
    fn usage(&self) -> impl Future<Output = Result<storage::Usage>> + Send {
        no()
    }
}

impl network::NetworkBackend for Nobody {
    fn attach(&self, _: String, _: OwnedFd) -> impl Future<Output = Result<network::Attachment>> + Send {
        no()
    }
    fn detach(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn owners(&self) -> impl Future<Output = Result<Vec<network::Attachment>>> + Send {
        no()
    }
}

impl api::ApiBackend for Nobody {
    fn remove_quota(&self, _: String, _: Resource) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn set_quota(&self, _: String, _: Resource, _: u64) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn quotas(&self, _: String) -> impl Future<Output = Result<Vec<Quota>>> + Send {
        no()
    }
    fn create_workspace(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn list_workspaces(&self) -> impl Future<Output = Result<Vec<String>>> + Send {
        no()
    }
    fn delete_workspace(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn create_token(&self, _: String, _: String, _: u32) -> impl Future<Output = Result<String>> + Send {
        no()
    }
    fn list_tokens(&self, _: String) -> impl Future<Output = Result<Vec<api::TokenInfo>>> + Send {
        no()
    }
    fn create_scoped_token(
        &self,
        _: String,
        _: String,
        _: u32,
        _: String,
        _: String,
    ) -> impl Future<Output = Result<String>> + Send {
        no()
    }
    fn revoke_token(&self, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn set_rate(&self, _: String, _: u32, _: u32, _: u32) -> impl Future<Output = Result<()>> + Send {
        no()
    }
    fn rate(&self, _: String) -> impl Future<Output = Result<api::Rate>> + Send {
        no()
    }
}

impl edge::EdgeBackend for Nobody {
    fn mint(&self, _: edge::PreviewSpec) -> impl Future<Output = Result<edge::Minted>> + Send {
        no()
    }
    fn revoke(&self, _: String, _: String, _: String) -> impl Future<Output = Result<bool>> + Send {
        no()
    }
    fn list(&self, _: String, _: String) -> impl Future<Output = Result<Vec<edge::PreviewInfo>>> + Send {
        no()
    }
    fn connections(&self) -> impl Future<Output = Result<u32>> + Send {
        no()
    }
}

async fn pair() -> zbus::Result<(zbus::Connection, zbus::Connection)> {
    let (a, b) = UnixStream::pair().expect("a socket pair");
    let nobody = || Arc::new(Nobody);
    let server = zbus::connection::Builder::unix_stream(a)
        .server(zbus::Guid::generate())
        .p2p()
        .serve_at(vmm::PATH, vmm::Vmm(nobody()))
        .serve_at(storage::PATH, storage::Storage(nobody()))
        .serve_at(network::PATH, network::Network(nobody()))
        .serve_at(api::PATH, api::Api(nobody()))
        .serve_at(edge::PATH, edge::Edge(nobody()))
        .build();
    let client = zbus::connection::Builder::unix_stream(b).p2p().build();
    let (server, client) = tokio::join!(server, client);
    Ok((server?, client?))
}

#[tokio::test]
async fn interfaces_are_as_they_were() {
    let (_server, client) = pair().await.expect("a bus of two");
    let mut changed = Vec::new();
    for (name, path) in [
        (vmm::NAME, vmm::PATH),
        (storage::NAME, storage::PATH),
        (network::NAME, network::PATH),
        (api::NAME, api::PATH),
        (edge::NAME, edge::PATH),
    ] {
        let proxy = zbus::fdo::IntrospectableProxy::builder(&client)
            .destination(name)
            .path(path)
            .build()
            .await
            .expect("a proxy");
        let xml = proxy.introspect().await.expect("an answer");
        let ours = xml.find("<interface name=\"ai.pandastack").expect("our interface");
        let end = ours + xml[ours..].find("</interface>").expect("its end") + "</interface>".len();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.xml"));
        let shown = format!("{}\n", &xml[ours..end]);
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(golden.parent().expect("a folder")).expect("made");
            std::fs::write(&golden, &shown).expect("written");
        }
        if std::fs::read_to_string(&golden).unwrap_or_default() != shown {
            changed.push(name);
        }
    }
    assert!(changed.is_empty(), "changed: {changed:?}");
}

#[tokio::test]
async fn an_error_arrives_as_the_variant_it_was() {
    let (_server, client) = pair().await.expect("a bus of two");
    let proxy = vmm::VmmProxy::new(&client).await.expect("a proxy");

    let error = proxy.get("x".into()).await.expect_err("nobody is here");

    assert_eq!(error, Error::NotFound("nobody is here".into()));
}
