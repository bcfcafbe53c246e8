//! WebSockets: commands side by side, terminals, language servers.
//!
//! Owns: the upgrade, pings, what a client may send and leave unread. Refuses to know: what is said on them.

pub mod commands;
pub mod lsp;
pub mod terminal;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, Interval, MissedTickBehavior, interval, timeout},
};
use warp::{
    Filter, Reply,
    filters::BoxedFilter,
    reply::Response,
    ws::{Message, WebSocket, Ws},
};

use super::{Answer, exec::STALLED_FOR};
use crate::{app::App, auth::Caller, limit::AT_ONCE, problem::Problem};

const PING_EVERY: Duration = Duration::from_secs(20);
/// A client that says nothing for so long, not even to a ping, is gone.
const SILENT_FOR: Duration = Duration::from_secs(70);

/// The routes of this folder.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    commands::routes(app).or(terminal::routes(app)).unify().or(lsp::routes(app)).unify().boxed()
}

/// The upgrade that a request asks for, if it does.
fn upgrade() -> impl Filter<Extract = (Option<Ws>,), Error = std::convert::Infallible> + Clone {
    warp::ws().map(Some).or(warp::any().map(|| None)).unify()
}

/// A WebSocket with the place it takes among its workspace's requests.
struct Socket {
    socket: WebSocket,
    pings: Interval,
    heard: Instant,
    _place: OwnedSemaphorePermit,
}

/// What a client sent.
enum Incoming {
    Text(String),
    Binary(Bytes),
}

/// Why a client sends nothing any more.
#[derive(Debug, PartialEq, Eq)]
enum Gone {
    /// It said so.
    Closed,
    /// Its connection broke, or it is silent.
    Lost,
}

/// Opens a WebSocket and goes on with it in `then`; nothing of a message may be over `limit` bytes.
fn open<F, U>(
    ws: Option<Ws>,
    limit: usize,
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    then: F,
) -> Answer
where
    F: FnOnce(Socket) -> U + Send + 'static,
    U: Future<Output = ()> + Send + 'static,
{
    let ws = ws.ok_or_else(not_a_websocket)?;
    // The request's own place ends with the answer's body, which an upgrade does not have.
    let place = app.limiter.enter(&caller.workspace, std::time::Instant::now()).ok_or_else(|| {
        let mut problem = Problem::new(
            StatusCode::TOO_MANY_REQUESTS,
            "rate_limited",
            format!("rate limit: more than {AT_ONCE} requests at once"),
        );
        problem.retry_after = Some(1);
        problem
    })?;
    let ws = ws.max_message_size(limit).max_frame_size(limit).max_write_buffer_size(4 << 20);
    let mut response = ws
        .on_upgrade(move |socket| {
            let mut pings = interval(PING_EVERY);
            pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
            pings.reset();
            then(Socket { socket, pings, heard: Instant::now(), _place: place })
        })
        .into_response();
    if let Some(chosen) = subprotocol(headers) {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, chosen);
    }
    Ok(response)
}

fn not_a_websocket() -> Problem {
    Problem::new(
        StatusCode::UPGRADE_REQUIRED,
        "websocket_required",
        "this is a WebSocket: ask for an upgrade",
    )
}

/// The first subprotocol offered: a browser that offers some gives up when none is chosen. The gate has taken those
/// out that are tokens.
fn subprotocol(headers: &HeaderMap) -> Option<HeaderValue> {
    let offered = headers.get(header::SEC_WEBSOCKET_PROTOCOL)?.to_str().ok()?;
    let first = offered.split(',').map(str::trim).find(|name| !name.is_empty())?;
    HeaderValue::from_str(first).ok()
}

impl Socket {
    /// What comes next. Pings meanwhile. Cancel-safe.
    async fn receive(&mut self) -> Result<Incoming, Gone> {
        loop {
            tokio::select! {
                message = self.socket.next() => {
                    let message = match message {
                        Some(Ok(message)) => message,
                        Some(Err(_)) | None => return Err(Gone::Lost),
                    };
                    self.heard = Instant::now();
                    if message.is_close() {
                        return Err(Gone::Closed);
                    }
                    if let Ok(text) = message.to_str() {
                        return Ok(Incoming::Text(text.to_owned()));
                    }
                    if message.is_binary() {
                        return Ok(Incoming::Binary(message.into_bytes()));
                    }
                }
                _ = self.pings.tick() => {
                    if self.heard.elapsed() > SILENT_FOR {
                        return Err(Gone::Lost);
                    }
                    self.send(Message::ping(Bytes::new())).await.ok_or(Gone::Lost)?;
                }
            }
        }
    }

    /// Sends a message; `None` when there is nobody to read it.
    async fn send(&mut self, message: Message) -> Option<()> {
        timeout(STALLED_FOR, self.socket.send(message)).await.ok()?.ok()
    }

    async fn text(&mut self, value: &serde_json::Value) -> Option<()> {
        self.send(Message::text(value.to_string())).await
    }

    /// Says goodbye, and waits a moment for the same of the client.
    async fn close(mut self, code: u16, reason: String) {
        const GOODBYE: Duration = Duration::from_secs(5);
        if self.send(Message::close_with(code, reason)).await.is_some() {
            let answer = async { while let Some(Ok(_)) = self.socket.next().await {} };
            let _ = timeout(GOODBYE, answer).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_subprotocol_is_chosen() {
        let chosen = |offered: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(offered));
            subprotocol(&headers)
        };
        assert_eq!(chosen("lsp, other").unwrap(), "lsp");
        assert_eq!(chosen(" , other").unwrap(), "other");
        assert_eq!(chosen(""), None);
        assert_eq!(subprotocol(&HeaderMap::new()), None);
    }
}
