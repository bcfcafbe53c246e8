//! The one list of routes: the gate, the metrics and the tests of the OpenAPI document all use it.

/// Method of a route that takes every method.
pub const ANY: &str = "ANY";
/// Last part of a template that stands for the rest of the path, which may be empty.
pub const REST: &str = "{*path}";

/// A route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// HTTP method, or [`ANY`].
    pub method: &'static str,
    /// Path with `{…}` for parameters; `{id}` is always a sandbox, [`REST`] as its last part the rest.
    pub template: &'static str,
    /// Who it is for.
    pub kind: Kind,
}

/// Whom a route is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Needs no token and is not rate limited.
    Public,
    /// Needs a token that may change things. Also for a `GET` that does something, such as a WebSocket.
    Plain,
    /// Needs a token: it only looks.
    Looks,
    /// Needs a token, also one that is for one sandbox only: it is about the token itself.
    Everyone,
    /// About a sandbox, and yet makes or deletes something beside it.
    Beyond,
    /// Whether it changes anything is said in the body; the handler checks it.
    Asks,
}

const fn open(method: &'static str, template: &'static str) -> Route {
    Route { method, template, kind: Kind::Public }
}

const fn shut(method: &'static str, template: &'static str) -> Route {
    Route { method, template, kind: Kind::Plain }
}

const fn look(template: &'static str) -> Route {
    Route { method: "GET", template, kind: Kind::Looks }
}

const fn special(method: &'static str, template: &'static str, kind: Kind) -> Route {
    Route { method, template, kind }
}

/// Every route there is.
pub const ROUTES: &[Route] = &[
    open("GET", "/healthz"),
    open("GET", "/version"),
    open("GET", "/v1/version"),
    open("GET", "/metrics"),
    open("GET", "/openapi.json"),
    special("GET", "/v1/me", Kind::Everyone),
    look("/v1/me/tokens"),
    shut("POST", "/v1/me/tokens"),
    shut("DELETE", "/v1/me/tokens/{prefix}"),
    shut("POST", "/v1/me/current-org"),
    look("/v1/quotas"),
    look("/v1/orgs"),
    look("/v1/orgs/{org}"),
    look("/v1/orgs/{org}/members"),
    look("/v1/templates"),
    shut("POST", "/v1/templates/build"),
    look("/v1/templates/builds"),
    look("/v1/templates/builds/{build}"),
    look("/v1/templates/builds/{build}/logs"),
    shut("POST", "/v1/templates/builds/{build}/cancel"),
    look("/v1/templates/{name}"),
    shut("DELETE", "/v1/templates/{name}"),
    shut("POST", "/v1/sandboxes"),
    look("/v1/sandboxes"),
    look("/v1/sandboxes/{id}"),
    shut("DELETE", "/v1/sandboxes/{id}"),
    look("/v1/sandboxes/{id}/lifecycle"),
    shut("PATCH", "/v1/sandboxes/{id}/lifecycle"),
    shut("POST", "/v1/sandboxes/{id}/pause"),
    shut("POST", "/v1/sandboxes/{id}/resume"),
    shut("POST", "/v1/sandboxes/{id}/hibernate"),
    shut("POST", "/v1/sandboxes/{id}/stop"),
    shut("POST", "/v1/sandboxes/{id}/wake"),
    shut("POST", "/v1/sandboxes/{id}/start"),
    special("POST", "/v1/sandboxes/{id}/snapshots", Kind::Beyond),
    look("/v1/snapshots"),
    look("/v1/snapshots/{snapshot}"),
    shut("DELETE", "/v1/snapshots/{snapshot}"),
    special("POST", "/v1/sandboxes/{id}/fork", Kind::Beyond),
    special("POST", "/v1/sandboxes/{id}/fork-tree", Kind::Beyond),
    special("POST", "/v1/sandboxes/{id}/promote", Kind::Beyond),
    shut("POST", "/v1/volumes"),
    look("/v1/volumes"),
    look("/v1/volumes/{name}"),
    shut("PATCH", "/v1/volumes/{name}"),
    shut("DELETE", "/v1/volumes/{name}"),
    shut("POST", "/v1/volumes/{name}/snapshots"),
    look("/v1/volumes/{name}/snapshots"),
    shut("DELETE", "/v1/volumes/{name}/snapshots/{snapshot}"),
    look("/v1/volume-snapshots"),
    shut("POST", "/v1/sandboxes/{id}/exec"),
    shut("POST", "/v1/sandboxes/{id}/exec/stream"),
    shut("GET", "/v1/sandboxes/{id}/exec/ws"),
    shut("GET", "/v1/sandboxes/{id}/exec/pty"),
    shut("GET", "/v1/sandboxes/{id}/ssh"),
    shut("GET", "/v1/sandboxes/{id}/lsp/{language}"),
    look("/v1/lsp/languages"),
    look("/v1/repl/languages"),
    shut("POST", "/v1/sandboxes/{id}/repl"),
    shut("POST", "/v1/sandboxes/{id}/repl/sessions"),
    look("/v1/sandboxes/{id}/repl/sessions"),
    shut("DELETE", "/v1/sandboxes/{id}/repl/sessions/{session}"),
    shut("POST", "/v1/sandboxes/{id}/repl/sessions/{session}/run"),
    look("/v1/sandboxes/{id}/execs"),
    // Whoever follows the session now is cut off by it.
    shut("GET", "/v1/sandboxes/{id}/execs/{session}"),
    shut("DELETE", "/v1/sandboxes/{id}/execs/{session}"),
    look("/v1/sandboxes/{id}/logs"),
    look("/v1/sandboxes/{id}/events"),
    look("/v1/events"),
    look("/v1/audit"),
    look("/v1/stats/boot"),
    look("/v1/metrics/sandbox/{id}"),
    look("/v1/metrics/overview"),
    look("/v1/sandboxes/{id}/fs"),
    shut("PUT", "/v1/sandboxes/{id}/fs"),
    shut("DELETE", "/v1/sandboxes/{id}/fs"),
    look("/v1/sandboxes/{id}/fs/dir"),
    look("/v1/sandboxes/{id}/fs/stat"),
    special("POST", "/mcp", Kind::Asks),
    special("POST", "/v1/mcp", Kind::Asks),
    special("POST", "/v1/sandboxes/{id}/mcp", Kind::Asks),
    look("/v1/sandboxes/{id}/ports"),
    shut("POST", "/v1/sandboxes/{id}/ports"),
    shut("DELETE", "/v1/sandboxes/{id}/ports/{port}"),
    shut(ANY, "/v1/sandboxes/{id}/proxy/{port}/{*path}"),
    shut("POST", "/v1/sandboxes/{id}/preview"),
    shut("POST", "/v1/sandboxes/{id}/preview-token"),
    look("/v1/sandboxes/{id}/preview-tokens"),
    shut("DELETE", "/v1/sandboxes/{id}/preview-tokens/{token}"),
];

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// This route, with the sandbox it concerns.
    Route(Route, Option<&'a str>),
    /// The path is known, for these methods.
    OtherMethods(Vec<&'static str>),
    /// Nothing of ours.
    Nothing,
}

/// Finds the route of a request.
pub fn find<'a>(method: &str, path: &'a str) -> Found<'a> {
    let mut others = Vec::new();
    for route in ROUTES {
        let Some(sandbox) = matches(route.template, path) else { continue };
        if route.method == method || route.method == ANY {
            return Found::Route(*route, sandbox);
        }
        others.push(route.method);
    }
    if others.is_empty() { Found::Nothing } else { Found::OtherMethods(others) }
}

