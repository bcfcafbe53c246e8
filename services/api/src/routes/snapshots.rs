//! Snapshots: taken of a sandbox, listed, shown, deleted. What else storage keeps as captures nobody sees here.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use pandastack_bus::{
    Error as BusError, SandboxId,
    storage::{Purpose, SnapshotInfo},
};
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, time::Instant};
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, no_content, volumes::shown};
use crate::{
    app::App,
    bus::{PATIENCE, again, again_knowing, patiently},
    input::{Input, segment},
    problem::{Effect, Problem},
    wire::{Error, rfc3339},
};

/// How long one that nobody waits for any more is looked after, so that it does not stay.
const ABANDONED: Duration = Duration::from_secs(900);
const STEP: Duration = Duration::from_millis(200);

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let (all, one) = (warp::path!("v1" / "snapshots"), warp::path!("v1" / "snapshots" / String));
    let take = warp::path!("v1" / "sandboxes" / String / "snapshots")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(take(a, id, i)));
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|a, i| finish(list(a, i)));
    let get = one.and(warp::get()).and(with(app)).and(input()).then(|s, a, i| finish(get(a, s, i)));
    let delete = one.and(warp::delete()).and(with(app)).and(input()).then(|s, a, i| finish(delete(a, s, i)));
    take.or(list).unify().or(get).unify().or(delete).unify().boxed()
}

/// A snapshot: memory and disks of a sandbox at one point in time.
#[derive(Debug, Serialize, ToSchema)]
pub struct Snapshot {
    /// Its id.
    pub id: String,
    /// Sandbox that it was taken of; may be gone.
    pub sandbox_id: String,
    /// Template that the sandbox came from; may be gone.
    pub template: String,
    /// Virtual processors.
    pub cpu: u32,
    /// Guest memory in MiB.
    pub memory_mb: u64,
    /// Root disk in MiB.
    pub disk_mb: u64,
    /// Bytes that its files have; those shared with others count.
    pub size_bytes: u64,
    /// Names of the volumes that it contains clones of.
    pub volumes: Vec<String>,
    /// RFC 3339.
    pub created_at: String,
    /// Owner.
    pub workspace: String,
    /// Why no sandbox can be made from it here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
}

impl From<SnapshotInfo> for Snapshot {
    fn from(info: SnapshotInfo) -> Self {
        let spec = info.spec;
        Self {
            id: spec.id,
            sandbox_id: spec.sandbox,
            template: spec.template,
            cpu: spec.vcpus,
            memory_mb: spec.memory_mib,
            disk_mb: spec.disk_mib,
            size_bytes: info.size_bytes,
            volumes: spec.volumes.into_iter().map(|volume| volume.name).collect(),
            created_at: rfc3339(info.created_unix_ms),
            workspace: spec.workspace,
            unusable: (!info.unusable.is_empty()).then_some(info.unusable),
        }
    }
}

/// Only snapshots of this sandbox.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct OfSandbox {
    /// Sandbox id; it may be gone.
    #[param(required = false)]
    pub sandbox_id: Option<String>,
}

fn no_snapshot(id: &str) -> Problem {
    Problem::not_found(format!("snapshot {} not found", shown(id)))
}

fn is_theirs(info: &SnapshotInfo, workspace: &str) -> bool {
    info.spec.workspace == workspace && info.spec.purpose == Purpose::Snapshot
}

/// A snapshot of the workspace's; anything else is not there.
pub async fn own_snapshot(app: &App, workspace: &str, id: &str) -> Result<SnapshotInfo, Problem> {
    let Ok(snapshot) = id.parse::<SandboxId>() else { return Err(no_snapshot(id)) };
    match again(|| app.storage.snapshot(snapshot.to_string())).await {
        Ok(info) if is_theirs(&info, workspace) => Ok(info),
        Ok(_) | Err(BusError::NotFound(_) | BusError::InvalidArgument(_)) => Err(no_snapshot(id)),
        Err(error) => Err(Problem::from_bus(&error, Effect::None)),
    }
}

/// Asks vmm until the snapshot is there: the same id again waits for the same snapshot.
async fn taken(app: &App, id: &str, snapshot: &SandboxId) -> Result<SnapshotInfo, BusError> {
    let end = Instant::now() + ABANDONED;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match patiently(left, || app.vmm.snapshot(id.to_owned(), snapshot.to_string())).await {
            Err(BusError::Timeout(_)) if Instant::now() < end => tokio::time::sleep(STEP).await,
            other => return other,
        }
    }
}

