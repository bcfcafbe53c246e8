//! Signed previews: an address that opens one port of one sandbox to whoever has it, for a time, and can be revoked.
//!
//! Owns: who may make and revoke one. Refuses to know: the token's form and who serves it; both are edge's.

use std::sync::Arc;

use http::{HeaderMap, StatusCode, header};
use pandastack_bus::edge::{Minted, PreviewInfo, PreviewSpec};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, no_content, ports::checked};
use crate::{
    app::App,
    bus::{again, again_knowing},
    input::{Input, JSON_LIMIT, segment, text, whole},
    problem::{Effect, Problem},
    wire::{Error, rfc3339},
};

const DEFAULT_TTL: u64 = 3600;
const MAX_TTL: u64 = 604_800;
const PATHS: usize = 32;
const PATH_BYTES: usize = 256;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let make = warp::path!("v1" / "sandboxes" / String / "preview")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(preview(a, id, i)));
    let make_token = warp::path!("v1" / "sandboxes" / String / "preview-token")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(preview_token(a, id, i)));
    let list = warp::path!("v1" / "sandboxes" / String / "preview-tokens")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(list(a, id, i)));
    let revoke = warp::path!("v1" / "sandboxes" / String / "preview-tokens" / String)
        .and(warp::delete())
        .and(with(app))
        .and(input())
        .then(|id, token, a, i| finish(revoke(a, id, token, i)));
    make.or(make_token).unify().or(list).unify().or(revoke).unify().boxed()
}

/// What a preview shall open.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct MakePreview {
    /// TCP port; not 22.
    #[serde(default, deserialize_with = "whole")]
    #[schema(required = true, nullable = false, minimum = 1, maximum = 65535)]
    pub port: Option<u64>,
    /// Seconds for which it is good; 3600 when absent or 0, 604800 at most.
    #[serde(default, deserialize_with = "whole")]
    pub ttl_seconds: Option<u64>,
    /// Paths that it opens, each with what is below it; all when absent or empty. Without `|` and `,`.
    #[schema(max_items = 32)]
    pub paths: Option<Vec<String>>,
}

/// A preview.
#[derive(Debug, Serialize, ToSchema)]
pub struct Preview {
    /// Where it is.
    pub url: String,
    /// Its token, also in the address: whoever has it has the preview.
    pub token: String,
    /// Its public name, to revoke it by.
    pub id: String,
    /// The sandbox.
    pub sandbox_id: String,
    /// TCP port.
    pub port: u16,
    /// Paths that it opens; none: all.
    pub paths: Vec<String>,
    /// RFC 3339.
    pub expires_at: String,
}

/// A preview without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct PreviewToken {
    /// Its public name, to revoke it by.
    pub id: String,
    /// The sandbox.
    pub sandbox_id: String,
    /// TCP port.
    pub port: u16,
    /// Paths that it opens; none: all.
    pub paths: Vec<String>,
    /// RFC 3339.
    pub created_at: String,
    /// RFC 3339.
    pub expires_at: String,
}

impl From<PreviewInfo> for PreviewToken {
    fn from(info: PreviewInfo) -> Self {
        Self {
            id: info.id,
            sandbox_id: info.sandbox,
            port: info.port,
            paths: info.paths,
            created_at: rfc3339(info.created_unix.saturating_mul(1000)),
            expires_at: rfc3339(info.expires_unix.saturating_mul(1000)),
        }
    }
}

/// Paths as they go into a token.
fn paths(wished: Vec<String>) -> Result<Vec<String>, Problem> {
    let refused =
        |sentence: &str| Err(Problem::invalid(format!("field `paths`: {sentence}")).with("field", "paths"));
    if wished.len() > PATHS {
        return refused("over 32 paths");
    }
    let mut paths = Vec::with_capacity(wished.len());
    for path in wished {
        text("paths", &path, PATH_BYTES)?;
        if path.contains(['|', ',']) || path.chars().any(char::is_control) {
            return refused("a path contains `|`, `,` or a control character");
        }
        if path.split('/').any(|part| part == "..") {
            return refused("a path contains `..`");
        }
        paths.push(if path.starts_with('/') { path } else { format!("/{path}") });
    }
    Ok(paths)
}

/// Where a preview is: below what the operator says, or on the edge's port of the host that the caller knows.
fn url(minted: &Minted, headers: &HeaderMap) -> String {
    let path = format!("/v1/p/{}/", minted.token);
    if !minted.base_url.is_empty() {
        return format!("{}{path}", minted.base_url.trim_end_matches('/'));
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = match host.rfind(']') {
        // An IPv6 address in brackets.
        Some(end) => &host[..=end],
        None => host.split(':').next().unwrap_or_default(),
    };
    let name = if name.is_empty() { "localhost" } else { name };
    format!("http://{name}:{}{path}", minted.http_port)
}

/// Makes an address that opens a port of the sandbox to whoever has it, without a token of the API.
#[utoipa::path(operation_id = "make_preview", post, path = "/v1/sandboxes/{id}/preview", tag = "ports",
    params(("id" = String, Path, description = "sandbox id")), request_body = MakePreview,
    responses((status = 200, body = Preview), (status = 404, body = Error)))]
