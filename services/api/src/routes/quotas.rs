//! What the workspace may have and ask, and has.

use std::sync::Arc;

use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    input::Input,
    limit::AT_ONCE,
    operator,
    problem::{Effect, Problem},
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    warp::path!("v1" / "quotas")
        .and(warp::get())
        .and(warp::any().map(move || Arc::clone(&app)))
        .and(input())
        .then(|a, i| finish(get(a, i)))
        .boxed()
}

/// What a workspace may have and ask.
#[derive(Debug, Serialize, ToSchema)]
pub struct Quotas {
    /// Which workspace.
    pub workspace: String,
    /// What it may have, and has.
    pub quotas: Vec<Quota>,
    /// What it may ask.
    pub rates: Rates,
}

/// One of them.
#[derive(Debug, Serialize, ToSchema)]
pub struct Quota {
    /// `sandboxes`, and their `vcpus`, `memory_mib` and `disk_mib` together, whatever their state; `snapshots`; `volumes` and
    /// their `volume_mib` together.
    pub resource: String,
    /// At most so much; null: no limit.
    pub limit: Option<u64>,
    /// So much is there.
    pub used: u64,
}

/// How much a workspace may ask.
#[derive(Debug, Serialize, ToSchema)]
pub struct Rates {
    /// Requests per second.
    pub requests_per_second: u32,
    /// Requests that it may have saved up.
    pub burst: u32,
    /// Requests under way at one time.
    pub at_once: usize,
    /// Calls of tools (MCP) in a minute.
    pub tool_calls_per_minute: u32,
}

/// What the workspace may have and ask, and has.
#[utoipa::path(operation_id = "get_quotas", get, path = "/v1/quotas", tag = "me", responses((status = 200, body = Quotas)))]
pub async fn get(app: Arc<App>, input: Input) -> Answer {
    let workspace = input.caller.workspace;
    let lines = operator::quotas(&app.vmm, &app.storage, &workspace)
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let quotas = lines.into_iter().map(|line| Quota {
        resource: line.resource.as_str().into(),
        limit: line.limit(),
        used: line.used,
    });
    let rate = app.tenancy.rate(&workspace);
    let rates = Rates {
        requests_per_second: rate.per_second,
        burst: rate.burst,
        at_once: AT_ONCE,
        tool_calls_per_minute: rate.tool_calls,
    };
    Ok(json(StatusCode::OK, &Quotas { workspace, quotas: quotas.collect(), rates }))
}