/// `None` when the path is another one; otherwise the sandbox in it.
fn matches<'a>(template: &str, path: &'a str) -> Option<Option<&'a str>> {
    let (mut wanted, mut given) = (template.split('/'), path.split('/'));
    let mut sandbox = None;
    loop {
        match (wanted.next(), given.next()) {
            (None, None) | (Some(REST), _) => return Some(sandbox),
            (Some(_), None) | (None, Some(_)) => return None,
            (Some(want), Some(got)) if want.starts_with('{') => {
                if got.is_empty() {
                    return None;
                }
                if want == "{id}" {
                    sandbox = Some(got);
                }
            }
            (Some(want), Some(got)) if want != got => return None,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found() {
        assert_eq!(find("GET", "/healthz"), Found::Route(open("GET", "/healthz"), None));
        assert_eq!(
            find("GET", "/v1/sandboxes/abc/fs/dir"),
            Found::Route(look("/v1/sandboxes/{id}/fs/dir"), Some("abc"))
        );
        assert_eq!(find("PUT", "/v1/sandboxes"), Found::OtherMethods(vec!["POST", "GET"]));
        let proxy = shut(ANY, "/v1/sandboxes/{id}/proxy/{port}/{*path}");
        for path in ["", "/", "//", "/a/b", "/a//../%2f"] {
            let path = format!("/v1/sandboxes/abc/proxy/3000{path}");
            assert_eq!(find("HEAD", &path), Found::Route(proxy, Some("abc")), "{path:?}");
        }
        for path in ["/v1/sandboxes/abc/proxy", "/v1/sandboxes/abc/proxy/", "/v1/sandboxes//proxy/3000/"] {
            assert_eq!(find("GET", path), Found::Nothing, "{path:?}");
        }
        for path in ["/healthzX", "/v1/sandboxes/", "/v1/sandboxes//fs", "/", "", "/v1/sandboxes/a/forks"] {
            assert_eq!(find("GET", path), Found::Nothing, "{path:?}");
        }
    }
}
