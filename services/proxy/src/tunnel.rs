//! A connection that changed its protocol: bytes both ways, until both have ended, nothing passed for long, or it is cut.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional},
    time::Instant,
};

use crate::exchange::Lease;

/// How long nothing may pass.
pub const IDLE: Duration = Duration::from_secs(600);
/// How long either side may take to change its protocol.
const CHANGE: Duration = Duration::from_secs(30);

/// Carries bytes between a client and a guest that both change their protocol.
pub async fn run(client: OnUpgrade, guest: OnUpgrade, lease: Lease) {
    let both = async { tokio::try_join!(client, guest) };
    let carried = async {
        match tokio::time::timeout(CHANGE, both).await {
            Ok(Ok((client, guest))) => carry(TokioIo::new(client), TokioIo::new(guest)).await,
            Ok(Err(error)) => tracing::debug!(%error, "a protocol was not changed"),
            Err(_) => tracing::debug!("a protocol was not changed in time"),
        }
    };
    tokio::select! {
        () = carried => {}
        () = lease.cut.cancelled() => tracing::debug!("a tunnel was cut"),
    }
    drop(lease);
}

/// Carries bytes until both sides have ended or nothing passed for [`IDLE`].
pub async fn carry<A, B>(client: A, guest: B)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let last = Arc::new(Mutex::new(Instant::now()));
    let mut client = Watched { inner: client, last: Arc::clone(&last) };
    let mut guest = Watched { inner: guest, last: Arc::clone(&last) };
    let silence = async {
        loop {
            let until = *last.lock().unwrap_or_else(PoisonError::into_inner) + IDLE;
            if until <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(until).await;
        }
    };
    tokio::select! {
        ended = copy_bidirectional(&mut client, &mut guest) => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a tunnel broke off");
            }
        }
        () = silence => tracing::debug!("a tunnel was silent for too long"),
    }
}

/// Remembers when something was read last.
struct Watched<S> {
    inner: S,
    last: Arc<Mutex<Instant>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_silent_tunnel_ends_and_a_busy_one_does_not() {
        let ((mut client, near), (far, mut guest)) = (tokio::io::duplex(64), tokio::io::duplex(64));
        let start = Instant::now();
        let carried = tokio::spawn(carry(near, far));
        for _ in 0..3 {
            tokio::time::sleep(IDLE - Duration::from_secs(1)).await;
            guest.write_all(b"x").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap(), b'x');
        }
        carried.await.unwrap();
        assert_eq!(start.elapsed().as_secs(), (3 * (IDLE - Duration::from_secs(1)) + IDLE).as_secs());
        assert_eq!(client.read(&mut [0]).await.unwrap(), 0);
    }
}
