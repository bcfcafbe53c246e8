//! What was changed in a workspace, and by which request.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    audit::Entry,
    input::{Input, count, moment},
    tenancy::now_ms,
    wire::rfc3339,
};

const DEFAULT_LIMIT: usize = 200;
const MOST: usize = 1000;
const DEFAULT_SPAN: Duration = Duration::from_secs(24 * 3600);

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    let with = warp::any().map(move || Arc::clone(&app));
    warp::path!("v1" / "audit")
        .and(warp::get())
        .and(with)
        .and(input())
        .then(|a, i| finish(read(a, i)))
        .boxed()
}

/// A request that was to change something.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditEntry {
    /// RFC 3339.
    pub ts: String,
    /// Whose it was.
    pub workspace: String,
    /// Its id.
    pub request_id: String,
    /// `POST`, `PUT`, `PATCH` or `DELETE`.
    pub method: String,
    /// Path without a query; of a token only its public name.
    pub path: String,
    /// Status of the answer.
    pub status: u16,
}

/// Such requests, the newest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditLog {
    /// These.
    pub entries: Vec<AuditEntry>,
    /// RFC 3339: nothing older was looked for.
    pub since: String,
}

/// From when on, and how many.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct AuditQuery {
    /// RFC 3339 or Unix seconds; a day ago when absent.
    #[param(required = false)]
    pub since: Option<String>,
    /// The newest so many; 200 when absent.
    #[param(required = false, minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
}

/// The requests of the workspace that were not reads. Kept are the last 8 MiB of them; bodies, queries and tokens never are.
#[utoipa::path(operation_id = "audit", get, path = "/v1/audit", tag = "observe", params(AuditQuery),
    responses((status = 200, body = AuditLog)))]
pub async fn read(app: Arc<App>, input: Input) -> Answer {
    let mut since = now_ms().saturating_sub(DEFAULT_SPAN.as_millis() as u64);
    let mut limit = DEFAULT_LIMIT;
    for (key, value) in input.pairs()? {
        match key.as_str() {
            "since" => since = moment(&key, &value)?,
            "limit" => limit = count(&key, &value, 1..=MOST)?,
            _ => {}
        }
    }
    let workspace = &input.caller.workspace;
    let entry = |Entry { ts, request_id, method, path, status }: Entry| AuditEntry {
        ts: rfc3339(ts),
        workspace: workspace.clone(),
        request_id,
        method,
        path,
        status,
    };
    let entries = app.audit.read(workspace, since, limit).await.into_iter().map(entry).collect();
    Ok(json(StatusCode::OK, &AuditLog { entries, since: rfc3339(since) }))
}
