//! An edge in one process: a vmm that knows one sandbox, whose guest is the real agent, and a program behind a port.
#![allow(dead_code)]

use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use guest_init::agent::{Agent, machine::Inert, serve};
use http::{Request, Response};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use pandastack_bus::{
    Error, Result,
    edge::{EdgeBackend, Minted, PreviewSpec},
    quota::{Quota, Resource},
    storage::{SnapshotInfo, VolumeSnapshotInfo, VolumeSnapshotSpec},
    vmm::{
        self, Capacity, Child, Event, Fork, HistoryPage, HistoryQuery, SandboxInfo, SandboxSpec, Series,
        State, Vmm, VmmBackend, VmmProxy,
    },
    zbus,
};
use pandastack_edge::{
    backend::Backend,
    hosts::Mode,
    listener,
    previews::{Previews, now_unix},
    router::Router,
    sandboxes::Sandboxes,
};
use pandastack_protocol::{Client, ClientError};
use pandastack_proxy::{Proxy, touch::Touch};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixStream},
    sync::Semaphore,
};

/// The one sandbox.
pub const ID: &str = "abcdefghij0123456789";

/// Far longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(20);

/// A vmm with one sandbox, which does what the edge may ask for.
pub struct OneSandbox {
    pub info: Mutex<SandboxInfo>,
    pub touched: Mutex<Vec<String>>,
    agent: Arc<Agent>,
}

async fn no<T>() -> Result<T> {
    Err(Error::Internal("the edge may not ask this".into()))
}

impl VmmBackend for OneSandbox {
    async fn get(&self, id: String) -> Result<SandboxInfo> {
        if id == ID { Ok(self.info.lock().unwrap().clone()) } else { Err(vmm::unknown_sandbox(&id)) }
    }

    async fn touch(&self, ids: Vec<String>) -> Result<()> {
        self.touched.lock().unwrap().extend(ids);
        Ok(())
    }

    async fn open_port(&self, id: String, port: u16, wake: bool) -> Result<(OwnedFd, Vec<u8>)> {
        let state = self.get(id).await?.state;
        match state {
            State::Running => {}
            State::Hibernated if wake => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                self.info.lock().unwrap().state = State::Running;
            }
            state => return Err(Error::WrongState(format!("no agent while {}", state.as_str()))),
        }
        let (near, far) = UnixStream::pair().unwrap();
        let agent = Arc::clone(&self.agent);
        tokio::spawn(async move { serve(far, agent).await });
        let client = Client::greet(near, 1, PATIENCE).await.unwrap();
        match client.forward(port, PATIENCE).await {
            Ok((stream, first)) => Ok((stream.into_std().unwrap().into(), first.to_vec())),
            Err(ClientError::Guest(_)) => Err(Error::Refused(format!("nothing listens on port {port}"))),
            Err(error) => Err(Error::GuestUnreachable(error.to_string())),
        }
    }

    async fn open_agent(&self, _: String, _: bool) -> Result<OwnedFd> {
        no().await
    }

    async fn create(&self, _: String, _: SandboxSpec) -> Result<SandboxInfo> {
        no().await
    }
    async fn list(&self, _: String) -> Result<Vec<SandboxInfo>> {
        no().await
    }
    async fn delete(&self, _: String) -> Result<bool> {
        no().await
    }
    async fn set_ttl(&self, _: String, _: u64) -> Result<SandboxInfo> {
        no().await
    }
    async fn set_persistent(&self, _: String, _: bool) -> Result<SandboxInfo> {
        no().await
    }
    async fn set_label(&self, _: String, _: String, _: String) -> Result<SandboxInfo> {
        no().await
    }
    async fn pause(&self, _: String) -> Result<SandboxInfo> {
        no().await
    }
    async fn resume(&self, _: String) -> Result<SandboxInfo> {
        no().await
    }
    async fn hibernate(&self, _: String) -> Result<SandboxInfo> {
        no().await
    }
    async fn wake(&self, _: String) -> Result<SandboxInfo> {
        no().await
    }
    async fn hibernate_all(&self) -> Result<Vec<String>> {
        no().await
    }
    async fn snapshot(&self, _: String, _: String) -> Result<SnapshotInfo> {
        no().await
    }
    async fn snapshot_volume(&self, _: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        no().await
    }
    async fn fork(&self, _: String, _: String, _: Vec<Child>) -> Result<Fork> {
        no().await
    }
    async fn events(&self, _: String) -> Result<Vec<Event>> {
        no().await
    }
    async fn open_console(&self, _: String, _: u32, _: u64, _: bool) -> Result<OwnedFd> {
        no().await
    }
    async fn set_quota(&self, _: String, _: Resource, _: i64) -> Result<()> {
        no().await
    }
    async fn quotas(&self, _: String) -> Result<Vec<Quota>> {
        no().await
    }
    async fn history(&self, _: HistoryQuery) -> Result<HistoryPage> {
        no().await
    }
    async fn metrics(&self, _: String, _: String, _: u64, _: u64, _: u32) -> Result<Vec<Series>> {
        no().await
    }
    async fn capacity(&self) -> Result<Capacity> {
        no().await
    }
    async fn create_timings(&self, _: String) -> Result<Vec<(String, u64)>> {
        no().await
    }
}

