//! From a request to a port of a sandbox, or to a sentence that says why not.
//!
//! Owns: what opens a port (a signed token, a host name), the form of refusals. Refuses to know: sockets; how a request gets into
//! a guest.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header, uri::PathAndQuery};
use http_body::Body;
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use pandastack_bus::SandboxId;
use pandastack_proxy::{Key, Proxy, Refusal, Streamed, Target, origin};
use serde_json::{Value, json};

use crate::{
    hosts::{self, Host, Mode},
    previews::{Previews, now_unix},
    sandboxes::Sandboxes,
};

/// Where signed previews are.
pub const SIGNED: &str = "/v1/p/";
/// What a label of a named port begins with.
const NAMED: &str = "port.";
/// What tokens of the API begin with; they are none of a guest's business.
const API_TOKEN: &str = "pds_";

/// A body of ours or of a guest's.
pub type Answer = Response<BoxBody<Bytes, pandastack_proxy::stream::Cut>>;

/// How a client is connected.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    /// Who it is.
    pub peer: IpAddr,
    /// `http` or `https`.
    pub scheme: &'static str,
}

/// Everything behind the sockets.
#[derive(Debug)]
pub struct Router {
    /// Tokens.
    pub previews: Previews,
    /// What is there.
    pub sandboxes: Sandboxes,
    /// The way into guests.
    pub proxy: Arc<Proxy>,
    /// Suffix of host names; empty: there are none.
    pub suffix: String,
    /// Which ports they open.
    pub mode: Mode,
}

/// Why there is no answer of a guest's.
enum No {
    Refused(Refusal),
    Said(StatusCode, Value),
    Moved(String),
}

impl From<Refusal> for No {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

fn not_found(message: &str) -> No {
    No::Said(StatusCode::NOT_FOUND, json!({"error": message, "code": "not_found", "retryable": false}))
}

impl Router {
    /// Answers one request.
    pub async fn answer(&self, request: Request<Incoming>, client: Client) -> Answer {
        let method = request.method().clone();
        let version = request.version();
        let unread = !request.body().is_end_stream();
        let mut answer = match self.route(request, client).await {
            Ok(answer) => answer.map(BodyExt::boxed),
            Err(no) => {
                let mut answer = refused(no);
                if unread && version <= Version::HTTP_11 {
                    // The body may not have been read: nobody sends a next request into the closing connection.
                    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
                }
                answer
            }
        };
        answer.headers_mut().remove("x-fcs-sandbox");
        tracing::debug!(method = %method, status = answer.status().as_u16(), "request");
        answer
    }

    async fn route(&self, request: Request<Incoming>, client: Client) -> Result<Response<Streamed>, No> {
        if request.method() == Method::CONNECT {
            let said = json!({"error": "this is no forward proxy", "code": "method_not_allowed", "retryable": false});
            return Err(No::Said(StatusCode::METHOD_NOT_ALLOWED, said));
        }
        let host = match request.uri().authority() {
            Some(authority) => authority.as_str().to_owned(),
            None => header_text(&request, header::HOST),
        };
        match hosts::parse(&host, &self.suffix) {
            Host::Preview(sandbox, port) => self.by_host(request, client, host, sandbox, port).await,
            Host::Unknown => Err(not_found("no such preview")),
            Host::Other => match request.uri().path() {
                "/healthz" => Err(No::Said(StatusCode::OK, json!({"status": "ok"}))),
                path if path.starts_with(SIGNED) => self.signed(request, client, host).await,
                _ => Err(not_found("no such route")),
            },
        }
    }

    async fn by_host(
        &self,
        request: Request<Incoming>,
        client: Client,
        host: String,
        sandbox: SandboxId,
        port: u16,
    ) -> Result<Response<Streamed>, No> {
        let sandbox = self.sandboxes.get(&sandbox).await?;
        if self.mode == Mode::Named && !sandbox.metadata.contains_key(&format!("{NAMED}{port}")) {
            return Err(not_found("this port has no preview; its owner can name it"));
        }
        let path = request.uri().path_and_query().map_or("/", PathAndQuery::as_str).to_owned();
        let target = Target {
            sandbox,
            port,
            public_host: host,
            scheme: client.scheme,
            prefix: String::new(),
            peer: Some(client.peer),
            key: None,
        };
        self.pass(request, &path, &target).await
    }

