//! Sockets: accepts connections, bounds them, and lets them end in peace.
//!
//! Owns: the accept loop, limits of connections, headers and time. Refuses to know: what is asked on them.

use std::{
    convert::Infallible,
    io,
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
use tokio::{net::TcpListener, sync::Semaphore};

use crate::gate::{Gate, Peer};

/// Connections at one time.
const CONNECTIONS: usize = 8192;
/// How long a connection may be idle between requests or take for the head of one. The clients keep idle connections for
/// two minutes and never send a request again that met a closed one.
const HEAD: Duration = Duration::from_secs(150);
/// How long a new connection may take for its first head: nothing is owed to who never asks.
const FIRST_HEAD: Duration = Duration::from_secs(15);
const HEAD_BYTES: usize = 64 << 10;
/// How long streams may go on after the end was announced.
const DRAIN: Duration = Duration::from_secs(10);

/// Serves until `stop` completes, then lets running requests finish, for a bounded time.
pub async fn serve(listener: TcpListener, gate: Gate, stop: impl Future<Output = ()>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let graceful = GracefulShutdown::new();
    tokio::pin!(stop);
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(&slots).acquire_owned() => slot,
            () = &mut stop => break,
        };
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => (stream, Peer(peer.ip())),
                Err(error) => {
                    // Out of descriptors, or the peer was faster: wait a moment, never end.
                    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
                        tracing::warn!(%error, "accept failed");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    continue;
                }
            },
            () = &mut stop => break,
        };
        let _ = stream.set_nodelay(true);
        let gate = gate.clone();
        let asked = Arc::new(AtomicBool::new(false));
        let first = Arc::clone(&asked);
        let service = service_fn(move |mut request: hyper::Request<Incoming>| {
            first.store(true, Ordering::Relaxed);
            request.extensions_mut().insert(peer);
            let gate = gate.clone();
            async move { Ok::<_, Infallible>(gate.answer(request).await) }
        });
        let mut http = auto::Builder::new(TokioExecutor::new()).http1_only();
        http.http1().timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES);
        let connection = http.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            tokio::select! {
                ended = connection => if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                },
                () = never_asks(&asked) => tracing::debug!("a new connection asked nothing in time"),
            }
            drop(slot);
        });
    }
    drop(listener);
    if tokio::time::timeout(DRAIN, graceful.shutdown()).await.is_err() {
        tracing::info!("streams that did not end in time were cut");
    }
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
        assert!(tokio::time::timeout(HEAD, never_asks(&asked)).await.is_err());
    }
}
