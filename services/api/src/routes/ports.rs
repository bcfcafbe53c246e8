//! Ports of a sandbox: those that its owner names, and those on which something listens.
//!
//! A named port is a label of the sandbox (`port.<number>`), so it goes with it and no copy inherits it. Where the operator's
//! edge serves named ports only, naming one makes it public.

use std::{collections::BTreeMap, sync::Arc};

use http::StatusCode;
use pandastack_bus::vmm::SandboxInfo;
use pandastack_protocol::{Code, Ports, Request};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json, no_content};
use crate::{
    app::App,
    bus::again,
    guest::{GuestError, Wake},
    input::{Input, JSON_LIMIT, text, whole},
    problem::{Effect, Problem},
    wire::Error,
};

/// What a label of a named port begins with.
pub const LABEL: &str = "port.";
const DEFAULT_LABEL: &str = "service";
const LABEL_BYTES: usize = 64;
/// Listening ports that are shown; a guest may claim any number.
const SHOWN: usize = 1024;
/// Never shown nor named: remote shells are none of this.
const SSH: u16 = 22;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let all = warp::path!("v1" / "sandboxes" / String / "ports");
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(list(a, id, i)));
    let declare =
        all.and(warp::post()).and(with(app)).and(input()).then(|id, a, i| finish(declare(a, id, i)));
    let withdraw = warp::path!("v1" / "sandboxes" / String / "ports" / String)
        .and(warp::delete())
        .and(with(app))
        .and(input())
        .then(|id, port, a, i| finish(withdraw(a, id, port, i)));
    list.or(declare).unify().or(withdraw).unify().boxed()
}

/// A port.
#[derive(Debug, PartialEq, Serialize, ToSchema)]
pub struct Port {
    /// Its number.
    pub port: u16,
    /// What its owner calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Whether something listens there.
    pub listening: bool,
    /// `user`: named by its owner. `detected`: something listens there.
    pub source: String,
    /// Where it is reached with a token, below the address of the API.
    pub proxy_url: String,
}

/// A port to be named.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct DeclarePort {
    /// Its number; not 22.
    #[serde(default, deserialize_with = "whole")]
    #[schema(required = true, nullable = false, minimum = 1, maximum = 65535)]
    pub port: Option<u64>,
    /// What to call it; `service` when absent.
    #[schema(max_length = 64)]
    pub label: Option<String>,
}

/// A port number that may be used.
pub fn checked(number: u64) -> Result<u16, Problem> {
    match u16::try_from(number) {
        Ok(port) if port != 0 && port != SSH => Ok(port),
        _ => Err(Problem::invalid("`port` must be 1 to 65535, and not 22").with("field", "port")),
    }
}

/// A port number from a path.
pub fn parsed(text: &str) -> Result<u16, Problem> {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    checked(if digits { text.parse().unwrap_or(0) } else { 0 })
}

/// Path below which a port is reached.
pub fn proxy_path(id: &str, port: u16) -> String {
    format!("/v1/sandboxes/{id}/proxy/{port}")
}

/// The named ports of a sandbox.
fn named(info: &SandboxInfo) -> BTreeMap<u16, String> {
    let ports = info.metadata.iter().filter_map(|(key, label)| {
        let port = key.strip_prefix(LABEL)?.parse().ok()?;
        Some((port, label.clone()))
    });
    ports.collect()
}

/// Named and listening ports as one list.
fn merged(id: &str, named: BTreeMap<u16, String>, listening: &[u16]) -> Vec<Port> {
    let port = |port: u16, label: Option<String>, listening: bool| Port {
        port,
        source: if label.is_some() { "user" } else { "detected" }.to_owned(),
        label,
        listening,
        proxy_url: format!("{}/", proxy_path(id, port)),
    };
    let mut all: BTreeMap<u16, Port> = listening
        .iter()
        .filter(|at| **at != SSH && **at != 0)
        .take(SHOWN)
        .map(|at| (*at, port(*at, None, true)))
        .collect();
    for (at, label) in named {
        let listens = listening.contains(&at);
        all.insert(at, port(at, Some(label), listens));
    }
    all.into_values().collect()
}

