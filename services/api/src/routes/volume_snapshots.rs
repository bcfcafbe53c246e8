//! Snapshots of volumes: taken, listed, deleted. A volume is made of one by `POST /v1/volumes`.
//!
//! A snapshot is found below the name that its volume had, also when that volume is gone: it does not need it.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use pandastack_bus::{
    Error as BusError, SandboxId,
    storage::{VolumeSnapshotInfo, VolumeSnapshotSpec},
};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, finish, input, json, no_content,
    templates::is_name,
    volumes::{no_volume, own_volume, refuse, shown},
};
use crate::{
    app::App,
    bus::{PATIENCE, again, again_knowing, patiently},
    input::{Input, JSON_LIMIT, segment, text},
    problem::{Effect, Problem},
    wire::{Error, rfc3339},
};

/// Longest label, bytes.
const LABEL_LIMIT: usize = 256;
/// How long one that nobody waits for any more is looked after, so that it does not stay.
const ABANDONED: Duration = Duration::from_secs(600);

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let of_one = warp::path!("v1" / "volumes" / String / "snapshots");
    let take = of_one.and(warp::post()).and(with(app)).and(input()).then(|n, a, i| finish(take(a, n, i)));
    let list = of_one.and(warp::get()).and(with(app)).and(input()).then(|n, a, i| finish(list(a, n, i)));
    let all = warp::path!("v1" / "volume-snapshots")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(list_all(a, i)));
    let delete = warp::path!("v1" / "volumes" / String / "snapshots" / String)
        .and(warp::delete())
        .and(with(app))
        .and(input())
        .then(|n, s, a, i| finish(delete(a, n, s, i)));
    take.or(list).unify().or(all).unify().or(delete).unify().boxed()
}

/// A snapshot of a volume. It stays when the volume is deleted.
#[derive(Debug, Serialize, ToSchema)]
pub struct VolumeSnapshot {
    /// Its id.
    pub id: String,
    /// Name that the volume had; it may be gone, or another one may have it now.
    pub volume: String,
    /// What its maker said.
    pub label: String,
    /// Size of the volume then, MiB.
    pub size_mb: u64,
    /// The same in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host; those shared with others count.
    pub used_bytes: u64,
    /// The guest that could write to the volume wrote out first what it held back. Otherwise the snapshot is what a power cut
    /// would leave.
    pub synced: bool,
    /// RFC 3339.
    pub created_at: String,
}

impl From<VolumeSnapshotInfo> for VolumeSnapshot {
    fn from(info: VolumeSnapshotInfo) -> Self {
        let VolumeSnapshotSpec { id, volume, label, synced, .. } = info.spec;
        Self {
            id,
            volume,
            label,
            size_mb: info.size_mib,
            size_bytes: info.size_mib.saturating_mul(1 << 20),
            used_bytes: info.used_bytes,
            synced,
            created_at: rfc3339(info.created_unix_ms),
        }
    }
}

/// What a snapshot of a volume shall be.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct TakeVolumeSnapshot {
    /// What its owner wants to know of it.
    #[schema(max_length = 256)]
    pub label: Option<String>,
}

fn no_snapshot(id: &str) -> Problem {
    Problem::not_found(format!("volume snapshot {} not found", shown(id)))
}

async fn of_workspace(app: &App, workspace: &str) -> Result<Vec<VolumeSnapshotInfo>, Problem> {
    let mut found = again(|| app.storage.volume_snapshots(workspace.to_owned()))
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    found.retain(|info| info.spec.workspace == workspace);
    Ok(found)
}

/// A snapshot of a volume of the workspace's; anything else is not there.
pub async fn own_volume_snapshot(
    app: &App,
    workspace: &str,
    id: &str,
) -> Result<VolumeSnapshotInfo, Problem> {
    let found = of_workspace(app, workspace).await?;
    found.into_iter().find(|info| info.spec.id == id).ok_or_else(|| no_snapshot(id))
}

