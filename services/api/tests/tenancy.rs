//! Tokens, organisations and rates: who may do what, over HTTP and by `busctl`.
#![allow(clippy::unwrap_used)]

mod client;
mod common;

use client::Api;
use common::Appliance;
use pandastack_api::operator::Operator;
use pandastack_bus::{Error, api::ApiBackend, quota::Resource};
use serde_json::{Value, json};

fn operator(appliance: &Appliance) -> Operator {
    Operator::new(&appliance.app)
}

async fn token(appliance: &Appliance, wish: Value) -> Api {
    let made = Api::new(appliance).post("/v1/me/tokens", &wish).await;
    assert_eq!(made.status, 200, "{}", made.text());
    Api::with_token(appliance, made.json()["token"].as_str().unwrap())
}

async fn tool(api: &Api, path: &str, name: &str, arguments: Value) -> Value {
    let params = json!({"name": name, "arguments": arguments});
    let message = json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params});
    api.post(path, &message).await.json()["result"].clone()
}

#[tokio::test]
async fn a_reading_token_changes_nothing() {
    let appliance = Appliance::start().await;
    let id = Api::new(&appliance).sandbox().await;
    let api = token(&appliance, json!({"scope": "read"})).await;

    for path in ["/v1/me", "/v1/sandboxes", &format!("/v1/sandboxes/{id}"), "/v1/orgs", "/v1/me/tokens"] {
        assert_eq!(api.get(path).await.status, 200, "{path}");
    }
    for route in pandastack_api::table::ROUTES {
        if route.method == "GET" || route.template.ends_with("/mcp") {
            continue;
        }
        let reply = api.send(route.method, &route.template.replace("{id}", &id), &[], b"{}").await;
        let body = reply.json();
        assert_eq!((reply.status, &body["code"]), (403, &json!("scope")), "{route:?}");
        assert_eq!(body["error"], "this token may only read");
    }
    assert_eq!(tool(&api, "/mcp", "list_sandboxes", json!({})).await["isError"], false);
    let refused = tool(&api, "/mcp", "create_sandbox", json!({})).await;
    assert_eq!(refused["isError"], true);
    assert!(refused["content"][0]["text"].as_str().unwrap().contains("may only read"));
    let shell = tool(&api, &format!("/v1/sandboxes/{id}/mcp"), "shell", json!({"command": "true"})).await;
    assert_eq!(shell["isError"], true);
    assert_eq!(appliance.vmm.sandboxes.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_sandboxs_token_sees_that_sandbox_only() {
    let appliance = Appliance::start().await;
    let whole = Api::new(&appliance);
    let (mine, other) = (whole.sandbox().await, whole.sandbox().await);
    let api = token(&appliance, json!({"sandbox_id": mine, "label": "agent"})).await;

    assert_eq!(api.get(&format!("/v1/sandboxes/{mine}")).await.status, 200);
    assert_eq!(api.post(&format!("/v1/sandboxes/{mine}/pause"), &json!({})).await.status, 204);
    assert_eq!(api.get(&format!("/v1/sandboxes/{other}")).await.status, 404);
    for path in ["/v1/sandboxes", "/v1/me/tokens", "/v1/volumes", "/v1/snapshots", "/v1/templates"] {
        let reply = api.get(path).await;
        assert_eq!(reply.status, 403, "{path}");
        assert!(reply.json()["error"].as_str().unwrap().contains(&mine));
    }
    for end in ["fork", "fork-tree", "promote", "snapshots"] {
        assert_eq!(api.post(&format!("/v1/sandboxes/{mine}/{end}"), &json!({})).await.status, 403, "{end}");
        assert_eq!(api.post(&format!("/v1/sandboxes/{other}/{end}"), &json!({})).await.status, 404, "{end}");
    }
    assert_eq!(api.post("/v1/mcp", &json!({})).await.status, 403);
    assert_eq!(api.post(&format!("/v1/sandboxes/{other}/mcp"), &json!({})).await.status, 404);
    let me = api.get("/v1/me").await.json();
    assert_eq!((&me["token"]["sandbox_id"], &me["token"]["scope"]), (&json!(mine), &json!("full")));

    for (wish, status) in [
        (json!({"sandbox_id": "zzzzzzzzzzzzzzzzzzzz"}), 404),
        (json!({"sandbox_id": "../x"}), 404),
        (json!({"sandbox_id": 5}), 400),
        (json!({"scope": "everything"}), 400),
        (json!({"scope": 1}), 400),
    ] {
        assert_eq!(whole.post("/v1/me/tokens", &wish).await.status, status, "{wish}");
    }
    let (foreign, _) = appliance.other_workspace().await;
    let theirs = Api::with_token(&appliance, &foreign);
    assert_eq!(theirs.post("/v1/me/tokens", &json!({"sandbox_id": mine})).await.status, 404);
}

#[tokio::test]
async fn a_token_shows_what_it_is_and_when_it_was_used() {
    let appliance = Appliance::start().await;
    let api = token(&appliance, json!({"label": "ci", "expires_in_days": 3, "scope": "read"})).await;
    let me = api.get("/v1/me").await.json();
    assert_eq!((&me["user_id"], &me["workspace"]), (&json!("default"), &json!("default")));
    assert_eq!((&me["email"], &me["current_org"], &me["orgs"]), (&json!(""), &Value::Null, &json!([])));
    let own = &me["token"];
    assert_eq!(
        (&own["label"], &own["scope"], &own["sandbox_id"]),
        (&json!("ci"), &json!("read"), &Value::Null)
    );
    assert!(
        own["expires_at"].is_string() && own["last_used_at"].is_string() && own["created_at"].is_string()
    );
    let listed = api.get("/v1/me/tokens").await.json();
    assert!(listed.as_array().unwrap().iter().any(|token| token["prefix"] == own["prefix"]));
}

#[tokio::test]
async fn the_organisation_is_the_workspace() {
    let appliance = Appliance::start().await;
    let (foreign, _) = appliance.other_workspace().await;
    let (mine, theirs) = (Api::new(&appliance), Api::with_token(&appliance, &foreign));
    let orgs = mine.get("/v1/orgs").await.json();
    let org = &orgs[0];
    let id = org["id"].as_str().unwrap();
    assert_eq!((orgs.as_array().unwrap().len(), id.len()), (1, 36));
    assert_eq!((&org["slug"], &org["role"]), (&json!("default"), &json!("owner")));
    for path in [id, "default"] {
        assert_eq!(mine.get(&format!("/v1/orgs/{path}")).await.json(), *org);
        let members = mine.get(&format!("/v1/orgs/{path}/members")).await.json();
        assert_eq!((&members[0]["user_id"], &members[0]["role"]), (&json!("default"), &json!("owner")));
        assert_eq!(theirs.get(&format!("/v1/orgs/{path}")).await.status, 404);
        assert_eq!(theirs.get(&format!("/v1/orgs/{path}/members")).await.status, 404);

        let header = [("x-pandastack-org", path)];
        assert_eq!(mine.send("GET", "/v1/me", &header, b"").await.status, 200);
        let refused = theirs.send("GET", "/v1/me", &header, b"").await;
        assert_eq!(
            (refused.status, &refused.json()["error"]),
            (403, &json!("not a member of requested org"))
        );
    }
    assert_eq!(mine.send("GET", "/v1/me", &[("x-pandastack-org", "")], b"").await.status, 200);
    assert_eq!(mine.send("GET", "/v1/me", &[("x-pandastack-org", "\u{e9}")], b"").await.status, 403);

    assert_eq!(mine.post("/v1/me/current-org", &json!({"org_id": id})).await.json(), json!({"org_id": id}));
    assert_eq!(theirs.post("/v1/me/current-org", &json!({"org_id": id})).await.status, 403);
    for body in [json!({}), json!({"org_id": 5}), json!([])] {
        assert_eq!(mine.post("/v1/me/current-org", &body).await.status, 400, "{body}");
    }
    // Nobody makes one but the operator.
    assert_eq!(mine.post("/v1/orgs", &json!({"name": "admin"})).await.status, 405);
}

#[tokio::test]
async fn a_rate_is_set_by_the_operator() {
    let appliance = Appliance::start().await;
    let (foreign, _) = appliance.other_workspace().await;
    let operator = operator(&appliance);
    let api = Api::with_token(&appliance, &foreign);
    operator.set_rate("acme".into(), 1, 3, 1).await.unwrap();
    let rate = operator.rate("acme".into()).await.unwrap();
    assert_eq!((rate.per_second, rate.burst, rate.tool_calls), (1, 3, 1));
    assert_eq!(tool(&api, "/mcp", "list_sandboxes", json!({})).await["isError"], false);
    assert_eq!(tool(&api, "/mcp", "list_sandboxes", json!({})).await, Value::Null);
    let mut last = api.get("/v1/me").await;
    for _ in 0..3 {
        last = api.get("/v1/me").await;
    }
    assert_eq!((last.status, last.header("retry-after")), (429, Some("1")));
    assert_eq!(last.json()["error"], "rate limit: more than 1 requests per second");

    operator.set_rate("acme".into(), 0, 0, 0).await.unwrap();
    assert_eq!(operator.rate("acme".into()).await.unwrap().per_second, 100);
    assert!(matches!(operator.set_rate("acme".into(), 0, 1, 1).await, Err(Error::InvalidArgument(_))));
    assert!(matches!(operator.rate("nobody".into()).await, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn the_operator_makes_tokens_of_any_scope() {
    let appliance = Appliance::start().await;
    let operator = operator(&appliance);
    let id = Api::new(&appliance).sandbox().await;
    let make = |scope: &str, sandbox: &str| {
        operator.create_scoped_token("default".into(), "x".into(), 1, scope.into(), sandbox.into())
    };
    let made = make("read", &id).await.unwrap();
    let info = operator.list_tokens("default".into()).await.unwrap();
    let info = info.iter().find(|info| made.starts_with(&info.prefix)).unwrap();
    assert_eq!((info.scope.as_str(), info.sandbox.as_str()), ("read", id.as_str()));
    let api = Api::with_token(&appliance, &made);
    assert_eq!(api.get(&format!("/v1/sandboxes/{id}")).await.status, 200);
    assert_eq!(api.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").await.status, 403);
    assert!(matches!(make("none", "").await, Err(Error::InvalidArgument(_))));
    assert!(matches!(make("full", "../x").await, Err(Error::NotFound(_))));
    assert!(matches!(operator.create_workspace("admin".into()).await, Err(Error::InvalidArgument(_))));
}

#[tokio::test]
async fn a_workspace_that_has_anything_stays() {
    let appliance = Appliance::start().await;
    let (foreign, _) = appliance.other_workspace().await;
    let operator = operator(&appliance);
    let api = Api::with_token(&appliance, &foreign);
    let id = api.sandbox().await;
    let delete = || operator.delete_workspace("acme".into());
    assert!(matches!(delete().await, Err(Error::WrongState(text)) if text.contains("1 sandboxes")));
    let snapshot = api.post(&format!("/v1/sandboxes/{id}/snapshots"), &json!({})).await.json();
    api.post("/v1/volumes", &json!({"name": "data"})).await;
    api.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").await;
    assert!(
        matches!(delete().await, Err(Error::WrongState(text)) if text.contains("1 snapshots, 1 volumes"))
    );
    api.send("DELETE", &format!("/v1/snapshots/{}", snapshot["id"].as_str().unwrap()), &[], b"").await;
    assert!(matches!(delete().await, Err(Error::WrongState(_))));
    let kept = api.post("/v1/volumes/data/snapshots", &json!({})).await.json();
    api.send("DELETE", "/v1/volumes/data", &[], b"").await;
    assert!(
        matches!(delete().await, Err(Error::WrongState(text)) if text.contains("1 snapshots of volumes"))
    );
    let kept = format!("/v1/volumes/data/snapshots/{}", kept["id"].as_str().unwrap());
    assert_eq!(api.send("DELETE", &kept, &[], b"").await.status, 204);
    assert!(delete().await.unwrap());
    assert_eq!(api.get("/v1/me").await.status, 401);
    assert!(!delete().await.unwrap());
}

#[tokio::test]
async fn a_quota_is_refused_so_that_the_clients_ask_again_and_one_that_never_fits_so_that_they_do_not() {
    let appliance = Appliance::start().await;
    let (foreign, _) = appliance.other_workspace().await;
    let operator = operator(&appliance);
    let api = Api::with_token(&appliance, &foreign);
    operator.set_quota("acme".into(), Resource::Sandboxes, 2).await.unwrap();
    let (parent, other) = (api.sandbox().await, api.sandbox().await);
    let fork = format!("/v1/sandboxes/{parent}/fork");
    for (path, body) in
        [("/v1/sandboxes", json!({})), (&fork, json!({})), (&format!("{fork}-tree"), json!({"count": 2}))]
    {
        let refused = api.post(path, &body).await;
        let error = refused.json();
        assert_eq!((refused.status, refused.header("retry-after")), (429, Some("2")), "{path}: {error}");
        assert!(error["error"].as_str().unwrap().starts_with("max sandboxes reached"), "{error}");
        assert_eq!((&error["code"], &error["retryable"]), (&json!("quota"), &json!(true)));
    }
    let never = api.post(&format!("{fork}-tree"), &json!({"count": 3})).await;
    assert_eq!((never.status, never.header("retry-after")), (429, None), "{}", never.text());
    assert_eq!(never.json()["retryable"], false);
    assert_eq!(api.get("/v1/sandboxes").await.json().as_array().unwrap().len(), 2);
    assert_eq!(Api::new(&appliance).post("/v1/sandboxes", &json!({})).await.status, 201);

    api.send("DELETE", &format!("/v1/sandboxes/{other}"), &[], b"").await;
    assert_eq!(api.post(&fork, &json!({})).await.status, 201);

    operator.set_quota("acme".into(), Resource::Volumes, 1).await.unwrap();
    assert_eq!(api.post("/v1/volumes", &json!({"name": "one", "size_mb": 64})).await.status, 201);
    let refused = api.post("/v1/volumes", &json!({"name": "two"})).await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("2")));

    let shown = api.get("/v1/quotas").await.json();
    assert_eq!(shown["workspace"], "acme");
    let line =
        |resource: &str, limit: Value, used: u64| json!({"resource": resource, "limit": limit, "used": used});
    assert_eq!(
        shown["quotas"],
        json!([
            line("sandboxes", json!(2), 2),
            line("vcpus", Value::Null, 4),
            line("memory_mib", Value::Null, 1024),
            line("disk_mib", Value::Null, 8192),
            line("snapshots", Value::Null, 0),
            line("volumes", json!(1), 1),
            line("volume_mib", Value::Null, 64)
        ])
    );
    assert_eq!(shown["rates"]["requests_per_second"], 100);
    let lines = operator.quotas("acme".into()).await.unwrap();
    assert_eq!((lines[0].limit, lines[1].limit, lines[5].limit), (2, -1, 1));

    operator.remove_quota("acme".into(), Resource::Sandboxes).await.unwrap();
    assert_eq!(api.post("/v1/sandboxes", &json!({})).await.status, 201);
    let unknown = operator.set_quota("nobody".into(), Resource::Sandboxes, 1).await;
    assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");
}

#[tokio::test]
async fn the_limits_of_a_workspace_end_with_it() {
    let appliance = Appliance::start().await;
    appliance.other_workspace().await;
    let operator = operator(&appliance);
    operator.set_quota("acme".into(), Resource::Sandboxes, 0).await.unwrap();
    operator.set_quota("acme".into(), Resource::VolumeMib, 0).await.unwrap();
    operator.set_rate("acme".into(), 1, 1, 1).await.unwrap();
    assert!(operator.delete_workspace("acme".into()).await.unwrap());
    assert!(operator.create_workspace("acme".into()).await.unwrap());
    assert!(operator.quotas("acme".into()).await.unwrap().iter().all(|line| line.limit == -1));
    assert_eq!(operator.rate("acme".into()).await.unwrap().per_second, 100);
}
