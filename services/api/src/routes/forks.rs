//! Forks: one child, or a tree of them, of one moment of a sandbox that runs on.
//!
//! Owns: what the labels of a child say about its tree, and the form of the answer. Labels that begin with `fork_` are set
//! here and nowhere else, so that [`super::promote`] can rely on them.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::future::join_all;
use http::{HeaderMap, StatusCode};
use pandastack_bus::{
    Error as BusError, SandboxId,
    vmm::{Child, Fork, SandboxInfo},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tokio::sync::oneshot;
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, finish, input, json,
    lifecycle::ttl,
    wish::{
        DIGEST_KEY, digest, idempotency_key, key_reused, once, request_name, unreserved_labels,
        without_secrets,
    },
};
use crate::{
    app::App,
    bus::{PATIENCE, again, patiently},
    input::{Input, JSON_LIMIT, whole},
    problem::{Effect, Problem, calm},
    wire::{Error, Sandbox, rfc3339},
};

/// Names the tree of a child.
pub const TREE_KEY: &str = "fork_tree_id";
/// Seconds after which a child that nobody promoted is deleted; the caller's label.
pub const EXPLORE_TTL_KEY: &str = "explore_ttl";
/// Also vmm's limit.
const MOST_CHILDREN: u64 = 16;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let one = warp::path!("v1" / "sandboxes" / String / "fork")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(fork(a, id, i)));
    let tree = warp::path!("v1" / "sandboxes" / String / "fork-tree")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(fork_tree(a, id, i)));
    one.or(tree).unify().boxed()
}

/// What the children shall be. Unknown fields are ignored.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ForkRequest {
    /// How many; 1 for `fork`, 2 for `fork-tree` when absent.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 1, maximum = 16)]
    pub count: Option<u64>,
    /// Labels of every child, as for a create; reserved ones are left out. The value of `explore_ttl` becomes the idle limit
    /// of the children, in seconds, until they are promoted.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Every fork takes memory and disk as they are; both words mean this.
    pub mode: Option<ForkMode>,
}

/// How clients say what they expect of a fork.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForkMode {
    /// As `warm`.
    Cold,
    /// With its memory.
    Warm,
}

/// What was made.
#[derive(Debug, Serialize, ToSchema)]
pub struct Forked {
    /// Names the tree.
    pub tree_id: String,
    /// The sandbox that was forked.
    pub parent_id: String,
    /// Names the capture that all children came from. It is not kept.
    pub snapshot_id: String,
    /// When that was, RFC 3339.
    pub at: String,
    /// Microseconds for which the parent stood still.
    pub paused_us: u64,
    /// The first child; only of `fork`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<Sandbox>,
    /// The children in the order asked for.
    pub children: Vec<Sandbox>,
    /// Those that could not be made.
    pub errors: Vec<ForkError>,
}

/// A child that could not be made. Nothing of it is left.
#[derive(Debug, Serialize, ToSchema)]
pub struct ForkError {
    /// Its place in the order, from 0.
    pub index: usize,
    /// One sentence.
    pub err: String,
}

/// What vmm is asked for.
struct Plan {
    request: String,
    /// The digest of the wish, when it can be repeated.
    wanted: Option<String>,
    tree: String,
    children: Vec<Child>,
}