/// Takes a snapshot of a volume as it is now, whoever has it.
///
/// A sandbox that may write to it runs on, and its guest writes out first what it holds back. The snapshot shares its blocks with
/// the volume, counts as a volume of that size, and stays when the volume is deleted.
#[utoipa::path(operation_id = "take_volume_snapshot", post, path = "/v1/volumes/{name}/snapshots", tag = "volumes",
    params(("name" = String, Path, description = "name of the volume")), request_body = TakeVolumeSnapshot,
    responses((status = 201, body = VolumeSnapshot), (status = 404, body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn take(app: Arc<App>, name: String, mut input: Input) -> Answer {
    let wish: TakeVolumeSnapshot = input.json(JSON_LIMIT).await?;
    let label = wish.label.unwrap_or_default();
    text("label", &label, LABEL_LIMIT)?;
    let workspace = input.caller.workspace;
    let name = own_volume(&app, &workspace, &segment(&name)).await?.name;
    let id = SandboxId::random().to_string();
    let spec = VolumeSnapshotSpec {
        id: id.clone(),
        workspace: workspace.clone(),
        volume: name.clone(),
        label,
        synced: false,
    };
    // In a task of its own: it runs to its end when the client hangs up.
    let (done, made) = oneshot::channel();
    let (maker, owner) = (Arc::clone(&app), workspace.clone());
    tokio::spawn(async move {
        // The same id again waits for the same snapshot.
        let outcome = patiently(ABANDONED, || maker.vmm.snapshot_volume(spec.clone())).await;
        if done.send(outcome).is_err() {
            tracing::info!(volume_snapshot = id, "nobody waits for it any more; deleting");
            if let Err(error) =
                again(|| maker.storage.delete_volume_snapshot(owner.clone(), id.clone())).await
            {
                tracing::warn!(volume_snapshot = id, %error, "abandoned, but not deleted");
            }
        }
    });
    let Ok(outcome) = tokio::time::timeout(PATIENCE, made).await else {
        return Err(Problem::gave_up("gave_up", "the snapshot took too long; nothing of it is kept"));
    };
    match outcome.map_err(|_| Problem::internal())? {
        Ok(info) => Ok(json(StatusCode::CREATED, &VolumeSnapshot::from(info))),
        Err(error) => Err(refuse(&app, &workspace, &name, error).await),
    }
}

/// The snapshots of the volumes that have, or had, this name, newest first.
#[utoipa::path(operation_id = "list_volume_snapshots", get, path = "/v1/volumes/{name}/snapshots", tag = "volumes",
    params(("name" = String, Path, description = "name of the volume, which may be gone")),
    responses((status = 200, body = Vec<VolumeSnapshot>), (status = 404, description = "no such volume, and none of its snapshots", body = Error)))]
pub async fn list(app: Arc<App>, name: String, input: Input) -> Answer {
    let (name, workspace) = (segment(&name), input.caller.workspace);
    if !is_name(&name) {
        return Err(no_volume(&name));
    }
    let mut found = of_workspace(&app, &workspace).await?;
    found.retain(|info| info.spec.volume == name);
    if found.is_empty() {
        own_volume(&app, &workspace, &name).await?;
    }
    let found: Vec<VolumeSnapshot> = found.into_iter().map(VolumeSnapshot::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// The snapshots of all volumes of the workspace, newest first.
#[utoipa::path(operation_id = "list_all_volume_snapshots", get, path = "/v1/volume-snapshots", tag = "volumes",
    responses((status = 200, body = Vec<VolumeSnapshot>)))]
pub async fn list_all(app: Arc<App>, input: Input) -> Answer {
    let found = of_workspace(&app, &input.caller.workspace).await?;
    let found: Vec<VolumeSnapshot> = found.into_iter().map(VolumeSnapshot::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// Deletes a snapshot of a volume. Volumes made of it are not concerned.
#[utoipa::path(operation_id = "delete_volume_snapshot", delete, path = "/v1/volumes/{name}/snapshots/{snapshot}", tag = "volumes",
    params(("name" = String, Path, description = "name that the volume had"), ("snapshot" = String, Path, description = "snapshot id")),
    responses((status = 204), (status = 404, body = Error)))]
pub async fn delete(app: Arc<App>, name: String, snapshot: String, input: Input) -> Answer {
    let (name, snapshot, workspace) = (segment(&name), segment(&snapshot), input.caller.workspace);
    let found = own_volume_snapshot(&app, &workspace, &snapshot).await?;
    if found.spec.volume != name {
        return Err(no_snapshot(&snapshot));
    }
    match again_knowing(|| app.storage.delete_volume_snapshot(workspace.clone(), snapshot.clone())).await {
        Ok((gone, perhaps)) if gone || perhaps => Ok(no_content()),
        Ok(_) | Err(BusError::NotFound(_)) => Err(no_snapshot(&snapshot)),
        Err(error) => Err(Problem::from_bus(&error, Effect::Perhaps)),
    }
}
