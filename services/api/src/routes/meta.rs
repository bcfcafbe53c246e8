//! About the server itself; no token needed.

use std::{
    sync::{Arc, LazyLock},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use pandastack_bus::{storage::Usage, vmm::Capacity};
use serde::Serialize;
use utoipa::ToSchema;
use warp::{Filter, Reply, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, json};
use crate::app::App;

const PATIENCE: Duration = Duration::from_secs(2);

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let health = warp::path!("healthz").and(warp::get()).and(with(app)).then(|app| finish(healthz(app)));
    let path = warp::path!("version").or(warp::path!("v1" / "version")).unify();
    let version = path.and(warp::get()).then(|| finish(version()));
    let counters = warp::path!("metrics").and(warp::get()).and(with(app)).then(|app| finish(metrics(app)));
    let document = warp::path!("openapi.json").and(warp::get()).then(|| finish(document()));
    health.or(version).unify().or(counters).unify().or(document).unify().boxed()
}

/// Whether the appliance works.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`, or `degraded` when something below is not.
    pub status: String,
    /// Each daemon with `ok` or `unreachable`.
    pub checks: std::collections::BTreeMap<String, String>,
}

/// Version of this server; all fields are strings.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    /// Name of the program.
    pub service: String,
    /// Its version.
    pub semver: String,
    /// Source revision, `unknown` when it was not told at build time.
    pub commit: String,
    /// Time of the build, `unknown` when it was not told at build time.
    pub build_time: String,
    /// Kept for a client that prints it: this server has nothing to do with Go.
    pub go: String,
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub arch: String,
}

/// An answer of a daemon, unless it takes too long.
async fn in_time<T>(answer: impl Future<Output = pandastack_bus::Result<T>>) -> Option<T> {
    tokio::time::timeout(PATIENCE, answer).await.ok().and_then(Result::ok)
}

async fn capacity(app: &App) -> Option<Capacity> {
    app.public.capacity.get(in_time(app.vmm.capacity())).await
}

async fn space(app: &App) -> Option<Usage> {
    app.public.storage.get(in_time(app.storage.usage())).await
}

/// Health of the server and of the daemons behind it.
#[utoipa::path(get, path = "/healthz", tag = "service", security(()),
    responses((status = 200, body = Health), (status = 503, description = "vmm does not answer", body = Health)))]
pub async fn healthz(app: Arc<App>) -> Answer {
    let (vmm, storage) = tokio::join!(capacity(&app), space(&app),);
    let word = |ok: bool| if ok { "ok" } else { "unreachable" }.to_owned();
    let (vmm, storage) = (vmm.is_some(), storage.is_some());
    let health = Health {
        status: if vmm && storage { "ok" } else { "degraded" }.to_owned(),
        checks: [("vmm".to_owned(), word(vmm)), ("storage".to_owned(), word(storage))].into(),
    };
    let status = if vmm { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok(json(status, &health))
}

/// Version of the server.
#[utoipa::path(get, path = "/version", tag = "service", security(()), responses((status = 200, body = Version)))]
pub async fn version() -> Answer {
    let told = |value: Option<&str>| value.unwrap_or("unknown").to_owned();
    let version = Version {
        service: "pandastack-api".into(),
        semver: env!("CARGO_PKG_VERSION").into(),
        commit: told(option_env!("PANDASTACK_COMMIT")),
        build_time: told(option_env!("PANDASTACK_BUILD_TIME")),
        go: "none".into(),
        os: std::env::consts::OS.into(),
        arch: std::env::consts::ARCH.into(),
    };
    Ok(json(StatusCode::OK, &version))
}

/// The same at the path where the command line looks for it.
#[utoipa::path(get, path = "/v1/version", tag = "service", security(()), responses((status = 200, body = Version)))]
pub async fn version_v1() -> Answer {
    version().await
}

/// Counters as Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "service", security(()),
    responses((status = 200, content_type = "text/plain", body = String)))]
pub async fn metrics(app: Arc<App>) -> Answer {
    let (capacity, space, states) = tokio::join!(
        capacity(&app),
        space(&app),
        app.public.states.get(async {
            in_time(app.vmm.list(String::new())).await.map(|all| crate::metrics::states(&all))
        }),
    );
    let mut response = app.metrics.render(capacity.as_ref(), states.as_ref(), space.as_ref()).into_response();
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "service", security(()),
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value)))]
pub async fn document() -> Answer {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| {
        serde_json::to_vec(&crate::openapi::document())
            .map_or_else(|_| Bytes::from_static(b"{}"), Bytes::from)
    });
    let mut response = Response::new(TEXT.clone().into());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}
