//! Create, list, get, delete.

use std::{collections::BTreeMap, sync::Arc};

use http::{HeaderMap, StatusCode};
use pandastack_bus::{SandboxId, vmm::SandboxSpec};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, lifecycle::ttl, no_content, templates::is_name};
use crate::{
    app::App,
    auth::hex,
    bus::{again, again_knowing},
    input::{Input, JSON_LIMIT, text, whole},
    problem::{Effect, Problem},
    wire::{Error, SECRET, Sandbox},
};

const DEFAULT_TEMPLATE: &str = "base";
const METADATA_ENTRIES: usize = 64;
/// Bytes of all keys and values together.
const METADATA_BYTES: usize = 64 << 10;
/// Also vmm's limit.
const MAX_DISK_GB: u64 = 1024;
/// Where the digest of an idempotent request is kept: among the labels, where nobody sees it.
const DIGEST_KEY: &str = "secret.pandastack.request";
/// How the name of a request without a key begins: vmm need not remember it for long.
const ONCE: &str = "once-";

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let (all, one) = (warp::path!("v1" / "sandboxes"), warp::path!("v1" / "sandboxes" / String));
    let create = all.and(warp::post()).and(with(app)).and(input()).then(|a, i| finish(create(a, i)));
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|a, i| finish(list(a, i)));
    let get = one.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(get(a, id, i)));
    let delete =
        one.and(warp::delete()).and(with(app)).and(input()).then(|id, a, i| finish(delete(a, id, i)));
    create.or(list).unify().or(get).unify().or(delete).unify().boxed()
}

/// What a new sandbox shall be. Unknown fields are ignored, `cpu` and `memory_mb` among them: a template has its size.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct CreateSandbox {
    /// Name or alias of a template; `base` when absent.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    pub template: Option<String>,
    /// Not supported yet.
    pub from_snapshot: Option<String>,
    /// Size of the root disk in GiB, at least the template's; absent or 0 means the template's.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 1024)]
    pub disk_gb: Option<u64>,
    /// Seconds without a request after which it is deleted, at most 30 days; absent or 0 means an hour.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2592000)]
    pub ttl_seconds: Option<u64>,
    /// Exempt from the idle limit.
    pub persistent: Option<bool>,
    /// Labels: at most 64, 64 KiB in total. `workspace` is always set by the server; those whose key begins with `secret.`
    /// are never returned.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Not supported yet: must be absent or empty.
    pub volumes: Option<Vec<VolumeMount>>,
}

/// A volume to attach.
#[derive(Debug, Deserialize, ToSchema)]
pub struct VolumeMount {
    /// Its name.
    pub name: String,
    /// Whether it is attached read-only.
    #[serde(default)]
    pub read_only: Option<bool>,
}

/// Only sandboxes with these labels: `?metadata.key=value`.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Filters {
    /// For example `metadata.team=a`. May be given several times with different keys; all must hold.
    #[param(rename = "metadata.team", required = false)]
    pub metadata: Option<String>,
}

fn reserved(key: &str, value: &str) -> bool {
    key.starts_with("fork_")
        || key.starts_with("secret.pandastack.")
        || key.strip_prefix("port.").is_some_and(|rest| rest.parse::<u32>().is_ok())
        || matches!(key, "app.id" | "app.name" | "db.label")
        || (key == "kind" && matches!(value, "app" | "database"))
}

fn labels(wished: BTreeMap<String, String>, workspace: &str) -> Result<BTreeMap<String, String>, Problem> {
    if wished.len() > METADATA_ENTRIES {
        return Err(Problem::invalid(format!("field `metadata` has over {METADATA_ENTRIES} entries"))
            .with("field", "metadata"));
    }
    if wished.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > METADATA_BYTES {
        let sentence =
            format!("field `metadata` is over {} KiB, keys and values together", METADATA_BYTES >> 10);
        return Err(Problem::invalid(sentence).with("field", "metadata"));
    }
    for (key, value) in &wished {
        if key.is_empty() {
            return Err(Problem::invalid("field `metadata` has an empty key").with("field", "metadata"));
        }
        text("metadata", key, 256)?;
        text("metadata", value, 16 << 10)?;
        if reserved(key, value) {
            let shown: String = key.chars().take(64).collect();
            return Err(
                Problem::invalid(format!("metadata key {shown:?} is reserved")).with("field", "metadata")
            );
        }
    }
    let mut labels = wished;
    labels.insert("workspace".into(), workspace.to_owned());
    Ok(labels)
}

fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.trim().len()) => Ok(Some(key.trim().to_owned())),
        _ => Err(Problem::invalid("the header Idempotency-Key has 1 to 255 printable ASCII characters")),
    }
}

/// The request's name for vmm: never the same for two workspaces, never guessable without the key.
fn request_name(workspace: &str, key: &str) -> String {
    let digest = Sha256::new().chain_update(workspace).chain_update([0]).chain_update(key).finalize();
    hex(&digest[..20])
}

