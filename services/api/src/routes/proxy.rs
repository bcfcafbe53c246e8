//! Programs in a sandbox, reached with a token: every method, streams and WebSockets.
//!
//! The token never goes on: the gate has taken it out of the head and the query. What a program wants to be told as
//! `Authorization` comes in `X-Pandastack-Broker-Auth`.

use std::sync::Arc;

use futures_util::TryStreamExt;
use http::{Method, Request, header, uri::PathAndQuery};
use http_body::{Body, Frame};
use http_body_util::{BodyDataStream, BodyExt, Empty, StreamBody, combinators::UnsyncBoxBody};
use hyper::upgrade::OnUpgrade;
use pandastack_proxy::{Streamed, Target, origin};
use warp::{Filter, Reply, filters::BoxedFilter, path::FullPath, reply::Response};

use super::{
    Answer, finish, input,
    ports::{parsed, proxy_path},
};
use crate::{app::App, gate::Peer, input::Input, problem::Problem, wire::Error};

const BROKER: &str = "x-pandastack-broker-auth";

/// The route of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    let arrival = warp::method()
        .and(warp::path::full())
        .and(warp::ext::optional::<OnUpgrade>())
        .and(warp::ext::optional::<Peer>())
        .map(|method, path, upgrade, peer| Arrival { method, path, upgrade, peer });
    warp::path!("v1" / "sandboxes" / String / "proxy" / String / ..)
        .and(warp::any().map(move || Arc::clone(&app)))
        .and(arrival)
        .and(input())
        .then(|id, port, a, arrival, i| finish(proxy(a, id, port, arrival, i)))
        .boxed()
}

/// The parts of a request that no other route needs.
#[derive(Debug)]
pub struct Arrival {
    method: Method,
    path: FullPath,
    upgrade: Option<OnUpgrade>,
    peer: Option<Peer>,
}

/// Passes the request on to a program that listens on a port of the sandbox, and its answer back; any method, and changes
/// of protocol (WebSocket). A hibernated sandbox is woken first. `Host` is the guest's own address; the client's is in
/// `X-Forwarded-Host`. `Authorization` is not passed on; `X-Pandastack-Broker-Auth` becomes it.
#[utoipa::path(operation_id = "proxy", method(get, put, post, patch, delete), path = "/v1/sandboxes/{id}/proxy/{port}/{path}", tag = "ports",
    params(("id" = String, Path, description = "sandbox id"), ("port" = u16, Path, description = "TCP port, not 22"),
        ("path" = String, Path, description = "the rest of the path, slashes included")),
    responses((status = "default", description = "what the program answers"), (status = 400, description = "not a port", body = Error),
        (status = 404, body = Error), (status = 502, description = "`upstream: …`: nothing listens there, or not HTTP", body = Error),
        (status = 503, description = "not running, or too many connections", body = Error),
        (status = 504, description = "no answer in time", body = Error)))]
pub async fn proxy(app: Arc<App>, id: String, port: String, arrival: Arrival, input: Input) -> Answer {
    let sandbox = app.get_own(&input.caller, &id).await?;
    let number = parsed(&port)?;
    let raw = arrival.path.as_str();
    // Each part before the rest has neither been decoded nor changed.
    let rest = raw.splitn(7, '/').nth(6).unwrap_or_default();
    let query = if input.query.is_empty() { String::new() } else { format!("?{}", input.query) };
    let uri = PathAndQuery::try_from(format!("/{rest}{query}"))
        .map_err(|_| Problem::invalid("the path cannot be passed on"))?;
    let host = input.headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let target = Target {
        sandbox,
        port: number,
        public_host: host.to_owned(),
        scheme: "http",
        prefix: proxy_path(&id, number),
        peer: arrival.peer.map(|Peer(address)| address),
        key: None,
    };
    let mut request = Request::new(body(&input.headers, input.body));
    *request.method_mut() = arrival.method;
    *request.uri_mut() = uri.into();
    *request.headers_mut() = input.headers;
    request.headers_mut().remove(header::AUTHORIZATION);
    if let Some(value) = request.headers_mut().remove(BROKER) {
        request.headers_mut().insert(header::AUTHORIZATION, value);
    }
    let answer = app.proxy.forward(request, arrival.upgrade, &target).await;
    let mut answer = answer.map_err(|refusal| Problem::from_refusal(&refusal))?;
    origin::confine(answer.headers_mut(), &target.prefix);
    Ok(passed_on(answer))
}

/// The request's body; none where the head announces none.
fn body(
    headers: &http::HeaderMap,
    body: crate::input::BodyStream,
) -> UnsyncBoxBody<bytes::Bytes, warp::Error> {
    if headers.contains_key(header::TRANSFER_ENCODING) || headers.contains_key(header::CONTENT_LENGTH) {
        StreamBody::new(body.map_ok(Frame::data)).boxed_unsync()
    } else {
        Empty::new().map_err(|never| match never {}).boxed_unsync()
    }
}

fn passed_on(answer: http::Response<Streamed>) -> Response {
    let (head, body) = answer.into_parts();
    let mut response = match body.is_end_stream() {
        true => Response::default(),
        false => warp::reply::stream(BodyDataStream::new(body)).into_response(),
    };
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}
