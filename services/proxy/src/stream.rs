//! The body of an answer on its way to the client: a piece at a time, with limits on silence, and an end that says whether it is
//! the end.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::sync::mpsc;

use crate::exchange::Lease;

/// How long a guest may be silent within a body, and a client leave a piece unread.
pub const IDLE: Duration = Duration::from_secs(600);
/// Pieces that wait for a client: what it or a guest can make us hold.
const DEPTH: usize = 2;

/// Why a body ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the answer was cut")]
pub struct Cut;

/// A body that arrives.
#[derive(Debug)]
pub struct Streamed {
    pieces: Option<mpsc::Receiver<Frame<Bytes>>>,
    whole: Arc<AtomicBool>,
}

impl Streamed {
    /// No body.
    pub fn empty() -> Self {
        Self { pieces: None, whole: Arc::new(AtomicBool::new(true)) }
    }

    /// Begins to read `body`; `lease` is held until its end or until nobody reads any more.
    pub fn from_guest<B>(body: B, lease: Lease) -> Self
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: std::fmt::Display + Send,
    {
        if body.is_end_stream() {
            return Self::empty();
        }
        let (to, pieces) = mpsc::channel(DEPTH);
        let whole = Arc::new(AtomicBool::new(false));
        let done = Arc::clone(&whole);
        tokio::spawn(async move {
            tokio::select! {
                () = read(body, to, &done) => {}
                () = lease.cut.cancelled() => tracing::debug!("an answer was cut"),
            }
            drop(lease);
        });
        Self { pieces: Some(pieces), whole }
    }
}

/// Passes a body on; says so in `whole` when it was all of it.
async fn read<B>(mut body: B, to: mpsc::Sender<Frame<Bytes>>, whole: &AtomicBool)
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    loop {
        let frame = tokio::select! {
            frame = tokio::time::timeout(IDLE, body.frame()) => frame,
            () = to.closed() => return,
        };
        match frame {
            Ok(None) => return whole.store(true, Ordering::Release),
            Ok(Some(Ok(frame))) => match tokio::time::timeout(IDLE, to.send(frame)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => return tracing::info!("a client stopped reading; its answer is cut"),
            },
            Ok(Some(Err(error))) => return tracing::debug!(%error, "the guest's answer broke off"),
            Err(_) => return tracing::info!("a guest was silent for too long; its answer is cut"),
        }
    }
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let Some(pieces) = &mut self.pieces else { return Poll::Ready(None) };
        match pieces.poll_recv(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(frame)) => Poll::Ready(Some(Ok(frame))),
            Poll::Ready(None) => {
                self.pieces = None;
                // Nobody may take the part for the whole.
                let cut = !self.whole.load(Ordering::Acquire);
                Poll::Ready(cut.then_some(Err(Cut)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.pieces.is_none() { SizeHint::with_exact(0) } else { SizeHint::default() }
    }
}
