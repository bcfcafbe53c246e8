//! An appliance in one process: the real server, a vmm and a storage that only remember, and the real agent as every
//! guest, behind relays that a test can cut.
#![allow(dead_code)]

mod edge;
mod storage;
mod vmm;

use std::{
    net::SocketAddr,
    os::unix::net::UnixStream as StdUnixStream,
    sync::{Arc, atomic::AtomicUsize},
};

pub use edge::FakeEdge;
use pandastack_api::{
    app::App,
    audit::Audit,
    auth::Token,
    builds::{Builds, Workshop, registry},
    gate::Gate,
    listener,
    routes::{self, kernels::Kernels},
    tenancy::{NewToken, Tenancy},
};
use pandastack_bus::{storage::Storage, vmm::Vmm, zbus};
pub use storage::{FakeStorage, Shelf};
use tokio::net::TcpListener;
pub use vmm::FakeVmm;

/// The token of the default workspace.
pub const TOKEN: &str = "pds_0123456789abcdef0123456789abcdef";

/// Everything, running.
pub struct Appliance {
    pub address: SocketAddr,
    pub vmm: Arc<FakeVmm>,
    pub storage: Arc<FakeStorage>,
    pub shelf: Arc<Shelf>,
    pub edge: Arc<FakeEdge>,
    pub app: Arc<App>,
    pub daemons: zbus::Connection,
    pub state: tempfile::TempDir,
}

impl Appliance {
    /// Starts one on a free port.
    pub async fn start() -> Self {
        Self::start_at("127.0.0.1:0", Kernels::default()).await
    }

    /// Starts one whose guests' kernels are asked like this.
    pub async fn start_at(address: &str, kernels: Kernels) -> Self {
        let shelf = Arc::<Shelf>::default();
        let vmm = FakeVmm::new(Arc::clone(&shelf));
        let storage = Arc::new(FakeStorage { asked: AtomicUsize::new(0), shelf: Arc::clone(&shelf) });
        let edge = Arc::<FakeEdge>::default();
        let (one, two) = StdUnixStream::pair().unwrap();
        let guid = zbus::Guid::generate();
        let (daemons, bus) = tokio::join!(
            zbus::connection::Builder::unix_stream(one)
                .server(guid)
                .p2p()
                .serve_at(pandastack_bus::vmm::PATH, Vmm(Arc::clone(&vmm)))
                .serve_at(pandastack_bus::edge::PATH, pandastack_bus::edge::Edge(Arc::clone(&edge)))
                .serve_at(pandastack_bus::storage::PATH, Storage(Arc::clone(&storage)))
                .build(),
            zbus::connection::Builder::unix_stream(two).p2p().build(),
        );
        let (daemons, bus) = (daemons.unwrap(), bus.unwrap());
        vmm.tell_on(&daemons);
        let state = tempfile::tempdir().unwrap();
        let tenancy = Tenancy::open(state.path()).unwrap();
        tenancy.first_boot(Token::parse(TOKEN), |_| unreachable!("a preset is there")).await.unwrap();
        let audit = Audit::open(&state.path().join("audit")).unwrap();
        let workshop = Workshop {
            program: state.path().join("build").to_str().unwrap().to_owned(),
            directory: state.path().join("work").to_str().unwrap().to_owned(),
            mounts: state.path().join("mnt").to_str().unwrap().to_owned(),
            ..Workshop::default()
        };
        let registries = registry::allowed("registry.test:5000 insecure");
        let builds = Builds::open(&state.path().join("builds"), registries, workshop).unwrap();
        let app = App::with_kernels(&bus, tenancy, Arc::new(audit), builds, kernels).await.unwrap();
        app.start().await.unwrap();
        let gate = Gate::new(Arc::clone(&app), routes::all(&app));
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(listener::serve(listener, gate, std::future::pending()));
        Self { address, vmm, storage, shelf, edge, app, daemons, state }
    }
    /// The token of another workspace, and its public name.
    pub async fn other_workspace(&self) -> (String, String) {
        self.app.tenancy.create_workspace("acme").await.unwrap();
        let (token, _) = self.app.tenancy.create_token("acme", NewToken::default()).await.unwrap();
        (token.reveal().to_owned(), token.prefix().to_owned())
    }
}
