//! What every request passes: request id, CORS, token, rate limit, log line, metrics.
//!
//! Owns: everything between the listener and the routes. Refuses to know: what a route does.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, combinators::BoxBody};
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use tokio::sync::OwnedSemaphorePermit;
use warp::{filters::BoxedFilter, reply::Response};

use crate::{
    app::App,
    audit::Entry,
    auth::{self, Caller},
    limit::Verdict,
    problem::Problem,
    table::{self, Found, Kind, Route},
    tenancy::now_ms,
};

/// Who is at the other end of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub std::net::IpAddr);

/// What the gate learned about a request, for the handlers.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Whose it is.
    pub caller: Caller,
    /// Query string without any token.
    pub query: String,
    /// Its id.
    pub request_id: String,
}

/// A place among the requests of a workspace, on its way from the gate's entry to its exit.
#[derive(Debug, Clone)]
struct Place(#[expect(dead_code, reason = "held, not read")] Arc<OwnedSemaphorePermit>);

/// A body that keeps its place until it is dropped.
struct Held<B> {
    body: B,
    _place: Option<Place>,
}

impl<B: Body + Unpin> Body for Held<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The whole server but for its sockets. Cheap to clone.
#[derive(Clone)]
pub struct Gate {
    app: Arc<App>,
    routes: BoxedFilter<(Response,)>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gate").finish_non_exhaustive()
    }
}

impl Gate {
    /// In front of these routes.
    pub fn new(app: Arc<App>, routes: BoxedFilter<(Response,)>) -> Self {
        Self { app, routes }
    }

    /// Answers one request. It is under way until the answer's body is dropped.
    pub async fn answer<B>(&self, request: Request<B>) -> http::Response<BoxBody<Bytes, warp::Error>>
    where
        B: http_body::Body + Send + Sync + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let start = Instant::now();
        let request_id = request_id(request.headers());
        let method = request.method().clone();
        let path = request.uri().path().to_owned();
        let has_body = !request.body().is_end_stream();
        let (mut response, route, caller) = if method == Method::OPTIONS && !for_guest(&request) {
            let mut response = Response::default();
            *response.status_mut() = StatusCode::NO_CONTENT;
            (response, None, None)
        } else {
            self.route(request, &path, &request_id).await
        };
        let place = response.extensions_mut().remove::<Place>();
        if let Some(problem) = response.extensions_mut().remove::<Problem>() {
            response = problem.render(&request_id);
        }
        dress(response.headers_mut(), &request_id);
        let (template, sandbox) = match &route {
            Some((route, sandbox)) => (route.template, sandbox.as_deref()),
            None => ("-", None),
        };
        let status = response.status().as_u16();
        // The repetition of a miss, which the clients make by themselves, says nothing new.
        if let Some((caller, true)) = &caller
            && matches!(method, Method::POST | Method::PUT | Method::PATCH | Method::DELETE)
        {
            let (method, request_id) = (method.as_str().to_owned(), request_id.clone());
            let entry = Entry { ts: now_ms(), request_id, method, path: path.clone(), status };
            self.app.audit.note(&caller.workspace, entry);
        }
        if status >= 400 && has_body {
            // The body may not have been read, and then the connection ends. Said here, no client sends its next
            // request into the closing one.
            response.headers_mut().insert(http::header::CONNECTION, http::HeaderValue::from_static("close"));
        }
        if let Some((route, _)) = &route {
            self.app.metrics.request(route.method, route.template, status, start.elapsed());
        }
        tracing::info!(
            method = %shown(&method),
            route = template,
            status,
            ms = start.elapsed().as_millis() as u64,
            workspace = caller.as_ref().map(|(caller, _)| caller.workspace.as_str()),
            request_id,
            sandbox,
            "request"
        );
        response.map(|body| Held { body, _place: place }.boxed())
    }

    /// The answer, its route with the sandbox in its path, and who asked; with whether the request was counted.
    async fn route<B>(
        &self,
        mut request: Request<B>,
        path: &str,
        request_id: &str,
    ) -> (Response, Option<(Route, Option<String>)>, Option<(Caller, bool)>)
    where
        B: http_body::Body + Send + Sync + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let method = request.method().clone();
        let found = table::find(method.as_str(), path);
        let (query, access_token) = auth::split_access_token(request.uri().query().unwrap_or_default());
        let open = match &found {
            Found::Route(route, _) => route.kind == Kind::Public,
            Found::OtherMethods(_) | Found::Nothing => !path.starts_with("/v1/"),
        };
        let mut caller = None;
        if !open {
            match self.admit(request.headers(), access_token.as_deref(), &method, path) {
                Ok((who, counted)) => caller = Some((who, counted)),
                Err(problem) => {
                    self.app.metrics.refused(problem.code);
                    let route = match found {
                        Found::Route(route, _) => Some((route, None)),
                        _ => None,
                    };
                    return (problem.into_response(), route, None);
                }
            }
        }
        let place = match &caller {
            Some((caller, counted)) => match self.app.limiter.enter(&caller.workspace, Instant::now()) {
                Some(place) => Some(Place(Arc::new(place))),
                None => {
                    let sentence = format!("more than {} requests at once", crate::limit::AT_ONCE);
                    let problem = rate_limited(&sentence, caller);
                    self.app.metrics.refused(problem.code);
                    let route = match found {
                        Found::Route(route, _) => Some((route, None)),
                        _ => None,
                    };
                    return (problem.into_response(), route, Some((caller.clone(), *counted)));
                }
            },
            None => None,
        };
        let (route, sandbox) = match found {
            Found::Route(route, sandbox) => (route, sandbox.map(str::to_owned)),
            Found::OtherMethods(allowed) => {
                let mut problem = Problem::new(
                    StatusCode::METHOD_NOT_ALLOWED,
                    "method_not_allowed",
                    format!("method {} is not allowed here", shown(&method)),
                );
                problem.allow = Some(format!("{}, OPTIONS", allowed.join(", ")));
                return (problem.into_response(), None, caller);
            }
            Found::Nothing => {
                let problem = Problem::new(StatusCode::NOT_FOUND, "no_such_route", "no such route");
                return (problem.into_response(), None, caller);
            }
        };
        if let Some((who, _)) = &caller
            && let Err(problem) = self.may(who, request.headers(), &route, sandbox.as_deref())
        {
            self.app.metrics.refused(problem.code);
            return (problem.into_response(), Some((route, sandbox)), caller);
        }
        // What goes on knows neither the token nor, therefore, can leak it.
        auth::remove_tokens(request.headers_mut());
        if let Ok(uri) = path.parse::<Uri>() {
            *request.uri_mut() = uri;
        }
        request.extensions_mut().insert(Asked {
            caller: caller.as_ref().map(|(caller, _)| caller.clone()).unwrap_or_default(),
            query,
            request_id: request_id.to_owned(),
        });
        let service = TowerToHyperService::new(warp::service(self.routes.clone()));
        let mut response = match service.call(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        };
        if let Some(place) = place {
            response.extensions_mut().insert(place);
        }
        if let Some((caller, true)) = &caller
            && response.status() == StatusCode::NOT_FOUND
            && matches!(method, Method::GET | Method::DELETE)
        {
            self.app.limiter.missed(&caller.workspace, key(&method, path), Instant::now());
        }
        (response, Some((route, sandbox)), caller)
    }

    /// Token and rate limit. The second value: whether the request was counted.
    fn admit(
        &self,
        headers: &HeaderMap,
        access_token: Option<&str>,
        method: &Method,
        path: &str,
    ) -> Result<(Caller, bool), Problem> {
        let token = auth::token_of(headers, access_token)?;
        let caller = self
            .app
            .tenancy
            .authenticate(&token, now_ms())
            .ok_or_else(|| Problem::unauthorized("invalid api token"))?;
        let rate = self.app.tenancy.rate(&caller.workspace);
        match self.app.limiter.count(&caller.workspace, key(method, path), Instant::now(), rate) {
            Verdict::Counted => Ok((caller, true)),
            Verdict::Free => Ok((caller, false)),
            Verdict::Refused => {
                let sentence = format!("more than {} requests per second", rate.per_second);
                Err(rate_limited(&sentence, &caller))
            }
        }
    }
}

