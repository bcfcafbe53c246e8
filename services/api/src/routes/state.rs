//! Pause, resume, hibernate, wake. Each may be asked for again; a wrong state is a 409.

use std::sync::Arc;

use http::StatusCode;
use pandastack_bus::vmm::SandboxInfo;
use serde::Serialize;
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, no_content};
use crate::{
    app::App,
    bus::{PATIENCE, patiently},
    input::Input,
    problem::{Effect, Problem},
    wire::Error,
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let pause = warp::path!("v1" / "sandboxes" / String / "pause")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(pause(a, id, i)));
    let resume = warp::path!("v1" / "sandboxes" / String / "resume")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(resume(a, id, i)));
    let hibernate = warp::path!("v1" / "sandboxes" / String / "hibernate")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(hibernate(a, id, i)));
    let stop = warp::path!("v1" / "sandboxes" / String / "stop")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(stop(a, id, i)));
    let wake = warp::path!("v1" / "sandboxes" / String / "wake")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(wake(a, id, i)));
    let start = warp::path!("v1" / "sandboxes" / String / "start")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(start(a, id, i)));
    let sleep = hibernate.or(stop).unify().or(wake).unify().or(start).unify();
    pause.or(resume).unify().or(sleep).unify().boxed()
}

/// The state that was reached.
#[derive(Debug, Serialize, ToSchema)]
pub struct Status {
    /// `hibernated` or `running`.
    pub status: String,
}

/// Asks vmm for a change of state, until it is known: every verb may be repeated.
async fn change<F, Fut>(app: &App, id: &str, input: &mut Input, verb: F) -> Result<SandboxInfo, Problem>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = pandastack_bus::Result<SandboxInfo>>,
{
    input.nothing().await?;
    app.own(&input.caller, id).await?;
    app.touch.used(id);
    let info = patiently(PATIENCE, verb).await.map_err(|error| match error {
        pandastack_bus::Error::NotFound(_) => {
            app.forget(id);
            Problem::no_sandbox(id)
        }
        other => Problem::about(id, &other, Effect::Perhaps),
    })?;
    // The signal says so, too, but the next request may be faster.
    app.guests.changed(id, info.state.as_str());
    Ok(info)
}

fn status(info: &SandboxInfo) -> Response {
    json(StatusCode::OK, &Status { status: info.state.as_str().to_owned() })
}

/// Stops the processors; memory is kept. Requests that need the guest are refused until it is resumed.
#[utoipa::path(operation_id = "pause_sandbox", post, path = "/v1/sandboxes/{id}/pause", tag = "state",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 204), (status = 404, body = Error), (status = 409, description = "neither running nor paused", body = Error)))]
pub async fn pause(app: Arc<App>, id: String, mut input: Input) -> Answer {
    change(&app, &id, &mut input, || app.vmm.pause(id.clone())).await?;
    Ok(no_content())
}

/// Lets a paused sandbox go on.
#[utoipa::path(operation_id = "resume_sandbox", post, path = "/v1/sandboxes/{id}/resume", tag = "state",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 204), (status = 404, body = Error), (status = 409, description = "neither paused nor running", body = Error)))]
pub async fn resume(app: Arc<App>, id: String, mut input: Input) -> Answer {
    change(&app, &id, &mut input, || app.vmm.resume(id.clone())).await?;
    Ok(no_content())
}

/// Puts memory and disk onto storage and ends the process. The next request that needs the guest wakes it.
#[utoipa::path(operation_id = "hibernate_sandbox", post, path = "/v1/sandboxes/{id}/hibernate", tag = "state",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Status), (status = 404, body = Error), (status = 409, body = Error),
        (status = 507, description = "not enough storage; it runs on", body = Error)))]
pub async fn hibernate(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let info = change(&app, &id, &mut input, || app.vmm.hibernate(id.clone())).await?;
    Ok(status(&info))
}

/// Another name for `hibernate`.
#[utoipa::path(operation_id = "stop_sandbox", post, path = "/v1/sandboxes/{id}/stop", tag = "state",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Status), (status = 404, body = Error), (status = 409, body = Error),
        (status = 507, description = "not enough storage; it runs on", body = Error)))]
pub async fn stop(app: Arc<App>, id: String, input: Input) -> Answer {
    hibernate(app, id, input).await
}

/// Brings a hibernated sandbox back; its processes go on.
#[utoipa::path(operation_id = "wake_sandbox", post, path = "/v1/sandboxes/{id}/wake", tag = "state",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Status), (status = 404, body = Error), (status = 409, description = "it is paused", body = Error),
        (status = 507, description = "not enough storage; it stays hibernated", body = Error)))]
pub async fn wake(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let info = change(&app, &id, &mut input, || app.vmm.wake(id.clone())).await?;
    app.guests.warm(&id);
    Ok(status(&info))
}

/// Another name for `wake`.
#[utoipa::path(operation_id = "start_sandbox", post, path = "/v1/sandboxes/{id}/start", tag = "state",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Status), (status = 404, body = Error), (status = 409, description = "it is paused", body = Error),
        (status = 507, description = "not enough storage; it stays hibernated", body = Error)))]
pub async fn start(app: Arc<App>, id: String, input: Input) -> Answer {
    wake(app, id, input).await
}
