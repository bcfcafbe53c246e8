//! The catalogue of templates: those for all, and those of the workspace.

use std::sync::Arc;

use http::StatusCode;
use pandastack_bus::storage::{StorageProxy, TemplateInfo, TemplateState};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, no_content};
use crate::{
    app::App,
    bus::{again, again_knowing},
    input::{Input, segment},
    problem::{Effect, Problem},
    wire::{Error, rfc3339},
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let list = warp::path!("v1" / "templates")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(list(a, i)));
    let get = warp::path!("v1" / "templates" / String)
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|name, a, i| finish(get(a, name, i)));
    let delete = warp::path!("v1" / "templates" / String)
        .and(warp::delete())
        .and(with(app))
        .and(input())
        .then(|name, a, i| finish(delete(a, name, i)));
    list.or(get).unify().or(delete).unify().boxed()
}

/// A template.
#[derive(Debug, Serialize, ToSchema)]
pub struct Template {
    /// Its name.
    pub name: String,
    /// Name of its root disk; not a path on the host.
    pub rootfs_path: String,
    /// Bytes its files take.
    pub size_bytes: u64,
    /// Virtual processors.
    pub cpu: u32,
    /// Guest memory in MiB.
    pub memory_mb: u64,
    /// Root disk in MiB.
    pub disk_mb: u64,
    /// Whether every workspace sees it.
    pub is_global: bool,
    /// Owner; absent for one that every workspace sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub workspace: Option<String>,
    /// One sentence.
    pub description: String,
    /// `base`, `data`, `agents` or `custom`.
    pub category: String,
    /// What a user finds in it.
    pub tools: Vec<String>,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// `importing`, `unbaked`, `baked` or `failed`; only from a baked one sandboxes can be made.
    pub status: String,
    /// More, among it the reason of a failure.
    #[schema(value_type = Object)]
    pub meta: Value,
}

impl From<TemplateInfo> for Template {
    fn from(info: TemplateInfo) -> Self {
        let status = match info.state {
            TemplateState::Importing => "importing",
            TemplateState::Unbaked => "unbaked",
            TemplateState::Baked => "baked",
            TemplateState::Failed => "failed",
        };
        let mut meta = json!({
            "name": info.title, "arch": std::env::consts::ARCH, "cpu": info.vcpus, "memory_mb": info.memory_mib,
            "size_mb": info.size_bytes >> 20, "workdir": info.workdir,
        });
        if !info.reason.is_empty() {
            meta["reason"] = info.reason.into();
        }
        let is_global = info.workspace.is_empty();
        if !is_global {
            meta["owner_workspace"] = info.workspace.as_str().into();
            meta["built_at"] = rfc3339(info.created_unix_ms).into();
        }
        Self {
            rootfs_path: format!("{}/root.img", info.title),
            name: info.title,
            workspace: (!is_global).then_some(info.workspace),
            size_bytes: info.size_bytes,
            cpu: info.vcpus,
            memory_mb: info.memory_mib,
            disk_mb: info.disk_mib,
            is_global,
            description: info.description,
            category: info.category,
            tools: info.tools,
            aliases: info.aliases,
            status: status.to_owned(),
            meta,
        }
    }
}

/// Whether a text can be the name of a template.
pub fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && !matches!(name, "." | "..")
}

/// The template that a workspace means by a name or alias; `None` when there is none.
pub async fn resolve(
    storage: &StorageProxy<'static>,
    workspace: &str,
    name: &str,
) -> Result<Option<TemplateInfo>, Problem> {
    if !is_name(name) {
        return Ok(None);
    }
    match again(|| storage.find_template(workspace.to_owned(), name.to_owned())).await {
        Ok(info) => Ok(Some(info)),
        Err(pandastack_bus::Error::NotFound(_) | pandastack_bus::Error::InvalidArgument(_)) => Ok(None),
        Err(error) => Err(Problem::from_bus(&error, Effect::None)),
    }
}

/// The templates for all, by name, then those of the workspace.
#[utoipa::path(operation_id = "list_templates", get, path = "/v1/templates", tag = "templates", responses((status = 200, body = Vec<Template>)))]
pub async fn list(app: Arc<App>, input: Input) -> Answer {
    let workspace = input.caller.workspace;
    let mut found =
        again(|| app.storage.templates()).await.map_err(|error| Problem::from_bus(&error, Effect::None))?;
    found.retain(|info| !info.hidden && (info.workspace.is_empty() || info.workspace == workspace));
    found.sort_by(|one, other| {
        (!one.workspace.is_empty(), &one.title).cmp(&(!other.workspace.is_empty(), &other.title))
    });
    let found: Vec<Template> = found.into_iter().map(Template::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// One template, by name or alias.
#[utoipa::path(operation_id = "get_template", get, path = "/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "name or alias")),
    responses((status = 200, body = Template), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, name: String, input: Input) -> Answer {
    let name = segment(&name);
    match resolve(&app.storage, &input.caller.workspace, &name).await? {
        Some(info) => Ok(json(StatusCode::OK, &Template::from(info))),
        None => Err(no_template(&name)),
    }
}

fn no_template(name: &str) -> Problem {
    let shown: String = name.chars().take(64).collect();
    Problem::not_found(format!("template {shown:?} not found"))
}

/// Deletes a template of the workspace's own; sandboxes and snapshots made from it go on.
#[utoipa::path(operation_id = "delete_template", delete, path = "/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "its name")),
    responses((status = 204), (status = 403, description = "it is one for all", body = Error), (status = 404, body = Error)))]
pub async fn delete(app: Arc<App>, name: String, input: Input) -> Answer {
    let (name, workspace) = (segment(&name), input.caller.workspace);
    let Some(info) = resolve(&app.storage, &workspace, &name).await? else { return Err(no_template(&name)) };
    if info.workspace != workspace {
        let text = "global templates cannot be deleted";
        return Err(Problem::new(StatusCode::FORBIDDEN, "global_template", text));
    }
    let deleted = again_knowing(|| app.storage.delete_template(workspace.clone(), info.name.clone())).await;
    app.catalogue.changed();
    match deleted {
        Ok((gone, perhaps)) if gone || perhaps => Ok(no_content()),
        Ok(_) | Err(pandastack_bus::Error::NotFound(_)) => Err(no_template(&name)),
        Err(error) => Err(Problem::from_bus(&error, Effect::Perhaps)),
    }
}