    async fn signed(
        &self,
        request: Request<Incoming>,
        client: Client,
        host: String,
    ) -> Result<Response<Streamed>, No> {
        let below = request.uri().path().strip_prefix(SIGNED).unwrap_or_default();
        let (token, path) = match below.find('/') {
            Some(end) => (below[..end].to_owned(), below[end..].to_owned()),
            None => (below.to_owned(), String::new()),
        };
        if token.is_empty() {
            return Err(Refusal::invalid("missing token").into());
        }
        let Some((claim, id)) = self.previews.check(&token, now_unix()) else {
            let said = json!({"error": "unauthorized", "detail": "invalid, expired or revoked preview token",
                "code": "unauthorized", "retryable": false});
            return Err(No::Said(StatusCode::UNAUTHORIZED, said));
        };
        let prefix = format!("{SIGNED}{token}");
        let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
        if path.is_empty() && matches!(*request.method(), Method::GET | Method::HEAD) {
            // Relative links of the page lead below the token only from here.
            return Err(No::Moved(format!("{prefix}/{query}")));
        }
        let path = if path.is_empty() { "/".to_owned() } else { path };
        if !claim.allows(&path) {
            let shown: String = path.chars().take(256).collect();
            let said = json!({"error": "preview path not in token ACL", "requested": shown, "allowed_paths": claim.paths,
                "code": "forbidden", "retryable": false});
            return Err(No::Said(StatusCode::FORBIDDEN, said));
        }
        let sandbox = self.sandboxes.get(&claim.sandbox).await?;
        if sandbox.workspace != claim.workspace {
            return Err(Refusal::no_sandbox(claim.sandbox.as_str()).into());
        }
        let target = Target {
            sandbox,
            port: claim.port,
            public_host: host,
            scheme: client.scheme,
            prefix,
            peer: Some(client.peer),
            key: Some(Key { id, until_unix: claim.expires_unix }),
        };
        let mut answer = self.pass(request, &format!("{path}{query}"), &target).await?;
        origin::confine(answer.headers_mut(), &target.prefix);
        Ok(answer)
    }

    async fn pass(
        &self,
        mut request: Request<Incoming>,
        path: &str,
        target: &Target,
    ) -> Result<Response<Streamed>, No> {
        let upgrade = (request.version() == Version::HTTP_11).then(|| hyper::upgrade::on(&mut request));
        let path = without_api_token(path);
        let path = PathAndQuery::try_from(path.as_str())
            .map_err(|_| Refusal::invalid("the path cannot be passed on"))?;
        *request.uri_mut() = path.into();
        let authorization = header_text(&request, header::AUTHORIZATION);
        if authorization.split_whitespace().any(|word| word.starts_with(API_TOKEN)) {
            request.headers_mut().remove(header::AUTHORIZATION);
        }
        Ok(self.proxy.forward(request, upgrade, target).await?)
    }
}

fn header_text<B>(request: &Request<B>, name: header::HeaderName) -> String {
    request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

/// A path and query without an `access_token` of the API, which somebody may have left there.
fn without_api_token(path: &str) -> String {
    let Some((path, query)) = path.split_once('?') else { return path.to_owned() };
    let is_token = |pair: &&str| {
        pair.split_once('=')
            .is_some_and(|(name, value)| name == "access_token" && value.starts_with(API_TOKEN))
    };
    let kept: Vec<&str> = query.split('&').filter(|pair| !is_token(pair)).collect();
    format!("{path}?{}", kept.join("&"))
}

fn refused(no: No) -> Answer {
    let body = |value: &Value| Full::from(value.to_string()).map_err(|never| match never {}).boxed();
    let (status, value, retry_after) = match no {
        No::Moved(location) => {
            let mut answer = Response::new(body(&Value::Null));
            *answer.status_mut() = StatusCode::TEMPORARY_REDIRECT;
            if let Ok(location) = HeaderValue::from_str(&location) {
                answer.headers_mut().insert(header::LOCATION, location);
            }
            return answer;
        }
        No::Said(status, value) => (status, value, None),
        No::Refused(refusal) => {
            let value = json!({"error": refusal.message, "code": refusal.code, "retryable": refusal.retry_after.is_some()});
            (refusal.status, value, refusal.retry_after)
        }
    };
    let mut answer = Response::new(body(&value));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(seconds) = retry_after {
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_the_api_stay_here() {
        for (given, kept) in [
            ("/a", "/a"),
            ("/a?x=1&access_token=pds_0&y", "/a?x=1&y"),
            ("/a?access_token=other", "/a?access_token=other"),
            ("/a?access_token=pds_0", "/a?"),
        ] {
            assert_eq!(without_api_token(given), kept);
        }
    }
}