/// What a wish was, secrets included. With the key in it, nobody guesses a short secret from the digest alone.
fn digest(key: &str, spec: &SandboxSpec) -> String {
    let spec = serde_json::to_vec(spec).unwrap_or_default();
    hex(&Sha256::new().chain_update(key).chain_update([0]).chain_update(spec).finalize())
}

/// Takes the `secret.` labels out. Nothing reads them yet and vmm keeps labels in the clear on disk, so they end here; of
/// an idempotent request only the digest goes on.
fn without_secrets(mut spec: SandboxSpec) -> SandboxSpec {
    spec.metadata.retain(|key, _| !key.starts_with(SECRET));
    spec
}

async fn specify(app: &App, wish: CreateSandbox, workspace: &str) -> Result<SandboxSpec, Problem> {
    if wish.from_snapshot.as_deref().is_some_and(|snapshot| !snapshot.is_empty()) {
        return Err(Problem::invalid("`from_snapshot` is not supported by this version of the appliance")
            .with("field", "from_snapshot"));
    }
    if let Some(volume) = wish.volumes.iter().flatten().next() {
        let shown: String = volume.name.chars().take(64).collect();
        return Err(Problem::invalid(format!(
            "volume {shown:?}: `volumes` are not supported by this version of the appliance"
        ))
        .with("field", "volumes"));
    }
    let ttl_seconds = ttl(wish.ttl_seconds)?;
    let metadata = labels(wish.metadata.unwrap_or_default(), workspace)?;
    let disk_gb = wish.disk_gb.unwrap_or(0);
    if disk_gb > MAX_DISK_GB {
        return Err(
            Problem::invalid(format!("field `disk_gb` is over {MAX_DISK_GB}")).with("field", "disk_gb")
        );
    }
    let name = wish.template.unwrap_or_else(|| DEFAULT_TEMPLATE.into());
    let template = match is_name(&name) {
        true => app.catalogue.find(&app.storage, &name).await?,
        false => None,
    };
    let Some(template) = template else {
        let shown: String = name.chars().take(64).collect();
        return Err(Problem::invalid(format!(
            "unknown template {shown:?}: not in the template catalog; GET /v1/templates lists it"
        ))
        .with("field", "template"));
    };
    let disk_mib = disk_gb * 1024;
    if disk_mib != 0 && disk_mib < template.disk_mib {
        return Err(Problem::invalid(format!(
            "field `disk_gb`: a disk only grows, and the template's has {} MiB",
            template.disk_mib
        ))
        .with("field", "disk_gb"));
    }
    Ok(SandboxSpec {
        workspace: workspace.to_owned(),
        template: template.name.clone(),
        metadata,
        ttl_seconds,
        persistent: wish.persistent.unwrap_or(false),
        disk_mib,
    })
}