/// Captures memory and disks at one point in time; the sandbox runs on. May take minutes.
#[utoipa::path(operation_id = "take_snapshot", post, path = "/v1/sandboxes/{id}/snapshots", tag = "snapshots",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 201, body = Snapshot), (status = 404, body = Error), (status = 409, body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn take(app: Arc<App>, id: String, mut input: Input) -> Answer {
    input.nothing().await?;
    app.own(&input.caller, &id).await?;
    let activity = app.touch.in_use(&id);
    let snapshot = SandboxId::random();
    // In a task of its own: it runs to its end when the client hangs up.
    let (done, made) = oneshot::channel();
    let (maker, sandbox) = (Arc::clone(&app), id.clone());
    tokio::spawn(async move {
        let _activity = activity;
        let outcome = taken(&maker, &sandbox, &snapshot).await;
        if done.send(outcome).is_err() {
            tracing::info!(sandbox, %snapshot, "nobody waits for the snapshot any more; deleting");
            if let Err(error) = again(|| maker.storage.delete_snapshot(snapshot.to_string())).await {
                tracing::warn!(sandbox, %snapshot, %error, "the abandoned snapshot was not deleted");
            }
        }
    });
    let Ok(outcome) = tokio::time::timeout(PATIENCE, made).await else {
        return Err(Problem::gave_up("gave_up", "the snapshot took too long; nothing of it is kept"));
    };
    let info = outcome.map_err(|_| Problem::internal())?.map_err(|error| match error {
        BusError::NotFound(_) => {
            app.forget(&id);
            Problem::no_sandbox(&id)
        }
        other => Problem::about(&id, &other, Effect::Perhaps),
    })?;
    Ok(json(StatusCode::CREATED, &Snapshot::from(info)))
}

/// The snapshots of the workspace, newest first.
#[utoipa::path(operation_id = "list_snapshots", get, path = "/v1/snapshots", tag = "snapshots", params(OfSandbox),
    responses((status = 200, body = Vec<Snapshot>)))]
pub async fn list(app: Arc<App>, input: Input) -> Answer {
    let of = input.pairs()?.into_iter().find(|(key, value)| key == "sandbox_id" && !value.is_empty());
    let of = of.map(|(_, value)| value);
    if of.as_deref().is_some_and(|of| of.parse::<SandboxId>().is_err()) {
        return Err(Problem::invalid("query parameter `sandbox_id` is not a sandbox id"));
    }
    let workspace = input.caller.workspace;
    let found = again(|| app.storage.snapshots(workspace.clone()))
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let found: Vec<Snapshot> = found
        .into_iter()
        .filter(|info| is_theirs(info, &workspace))
        .filter(|info| of.as_deref().is_none_or(|of| info.spec.sandbox == of))
        .map(Snapshot::from)
        .collect();
    Ok(json(StatusCode::OK, &found))
}

/// One snapshot.
#[utoipa::path(operation_id = "get_snapshot", get, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "snapshot id")),
    responses((status = 200, body = Snapshot), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, snapshot: String, input: Input) -> Answer {
    let info = own_snapshot(&app, &input.caller.workspace, &segment(&snapshot)).await?;
    Ok(json(StatusCode::OK, &Snapshot::from(info)))
}

/// Deletes a snapshot. Sandboxes made from it are not concerned.
#[utoipa::path(operation_id = "delete_snapshot", delete, path = "/v1/snapshots/{snapshot}", tag = "snapshots",
    params(("snapshot" = String, Path, description = "snapshot id")),
    responses((status = 204), (status = 404, body = Error)))]
pub async fn delete(app: Arc<App>, snapshot: String, input: Input) -> Answer {
    let id = own_snapshot(&app, &input.caller.workspace, &segment(&snapshot)).await?.spec.id;
    match again_knowing(|| app.storage.delete_snapshot(id.clone())).await {
        Ok((gone, perhaps)) if gone || perhaps => Ok(no_content()),
        Ok(_) | Err(BusError::NotFound(_)) => Err(no_snapshot(&id)),
        Err(error) => Err(Problem::from_bus(&error, Effect::Perhaps)),
    }
}
