//! What a token may do. Pure.
//!
//! Owns: which routes a scope opens, and the sentences of a 403. Refuses to know: tokens.

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{
    problem::Problem,
    table::{Kind, Route},
};

/// How much a token may change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Everything.
    #[default]
    Full,
    /// Nothing: it only looks.
    Read,
}

impl Scope {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Read => "read",
        }
    }

    /// The scope of a word; none means all.
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "" | "full" => Some(Self::Full),
            "read" => Some(Self::Read),
            _ => None,
        }
    }
}

/// What a token may do within its workspace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// How much it may change.
    #[serde(default)]
    pub scope: Scope,
    /// The only sandbox that it sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

impl Grant {
    /// Whether it is all there is to grant.
    pub fn is_whole(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a request for this route, about this sandbox, may go on.
    pub fn check(&self, route: &Route, sandbox: Option<&str>) -> Result<(), Problem> {
        if let Some(own) = &self.sandbox {
            match sandbox {
                // As for a foreign one.
                Some(id) if id != own => return Err(Problem::no_sandbox(id)),
                Some(_) if route.kind != Kind::Beyond => {}
                None if route.kind == Kind::Everyone => {}
                _ => {
                    return Err(refused(&format!(
                        "this token is for sandbox {own} only, not for what is beside it"
                    )));
                }
            }
        }
        let changes = matches!(route.kind, Kind::Plain | Kind::Beyond);
        if self.scope == Scope::Read && changes { Err(read_only()) } else { Ok(()) }
    }

    /// Whether what the body of a request asks for may be done.
    pub fn check_asked(&self, reads: bool) -> Result<(), Problem> {
        if self.scope == Scope::Read && !reads { Err(read_only()) } else { Ok(()) }
    }
}

fn read_only() -> Problem {
    refused("this token may only read")
}

fn refused(sentence: &str) -> Problem {
    Problem::new(StatusCode::FORBIDDEN, "scope", sentence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::ROUTES;

    fn status(grant: &Grant, route: &Route, sandbox: Option<&str>) -> u16 {
        grant.check(route, sandbox).map_or_else(|problem| problem.status.as_u16(), |()| 200)
    }

    #[test]
    fn a_whole_grant_opens_every_route_and_a_reading_one_no_change() {
        let reading = Grant { scope: Scope::Read, ..Grant::default() };
        for route in ROUTES {
            let sandbox = route.template.contains("{id}").then_some("s");
            assert_eq!(status(&Grant::default(), route, sandbox), 200);
            let opens = route.kind == Kind::Asks || route.method == "GET" && route.kind != Kind::Plain;
            assert_eq!(status(&reading, route, sandbox) == 200, opens, "{route:?}");
            assert!(route.kind != Kind::Asks || route.template.ends_with("/mcp"), "who checks {route:?}?");
        }
    }

    #[test]
    fn a_sandboxs_token_sees_that_sandbox_and_makes_nothing_beside_it() {
        let bound = Grant { sandbox: Some("s".into()), ..Grant::default() };
        for route in ROUTES.iter().filter(|route| route.kind != Kind::Public) {
            if route.template.contains("{id}") {
                assert_eq!(status(&bound, route, Some("other")), 404, "{route:?}");
                let beyond =
                    ["/fork", "/fork-tree", "/promote"].iter().any(|end| route.template.ends_with(end))
                        || route.template == "/v1/sandboxes/{id}/snapshots";
                assert_eq!(status(&bound, route, Some("s")), if beyond { 403 } else { 200 }, "{route:?}");
            } else {
                let expected = if route.template == "/v1/me" { 200 } else { 403 };
                assert_eq!(status(&bound, route, None), expected, "{route:?}");
            }
        }
    }
}
