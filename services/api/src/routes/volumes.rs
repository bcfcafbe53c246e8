//! Volumes: made, listed, shown, grown, deleted. Attached they are by a create.

use std::sync::Arc;

use http::StatusCode;
use pandastack_bus::{Error as BusError, storage::VolumeInfo};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, finish, input, json, no_content, templates::is_name, volume_snapshots::own_volume_snapshot,
};
use crate::{
    app::App,
    bus::{again, again_knowing},
    input::{Input, JSON_LIMIT, segment, whole},
    problem::{Effect, Problem},
    tenancy::now_ms,
    wire::{Error, rfc3339},
};

const DEFAULT_MIB: u64 = 256;
const MAX_MIB: u64 = 65_536;
/// How a name is made.
pub const NAME_RULE: &str =
    "a volume's name has 1 to 64 characters of A-Z, a-z, 0-9, `.`, `_` and `-`, and is neither `.` nor `..`";

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let (all, one) = (warp::path!("v1" / "volumes"), warp::path!("v1" / "volumes" / String));
    let create = all.and(warp::post()).and(with(app)).and(input()).then(|a, i| finish(create(a, i)));
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|a, i| finish(list(a, i)));
    let get = one.and(warp::get()).and(with(app)).and(input()).then(|n, a, i| finish(get(a, n, i)));
    let grow = one.and(warp::patch()).and(with(app)).and(input()).then(|n, a, i| finish(grow(a, n, i)));
    let delete = one.and(warp::delete()).and(with(app)).and(input()).then(|n, a, i| finish(delete(a, n, i)));
    create.or(list).unify().or(get).unify().or(grow).unify().or(delete).unify().boxed()
}

/// A volume.
#[derive(Debug, Serialize, ToSchema)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Size in MiB.
    pub size_mb: u64,
    /// The same in bytes.
    pub size_bytes: u64,
    /// Bytes it takes on the host.
    pub used_bytes: u64,
    /// Sandboxes that have it; one at most if it is writable there.
    pub attached_to: Vec<String>,
    /// RFC 3339.
    pub created_at: String,
}

impl From<VolumeInfo> for Volume {
    fn from(info: VolumeInfo) -> Self {
        Self {
            name: info.name,
            size_mb: info.size_mib,
            size_bytes: info.size_mib.saturating_mul(1 << 20),
            used_bytes: info.used_bytes,
            attached_to: info.holders,
            created_at: rfc3339(info.created_unix_ms),
        }
    }
}

/// What a new volume shall be.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct CreateVolume {
    /// Its name within the workspace; not `.` or `..`.
    #[schema(
        required = true,
        nullable = false,
        min_length = 1,
        max_length = 64,
        pattern = "^[A-Za-z0-9._-]+$"
    )]
    pub name: Option<String>,
    /// Size in MiB; 256 when absent, or that of the snapshot.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1, maximum = 65536)]
    pub size_mb: Option<u64>,
    /// Snapshot of a volume that it shall be a copy of. It is as large as that unless `size_mb` says more.
    pub from_snapshot: Option<String>,
}

/// How large a volume shall become.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct GrowVolume {
    /// Size in MiB, at least what it has.
    #[serde(default, deserialize_with = "whole")]
    #[schema(required = true, nullable = false, minimum = 1, maximum = 65536)]
    pub size_mb: Option<u64>,
}

/// A name as it may stand in a sentence.
pub fn shown(name: &str) -> String {
    format!("{:?}", name.chars().take(64).collect::<String>())
}

/// 404.
pub fn no_volume(name: &str) -> Problem {
    Problem::not_found(format!("volume {} not found", shown(name)))
}

fn sized(wished: u64) -> Result<u64, Problem> {
    if (1..=MAX_MIB).contains(&wished) {
        return Ok(wished);
    }
    Err(Problem::invalid(format!("field `size_mb` must be 1 to {MAX_MIB}")).with("field", "size_mb"))
}

/// A volume of the workspace's.
pub async fn own_volume(app: &App, workspace: &str, name: &str) -> Result<VolumeInfo, Problem> {
    if !is_name(name) {
        return Err(no_volume(name));
    }
    match again(|| app.storage.volume(workspace.to_owned(), name.to_owned())).await {
        Ok(info) if info.workspace == workspace => Ok(info),
        Ok(_) | Err(BusError::NotFound(_)) => Err(no_volume(name)),
        Err(error) => Err(Problem::from_bus(&error, Effect::None)),
    }
}

/// What storage refused, in the contract's form where there is no room.
pub async fn refuse(app: &App, workspace: &str, name: &str, error: BusError) -> Problem {
    let reason = match error {
        BusError::NoSpace(reason) => reason,
        BusError::NotFound(_) => return no_volume(name),
        BusError::Exists(_) => return Problem::conflict("volume already exists"),
        other => return Problem::from_bus(&other, Effect::Perhaps),
    };
    let problem =
        Problem::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", "insufficient host storage headroom");
    let problem =
        problem.with("reason", reason).with("hint", "delete volumes or snapshots, or ask for a smaller one");
    let (volumes, usage) = tokio::join!(app.storage.volumes(workspace.to_owned()), app.storage.usage());
    let (Ok(volumes), Ok(usage)) = (volumes, usage) else { return problem };
    let provisioned: u64 = volumes.iter().map(|volume| volume.size_mib.saturating_mul(1 << 20)).sum();
    problem
        .with("provisioned_bytes", provisioned)
        .with("fs_size_bytes", usage.total_bytes)
        .with("fs_free_bytes", usage.free_bytes)
        .with("free_reserve_bytes", usage.reserve_bytes)
        .with("oversub_factor", provisioned as f64 / usage.total_bytes.max(1) as f64)
}

