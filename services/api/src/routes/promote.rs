//! Promotion: a child of a fork becomes independent, its siblings go if that is wished.

use std::{collections::BTreeMap, sync::Arc};

use futures_util::future::join_all;
use http::StatusCode;
use pandastack_bus::{Error as BusError, vmm::SandboxInfo};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, finish,
    forks::{EXPLORE_TTL_KEY, TREE_KEY},
    input, json,
    lifecycle::DEFAULT_TTL,
};
use crate::{
    app::App,
    bus::again,
    input::{Input, JSON_LIMIT, text},
    problem::{Effect, Problem},
    wire::Error,
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    warp::path!("v1" / "sandboxes" / String / "promote")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(promote(a, id, i)))
        .boxed()
}

/// How to promote.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct Promote {
    /// Whether the other children of the tree are deleted; not when absent.
    pub cleanup_siblings: Option<bool>,
    /// The child's tree; what its labels say when absent.
    #[schema(max_length = 64)]
    pub tree_id: Option<String>,
}

/// What was done.
#[derive(Debug, Serialize, ToSchema)]
pub struct Promoted {
    /// The child.
    pub winner: String,
    /// Its tree.
    pub tree_id: String,
    /// Siblings that are gone.
    pub deleted: Vec<String>,
    /// Siblings that could not be deleted, and why.
    pub failures: BTreeMap<String, String>,
}

/// Makes a child of a fork independent: `explore_ttl` holds for it no longer. Its siblings in the same tree are deleted if
/// that is wished, and nobody else.
#[utoipa::path(operation_id = "promote_sandbox", post, path = "/v1/sandboxes/{id}/promote", tag = "forks", request_body = Option<Promote>,
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Promoted), (status = 404, body = Error),
        (status = 409, description = "not a child of that tree", body = Error)))]
pub async fn promote(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let wish: Promote = input.json(JSON_LIMIT).await?;
    let asked = wish.tree_id.filter(|tree| !tree.is_empty());
    text("tree_id", asked.as_deref().unwrap_or_default(), 64)?;
    let winner = app.get_own(&input.caller, &id).await?;
    app.touch.used(&id);
    let Some(tree) = winner.metadata.get(TREE_KEY).cloned() else {
        return Err(Problem::conflict("the sandbox is not a child of a fork"));
    };
    if asked.is_some_and(|asked| asked != tree) {
        return Err(
            Problem::conflict("the sandbox is not a child of the tree `tree_id`").with("field", "tree_id")
        );
    }
    let cleanup = wish.cleanup_siblings.unwrap_or(false);
    // In a task of its own: it runs to its end when the client hangs up.
    let done = tokio::spawn(async move { promoted(&app, winner, tree, cleanup).await });
    let promoted = done.await.map_err(|_| Problem::internal())??;
    Ok(json(StatusCode::OK, &promoted))
}

async fn promoted(app: &App, winner: SandboxInfo, tree: String, cleanup: bool) -> Result<Promoted, Problem> {
    let refuse = |error: BusError| match error {
        BusError::NotFound(_) => Problem::no_sandbox(&winner.id),
        other => Problem::about(&winner.id, &other, Effect::Perhaps),
    };
    // Unless somebody has set another limit since.
    let explored = winner.metadata.get(EXPLORE_TTL_KEY).and_then(|text| text.parse().ok());
    if explored == Some(winner.ttl_seconds) {
        again(|| app.vmm.set_ttl(winner.id.clone(), DEFAULT_TTL)).await.map_err(refuse)?;
    }
    let mut promoted = Promoted {
        winner: winner.id.clone(),
        tree_id: tree.clone(),
        deleted: Vec::new(),
        failures: BTreeMap::new(),
    };
    if !cleanup {
        return Ok(promoted);
    }
    let all = again(|| app.vmm.list(winner.workspace.clone())).await.map_err(refuse)?;
    let siblings = all.into_iter().filter(|info| {
        info.workspace == winner.workspace
            && info.id != winner.id
            && info.metadata.get(TREE_KEY) == Some(&tree)
    });
    let deletions = siblings.map(|info| async move {
        let outcome = again(|| app.vmm.delete(info.id.clone())).await;
        app.forget(&info.id);
        (info.id, outcome)
    });
    for (id, outcome) in join_all(deletions).await {
        match outcome {
            Ok(_) | Err(BusError::NotFound(_)) => promoted.deleted.push(id),
            Err(error) => {
                let problem = Problem::about(&id, &error, Effect::Perhaps);
                promoted.failures.insert(id, problem.message);
            }
        }
    }
    Ok(promoted)
}
