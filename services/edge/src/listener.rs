//! Sockets: accepts connections, bounds them, and lets them end in peace.
//!
//! Owns: the accept loop, limits of connections, heads and time. Refuses to know: what is asked on them.

use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};

use tokio_rustls::TlsAcceptor;

use crate::router::{Client, Router};

/// Connections at one time, of both ports.
pub const CONNECTIONS: usize = 8192;
/// How long a connection may be idle between requests, or take for a head.
const HEAD: Duration = Duration::from_secs(75);
const HEAD_BYTES: usize = 64 << 10;
/// Requests of one HTTP/2 connection at one time.
const STREAMS: u32 = 64;
/// How long a client of HTTP/2 may be silent before it is asked whether it is there, and for its answer.
const PING: Duration = Duration::from_secs(60);
const PONG: Duration = Duration::from_secs(20);
/// How long a new connection may take for its first head, the handshake of TLS included: nothing is owed to who never asks.
const FIRST_HEAD: Duration = Duration::from_secs(15);
/// How long requests may go on after the end was announced.
const DRAIN: Duration = Duration::from_secs(5);

/// Serves HTTP until `stop` completes; with an acceptor, over TLS.
pub async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Arc<Router>,
    slots: Arc<Semaphore>,
    stop: impl Future<Output = ()>,
) {
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    while let Some((stream, peer, slot)) = accepted(&listener, &slots, &mut stop).await {
        let (router, tls, watcher) = (Arc::clone(&router), tls.clone(), graceful.watcher());
        tokio::spawn(async move {
            let asked = Arc::new(AtomicBool::new(false));
            let served = async {
                match tls {
                    None => {
                        let client = Client { peer, scheme: "http" };
                        watcher.watch(http(stream, router, client, Arc::clone(&asked))).await
                    }
                    Some(tls) => {
                        let client = Client { peer, scheme: "https" };
                        let stream = tls.accept(stream).await?;
                        watcher.watch(http(stream, router, client, Arc::clone(&asked))).await
                    }
                }
            };
            let ended = tokio::select! {
                ended = served => ended,
                () = never_asks(&asked) => Err("it asked nothing in time".into()),
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "connection ended");
            }
            drop(slot);
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(DRAIN, graceful.shutdown()).await;
}

/// The next connection with its slot; `None` when it is time to stop.
async fn accepted(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
    mut stop: impl Future<Output = ()> + Unpin,
) -> Option<(TcpStream, IpAddr, tokio::sync::OwnedSemaphorePermit)> {
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(slots).acquire_owned() => slot.ok()?,
            () = &mut stop => return None,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut stop => return None,
        };
        match accepted {
            Ok((stream, peer)) => {
                let _ = stream.set_nodelay(true);
                return Some((stream, peer.ip(), slot));
            }
            // Out of descriptors, or the peer was faster: wait a moment, never end.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset
                ) => {}
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves one connection: HTTP/1.1 or HTTP/2, as the client begins. `asked` becomes true with its first request.
pub fn http<S>(
    stream: S,
    router: Arc<Router>,
    client: Client,
    asked: Arc<AtomicBool>,
) -> impl hyper_util::server::graceful::GracefulConnection<Error = Box<dyn std::error::Error + Send + Sync>> + Send
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        asked.store(true, Ordering::Relaxed);
        let router = Arc::clone(&router);
        async move { Ok::<_, Infallible>(router.answer(request, client).await) }
    });
    let mut http = auto::Builder::new(TokioExecutor::new());
    http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES);
    http.http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(HEAD_BYTES as u32)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    http.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned()
}

/// Completes when the first head did not come in time.
async fn never_asks(asked: &AtomicBool) {
    tokio::time::sleep(FIRST_HEAD).await;
    if asked.load(Ordering::Relaxed) {
        std::future::pending::<()>().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_a_connection_that_never_asked_ends_early() {
        let start = tokio::time::Instant::now();
        never_asks(&AtomicBool::new(false)).await;
        assert_eq!(start.elapsed(), FIRST_HEAD);
        let asked = AtomicBool::new(true);
        assert!(tokio::time::timeout(2 * FIRST_HEAD, never_asks(&asked)).await.is_err());
    }
}
