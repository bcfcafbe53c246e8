//! Builds of templates over HTTP: asked for, listed, shown, followed, cancelled.

use std::sync::Arc;

use http::{HeaderMap, StatusCode, header};
use pandastack_bus::{SandboxId, storage::TemplateInfo};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Pieces, event_stream,
    exec::{KEEP_ALIVE_EVERY, STALLED_FOR},
    finish, input, json, pieces,
};
use crate::{
    app::App,
    auth::hex,
    builds::{
        Build, Stage,
        form::{self, Wish, unwritten},
        log,
        record::Event,
        store::BuildsError,
        work::bases,
    },
    bus::again,
    input::{Input, flag, linger, segment},
    output::KEEP_ALIVE,
    problem::{Effect, Problem},
    tenancy::now_ms,
    wire::{Error, rfc3339},
};

/// Templates of a workspace; storage refuses more, too.
const TEMPLATES: usize = 32;
/// Seconds after which a build may find a place.
const RETRY: u32 = 15;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let (all, one) =
        (warp::path!("v1" / "templates" / "builds"), warp::path!("v1" / "templates" / "builds" / String));
    let build = warp::path!("v1" / "templates" / "build")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(build(a, i)));
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|a, i| finish(list(a, i)));
    let get = one.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(get(a, id, i)));
    let logs = warp::path!("v1" / "templates" / "builds" / String / "logs")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(logs(a, id, i)));
    let cancel = warp::path!("v1" / "templates" / "builds" / String / "cancel")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(cancel(a, id, i)));
    build.or(list).unify().or(get).unify().or(logs).unify().or(cancel).unify().boxed()
}

/// A build of a template.
#[derive(Debug, Serialize, ToSchema)]
pub struct TemplateBuild {
    /// Its id: 16 hexadecimal digits.
    pub id: String,
    /// Name of the template that it makes.
    pub name: String,
    /// `queued`, `running`, `uploading`, `baking`, and at the end `done` or `failed`.
    pub status: String,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// RFC 3339: when it was asked for.
    pub started_at: String,
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Root disk in MiB, at least.
    pub size_mb: u64,
    /// Virtual processors.
    pub cpu: u32,
    /// Guest memory in MiB.
    pub memory_mb: u64,
    /// Bytes of the template's files, once they are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Image that it is built from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_ref: Option<String>,
    /// Owner.
    pub owner_workspace: String,
}

impl From<Build> for TemplateBuild {
    fn from(build: Build) -> Self {
        let given = |text: String| (!text.is_empty()).then_some(text);
        Self {
            id: build.id,
            name: build.name,
            status: build.stage.as_str().to_owned(),
            error: given(build.error).filter(|_| build.stage.as_str() == "failed"),
            started_at: rfc3339(build.created_unix_ms),
            ended_at: (build.ended_unix_ms > 0).then(|| rfc3339(build.ended_unix_ms)),
            size_mb: build.size_mib,
            cpu: build.vcpus,
            memory_mb: build.memory_mib,
            bytes: (build.bytes > 0).then_some(build.bytes),
            image_ref: given(build.image_ref),
            owner_workspace: build.workspace,
        }
    }
}

/// What a template shall be, and what it is built from: exactly one of `rootfs`, `dockerfile` (with files of its context, if there
/// are some) and `image_ref`. Other fields are ignored. Each file of a context is a file part that is called as its relative path.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct BuildForm {
    /// Its name; neither `.` nor `..`, `build` nor `builds`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    pub name: String,
    /// Root disk in MiB, 32 to 16384; 1024 when absent.
    #[schema(pattern = "^[0-9]+$")]
    pub size_mb: Option<String>,
    /// Virtual processors, 1 to 64; a template has 8 at most; 2 when absent.
    #[schema(pattern = "^[0-9]+$")]
    pub cpu: Option<String>,
    /// Guest memory in MiB, 128 to 65536, and at most half of the host's; 1024 when absent.
    #[schema(pattern = "^[0-9]+$")]
    pub memory_mb: Option<String>,
    /// `true`: takes the place of the workspace's template of that name. May also stand in the query.
    pub replace: Option<String>,
    /// An archive of a root file system, or an OCI or Docker image archive: tar or tar.gz, at most `size_mb`.
    #[schema(value_type = Option<String>, content_media_type = "application/octet-stream")]
    pub rootfs: Option<Vec<u8>>,
    /// A Dockerfile.
    pub dockerfile: Option<String>,
    /// Reference to an image in a registry that the operator allows.
    pub image_ref: Option<String>,
}

fn no_build(raw: &str) -> Problem {
    let shown: String = raw.chars().take(64).collect();
    Problem::not_found(format!("build {shown:?} not found"))
}

fn own_build(app: &App, input: &Input, raw: &str) -> Result<Build, Problem> {
    let id = segment(raw);
    app.builds.get(&input.caller.workspace, &id).ok_or_else(|| no_build(&id))
}

