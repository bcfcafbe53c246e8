//! One request and its answer over one connection to a port.
//!
//! Owns: the conversation with the program behind the port, and how long each part of it may take. Refuses to know: how the
//! connection came to be.

use std::{
    any::Any,
    error::Error,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body::{Body, Frame, SizeHint};
use hyper::{client::conn::http1, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::AbortHandle,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

use crate::{
    headers::{self, Forwarded},
    refusal::Refusal,
    stream::Streamed,
    tunnel,
};

/// Bytes of an answer's head at most.
pub const HEAD_BYTES: usize = 64 << 10;
const BUFFER_BYTES: usize = 64 << 10;
/// How long the program may take to begin its answer, from the last piece of the request on; and the client for each piece.
pub const ANSWER: Duration = Duration::from_secs(300);

/// What a request holds until its answer has ended.
pub struct Lease {
    /// Ends it early.
    pub cut: CancellationToken,
    /// Whatever has to live as long.
    pub held: Box<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease").finish_non_exhaustive()
    }
}

/// Ends a task when it is dropped.
#[derive(Debug)]
struct Ending(AbortHandle);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends a request over a fresh connection and answers with what comes back, its body still arriving.
pub async fn exchange<S, B>(
    stream: S,
    request: Request<B>,
    upgrade: Option<OnUpgrade>,
    to: &Forwarded,
    lease: Lease,
) -> Result<Response<Streamed>, Refusal>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let (mut head, body) = request.into_parts();
    let asks = headers::outgoing(&mut head, !body.is_end_stream(), to);
    let last = Arc::new(Mutex::new(Instant::now()));
    let body = Counted { body: Box::pin(body), last: Arc::clone(&last) };
    let (mut sender, connection) = http1::Builder::new()
        .max_header_size(HEAD_BYTES)
        .max_buf_size(HEAD_BYTES + BUFFER_BYTES)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(|_| Refusal::upstream("the connection broke off"))?;
    let ending = Ending(
        tokio::spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a connection into a guest ended");
            }
        })
        .abort_handle(),
    );
    let sent = sender.send_request(Request::from_parts(head, body));
    let mut response = tokio::select! {
        response = sent => response.map_err(|error| refused(&error))?,
        () = silence(&last) => return Err(Refusal::late("upstream: the program did not answer in time")),
        () = lease.cut.cancelled() => return Err(Refusal::cut()),
    };
    let status = response.status();
    if status == StatusCode::SWITCHING_PROTOCOLS {
        let (true, Some(client)) = (asks, upgrade) else {
            return Err(Refusal::upstream("it changed the protocol without being asked"));
        };
        let guest = hyper::upgrade::on(&mut response);
        headers::incoming(response.headers_mut(), status);
        tokio::spawn(async move {
            tunnel::run(client, guest, lease).await;
            drop(ending);
        });
        return Ok(response.map(|_| Streamed::empty()));
    }
    headers::incoming(response.headers_mut(), status);
    let lease = Lease { cut: lease.cut.clone(), held: Box::new((lease, ending)) };
    Ok(response.map(|body| Streamed::from_guest(body, lease)))
}

/// Completes when no piece of the request went for too long.
async fn silence(last: &Mutex<Instant>) {
    loop {
        let until = *last.lock().unwrap_or_else(PoisonError::into_inner) + ANSWER;
        if until <= Instant::now() {
            return;
        }
        tokio::time::sleep_until(until).await;
    }
}

fn refused(error: &hyper::Error) -> Refusal {
    if error.is_user() {
        return Refusal::invalid("the request body ended early");
    }
    if error.is_parse() {
        return Refusal::upstream("the answer is not HTTP, or its head is over 64 KiB");
    }
    Refusal::upstream("the program ended the connection without an answer")
}

/// The request's body, which remembers when it moved last.
struct Counted<B> {
    body: Pin<Box<B>>,
    last: Arc<Mutex<Instant>>,
}

impl<B: Body> Body for Counted<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(self.body.as_mut().poll_frame(cx));
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
