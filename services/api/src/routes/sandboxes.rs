//! Create, list, get, delete.

use std::sync::Arc;

use http::StatusCode;
use serde::Deserialize;
use tokio::sync::oneshot;
use utoipa::IntoParams;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, finish, input, json, no_content,
    wish::{
        CreateSandbox, DIGEST_KEY, digest, idempotency_key, key_reused, once, request_name, specify,
        without_secrets,
    },
};
use crate::{
    app::App,
    bus::{again, again_knowing},
    input::{Input, JSON_LIMIT},
    problem::{Effect, Problem},
    wire::{Error, SECRET, Sandbox},
};

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

/// Only sandboxes with these labels: `?metadata.key=value`.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Filters {
    /// For example `metadata.team=a`. May be given several times with different keys; all must hold.
    #[param(rename = "metadata.team", required = false)]
    pub metadata: Option<String>,
}

/// Makes a sandbox. The answer comes when it accepts commands.
///
/// With `Idempotency-Key` the same request answers with the same sandbox. 503 with `Retry-After`, 507 and 429 mean that
/// nothing was made.
#[utoipa::path(operation_id = "create_sandbox", post, path = "/v1/sandboxes", tag = "sandboxes", request_body = Option<CreateSandbox>,
    params(("Idempotency-Key" = Option<String>, Header, description = "the caller's name for this wish",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    responses((status = 201, body = Sandbox),
        (status = 404, description = "no such snapshot or volume", body = Error),
        (status = 409, description = "the snapshot cannot be used here, a volume is attached elsewhere, or what the key stands for is gone", body = Error),
        (status = 413, body = Error),
        (status = 422, description = "the key was used for another request", body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn create(app: Arc<App>, mut input: Input) -> Answer {
    let wish: CreateSandbox = input.json(JSON_LIMIT).await?;
    let key = idempotency_key(&input.headers)?;
    let workspace = input.caller.workspace.clone();
    let mut spec = specify(&app, wish, &workspace).await?;
    // What the wish names beside the template was there a moment ago.
    let names_more = !spec.snapshot.is_empty() || !spec.volumes.is_empty();
    let wanted = key.as_ref().map(|key| digest(key, &spec));
    without_secrets(&mut spec.metadata);
    // Every wish has a name, so that it can be repeated when vmm dies half-way.
    let request = match &key {
        Some(key) => request_name(&workspace, key),
        None => once(),
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
        pandastack_bus::Error::NotFound(text) if names_more => Problem::not_found(text),
        pandastack_bus::Error::NotFound(text) => Problem::invalid(text),
        other => Problem::from_bus(&other, Effect::Perhaps),
    })?;
    match (info.metadata.get(DIGEST_KEY), wanted) {
        (Some(had), Some(wanted)) if *had != wanted => Err(key_reused()),
        _ => Ok(json(StatusCode::CREATED, &Sandbox::from(info))),
    }
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