impl Gate {
    /// Whether the token is of the organisation that was asked for, and opens this route.
    fn may(
        &self,
        caller: &Caller,
        headers: &HeaderMap,
        route: &Route,
        sandbox: Option<&str>,
    ) -> Result<(), Problem> {
        if let Some(wanted) = headers.get("x-pandastack-org").filter(|value| !value.is_empty())
            && !wanted.to_str().is_ok_and(|wanted| self.app.tenancy.is_org(&caller.workspace, wanted))
        {
            return Err(Problem::new(StatusCode::FORBIDDEN, "not_a_member", "not a member of requested org"));
        }
        caller.grant.check(route, sandbox)
    }
}

fn rate_limited(sentence: &str, caller: &Caller) -> Problem {
    let sentence = format!("rate limit: {sentence}");
    let mut problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", sentence)
        .with("workspace", caller.workspace.as_str());
    problem.retry_after = Some(1);
    problem
}

fn key(method: &Method, path: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (method, path).hash(&mut hasher);
    hasher.finish()
}

/// Whether a question about options is meant for a program in a guest. What a browser asks ahead of another request is not:
/// it has no token with it.
fn for_guest<B>(request: &Request<B>) -> bool {
    let any = matches!(table::find("OPTIONS", request.uri().path()), Found::Route(route, _) if route.method == table::ANY);
    any && !request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// A method as it may stand in a log.
fn shown(method: &Method) -> String {
    method.as_str().chars().take(16).collect()
}

/// The caller's id for the request when it is short and harmless, else a fresh one.
fn request_id(headers: &HeaderMap) -> String {
    let given = headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok())
        .filter(|id| (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()));
    match given {
        Some(id) => id.to_owned(),
        None => {
            let mut bytes = [0u8; 8];
            getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
            auth::hex(&bytes)
        }
    }
}

fn dress(headers: &mut HeaderMap, request_id: &str) {
    for (name, value) in [
        ("access-control-allow-origin", "*"),
        ("access-control-allow-methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS"),
        (
            "access-control-allow-headers",
            "content-type, accept, authorization, idempotency-key, x-api-key, x-request-id, x-pandastack-org, mcp-protocol-version",
        ),
        ("access-control-expose-headers", "x-request-id, retry-after, x-pandastack-session"),
        ("access-control-max-age", "600"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if let Ok(value) = HeaderValue::from_str(request_id) {
        headers.insert("x-request-id", value);
    }
}