fn refuse(error: &BuildsError) -> Problem {
    match error {
        BuildsError::TooMany | BuildsError::Full => {
            let mut problem =
                Problem::new(StatusCode::TOO_MANY_REQUESTS, "too_many_builds", error.to_string());
            problem.retry_after = Some(RETRY);
            problem
        }
        BuildsError::Records(cause) => {
            tracing::error!(error = %pandastack_daemon::chain(cause), "a build cannot be recorded");
            Problem::internal()
        }
    }
}

/// Builds a template. Answers as soon as the build waits for its turn.
///
/// The name may be that of a template of the workspace's own only with `replace`, which takes effect at the end of the build.
#[utoipa::path(operation_id = "build_template", post, path = "/v1/templates/build", tag = "templates",
    request_body(content((BuildForm = "multipart/form-data"), (BuildForm = "application/x-www-form-urlencoded"))),
    responses((status = 202, body = TemplateBuild), (status = 408, description = "the upload paused too long", body = Error),
        (status = 409, description = "the name is taken", body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn build(app: Arc<App>, mut input: Input) -> Answer {
    let workspace = input.caller.workspace.clone();
    let headers = input.headers.clone();
    let begun = async {
        let place = app.builds.enter(&workspace).map_err(|error| refuse(&error))?;
        admit(&app, &headers).await?;
        let id = new_id();
        let incoming = app.builds.spool.begin(&id).await.map_err(|error| unwritten(&error))?;
        Ok::<_, Problem>((place, id, incoming))
    };
    let (_place, id, mut incoming) = match begun.await {
        Ok(begun) => begun,
        Err(problem) => {
            linger(std::mem::replace(&mut input.body, Box::pin(futures_util::stream::empty())));
            return Err(problem);
        }
    };
    let (wish, upload) = form::read(input, &mut incoming).await?;
    check(&app, &workspace, &wish).await?;
    if let Some(text) = &upload.dockerfile {
        bases(&app, &workspace, text).await?;
    }
    incoming.finish(&upload).await.map_err(|error| unwritten(&error))?;
    let build = Build {
        id: id.clone(),
        workspace,
        name: wish.name,
        kind: wish.kind,
        size_mib: wish.size_mib,
        vcpus: wish.vcpus,
        memory_mib: wish.memory_mib,
        image_ref: wish.image.map(|image| image.text).unwrap_or_default(),
        replace: wish.replace,
        template: SandboxId::random().to_string(),
        stage: Stage::Queued,
        cancelled: false,
        error: String::new(),
        attempts: 0,
        bytes: 0,
        env: Default::default(),
        workdir: String::new(),
        created_unix_ms: now_ms(),
        ended_unix_ms: 0,
    };
    if let Err(error) = app.builds.add(build.clone()).await {
        app.builds.spool.remove(&id);
        return Err(refuse(&error));
    }
    Ok(json(StatusCode::ACCEPTED, &TemplateBuild::from(build)))
}

fn new_id() -> String {
    let mut bytes = [0u8; 8];
    getrandom::fill(&mut bytes).expect("the kernel's random generator answers");
    hex(&bytes)
}

/// Whether there is room for the upload.
async fn admit(app: &App, headers: &HeaderMap) -> Result<(), Problem> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let wanted: u64 = length.unwrap_or(form::CONTEXT);
    if wanted > (form::SIZE_MAX << 20) + form::CONTEXT {
        return Err(Problem::too_large(format!("an upload has at most {} MiB", form::SIZE_MAX)));
    }
    let usage =
        again(|| app.storage.usage()).await.map_err(|error| Problem::from_bus(&error, Effect::None))?;
    if usage.free_bytes >= usage.reserve_bytes.saturating_add(wanted) {
        return Ok(());
    }
    Err(Problem::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", "insufficient host storage headroom"))
}

/// Whether the workspace may have such a template.
async fn check(app: &App, workspace: &str, wish: &Wish) -> Result<(), Problem> {
    if let Some(image) = &wish.image
        && !app.builds.registries.iter().any(|registry| registry.host == image.host)
    {
        return Err(Problem::invalid(format!(
            "images of {} are not allowed: the operator lists the registries that templates may be built from",
            image.host
        ))
        .with("field", "image_ref"));
    }
    if let Some(most) = host_memory_mib().map(|mib| mib / 2).filter(|most| wish.memory_mib > *most) {
        return Err(Problem::invalid(format!(
            "field `memory_mb` is over {most}, half of this host's memory"
        ))
        .with("field", "memory_mb"));
    }
    let templates =
        again(|| app.storage.templates()).await.map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let is =
        |info: &&TemplateInfo| !info.hidden && (info.title == wish.name || info.aliases.contains(&wish.name));
    if templates.iter().filter(is).any(|info| info.workspace.is_empty()) {
        return Err(match wish.replace {
            true => {
                Problem::new(StatusCode::FORBIDDEN, "global_template", "global templates cannot be replaced")
            }
            false => Problem::conflict("template already exists: it is a global one, and cannot be replaced"),
        });
    }
    let own: std::collections::BTreeSet<String> = templates
        .into_iter()
        .filter(|info| !info.hidden && info.workspace == workspace)
        .map(|info| info.title)
        .collect();
    let open = app.builds.list(workspace).into_iter().filter(|build| !build.stage.is_decided());
    let coming: std::collections::BTreeSet<String> = open.map(|build| build.name).collect();
    if !wish.replace && (own.contains(&wish.name) || coming.contains(&wish.name)) {
        return Err(Problem::conflict("template already exists; pass replace=true to overwrite"));
    }
    if !own.contains(&wish.name) && own.union(&coming).count() >= TEMPLATES {
        let sentence = format!("max templates reached: a workspace has at most {TEMPLATES}");
        return Err(Problem::new(StatusCode::TOO_MANY_REQUESTS, "quota", sentence));
    }
    Ok(())
}

fn host_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(total.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
}

/// The builds of the workspace that wait, run, or ended lately, the newest first.
#[utoipa::path(operation_id = "list_template_builds", get, path = "/v1/templates/builds", tag = "templates",
    responses((status = 200, body = Vec<TemplateBuild>)))]
