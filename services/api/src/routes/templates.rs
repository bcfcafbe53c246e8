//! The catalogue of templates.

use std::sync::Arc;

use http::StatusCode;
use pandastack_bus::storage::{StorageProxy, TemplateInfo, TemplateState};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    bus::again,
    input::{Input, segment},
    problem::{Effect, Problem},
    wire::Error,
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
    list.or(get).unify().boxed()
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
            "name": info.name, "arch": std::env::consts::ARCH, "cpu": info.vcpus, "memory_mb": info.memory_mib,
            "size_mb": info.size_bytes >> 20, "workdir": info.workdir,
        });
        if !info.reason.is_empty() {
            meta["reason"] = info.reason.into();
        }
        Self {
            rootfs_path: format!("{}/root.img", info.name),
            name: info.name,
            size_bytes: info.size_bytes,
            cpu: info.vcpus,
            memory_mb: info.memory_mib,
            disk_mb: info.disk_mib,
            is_global: true,
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

/// A template by name or alias; `None` when there is none.
pub async fn resolve(storage: &StorageProxy<'static>, name: &str) -> Result<Option<TemplateInfo>, Problem> {
    if !is_name(name) {
        return Ok(None);
    }
    match again(|| storage.template(name.to_owned())).await {
        Ok(info) => Ok(Some(info)),
        Err(pandastack_bus::Error::NotFound(_) | pandastack_bus::Error::InvalidArgument(_)) => Ok(None),
        Err(error) => Err(Problem::from_bus(&error, Effect::None)),
    }
}

/// All templates, by name.
#[utoipa::path(operation_id = "list_templates", get, path = "/v1/templates", tag = "templates", responses((status = 200, body = Vec<Template>)))]
pub async fn list(app: Arc<App>, _input: Input) -> Answer {
    let mut found =
        again(|| app.storage.templates()).await.map_err(|error| Problem::from_bus(&error, Effect::None))?;
    found.sort_by(|one, other| one.name.cmp(&other.name));
    let found: Vec<Template> = found.into_iter().map(Template::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// One template, by name or alias.
#[utoipa::path(operation_id = "get_template", get, path = "/v1/templates/{name}", tag = "templates",
    params(("name" = String, Path, description = "name or alias")),
    responses((status = 200, body = Template), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, name: String, _input: Input) -> Answer {
    let name = segment(&name);
    match resolve(&app.storage, &name).await? {
        Some(info) => Ok(json(StatusCode::OK, &Template::from(info))),
        None => {
            let shown: String = name.chars().take(64).collect();
            Err(Problem::not_found(format!("template {shown:?} not found")))
        }
    }
}