/// How large a volume shall be that is made of a snapshot.
async fn size_of_copy(
    app: &App,
    workspace: &str,
    snapshot: &str,
    wished: Option<u64>,
) -> Result<u64, Problem> {
    let least = own_volume_snapshot(app, workspace, snapshot).await?.size_mib;
    match wished.map(sized).transpose()? {
        Some(size) if size < least => {
            let sentence =
                format!("field `size_mb`: the snapshot has {least}, and a volume of it is never smaller");
            Err(Problem::invalid(sentence).with("field", "size_mb"))
        }
        size => Ok(size.unwrap_or(least)),
    }
}

/// Makes a volume with an empty file system, or of a snapshot of a volume.
#[utoipa::path(operation_id = "create_volume", post, path = "/v1/volumes", tag = "volumes", request_body = CreateVolume,
    responses((status = 201, body = Volume), (status = 404, description = "no such snapshot", body = Error), (status = 409, description = "the name is taken", body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn create(app: Arc<App>, mut input: Input) -> Answer {
    let wish: CreateVolume = input.json(JSON_LIMIT).await?;
    let workspace = input.caller.workspace;
    let name = wish.name.unwrap_or_default();
    if !is_name(&name) {
        return Err(Problem::invalid(format!("field `name`: {NAME_RULE}")).with("field", "name"));
    }
    let size = match &wish.from_snapshot {
        Some(snapshot) => size_of_copy(&app, &workspace, snapshot, wish.size_mb).await?,
        None => sized(wish.size_mb.unwrap_or(DEFAULT_MIB))?,
    };
    let (mut calls, start) = (0, now_ms());
    let made = again(|| {
        calls += 1;
        let (workspace, name) = (workspace.clone(), name.clone());
        let (storage, snapshot) = (&app.storage, wish.from_snapshot.clone());
        async move {
            match snapshot {
                Some(snapshot) => storage.restore_volume(workspace, snapshot, name, size).await,
                None => storage.create_volume(workspace, name, size).await,
            }
        }
    });
    let info = match made.await {
        Ok(info) => info,
        // What is there was made by the attempt before, whose answer was lost.
        Err(BusError::Exists(_)) if calls > 1 => match own_volume(&app, &workspace, &name).await? {
            info if info.created_unix_ms >= start && info.size_mib == size => info,
            _ => return Err(Problem::conflict("volume already exists")),
        },
        // Deleted meanwhile.
        Err(BusError::NotFound(sentence)) => return Err(Problem::not_found(sentence)),
        Err(error) => return Err(refuse(&app, &workspace, &name, error).await),
    };
    Ok(json(StatusCode::CREATED, &Volume::from(info)))
}

/// The volumes of the workspace, by name.
#[utoipa::path(operation_id = "list_volumes", get, path = "/v1/volumes", tag = "volumes",
    responses((status = 200, body = Vec<Volume>)))]
pub async fn list(app: Arc<App>, input: Input) -> Answer {
    let workspace = input.caller.workspace;
    let found = again(|| app.storage.volumes(workspace.clone()))
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let found: Vec<Volume> =
        found.into_iter().filter(|info| info.workspace == workspace).map(Volume::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// One volume.
#[utoipa::path(operation_id = "get_volume", get, path = "/v1/volumes/{name}", tag = "volumes",
    params(("name" = String, Path, description = "its name")),
    responses((status = 200, body = Volume), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, name: String, input: Input) -> Answer {
    let info = own_volume(&app, &input.caller.workspace, &segment(&name)).await?;
    Ok(json(StatusCode::OK, &Volume::from(info)))
}

/// Makes a volume larger, while no sandbox has it.
#[utoipa::path(operation_id = "grow_volume", patch, path = "/v1/volumes/{name}", tag = "volumes",
    params(("name" = String, Path, description = "its name")), request_body = GrowVolume,
    responses((status = 200, body = Volume), (status = 404, body = Error), (status = 409, description = "it is attached", body = Error),
        (status = 507, description = "not enough storage; it stays as it is", body = Error)))]
pub async fn grow(app: Arc<App>, name: String, mut input: Input) -> Answer {
    let wish: GrowVolume = input.json(JSON_LIMIT).await?;
    let Some(size) = wish.size_mb else {
        return Err(Problem::invalid("field `size_mb` is required").with("field", "size_mb"));
    };
    let (size, workspace) = (sized(size)?, input.caller.workspace);
    let name = own_volume(&app, &workspace, &segment(&name)).await?.name;
    match again(|| app.storage.grow_volume(workspace.clone(), name.clone(), size)).await {
        Ok(info) => Ok(json(StatusCode::OK, &Volume::from(info))),
        Err(error) => Err(refuse(&app, &workspace, &name, error).await),
    }
}

/// Deletes a volume with what is on it.
#[utoipa::path(operation_id = "delete_volume", delete, path = "/v1/volumes/{name}", tag = "volumes",
    params(("name" = String, Path, description = "its name")),
    responses((status = 204), (status = 404, body = Error), (status = 409, description = "it is attached", body = Error)))]
pub async fn delete(app: Arc<App>, name: String, input: Input) -> Answer {
    let (name, workspace) = (segment(&name), input.caller.workspace);
    if !is_name(&name) {
        return Err(no_volume(&name));
    }
    match again_knowing(|| app.storage.delete_volume(workspace.clone(), name.clone())).await {
        Ok((gone, perhaps)) if gone || perhaps => Ok(no_content()),
        Ok(_) | Err(BusError::NotFound(_)) => Err(no_volume(&name)),
        Err(error) => Err(Problem::from_bus(&error, Effect::Perhaps)),
    }
}