/// Everything about the children that follows from the wish, the parent and the request's name. Pure but for that name.
fn plan(wish: ForkRequest, default: u64, parent: &SandboxInfo, headers: &HeaderMap) -> Result<Plan, Problem> {
    let count = wish.count.unwrap_or(default);
    if !(1..=MOST_CHILDREN).contains(&count) {
        return Err(
            Problem::invalid(format!("field `count` must be 1 to {MOST_CHILDREN}")).with("field", "count")
        );
    }
    let key = idempotency_key(headers)?;
    let mut labels = unreserved_labels(wish.metadata.unwrap_or_default(), &parent.workspace)?;
    let ttl_seconds = match labels.get(EXPLORE_TTL_KEY) {
        None => parent.ttl_seconds,
        Some(text) => ttl(Some(text.parse().map_err(|_| {
            Problem::invalid("field `metadata.explore_ttl` must be a whole number of seconds")
                .with("field", "metadata.explore_ttl")
        })?))?,
    };
    let wanted = key.as_ref().map(|key| digest(key, &("fork", &parent.id, count, &labels)));
    without_secrets(&mut labels);
    // Apart from the creates' names, so that one key can be used for both.
    let request = match &key {
        Some(key) => request_name(&parent.workspace, &format!("fork\0{key}")),
        None => once(),
    };
    let tree = tree_of(&request);
    labels.insert(TREE_KEY.into(), tree.clone());
    labels.insert("fork_tree_role".into(), "child".into());
    labels.insert("fork_parent_id".into(), parent.id.clone());
    if let Some(wanted) = &wanted {
        labels.insert(DIGEST_KEY.into(), wanted.clone());
    }
    let child = |index: u64| {
        let mut metadata = labels.clone();
        metadata.insert("fork_index".into(), index.to_string());
        Child { metadata, ttl_seconds, persistent: false }
    };
    Ok(Plan { request, wanted, tree, children: (0..count).map(child).collect() })
}

/// The tree of a request: the same request is the same tree. Of the form of a sandbox id.
fn tree_of(request: &str) -> String {
    const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
    let digest = Sha256::new().chain_update("tree\0").chain_update(request).finalize();
    digest.iter().take(SandboxId::LEN).map(|byte| char::from(ALPHABET[usize::from(byte % 36)])).collect()
}

