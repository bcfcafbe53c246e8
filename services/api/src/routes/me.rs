//! Who am I, and my workspace's tokens.

use std::sync::Arc;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, no_content};
use crate::{
    app::App,
    auth::Caller,
    input::{Input, JSON_LIMIT, segment, text, whole},
    problem::Problem,
    scope::{Grant, Scope},
    tenancy::{self, TenancyError, TokenRecord},
    wire::{Error, rfc3339},
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let tokens = warp::path!("v1" / "me" / "tokens");
    let me =
        warp::path!("v1" / "me").and(warp::get()).and(with(app)).and(input()).then(|a, i| finish(me(a, i)));
    let list = tokens.and(warp::get()).and(with(app)).and(input()).then(|a, i| finish(list_tokens(a, i)));
    let make = tokens.and(warp::post()).and(with(app)).and(input()).then(|a, i| finish(create_token(a, i)));
    let revoke = warp::path!("v1" / "me" / "tokens" / String)
        .and(warp::delete())
        .and(with(app))
        .and(input())
        .then(|prefix, a, i| finish(revoke_token(a, prefix, i)));
    me.or(list).unify().or(make).unify().or(revoke).unify().boxed()
}

/// The caller.
#[derive(Debug, Serialize, ToSchema)]
pub struct Me {
    /// The token's workspace.
    pub user_id: String,
    /// Always empty: tokens have no e-mail address.
    pub email: String,
    /// Always null: a token is nobody's, so it has no choice of organisations. `GET /v1/orgs` has the one that it opens.
    #[schema(value_type = Option<Object>)]
    pub current_org: Option<serde_json::Value>,
    /// Always empty, for the same reason.
    #[schema(value_type = Vec<Object>)]
    pub orgs: Vec<serde_json::Value>,
    /// Always `token`.
    pub auth_method: String,
    /// The token's workspace.
    pub workspace: String,
    /// The token itself.
    pub token: TokenInfo,
}

/// A token without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenInfo {
    /// Its first 12 characters, by which it is revoked.
    pub prefix: String,
    /// Free text.
    pub label: String,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339; null until its first use, at most a minute old.
    pub last_used_at: Option<String>,
    /// RFC 3339; null when it does not expire.
    pub expires_at: Option<String>,
    /// How much it may change.
    pub scope: Scope,
    /// The only sandbox that it is for; null when it is for the whole workspace.
    pub sandbox_id: Option<String>,
}

/// A token that was just made.
#[derive(Debug, Serialize, ToSchema)]
pub struct NewToken {
    /// The whole token: shown here and never again.
    pub token: String,
    /// The rest.
    #[serde(flatten)]
    pub info: TokenInfo,
}

/// What a new token shall be.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct CreateToken {
    /// Free text, at most 200 bytes.
    #[schema(max_length = 200)]
    pub label: Option<String>,
    /// Another word for `label`.
    #[schema(max_length = 200)]
    pub name: Option<String>,
    /// Days until it expires; absent or 0 means never. It never outlives the token that makes it: `expires_at` of the answer
    /// says what holds.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 36500)]
    pub expires_in_days: Option<u64>,
    /// How much it may change; everything when absent. One that may not do everything makes no tokens.
    pub scope: Option<Scope>,
    /// The only sandbox that it is for; the whole workspace when absent.
    #[schema(max_length = 64)]
    pub sandbox_id: Option<String>,
}

fn info(prefix: String, record: &TokenRecord) -> TokenInfo {
    let optional = |ms: u64| (ms != 0).then(|| rfc3339(ms));
    TokenInfo {
        prefix,
        label: record.label.clone(),
        created_at: rfc3339(record.created_unix_ms),
        last_used_at: optional(record.last_used_unix_ms),
        expires_at: optional(record.expires_unix_ms),
        scope: record.grant.scope,
        sandbox_id: record.grant.sandbox.clone(),
    }
}

