//! From nothing to serving.

use std::{io, sync::Arc, time::Duration};

use pandastack_bus::{
    edge::{Edge, NAME, PATH},
    vmm::VmmProxy,
    zbus,
};
use pandastack_daemon::{Context, records::until_poisoned};
use pandastack_proxy::{Proxy, touch::Touch};
use tokio::{net::TcpListener, sync::Semaphore};

use crate::{
    backend::Backend,
    config::Config,
    listener,
    previews::{OpenError, Previews, now_unix},
    router::Router,
    sandboxes::Sandboxes,
    tls::{self, TlsError},
};

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory is not usable.
    #[error("the previews cannot be opened")]
    Previews(#[from] OpenError),
    /// A credential is there and cannot be read.
    #[error("a credential cannot be read")]
    Credential(#[source] io::Error),
    /// The operator's certificate is not usable, or ours cannot be made.
    #[error("TLS")]
    Tls(#[from] TlsError),
    /// The bus does not let us in.
    #[error("the bus")]
    Bus(#[from] zbus::Error),
    /// A record could not be made durable; the next run goes on from what the disk holds.
    #[error("a record could not be made durable")]
    Poisoned,
    /// The address is taken.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

async fn listen(address: &str) -> Result<TcpListener, StartError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| StartError::Listen { address: address.to_owned(), source })
}

/// Runs the daemon until it is told to stop.
pub async fn run(context: Context) -> Result<(), StartError> {
    let config = Config::read(&context).map_err(StartError::Credential)?;
    let (state, wished) = (context.state_dir().to_owned(), config.clone());
    let opened = tokio::task::spawn_blocking(move || -> Result<_, StartError> {
        let wanted = !wished.https.is_empty();
        let tls = wanted
            .then(|| tls::acceptor(wished.certificate.as_deref(), &state, &wished.suffix))
            .transpose()?;
        Ok((Previews::open(&state)?, tls))
    });
    let (previews, tls) =
        opened.await.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    let vmm =
        VmmProxy::builder(&context.bus).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
    let touch = Arc::<Touch>::default();
    let proxy = Proxy::new(vmm.clone(), Arc::clone(&touch));
    proxy.follow(&vmm).await?;
    tokio::spawn(touch.run(vmm.clone()));
    let live = proxy.live.clone();
    tokio::spawn(async move {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        loop {
            every.tick().await;
            live.expire(now_unix());
        }
    });
    let http = listen(&config.http).await?;
    let https = match &tls {
        Some(_) => Some(listen(&config.https).await?),
        None => None,
    };
    let http_port = http.local_addr().map_or(0, |address| address.port());
    let backend = Backend {
        previews: previews.clone(),
        live: proxy.live.clone(),
        base_url: config.base_url.clone(),
        http_port,
    };
    let router = Arc::new(Router {
        previews: previews.clone(),
        sandboxes: Sandboxes::new(vmm),
        proxy,
        suffix: config.suffix.clone(),
        mode: config.mode,
    });
    context.bus.object_server().at(PATH, Edge(Arc::new(backend))).await?;
    context.bus.request_name(NAME).await?;
    let probe = previews.clone();
    context.watchdog(move || {
        let probe = probe.clone();
        async move { drop(probe.check("", 0)) }
    });
    let names =
        if config.suffix.is_empty() { "no host names".to_owned() } else { format!("*.{}", config.suffix) };
    context.ready(&format!("serving previews on {} {}, {names}", config.http, config.https));
    let slots = Arc::new(Semaphore::new(listener::CONNECTIONS));
    let end = || async {
        tokio::select! {
            () = context.stopped() => (),
            () = until_poisoned(|| previews.is_poisoned()) => (),
        }
    };
    let plain = listener::serve(http, None, Arc::clone(&router), Arc::clone(&slots), end());
    let secure = async {
        if let Some(https) = https {
            listener::serve(https, tls, router, slots, end()).await;
        }
    };
    tokio::join!(plain, secure);
    if previews.is_poisoned() { Err(StartError::Poisoned) } else { Ok(()) }
}
