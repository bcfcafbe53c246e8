//! The routes: each a warp filter around a handler that answers `Result<Response, Problem>`.
//!
//! Owns: which handler belongs to which path (the list of paths is [`crate::table`]; a test holds both together).

pub mod audit;
pub mod builds;
pub mod cells;
pub mod command;
pub mod events;
pub mod exec;
pub mod execs;
pub mod files;
pub mod forks;
pub mod kernels;
pub mod lifecycle;
mod log_lines;
pub mod logs;
pub mod mcp;
pub mod me;
pub mod meta;
pub mod orgs;
pub mod ports;
pub mod previews;
pub mod promote;
pub mod proxy;
pub mod quotas;
pub mod repl;
pub mod sandboxes;
pub mod snapshots;
pub mod sockets;
pub mod state;
pub mod stats;
pub mod templates;
pub mod usage;
pub mod volume_snapshots;
pub mod volumes;
pub mod wish;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use tokio::sync::mpsc;
use warp::{Filter, Rejection, Reply, filters::BoxedFilter, reply::Response};

use crate::{app::App, gate::Asked, input::Input, problem::Problem};

/// What a handler answers.
pub type Answer = Result<Response, Problem>;

/// All routes.
pub fn all(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    // The most frequent first.
    let groups = [
        exec::routes(app),
        files::routes(app),
        cells::routes(app),
        repl::routes(app),
        sandboxes::routes(app),
        lifecycle::routes(app),
        state::routes(app),
        forks::routes(app),
        promote::routes(app),
        snapshots::routes(app),
        execs::routes(app),
        sockets::routes(app),
        logs::routes(app),
        events::routes(app),
        audit::routes(app),
        stats::routes(app),
        usage::routes(app),
        volumes::routes(app),
        volume_snapshots::routes(app),
        proxy::routes(app),
        ports::routes(app),
        previews::routes(app),
        builds::routes(app),
        templates::routes(app),
        mcp::routes(app),
        me::routes(app),
        orgs::routes(app),
        quotas::routes(app),
    ];
    // One type for all of them: a chain of thirty different ones takes the compiler minutes.
    groups.into_iter().rev().fold(meta::routes(app), |later, earlier| earlier.or(later).unify().boxed())
}

/// The request as the handlers see it.
fn input() -> impl Filter<Extract = (Input,), Error = Rejection> + Clone {
    warp::ext::get::<Asked>().and(warp::header::headers_cloned()).and(warp::body::stream()).map(
        |asked: Asked, headers, body| Input {
            caller: asked.caller,
            request_id: asked.request_id,
            query: asked.query,
            headers,
            body: Box::pin(body_bytes(body)),
        },
    )
}

fn body_bytes<B: Buf + Send + 'static>(
    body: impl futures_util::Stream<Item = Result<B, warp::Error>> + Send + 'static,
) -> impl futures_util::Stream<Item = Result<Bytes, warp::Error>> + Send + 'static {
    body.map(|part| part.map(|mut buf| buf.copy_to_bytes(buf.remaining())))
}

/// A handler's answer as a response; a problem goes on to the gate.
async fn finish(answer: impl Future<Output = Answer>) -> Response {
    answer.await.unwrap_or_else(Problem::into_response)
}

/// JSON with a status.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    warp::reply::with_status(warp::reply::json(value), status).into_response()
}

/// 204.
fn no_content() -> Response {
    StatusCode::NO_CONTENT.into_response()
}

/// Pieces that wait for a client at most: what a guest or a client can make us hold is this many pieces.
const DEPTH: usize = 2;
/// How long a client may leave a piece of a result unread.
const UNREAD_FOR: Duration = Duration::from_secs(60);

/// The near end of a body that is sent piece by piece.
#[derive(Debug)]
struct Pieces {
    to: mpsc::Sender<Bytes>,
    cut: Arc<AtomicBool>,
    patience: Duration,
}

/// Its far end, for [`streamed`].
#[derive(Debug)]
struct Arriving {
    pieces: mpsc::Receiver<Bytes>,
    cut: Arc<AtomicBool>,
}

/// A body whose client may leave a piece unread for so long.
fn pieces(patience: Duration) -> (Pieces, Arriving) {
    let (to, pieces) = mpsc::channel(DEPTH);
    let cut = Arc::new(AtomicBool::new(false));
    (Pieces { to, cut: Arc::clone(&cut), patience }, Arriving { pieces, cut })
}

impl Pieces {
    /// Sends a piece; `None` when there is nobody to read it (any more), and then nothing else needs to be sent.
    async fn send(&self, piece: impl Into<Bytes>) -> Option<()> {
        match tokio::time::timeout(self.patience, self.to.send(piece.into())).await {
            Ok(sent) => sent.ok(),
            Err(_) => {
                tracing::info!("a client stopped reading; its answer is cut");
                self.cut();
                None
            }
        }
    }

    /// Ends the body as an error, so that nobody takes the part for the whole.
    fn cut(&self) {
        self.cut.store(true, Ordering::Release);
    }

    /// Completes when the client has gone.
    async fn closed(&self) {
        self.to.closed().await;
    }
}

impl Arriving {
    fn poll(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Option<std::io::Result<Bytes>>> {
        self.pieces.poll_recv(cx).map(|piece| match piece {
            Some(piece) => Some(Ok(piece)),
            None if self.cut.swap(false, Ordering::Acquire) => {
                Some(Err(std::io::Error::other("the answer was cut")))
            }
            None => None,
        })
    }
}

/// A body that arrives piece by piece.
fn streamed(mut arriving: Arriving, content_type: &'static str) -> Response {
    let stream = futures_util::stream::poll_fn(move |cx| arriving.poll(cx));
    let mut response = warp::reply::stream(stream).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// A body of events.
fn event_stream(arriving: Arriving) -> Response {
    let mut response = streamed(arriving, "text/event-stream; charset=utf-8");
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn rest(mut arriving: Arriving) -> Vec<Result<Bytes, String>> {
        let mut all = Vec::new();
        while let Some(piece) = std::future::poll_fn(|cx| arriving.poll(cx)).await {
            all.push(piece.map_err(|error| error.to_string()));
        }
        all
    }

    #[tokio::test]
    async fn a_client_that_reads_gets_a_clean_end() {
        let (to, arriving) = pieces(UNREAD_FOR);
        to.send("a").await.unwrap();
        drop(to);
        assert_eq!(rest(arriving).await, [Ok(Bytes::from("a"))]);
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_cut() {
        let (to, arriving) = pieces(Duration::from_millis(20));
        for _ in 0..DEPTH {
            to.send("a").await.unwrap();
        }
        assert!(to.send("b").await.is_none());
        drop(to);
        let all = rest(arriving).await;
        assert_eq!(all.len(), DEPTH + 1);
        assert!(all[DEPTH].is_err());
    }
}