fn sandbox() -> SandboxInfo {
    SandboxInfo {
        id: ID.into(),
        workspace: "default".into(),
        template: "base".into(),
        vcpus: 1,
        memory_mib: 512,
        disk_mib: 4096,
        state: State::Running,
        reason: String::new(),
        metadata: BTreeMap::new(),
        ttl_seconds: 3600,
        idle_seconds: 0,
        persistent: false,
        guest_ip: "10.200.0.2".into(),
        boot_mode: "snapshot".into(),
        boot_ms: 1,
        created_unix_ms: 1,
        generation: 1,
        snapshot: String::new(),
        parent: String::new(),
        machine: ID.into(),
        mounts: Vec::new(),
    }
}

/// Everything, running.
pub struct Edge {
    pub address: SocketAddr,
    pub secure: SocketAddr,
    pub vmm: Arc<OneSandbox>,
    pub backend: Backend,
    pub router: Arc<Router>,
    daemons: zbus::Connection,
    _state: tempfile::TempDir,
}

impl Edge {
    pub async fn start(suffix: &str, mode: Mode) -> Self {
        let vmm = Arc::new(OneSandbox {
            info: Mutex::new(sandbox()),
            touched: Mutex::default(),
            agent: Agent::new(Inert, None),
        });
        let (one, two) = StdUnixStream::pair().unwrap();
        let (daemons, bus) = tokio::join!(
            zbus::connection::Builder::unix_stream(one)
                .server(zbus::Guid::generate())
                .p2p()
                .serve_at(vmm::PATH, Vmm(Arc::clone(&vmm)))
                .build(),
            zbus::connection::Builder::unix_stream(two).p2p().build(),
        );
        let (daemons, bus) = (daemons.unwrap(), bus.unwrap());
        let no_cache = zbus::proxy::CacheProperties::No;
        let asked = VmmProxy::builder(&bus).cache_properties(no_cache).build().await.unwrap();
        let touch = Arc::<Touch>::default();
        let proxy = Proxy::new(asked.clone(), Arc::clone(&touch));
        tokio::spawn(touch.run(asked.clone()));
        proxy.follow(&asked).await.unwrap();
        let live = proxy.live.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(200)).await;
                live.expire(now_unix());
            }
        });
        let state = tempfile::tempdir().unwrap();
        let previews = Previews::open(state.path()).unwrap();
        let backend = Backend {
            previews: previews.clone(),
            live: proxy.live.clone(),
            base_url: String::new(),
            http_port: 8081,
        };
        let router =
            Router { previews, sandboxes: Sandboxes::new(asked), proxy, suffix: suffix.into(), mode };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let slots = Arc::new(Semaphore::new(listener::CONNECTIONS));
        let (router, forever) = (Arc::new(router), std::future::pending);
        tokio::spawn(listener::serve(listener, None, Arc::clone(&router), Arc::clone(&slots), forever()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let secure = listener.local_addr().unwrap();
        let tls = pandastack_edge::tls::acceptor(None, state.path(), suffix).unwrap();
        tokio::spawn(listener::serve(listener, Some(tls), Arc::clone(&router), slots, forever()));
        Self { address, secure, vmm, backend, router, daemons, _state: state }
    }

    /// The sandbox is captured.
    pub async fn capture(&self) {
        let emitter = zbus::object_server::SignalEmitter::new(&self.daemons, vmm::PATH).unwrap();
        Vmm::<OneSandbox>::captured(&emitter, ID).await.unwrap();
    }

    /// The sandbox is in another state.
    pub async fn changed(&self, state: &str) {
        let emitter = zbus::object_server::SignalEmitter::new(&self.daemons, vmm::PATH).unwrap();
        Vmm::<OneSandbox>::changed(&emitter, ID, "default", state, 2).await.unwrap();
    }

    pub async fn mint(&self, port: u16, ttl_seconds: u64, paths: &[&str]) -> Minted {
        let paths = paths.iter().map(|path| (*path).to_owned()).collect();
        let spec = PreviewSpec { workspace: "default".into(), sandbox: ID.into(), port, ttl_seconds, paths };
        self.backend.mint(spec).await.unwrap()
    }
}

type Told = Response<BoxBody<Bytes, Infallible>>;

/// Tells what it was asked; echoes at `ws`; never ends at `endless`.
async fn told(mut request: Request<Incoming>) -> std::result::Result<Told, Infallible> {
    if request.headers().contains_key("upgrade") {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..read]).await.unwrap();
            }
        });
        let answer =
            Response::builder().status(101).header("connection", "upgrade").header("upgrade", "websocket");
        return Ok(answer.body(Full::default().boxed()).unwrap());
    }
    if request.uri().path().ends_with("/endless") {
        let piece = Bytes::from(vec![b'x'; 16 << 10]);
        let pieces = stream::repeat_with(move || Ok(http_body::Frame::data(piece.clone())));
        return Ok(Response::new(BodyExt::boxed(StreamBody::new(pieces))));
    }
    let mut text = format!("{} {}\n", request.method(), request.uri());
    for (name, value) in request.headers() {
        text.push_str(&format!("{name}: {}\n", value.to_str().unwrap()));
    }
    let answer =
        Response::builder().header("set-cookie", "a=b; Path=/").header("service-worker-allowed", "/");
    Ok(answer.body(Full::from(text).boxed()).unwrap())
}

/// A program on a port of its own.
pub async fn program() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let served = http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(told));
            tokio::spawn(served.with_upgrades());
        }
    });
    port
}