/// Makes a child with memory and disk of this moment; the sandbox runs on.
///
/// With `Idempotency-Key` the same request answers with the same children. 503 with `Retry-After`, 507 and 429 mean that
/// nothing was made.
#[utoipa::path(operation_id = "fork_sandbox", post, path = "/v1/sandboxes/{id}/fork", tag = "forks", request_body = Option<ForkRequest>,
    params(("id" = String, Path, description = "sandbox id"),
        ("Idempotency-Key" = Option<String>, Header, description = "the caller's name for this wish",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    responses((status = 201, body = Forked), (status = 404, body = Error), (status = 409, body = Error),
        (status = 422, description = "the key was used for another request", body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn fork(app: Arc<App>, id: String, input: Input) -> Answer {
    let mut forked = forked(app, id, input, 1).await?;
    forked.sandbox = forked.children.first().cloned();
    Ok(json(StatusCode::CREATED, &forked))
}

/// Makes several children of one moment, side by side. Fewer than asked for are a success; then `errors` says why.
#[utoipa::path(operation_id = "fork_tree", post, path = "/v1/sandboxes/{id}/fork-tree", tag = "forks", request_body = Option<ForkRequest>,
    params(("id" = String, Path, description = "sandbox id"),
        ("Idempotency-Key" = Option<String>, Header, description = "the caller's name for this wish",
        min_length = 1, max_length = 255, pattern = "^[!-~]+$")),
    responses((status = 201, body = Forked), (status = 404, body = Error), (status = 409, body = Error),
        (status = 422, description = "the key was used for another request", body = Error),
        (status = 507, description = "not enough storage; nothing was made", body = Error)))]
pub async fn fork_tree(app: Arc<App>, id: String, input: Input) -> Answer {
    let forked = forked(app, id, input, 2).await?;
    Ok(json(StatusCode::CREATED, &forked))
}

async fn forked(app: Arc<App>, id: String, mut input: Input, default: u64) -> Result<Forked, Problem> {
    let wish: ForkRequest = input.json(JSON_LIMIT).await?;
    let parent = app.get_own(&input.caller, &id).await?;
    let Plan { request, wanted, tree, children } = plan(wish, default, &parent, &input.headers)?;
    // In a task of its own: it runs to its end when the client hangs up.
    let (done, made) = oneshot::channel();
    let (maker, keyed) = (Arc::clone(&app), wanted.is_some());
    tokio::spawn(async move {
        let _activity = maker.touch.in_use(&id);
        let outcome = make(&maker, &id, request, children).await;
        // Nobody is there to learn their ids, and nobody can ask again: take them away.
        if let Err(Ok((fork, _))) = done.send(outcome)
            && !keyed
        {
            tracing::info!(parent = %id, "the client hung up during the fork; deleting its children");
            abandon(&maker, &fork).await;
        }
    });
    let (fork, found) =
        made.await.map_err(|_| Problem::internal())?.map_err(|problem| match problem.code {
            "conflict" if keyed => key_reused(),
            _ => problem,
        })?;
    answer(parent.id, tree, wanted.as_ref(), &fork, found)
}

/// Makes the children and looks at each.
async fn make(
    app: &Arc<App>,
    parent: &str,
    request: String,
    children: Vec<Child>,
) -> Result<(Fork, Vec<Option<SandboxInfo>>), Problem> {
    let keyed = children.iter().any(|child| child.metadata.contains_key(DIGEST_KEY));
    // Until its outcome is known, so that no children are left that nobody knows.
    let fork =
        patiently(PATIENCE, || app.vmm.fork(request.clone(), parent.to_owned(), children.clone())).await;
    let fork = fork.map_err(|error| match error {
        BusError::NotFound(text) => Problem::not_found(text),
        other => Problem::about(parent, &other, Effect::Perhaps),
    })?;
    let looks = fork.children.iter().map(|birth| async {
        if birth.id.is_empty() {
            return Ok(None);
        }
        match again(|| app.vmm.get(birth.id.clone())).await {
            Ok(info) => Ok(Some(info)),
            Err(BusError::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    });
    match join_all(looks).await.into_iter().collect::<Result<Vec<_>, _>>() {
        Ok(found) => {
            for info in found.iter().flatten() {
                app.remember(info);
                app.guests.warm(&info.id);
            }
            Ok((fork, found))
        }
        Err(error) => {
            // They cannot be named to the caller. Who has a key can ask again.
            if !keyed {
                abandon(app, &fork).await;
            }
            Err(Problem::about(parent, &error, Effect::Perhaps))
        }
    }
}

async fn abandon(app: &App, fork: &Fork) {
    join_all(fork.children.iter().filter(|birth| !birth.id.is_empty()).map(|birth| async {
        app.forget(&birth.id);
        if let Err(error) = again(|| app.vmm.delete(birth.id.clone())).await {
            tracing::warn!(sandbox = %birth.id, %error, "the abandoned child was not deleted");
        }
    }))
    .await;
}

fn answer(
    parent_id: String,
    tree_id: String,
    wanted: Option<&String>,
    fork: &Fork,
    found: Vec<Option<SandboxInfo>>,
) -> Result<Forked, Problem> {
    let (mut children, mut errors) = (Vec::new(), Vec::new());
    for (index, (birth, info)) in fork.children.iter().zip(found).enumerate() {
        match info {
            Some(info) => {
                if wanted.is_some() && info.metadata.get(DIGEST_KEY) != wanted {
                    return Err(key_reused());
                }
                children.push(Sandbox::from(info));
            }
            None if birth.id.is_empty() => errors.push(ForkError { index, err: calm(&birth.error) }),
            None => errors.push(ForkError { index, err: "the child is gone".into() }),
        }
    }
    if children.is_empty() {
        return Err(Problem::conflict("the children of this fork are gone"));
    }
    Ok(Forked {
        tree_id,
        parent_id,
        snapshot_id: fork.snapshot.clone(),
        at: rfc3339(fork.unix_ms),
        paused_us: fork.paused_us,
        sandbox: None,
        children,
        errors,
    })
}
