//! A connection to an agent whose holder can look whether it is still good while it lies idle, and that can be cut by whoever
//! knows that it is not.

use std::{
    io,
    os::fd::AsRawFd,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

/// The stream inside a `Client`.
#[derive(Debug)]
pub struct AgentStream(Arc<UnixStream>);

/// The look from outside.
#[derive(Debug)]
pub struct Pulse(Arc<UnixStream>);

/// The right to cut it, which does not keep it open.
#[derive(Debug)]
pub struct Line(Weak<UnixStream>);

impl Line {
    /// Whether somebody has the stream.
    pub fn is_open(&self) -> bool {
        self.0.strong_count() > 0
    }

    /// Ends it both ways.
    pub fn cut(&self) {
        if let Some(stream) = self.0.upgrade()
            && let Err(error) = shutdown(stream.as_raw_fd(), Shutdown::Both)
        {
            tracing::debug!(%error, "a stream that was to be cut is gone");
        }
    }
}

impl Pulse {
    /// What the stream can be cut with.
    pub fn line(&self) -> Line {
        Line(Arc::downgrade(&self.0))
    }

    /// Whether an idle stream still looks usable: open, and nothing unexpected on it.
    pub fn looks_alive(&self) -> bool {
        matches!(self.0.try_read(&mut [0; 1]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl AgentStream {
    /// Wraps a connected stream.
    pub fn new(stream: UnixStream) -> (Self, Pulse) {
        let stream = Arc::new(stream);
        (Self(Arc::clone(&stream)), Pulse(stream))
    }
}

impl AsyncRead for AgentStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.0.try_read(buf.initialize_unfilled()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_read_ready(cx))?;
                }
                Err(error) => return Poll::Ready(Err(error)),
                Ok(read) => {
                    buf.advance(read);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl AsyncWrite for AgentStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            match self.0.try_write(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.0.poll_write_ready(cx))?;
                }
                done => return Poll::Ready(done),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn it_carries_bytes_and_shows_its_end() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (mut stream, pulse) = AgentStream::new(near);
        let bytes: Vec<u8> = (0..1 << 20).map(|i| i as u8).collect();
        let sent = bytes.clone();
        let peer = tokio::spawn(async move {
            let mut got = vec![0; sent.len()];
            far.read_exact(&mut got).await.unwrap();
            assert_eq!(got, sent);
            far.write_all(b"ok").await.unwrap();
            far
        });
        stream.write_all(&bytes).await.unwrap();
        let mut answer = [0; 2];
        stream.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"ok");
        assert!(pulse.looks_alive());

        drop(peer.await.unwrap());
        stream.0.readable().await.unwrap();
        assert!(!pulse.looks_alive());
    }

    #[tokio::test]
    async fn whoever_waits_on_one_that_is_cut_learns_of_it() {
        let (near, _far) = UnixStream::pair().unwrap();
        let (mut stream, pulse) = AgentStream::new(near);
        let line = pulse.line();
        drop(pulse);
        let reader = tokio::spawn(async move { stream.read(&mut [0; 1]).await.unwrap() });
        tokio::task::yield_now().await;

        assert!(line.is_open());
        line.cut();

        assert_eq!(reader.await.unwrap(), 0);
        assert!(!line.is_open());
        line.cut();
    }
}
