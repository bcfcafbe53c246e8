//! How long a sandbox lives.

use std::sync::Arc;

use http::StatusCode;
use pandastack_bus::vmm::SandboxInfo;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    bus::again,
    input::{Input, JSON_LIMIT, whole},
    problem::{Effect, Problem},
    wire::Error,
};

/// Idle limit of who does not ask for one, seconds.
pub const DEFAULT_TTL: u64 = 3600;
/// Longest idle limit, seconds.
pub const MAX_TTL: u64 = 30 * 86_400;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let path = warp::path!("v1" / "sandboxes" / String / "lifecycle");
    let get = path.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(get(a, id, i)));
    let patch = path.and(warp::patch()).and(with(app)).and(input()).then(|id, a, i| finish(patch(a, id, i)));
    get.or(patch).unify().boxed()
}

/// Lifecycle of a sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub struct Lifecycle {
    /// Seconds without a request after which it is deleted.
    pub ttl_seconds: u64,
    /// Exempt from that.
    pub persistent: bool,
    /// Seconds since the last request.
    pub idle_seconds: u64,
}

/// What to change; absent fields stay.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct PatchLifecycle {
    /// Idle limit in seconds, at most 30 days; 0 means the default of an hour.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2592000)]
    pub ttl_seconds: Option<u64>,
    /// Exempt from the idle limit.
    pub persistent: Option<bool>,
}

impl From<SandboxInfo> for Lifecycle {
    fn from(info: SandboxInfo) -> Self {
        Self { ttl_seconds: info.ttl_seconds, persistent: info.persistent, idle_seconds: info.idle_seconds }
    }
}

/// The idle limit that is meant; 0 and nothing mean the default.
pub fn ttl(wished: Option<u64>) -> Result<u64, Problem> {
    match wished {
        None | Some(0) => Ok(DEFAULT_TTL),
        Some(seconds) if seconds <= MAX_TTL => Ok(seconds),
        Some(_) => Err(Problem::invalid(format!("ttl_seconds exceeds tier maximum of {MAX_TTL} seconds"))
            .with("field", "ttl_seconds")),
    }
}

/// Idle limit and idle time of a sandbox.
#[utoipa::path(operation_id = "get_lifecycle", get, path = "/v1/sandboxes/{id}/lifecycle", tag = "sandboxes",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Lifecycle), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, id: String, input: Input) -> Answer {
    let info = app.get_own(&input.caller, &id).await?;
    app.touch.used(&info.id);
    Ok(json(StatusCode::OK, &Lifecycle::from(info)))
}

/// Changes the idle limit or the exemption from it.
#[utoipa::path(operation_id = "set_lifecycle", patch, path = "/v1/sandboxes/{id}/lifecycle", tag = "sandboxes",
    params(("id" = String, Path, description = "sandbox id")), request_body = PatchLifecycle,
    responses((status = 200, body = Lifecycle), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn patch(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let wish: PatchLifecycle = input.json(JSON_LIMIT).await?;
    let seconds = wish.ttl_seconds.map(|seconds| ttl(Some(seconds))).transpose()?;
    let mut info = app.get_own(&input.caller, &id).await?;
    app.touch.used(&info.id);
    let problem = |error| Problem::about(&id, &error, Effect::Perhaps);
    if let Some(seconds) = seconds {
        info = again(|| app.vmm.set_ttl(id.clone(), seconds)).await.map_err(problem)?;
    }
    if let Some(persistent) = wish.persistent {
        info = again(|| app.vmm.set_persistent(id.clone(), persistent)).await.map_err(problem)?;
    }
    Ok(json(StatusCode::OK, &Lifecycle::from(info)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_the_default_and_there_is_a_maximum() {
        assert_eq!(ttl(None).unwrap(), 3600);
        assert_eq!(ttl(Some(0)).unwrap(), 3600);
        assert_eq!(ttl(Some(MAX_TTL)).unwrap(), MAX_TTL);
        let problem = ttl(Some(MAX_TTL + 1)).unwrap_err();
        assert!(problem.message.contains("ttl_seconds exceeds tier maximum"));
    }
}