fn refuse(error: TenancyError) -> Problem {
    match error {
        TenancyError::BadToken(text) => Problem::invalid(text),
        TenancyError::TooMany => Problem::conflict(error.to_string()),
        TenancyError::NoWorkspace(_) => Problem::unauthorized("invalid api token"),
        TenancyError::NotWhole => Problem::new(StatusCode::FORBIDDEN, "scope", error.to_string()),
        TenancyError::BadName | TenancyError::BadRate | TenancyError::Permanent => {
            Problem::invalid(error.to_string())
        }
        TenancyError::Records(cause) => {
            tracing::error!(error = %cause, "the tenants' records cannot be changed");
            Problem::internal()
        }
    }
}

/// Whose token this is.
#[utoipa::path(get, path = "/v1/me", tag = "me", responses((status = 200, body = Me)))]
pub async fn me(app: Arc<App>, input: Input) -> Answer {
    let Caller { workspace, prefix, .. } = input.caller;
    let Some((prefix, record)) = app.tenancy.token(&prefix) else {
        return Err(Problem::unauthorized("invalid api token"));
    };
    let me = Me {
        user_id: workspace.clone(),
        email: String::new(),
        current_org: None,
        orgs: Vec::new(),
        auth_method: "token".into(),
        workspace,
        token: info(prefix, &record),
    };
    Ok(json(StatusCode::OK, &me))
}

/// The tokens of the workspace, oldest first.
#[utoipa::path(get, path = "/v1/me/tokens", tag = "me", responses((status = 200, body = Vec<TokenInfo>)))]
pub async fn list_tokens(app: Arc<App>, input: Input) -> Answer {
    let tokens: Vec<TokenInfo> = app
        .tenancy
        .tokens(&input.caller.workspace)
        .into_iter()
        .map(|(prefix, record)| info(prefix, &record))
        .collect();
    Ok(json(StatusCode::OK, &tokens))
}

/// Makes a token of the workspace.
#[utoipa::path(post, path = "/v1/me/tokens", tag = "me", request_body = Option<CreateToken>,
    responses((status = 200, body = NewToken), (status = 404, description = "no such sandbox", body = Error),
        (status = 409, description = "too many tokens", body = Error)))]
pub async fn create_token(app: Arc<App>, mut input: Input) -> Answer {
    let wish: CreateToken = input.json(JSON_LIMIT).await?;
    for (field, given) in [("label", &wish.label), ("name", &wish.name)] {
        text(field, given.as_deref().unwrap_or_default(), 200)?;
    }
    let label = wish.label.or(wish.name).unwrap_or_default();
    let days = u32::try_from(wish.expires_in_days.unwrap_or(0)).unwrap_or(u32::MAX);
    let sandbox = wish.sandbox_id.filter(|id| !id.is_empty());
    if let Some(id) = &sandbox {
        app.own(&input.caller, id).await?;
    }
    let grant = Grant { scope: wish.scope.unwrap_or_default(), sandbox };
    let wish = tenancy::NewToken { label, expires_in_days: days, grant };
    let (token, record) = app.tenancy.mint(&input.caller, wish).await.map_err(refuse)?;
    let info = info(token.prefix().to_owned(), &record);
    tracing::info!(workspace = input.caller.workspace, token = token.prefix(), "token made");
    Ok(json(StatusCode::OK, &NewToken { token: token.reveal().to_owned(), info }))
}

/// Revokes a token of the workspace.
#[utoipa::path(delete, path = "/v1/me/tokens/{prefix}", tag = "me",
    params(("prefix" = String, Path, description = "first 12 characters of the token")),
    responses((status = 204), (status = 404, description = "no such token in this workspace", body = Error)))]
pub async fn revoke_token(app: Arc<App>, prefix: String, input: Input) -> Answer {
    let prefix = segment(&prefix);
    if !app.tenancy.revoke(&prefix, &input.caller.workspace).await.map_err(refuse)? {
        return Err(Problem::not_found("token not found"));
    }
    tracing::info!(workspace = input.caller.workspace, token = %prefix, "token revoked");
    Ok(no_content())
}