/// The named ports and those on which something listens, by number.
#[utoipa::path(operation_id = "list_ports", get, path = "/v1/sandboxes/{id}/ports", tag = "ports",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Vec<Port>), (status = 404, body = Error),
        (status = 409, description = "it is paused or failed", body = Error)))]
pub async fn list(app: Arc<App>, id: String, input: Input) -> Answer {
    let info = app.get_own(&input.caller, &id).await?;
    app.touch.used(&id);
    let listening = match app.guests.call::<Ports>(&id, &Request::Ports {}, Wake::Yes).await {
        Ok((ports, _)) => ports.ports,
        // An agent from before there was such a question.
        Err((GuestError::Refused(failure), _)) if failure.code == Code::Unsupported => Vec::new(),
        Err((error, _)) => return Err(error.reading(&id)),
    };
    Ok(json(StatusCode::OK, &merged(&id, named(&info), &listening)))
}

/// Names a port.
#[utoipa::path(operation_id = "declare_port", post, path = "/v1/sandboxes/{id}/ports", tag = "ports",
    params(("id" = String, Path, description = "sandbox id")), request_body = DeclarePort,
    responses((status = 201, body = Port), (status = 404, body = Error), (status = 409, description = "it is being made", body = Error)))]
pub async fn declare(app: Arc<App>, id: String, mut input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let wish: DeclarePort = input.json(JSON_LIMIT).await?;
    let port = checked(wish.port.unwrap_or(0))?;
    let label = wish.label.filter(|label| !label.is_empty()).unwrap_or_else(|| DEFAULT_LABEL.into());
    text("label", &label, LABEL_BYTES)?;
    set(&app, &id, port, &label).await?;
    let mut made = merged(&id, [(port, label)].into(), &[]);
    Ok(json(StatusCode::CREATED, &made.remove(0)))
}

/// Takes a port's name away.
#[utoipa::path(operation_id = "withdraw_port", delete, path = "/v1/sandboxes/{id}/ports/{port}", tag = "ports",
    params(("id" = String, Path, description = "sandbox id"), ("port" = u16, Path, description = "its number")),
    responses((status = 204), (status = 404, body = Error), (status = 409, description = "it is being made", body = Error)))]
pub async fn withdraw(app: Arc<App>, id: String, port: String, input: Input) -> Answer {
    let info = app.get_own(&input.caller, &id).await?;
    let port = parsed(&port)?;
    if !named(&info).contains_key(&port) {
        return Err(Problem::not_found(format!("port {port} has no name")));
    }
    set(&app, &id, port, "").await?;
    Ok(no_content())
}

async fn set(app: &App, id: &str, port: u16, label: &str) -> Result<SandboxInfo, Problem> {
    let key = format!("{LABEL}{port}");
    let done = again(|| app.vmm.set_label(id.to_owned(), key.clone(), label.to_owned())).await;
    done.map_err(|error| match error {
        pandastack_bus::Error::NotFound(_) => {
            app.forget(id);
            Problem::no_sandbox(id)
        }
        other => Problem::about(id, &other, Effect::Perhaps),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_and_detected_ports_are_one_list() {
        let ports = merged("x", [(8080, "web".to_owned()), (9, "later".to_owned())].into(), &[22, 80, 8080]);
        let shown: Vec<_> = ports
            .iter()
            .map(|port| (port.port, port.label.as_deref(), port.listening, port.source.as_str()))
            .collect();
        assert_eq!(
            shown,
            [
                (9, Some("later"), false, "user"),
                (80, None, true, "detected"),
                (8080, Some("web"), true, "user")
            ]
        );
        assert_eq!(ports[1].proxy_url, "/v1/sandboxes/x/proxy/80/");
    }

    #[test]
    fn a_guest_cannot_claim_ports_without_end() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        assert!(merged("x", BTreeMap::new(), &all).len() <= SHOWN);
    }

    #[test]
    fn only_ports_are_ports() {
        for bad in ["", "0", "22", "65536", "+80", " 80", "8o", "000080"] {
            assert_eq!(parsed(bad).unwrap_err().status.as_u16(), 400, "{bad:?}");
        }
        assert_eq!((parsed("1").unwrap(), parsed("65535").unwrap(), parsed("0080").unwrap()), (1, 65535, 80));
    }
}