pub async fn list(app: Arc<App>, input: Input) -> Answer {
    let found: Vec<TemplateBuild> =
        app.builds.list(&input.caller.workspace).into_iter().map(TemplateBuild::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// One build.
#[utoipa::path(operation_id = "get_template_build", get, path = "/v1/templates/builds/{build}", tag = "templates",
    params(("build" = String, Path, description = "id of the build")),
    responses((status = 200, body = TemplateBuild), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, id: String, input: Input) -> Answer {
    Ok(json(StatusCode::OK, &TemplateBuild::from(own_build(&app, &input, &id)?)))
}

/// Cancels a build; what it has is removed. One that is about to end, or has ended, is refused with 409.
#[utoipa::path(operation_id = "cancel_template_build", post, path = "/v1/templates/builds/{build}/cancel", tag = "templates",
    params(("build" = String, Path, description = "id of the build")),
    responses((status = 200, body = TemplateBuild), (status = 404, body = Error),
        (status = 409, description = "it is over, or about to be", body = Error)))]
pub async fn cancel(app: Arc<App>, id: String, mut input: Input) -> Answer {
    input.nothing().await?;
    let build = own_build(&app, &input, &id)?;
    let wish = |build: &mut Build| {
        build.stage.on(Event::Cancel)?;
        build.cancelled = true;
        Some(())
    };
    let cancelled = app.builds.change(&build.id, wish).await.map_err(|error| refuse(&error))?;
    let Some(mut build) = cancelled else {
        return Err(Problem::conflict("the build is over, or about to be"));
    };
    if build.stage == Stage::Queued {
        // Nobody works on it, and its turn may be far.
        let ended = app.builds.happen(&build.id, Event::Cancel, "cancelled").await;
        if let Some(ended) = ended.map_err(|error| refuse(&error))? {
            app.builds.work.notify_one();
            build = ended;
        }
    }
    Ok(json(StatusCode::OK, &TemplateBuild::from(build)))
}

/// How much of a log.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogsQuery {
    /// Whether to go on until the build ends; false when absent.
    #[param(required = false)]
    pub follow: Option<bool>,
}

/// The log of a build as events, a line each. At the end comes the event `done` with `end`.
///
/// Lines that begin as JSON, or are words of this stream, have `| ` in front.
#[utoipa::path(operation_id = "template_build_logs", get, path = "/v1/templates/builds/{build}/logs", tag = "templates",
    params(("build" = String, Path, description = "id of the build"), LogsQuery),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 404, body = Error)))]
pub async fn logs(app: Arc<App>, id: String, input: Input) -> Answer {
    let mut follow = false;
    for (key, value) in input.pairs()? {
        if key == "follow" {
            follow = flag(&key, &value)?;
        }
    }
    let build = own_build(&app, &input, &id)?;
    let (sender, events) = pieces(STALLED_FOR);
    tokio::spawn(tell(app, build, follow, sender));
    Ok(event_stream(events))
}

/// Tells lines; `None` when nobody listens any more.
async fn tell(app: Arc<App>, build: Build, follow: bool, to: Pieces) -> Option<()> {
    let path = app.builds.log(&build.id);
    let (mut changes, mut position) = (app.builds.changes(), 0);
    loop {
        // Looked at before the log: what it says after that is there already.
        changes.borrow_and_update();
        let now = app.builds.get(&build.workspace, &build.id);
        let is_last = !follow || now.is_none_or(|build| build.stage.is_over());
        loop {
            let (lines, next) = match log::read(&path, position).await {
                Ok(read) => read,
                Err(error) => {
                    tracing::error!(build = build.id, %error, "its log cannot be read");
                    to.cut();
                    return None;
                }
            };
            if next == position {
                break;
            }
            position = next;
            let text: String =
                lines.iter().map(|line| format!("data: {}\n\n", log::harmless(line))).collect();
            if !text.is_empty() {
                to.send(text).await?;
            }
        }
        if is_last {
            return to.send("event: done\ndata: end\n\n").await;
        }
        tokio::select! {
            changed = timeout(KEEP_ALIVE_EVERY, changes.changed()) => match changed {
                Ok(_) => {}
                Err(_) => to.send(KEEP_ALIVE).await?,
            },
            () = to.closed() => return None,
        }
    }
}
