//! Organisations, as far as there are any: each workspace is one, its only member is its holder, and a token is of the one
//! that it opens. They are made, and end, by the operator's hand (`busctl`), never by a tenant's.

use std::sync::Arc;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    auth::Caller,
    input::{Input, JSON_LIMIT, segment},
    problem::Problem,
    wire::{Error, rfc3339},
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let list = warp::path!("v1" / "orgs")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(list(a, i)));
    let get = warp::path!("v1" / "orgs" / String)
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|org, a, i| finish(get(a, org, i)));
    let members = warp::path!("v1" / "orgs" / String / "members")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|org, a, i| finish(members(a, org, i)));
    let choose = warp::path!("v1" / "me" / "current-org")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(choose(a, i)));
    list.or(get).unify().or(members).unify().or(choose).unify().boxed()
}

/// An organisation: a workspace.
#[derive(Debug, Serialize, ToSchema)]
pub struct Org {
    /// Its id, of the form of a UUID.
    pub id: String,
    /// Name of the workspace.
    pub slug: String,
    /// The same.
    pub name: String,
    /// Its holder, as `user_id` of `/v1/me`.
    pub owner_user_id: String,
    /// `owner` for a token that may do everything, else `member`.
    pub role: String,
    /// RFC 3339.
    pub created_at: String,
}

/// Who belongs to an organisation.
#[derive(Debug, Serialize, ToSchema)]
pub struct Member {
    /// As `user_id` of `/v1/me`.
    pub user_id: String,
    /// Always empty: tokens have no e-mail address.
    pub email: String,
    /// Always `owner`.
    pub role: String,
    /// RFC 3339.
    pub joined_at: String,
}

/// Which organisation.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CurrentOrg {
    /// Its id.
    #[schema(max_length = 64)]
    pub org_id: String,
}

/// The caller's organisation; `None` when its workspace was deleted just now.
fn own(app: &App, caller: &Caller) -> Option<Org> {
    let name = caller.workspace.clone();
    let workspace = app.tenancy.workspace(&name)?;
    Some(Org {
        id: workspace.org_id(&name),
        slug: name.clone(),
        owner_user_id: name.clone(),
        name,
        role: if caller.grant.is_whole() { "owner" } else { "member" }.into(),
        created_at: rfc3339(workspace.created_unix_ms),
    })
}

/// The caller's organisation by id or slug; any other is not there.
fn find(app: &App, caller: &Caller, wanted: &str) -> Result<Org, Problem> {
    own(app, caller)
        .filter(|org| org.id == wanted || org.slug == wanted)
        .ok_or_else(|| Problem::not_found("not found or not a member"))
}

/// The organisation that the token opens.
#[utoipa::path(operation_id = "list_orgs", get, path = "/v1/orgs", tag = "orgs", responses((status = 200, body = Vec<Org>)))]
pub async fn list(app: Arc<App>, input: Input) -> Answer {
    let orgs: Vec<Org> = own(&app, &input.caller).into_iter().collect();
    Ok(json(StatusCode::OK, &orgs))
}

/// An organisation, by id or slug.
#[utoipa::path(operation_id = "get_org", get, path = "/v1/orgs/{org}", tag = "orgs",
    params(("org" = String, Path, description = "id or slug")),
    responses((status = 200, body = Org), (status = 404, body = Error)))]
pub async fn get(app: Arc<App>, org: String, input: Input) -> Answer {
    Ok(json(StatusCode::OK, &find(&app, &input.caller, &segment(&org))?))
}

/// Who belongs to it.
#[utoipa::path(operation_id = "list_members", get, path = "/v1/orgs/{org}/members", tag = "orgs",
    params(("org" = String, Path, description = "id or slug")),
    responses((status = 200, body = Vec<Member>), (status = 404, body = Error)))]
pub async fn members(app: Arc<App>, org: String, input: Input) -> Answer {
    let org = find(&app, &input.caller, &segment(&org))?;
    let holder = Member {
        user_id: org.owner_user_id,
        email: String::new(),
        role: "owner".into(),
        joined_at: org.created_at,
    };
    Ok(json(StatusCode::OK, &[holder]))
}

/// Chooses the organisation that requests are for. A token has no choice: only its own is accepted.
#[utoipa::path(operation_id = "choose_org", post, path = "/v1/me/current-org", tag = "orgs", request_body = CurrentOrg,
    responses((status = 200, body = CurrentOrg), (status = 403, description = "not a member", body = Error)))]
pub async fn choose(app: Arc<App>, mut input: Input) -> Answer {
    let CurrentOrg { org_id } = input.json(JSON_LIMIT).await?;
    match find(&app, &input.caller, &org_id) {
        Ok(org) => Ok(json(StatusCode::OK, &CurrentOrg { org_id: org.id })),
        Err(_) => Err(Problem::new(StatusCode::FORBIDDEN, "not_a_member", "not a member of requested org")),
    }
}