/// Makes a sandbox. The answer comes when it accepts commands.
///
/// With `Idempotency-Key` the same request answers with the same sandbox. 503 with `Retry-After`, 507 and 429 mean that
/// nothing was made.
#[utoipa::path(operation_id = "create_sandbox", post, path = "/v1/sandboxes", tag = "sandboxes", request_body = Option<CreateSandbox>,
    params(("Idempotency-Key" = Option<String>, Header, description = "the caller's name for this wish",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    responses((status = 201, body = Sandbox),
        (status = 409, description = "what the key stands for is gone", body = Error),
        (status = 413, body = Error),
        (status = 422, description = "the key was used for another request", body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn create(app: Arc<App>, mut input: Input) -> Answer {
    let wish: CreateSandbox = input.json(JSON_LIMIT).await?;
    let key = idempotency_key(&input.headers)?;
    let workspace = input.caller.workspace.clone();
    let spec = specify(&app, wish, &workspace).await?;
    let wanted = key.as_ref().map(|key| digest(key, &spec));
    let mut spec = without_secrets(spec);
    // Every wish has a name, so that it can be repeated when vmm dies half-way.
    let request = match &key {
        Some(key) => request_name(&workspace, key),
        None => format!("{ONCE}{}", SandboxId::random()),
    };
    if let Some(wanted) = &wanted {
        spec.metadata.insert(DIGEST_KEY.into(), wanted.clone());
    }
    // In a task of its own: it runs to its end when the client hangs up.
    let (done, made) = oneshot::channel();
    let keyed = key.is_some();
    let maker = Arc::clone(&app);
    tokio::spawn(async move {
        let outcome =
            again_knowing(|| maker.vmm.create(request.clone(), spec.clone())).await.map(|(info, _)| info);
        let id = outcome.as_ref().ok().map(|info| info.id.clone());
        if let Ok(info) = &outcome {
            maker.remember(info);
            maker.guests.warm(&info.id);
        }
        // Nobody is there to learn its id, and nobody can ask again: take it away.
        if done.send(outcome).is_err()
            && !keyed
            && let Some(id) = id
        {
            tracing::info!(sandbox = %id, "the client hung up during the create; deleting");
            maker.forget(&id);
            if let Err(error) = again(|| maker.vmm.delete(id.clone())).await {
                tracing::warn!(sandbox = %id, %error, "the abandoned sandbox was not deleted");
            }
        }
    });
    let outcome = made.await.map_err(|_| Problem::internal())?;
    let info = outcome.map_err(|error| match error {
        pandastack_bus::Error::Exists(_) if keyed => key_reused(),
        pandastack_bus::Error::NotFound(text) if keyed => Problem::conflict(text),
        pandastack_bus::Error::NotFound(text) => Problem::invalid(text),
        other => Problem::from_bus(&other, Effect::Perhaps),
    })?;
    match (info.metadata.get(DIGEST_KEY), wanted) {
        (Some(had), Some(wanted)) if *had != wanted => Err(key_reused()),
        _ => Ok(json(StatusCode::CREATED, &Sandbox::from(info))),
    }
}

fn key_reused() -> Problem {
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "idempotency_key_reused",
        "this Idempotency-Key was used for a different request",
    )
}

/// The sandboxes of the workspace, oldest first.
#[utoipa::path(operation_id = "list_sandboxes", get, path = "/v1/sandboxes", tag = "sandboxes", params(Filters),
    responses((status = 200, body = Vec<Sandbox>)))]
pub async fn list(app: Arc<App>, input: Input) -> Answer {
    let filters: Vec<(String, String)> = input
        .pairs()?
        .into_iter()
        .filter_map(|(key, value)| key.strip_prefix("metadata.").map(|key| (key.to_owned(), value)))
        .collect();
    if filters.iter().any(|(key, _)| key.starts_with(SECRET)) {
        return Err(Problem::invalid("`secret.` labels cannot be searched"));
    }
    let found = again(|| app.vmm.list(input.caller.workspace.clone()))
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let found: Vec<Sandbox> = found
        .into_iter()
        .filter(|info| info.workspace == input.caller.workspace)
        .map(Sandbox::from)
        .filter(|sandbox| filters.iter().all(|(key, value)| sandbox.metadata.get(key) == Some(value)))
        .collect();
    Ok(json(StatusCode::OK, &found))
}

/// One sandbox.
#[utoipa::path(operation_id = "get_sandbox", get, path = "/v1/sandboxes/{id}", tag = "sandboxes",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Sandbox), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, id: String, input: Input) -> Answer {
    let info = app.get_own(&input.caller, &id).await?;
    app.touch.used(&info.id);
    Ok(json(StatusCode::OK, &Sandbox::from(info)))
}

/// Deletes a sandbox with everything it has.
#[utoipa::path(operation_id = "delete_sandbox", delete, path = "/v1/sandboxes/{id}", tag = "sandboxes",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 204), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn delete(app: Arc<App>, id: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let outcome = again_knowing(|| app.vmm.delete(id.clone())).await;
    app.forget(&id);
    match outcome {
        Ok((gone, perhaps)) if gone || perhaps => Ok(no_content()),
        Ok(_) | Err(pandastack_bus::Error::NotFound(_)) => Err(Problem::no_sandbox(&id)),
        Err(error) => Err(Problem::about(&id, &error, Effect::Perhaps)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_forced_reserved_and_bounded() {
        let one = |key: &str, value: &str| labels([(key.to_owned(), value.to_owned())].into(), "acme");
        assert_eq!(one("workspace", "other").unwrap()["workspace"], "acme");
        assert_eq!(one("kind", "demo").unwrap()["kind"], "demo");
        for (key, value) in [
            ("fork_tree_id", "x"),
            ("port.80", "web"),
            ("app.id", "x"),
            ("kind", "app"),
            ("secret.pandastack.request", "x"),
            ("", "x"),
            ("a\0", "x"),
            ("a", "\0"),
        ] {
            assert_eq!(one(key, value).unwrap_err().status.as_u16(), 400, "{key:?}");
        }
        let many = (0..=METADATA_ENTRIES).map(|i| (i.to_string(), String::new())).collect();
        assert_eq!(labels(many, "acme").unwrap_err().status.as_u16(), 400);
        let sized = |entries: usize| (0..entries).map(|i| (i.to_string(), "x".repeat(16_000))).collect();
        assert_eq!(labels(sized(4), "acme").unwrap().len(), 5);
        assert!(labels(sized(5), "acme").unwrap_err().message.contains("64 KiB"));
    }

    #[test]
    fn a_key_is_apart_per_workspace() {
        assert_ne!(request_name("a", "bc"), request_name("ab", "c"));
        assert_eq!(request_name("a", "b"), request_name("a", "b"));
    }
}
