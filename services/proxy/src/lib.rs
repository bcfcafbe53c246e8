//! A streaming HTTP/1.1 reverse proxy to a port in a guest; api and edge serve with it.
//!
//! Owns: the connection to the port, the heads on their way in and out, bodies and tunnels with their limits, how many there
//! are. Refuses to know: who may reach what, how the client is connected.
//!
//! ```text
//!   request ──► place ──► dial: vmm.open_port (wakes) ────────────────────┐
//!   response ◄── stream (a piece at a time) ◄── exchange (hyper's client) ┘
//!                                                 └── 101 ──► tunnel, both ways
//! ```
//!
//! hyper parses what comes in and writes what goes out, on both sides: a head that could be read in two ways is refused by its
//! parser or written anew in one way. One connection into the guest serves one request, so nothing of one client is ever in
//! front of another's.

pub mod dial;
pub mod exchange;
pub mod headers;
pub mod live;
pub mod origin;
pub mod places;
pub mod refusal;
pub mod stream;
pub mod touch;
pub mod tunnel;

use std::{future::ready, net::IpAddr, sync::Arc};

use futures_util::StreamExt;
use http::{Request, Response};
use http_body::Body;
use hyper::upgrade::OnUpgrade;
use pandastack_bus::{
    vmm::{SandboxInfo, VmmProxy},
    zbus,
};

pub use crate::{
    dial::Dialer,
    live::{Key, Live},
    refusal::Refusal,
    stream::Streamed,
};
use crate::{headers::Forwarded, places::Places, touch::Touch};

/// Where a request goes, and what the guest is told about where it came from.
#[derive(Debug, Clone)]
pub struct Target {
    /// The sandbox, as it was a moment ago.
    pub sandbox: SandboxInfo,
    /// TCP port in it.
    pub port: u16,
    /// Host that the client asked for.
    pub public_host: String,
    /// `http` or `https`: how the client asked.
    pub scheme: &'static str,
    /// What the guest's `/` is to the client: empty, or a path without a slash at its end.
    pub prefix: String,
    /// Who asks.
    pub peer: Option<IpAddr>,
    /// What the connection is cut with, beside its sandbox.
    pub key: Option<Key>,
}

/// The proxy of one daemon.
#[derive(Debug)]
pub struct Proxy {
    dialer: Dialer,
    places: Places,
    touch: Arc<Touch>,
    /// What is under way.
    pub live: Live,
}

impl Proxy {
    /// Over vmm; use is told by way of `touch`.
    pub fn new(vmm: VmmProxy<'static>, touch: Arc<Touch>) -> Arc<Self> {
        Arc::new(Self { dialer: Dialer::new(vmm), places: Places::default(), touch, live: Live::default() })
    }

    /// Cuts what leads into sandboxes that go or are captured, as long as the bus is there: nothing tells it on their
    /// connections.
    ///
    /// # Errors
    /// vmm's signals cannot be subscribed to.
    pub async fn follow(self: &Arc<Self>, vmm: &VmmProxy<'static>) -> zbus::Result<()> {
        let (changes, captures) = (vmm.receive_changed().await?, vmm.receive_captured().await?);
        let this = Arc::clone(self);
        tokio::spawn(changes.for_each(move |change| {
            if let Ok(change) = change.args()
                && matches!(*change.state(), "" | "failed" | "hibernated")
            {
                this.cut(change.id());
            }
            ready(())
        }));
        let this = Arc::clone(self);
        tokio::spawn(captures.for_each(move |captured| {
            if let Ok(captured) = captured.args() {
                this.cut(captured.id());
            }
            ready(())
        }));
        Ok(())
    }

    fn cut(&self, id: &str) {
        let cut = self.live.cut(|entry| entry.sandbox == id);
        tracing::debug!(sandbox = id, cut, "its connections are cut");
    }

    /// Carries a request to the guest and its answer back. `upgrade` is the client's side of a connection that may become a
    /// tunnel. The request's URI is what the guest sees: a path and a query.
    pub async fn forward<B>(
        &self,
        request: Request<B>,
        upgrade: Option<OnUpgrade>,
        target: &Target,
    ) -> Result<Response<Streamed>, Refusal>
    where
        B: Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let id = &target.sandbox.id;
        let place = self.places.enter(id).await?;
        let activity = self.touch.in_use(id);
        // From here on it can be cut: what is dialled for a token that is revoked meanwhile is not used.
        let entry = self.live.enter(id, target.port, target.key.clone());
        let cut = entry.cut.clone();
        let dialled = tokio::select! {
            dialled = self.dialer.dial(&target.sandbox, target.port) => dialled?,
            () = cut.cancelled() => return Err(Refusal::cut()),
        };
        let forwarded = Forwarded {
            guest: format!("{}:{}", dialled.address, target.port),
            host: target.public_host.clone(),
            scheme: target.scheme,
            prefix: target.prefix.clone(),
            peer: target.peer,
            sandbox: id.clone(),
        };
        let lease = exchange::Lease { cut, held: Box::new((place, activity, entry)) };
        let mut response = exchange::exchange(dialled.stream, request, upgrade, &forwarded, lease).await?;
        origin::translate_location(response.headers_mut(), &forwarded);
        Ok(response)
    }
}