pub async fn preview(app: Arc<App>, id: String, mut input: Input) -> Answer {
    // Fresh: nothing is made for a sandbox that is not there.
    let sandbox = app.get_own(&input.caller, &id).await?;
    let wish: MakePreview = input.json(JSON_LIMIT).await?;
    let port = checked(wish.port.unwrap_or(0))?;
    let ttl_seconds = match wish.ttl_seconds {
        None | Some(0) => DEFAULT_TTL,
        Some(seconds) => seconds.min(MAX_TTL),
    };
    let paths = paths(wish.paths.unwrap_or_default())?;
    let spec = PreviewSpec { workspace: sandbox.workspace, sandbox: id, port, ttl_seconds, paths };
    // Once more makes a second one, which nobody learns of and which expires.
    let minted = again(|| app.edge.mint(spec.clone()))
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let preview = Preview {
        url: url(&minted, &input.headers),
        token: minted.token,
        id: minted.info.id,
        sandbox_id: minted.info.sandbox,
        port: minted.info.port,
        paths: minted.info.paths,
        expires_at: rfc3339(minted.info.expires_unix.saturating_mul(1000)),
    };
    Ok(json(StatusCode::OK, &preview))
}

/// Another name for `preview`.
#[utoipa::path(operation_id = "make_preview_token", post, path = "/v1/sandboxes/{id}/preview-token", tag = "ports",
    params(("id" = String, Path, description = "sandbox id")), request_body = MakePreview,
    responses((status = 200, body = Preview), (status = 404, body = Error)))]
pub async fn preview_token(app: Arc<App>, id: String, input: Input) -> Answer {
    preview(app, id, input).await
}

/// The previews of a sandbox that are good now, oldest first.
#[utoipa::path(operation_id = "list_preview_tokens", get, path = "/v1/sandboxes/{id}/preview-tokens", tag = "ports",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Vec<PreviewToken>), (status = 404, body = Error)))]
pub async fn list(app: Arc<App>, id: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let found = again(|| app.edge.list(input.caller.workspace.clone(), id.clone()))
        .await
        .map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let found: Vec<PreviewToken> = found.into_iter().map(PreviewToken::from).collect();
    Ok(json(StatusCode::OK, &found))
}

/// Revokes a preview by its public name or its token. What goes on with it is cut.
#[utoipa::path(operation_id = "revoke_preview_token", delete, path = "/v1/sandboxes/{id}/preview-tokens/{token}", tag = "ports",
    params(("id" = String, Path, description = "sandbox id"), ("token" = String, Path, description = "its public name, or all of it")),
    responses((status = 204), (status = 404, body = Error)))]
pub async fn revoke(app: Arc<App>, id: String, token: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let (workspace, token) = (input.caller.workspace, segment(&token));
    match again_knowing(|| app.edge.revoke(workspace.clone(), id.clone(), token.clone())).await {
        Ok((gone, perhaps)) if gone || perhaps => Ok(no_content()),
        Ok(_) => Err(Problem::not_found("no such preview")),
        Err(error) => Err(Problem::from_bus(&error, Effect::Perhaps)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_absolute_and_fit_into_a_token() {
        let good = paths(vec!["a".into(), "/b/c".into(), String::new()]).unwrap();
        assert_eq!(good, ["/a", "/b/c", "/"]);
        for bad in ["a|b", "a,b", "/a/../b", "a\nb", "a\0b", &"x".repeat(257)] {
            assert_eq!(paths(vec![(*bad).to_owned()]).unwrap_err().status.as_u16(), 400, "{bad:?}");
        }
        assert!(paths(vec![String::new(); 33]).is_err());
    }

    #[test]
    fn the_address_is_the_operators_or_that_of_the_caller() {
        let minted = |base: &str| Minted {
            token: "t.s".into(),
            info: PreviewInfo {
                id: String::new(),
                workspace: String::new(),
                sandbox: String::new(),
                port: 1,
                paths: Vec::new(),
                created_unix: 0,
                expires_unix: 0,
            },
            base_url: base.into(),
            http_port: 8081,
        };
        for (base, host, url_is) in [
            ("https://p.test/", "api.test:8080", "https://p.test/v1/p/t.s/"),
            ("", "api.test:8080", "http://api.test:8081/v1/p/t.s/"),
            ("", "[::1]:8080", "http://[::1]:8081/v1/p/t.s/"),
            ("", "", "http://localhost:8081/v1/p/t.s/"),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().unwrap());
            assert_eq!(url(&minted(base), &headers), url_is);
        }
    }
}
