//! The API over real sockets, with the real agent as the guest.
#![allow(clippy::unwrap_used)]

mod client;
mod common;

use client::{Api, Reply};
use common::{Appliance, FakeStorage};
use pandastack_bus::{Error, storage::Storage};
use serde_json::{Value, json};

#[tokio::test]
async fn service_routes_need_no_token() {
    let appliance = Appliance::start().await;
    let api = Api::without_token(&appliance);

    let health = api.get("/healthz").await;
    assert_eq!((health.status, health.json()["status"].clone()), (200, json!("ok")));
    for path in ["/version", "/v1/version"] {
        assert_eq!(api.get(path).await.json()["service"], "pandastack-api");
    }
    let metrics = api.get("/metrics").await;
    assert!(metrics.text().contains("pandastack_slots_ready 3"), "{}", metrics.text());
    assert_eq!(api.get("/openapi.json").await.json()["openapi"], "3.1.0");
    assert_eq!(api.get("/healthzX").await.status, 404);

    appliance.vmm.failures.lock().unwrap().push(Error::Internal("down".into()));
    assert_eq!(api.get("/healthz").await.status, 200, "good for a second");
    tokio::time::sleep(pandastack_api::fresh::GOOD_FOR).await;
    assert_eq!(api.get("/healthz").await.status, 503);
}

#[tokio::test]
async fn the_gate_says_why() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let anonymous = Api::without_token(&appliance);

    let refused = anonymous.get("/v1/me").await;
    assert_eq!((refused.status, refused.json()["detail"].clone()), (401, json!("missing bearer token")));
    assert_eq!(anonymous.get("/v1/nowhere").await.status, 401);
    let by_query = anonymous.get(&format!("/v1/me?access_token={}", common::TOKEN)).await;
    assert_eq!(by_query.json()["user_id"], "default");

    let unknown = api.get("/v1/sandboxes/x/forks").await;
    assert_eq!((unknown.status, unknown.json()["error"].clone()), (404, json!("no such route")));
    let wrong = api.send("PUT", "/v1/sandboxes", &[], b"").await;
    assert_eq!((wrong.status, wrong.header("allow")), (405, Some("POST, GET, OPTIONS")));
    let cors = anonymous.send("OPTIONS", "/v1/sandboxes", &[], b"").await;
    assert_eq!((cors.status, cors.header("access-control-allow-origin")), (204, Some("*")));

    let echoed = api.send("GET", "/v1/me", &[("x-request-id", "mine-1")], b"").await;
    assert_eq!(echoed.header("x-request-id"), Some("mine-1"));
    let long = "x".repeat(65);
    let fresh = api.send("GET", "/v1/sandboxes/x", &[("x-request-id", &long)], b"").await;
    let id = fresh.header("x-request-id").unwrap();
    assert_eq!((id.len(), fresh.json()["request_id"].clone()), (16, json!(id)));
}

#[tokio::test]
async fn every_route_of_the_table_has_a_handler() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for route in pandastack_api::table::ROUTES {
        let path = route.template.replace("{id}", "zzzzzzzzzzzzzzzzzzzz").replace("{name}", "nope");
        let path = path.replace("{prefix}", "pds_none").replace("{port}", "80").replace("{*path}", "a/b");
        let method = if route.method == pandastack_api::table::ANY { "PATCH" } else { route.method };
        let reply = api.send(method, &path, &[], b"").await;
        let kind = reply.header("content-type").unwrap_or_default();
        let ours = kind == "application/json" || kind.starts_with("text/plain; version");
        // What warp says of a route it does not have is text/plain without more.
        assert!(ours, "{} {}: {} {kind}", route.method, path, reply.status);
    }
}

#[tokio::test]
async fn a_sandbox_is_made_shown_and_deleted() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let wish = json!({"template": "ubuntu-24.04", "metadata":
        {"team": "a", "workspace": "other", "secret.key": "x"}, "cpu": 8, "volumes": []});
    let made = api.post("/v1/sandboxes", &wish).await;
    assert_eq!(made.header("content-length"), Some(made.body.len().to_string().as_str()));
    let sandbox = made.json();
    assert_eq!(made.status, 201, "{sandbox}");
    assert_eq!(sandbox["template"], "base");
    assert_eq!(sandbox["metadata"], json!({"team": "a", "workspace": "default"}));
    assert_eq!((&sandbox["status"], &sandbox["persistent"]), (&json!("running"), &json!(false)));
    let id = sandbox["id"].as_str().unwrap();

    let path = format!("/v1/sandboxes/{id}");
    assert_eq!(api.get(&path).await.json()["id"], id);
    assert_eq!(api.get("/v1/sandboxes").await.json().as_array().unwrap().len(), 1);
    assert_eq!(api.get("/v1/sandboxes?metadata.team=a").await.json()[0]["id"], id);
    assert_eq!(api.get("/v1/sandboxes?metadata.team=b").await.json(), json!([]));

    let life = api.get(&format!("{path}/lifecycle")).await.json();
    assert_eq!(life, json!({"ttl_seconds": 3600, "persistent": false, "idle_seconds": 0}));
    let patched = api.send("PATCH", &format!("{path}/lifecycle"), &[], br#"{"ttl_seconds":60}"#).await;
    assert_eq!((patched.status, patched.json()["ttl_seconds"].clone()), (200, json!(60)));
    let patched = api.send("PATCH", &format!("{path}/lifecycle"), &[], br#"{"persistent":true}"#).await;
    assert_eq!(patched.json(), json!({"ttl_seconds": 60, "persistent": true, "idle_seconds": 0}));

    assert_eq!(api.send("DELETE", &path, &[], b"").await.status, 204);
    assert_eq!(api.send("DELETE", &path, &[], b"").await.status, 404);
    assert_eq!(api.get(&path).await.status, 404);
    for _ in 0..30 {
        if appliance.vmm.touched.lock().unwrap().iter().any(|touched| touched == id) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    panic!("activity was never told");
}

#[tokio::test]
async fn optional_bodies_may_be_absent_or_empty() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for (headers, body) in
        [(&[][..], &b""[..]), (&[("content-type", "text/plain;charset=UTF-8")][..], b""), (&[][..], b"{}")]
    {
        assert_eq!(api.send("POST", "/v1/sandboxes", headers, body).await.status, 201);
        assert_eq!(api.send("POST", "/v1/me/tokens", headers, body).await.status, 200);
    }
}

#[tokio::test]
async fn bad_wishes_are_refused_with_a_sentence() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for (body, needle) in [
        (json!({"template": "nope"}), "unknown template \"nope\": not in the template catalog"),
        (json!({"template": ".."}), "unknown template"),
        (json!({"template": "a\u{0}b"}), "unknown template"),
        (json!({"template": 1}), "`template`"),
        (json!({"ttl_seconds": -1}), "`ttl_seconds`"),
        (json!({"ttl_seconds": 1.5}), "`ttl_seconds`"),
        (json!({"ttl_seconds": "60"}), "`ttl_seconds`"),
        (json!({"ttl_seconds": 2_592_001}), "ttl_seconds exceeds tier maximum"),
        (json!({"persistent": "yes"}), "`persistent`"),
        (json!({"metadata": {"a": 1}}), "`metadata.a`"),
        (json!({"metadata": {"fork_tree_id": "x"}}), "reserved"),
        (json!({"from_snapshot": 1}), "`from_snapshot`"),
        (json!({"disk_gb": 1}), "only grows"),
        (json!({"disk_gb": 1025}), "`disk_gb` is over 1024"),
        (json!([]), "object"),
    ] {
        let reply = api.post("/v1/sandboxes", &body).await;
        let error = reply.json()["error"].as_str().unwrap().to_owned();
        assert!(reply.status == 400 && error.contains(needle), "{body}: {} {error}", reply.status);
    }
    assert!(appliance.vmm.sandboxes.lock().unwrap().is_empty());
    let long = vec![b' '; 2 << 20];
    assert_eq!(api.send("POST", "/v1/sandboxes", &[], &long).await.status, 413);
}

#[tokio::test]
async fn what_vmm_refuses_has_the_contracts_form() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for (error, status, retry) in [
        (Error::NoCapacity("no compute capacity available".into()), 503, Some("5")),
        (Error::NotReady("template base is being baked".into()), 503, Some("5")),
        (Error::NoSpace("insufficient host storage".into()), 507, None),
        (Error::Timeout("the guest did not come up".into()), 504, None),
        (Error::InvalidArgument("no".into()), 400, None),
        (Error::Internal("secret detail".into()), 500, None),
    ] {
        appliance.vmm.failures.lock().unwrap().push(error.clone());
        let reply = api.post("/v1/sandboxes", &json!({})).await;
        assert_eq!((reply.status, reply.header("retry-after")), (status, retry), "{error:?}");
        let body = reply.json();
        assert!(body["error"].is_string() && body["retryable"].is_boolean() && body["code"].is_string());
        assert!(!body.to_string().contains("secret detail"));
    }
}

#[tokio::test]
async fn the_same_key_is_the_same_sandbox() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let keyed = |body: Value| {
        let api = &api;
        async move {
            api.send("POST", "/v1/sandboxes", &[("idempotency-key", "k1")], body.to_string().as_bytes()).await
        }
    };
    let first = keyed(json!({"metadata": {"a": "b"}})).await;
    let second = keyed(json!({"metadata": {"a": "b"}})).await;
    assert_eq!((first.status, second.status), (201, 201));
    assert_eq!(first.json()["id"], second.json()["id"]);
    assert!(!first.text().contains("secret."));
    assert_eq!(keyed(json!({"metadata": {"a": "c"}})).await.status, 422);
    let lifecycle = format!("/v1/sandboxes/{}/lifecycle", first.json()["id"].as_str().unwrap());
    let patched = api.send("PATCH", &lifecycle, &[], br#"{"ttl_seconds":60,"persistent":true}"#).await;
    assert_eq!(patched.status, 200);
    let third = keyed(json!({"metadata": {"a": "b"}})).await;
    assert_eq!((third.status, third.json()["id"].clone()), (201, first.json()["id"].clone()));
    let empty = api.send("POST", "/v1/sandboxes", &[("idempotency-key", "")], b"").await;
    assert_eq!(empty.status, 400);

    let (token, _) = appliance.other_workspace().await;
    let theirs = Api::with_token(&appliance, &token);
    let other = theirs.send("POST", "/v1/sandboxes", &[("idempotency-key", "k1")], b"").await;
    assert_ne!(first.json()["id"], other.json()["id"]);
}

#[tokio::test]
async fn secrets_end_at_the_api_and_yet_tell_requests_apart() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let wish = |secret: &str| json!({"metadata": {"secret.key": secret, "a": "b"}}).to_string();
    let (key, hidden, other) = ([("idempotency-key", "k")], wish("hidden"), wish("other"));
    for (headers, body, status) in
        [(&key[..], &hidden, 201), (&key, &hidden, 201), (&key, &other, 422), (&[], &hidden, 201)]
    {
        assert_eq!(api.send("POST", "/v1/sandboxes", headers, body.as_bytes()).await.status, status);
    }
    let kept = format!("{:?}", appliance.vmm.sandboxes.lock().unwrap());
    assert!(
        kept.contains("\"a\": \"b\"") && !kept.contains("hidden") && !kept.contains("secret.key"),
        "{kept}"
    );
    let requests = appliance.vmm.requests.lock().unwrap();
    let mut once: Vec<bool> = requests.keys().map(|name| name.starts_with("once-")).collect();
    once.sort_unstable();
    assert_eq!(once, [false, true]);
}

#[tokio::test]
async fn a_warm_create_asks_storage_nothing_until_a_template_changes() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let asked = || appliance.storage.asked.load(std::sync::atomic::Ordering::Relaxed);
    for _ in 0..3 {
        api.sandbox().await;
    }
    assert_eq!(asked(), 1);
    let storage = pandastack_bus::zbus::object_server::SignalEmitter::new(
        &appliance.daemons,
        pandastack_bus::storage::PATH,
    );
    Storage::<FakeStorage>::template_changed(&storage.unwrap(), "base", "baked").await.unwrap();
    for _ in 0..50 {
        api.sandbox().await;
        if asked() == 2 {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the change was not noticed");
}

#[tokio::test]
async fn a_foreign_sandbox_is_not_there() {
    let appliance = Appliance::start().await;
    let mine = Api::new(&appliance);
    let id = mine.sandbox().await;
    let (token, prefix) = appliance.other_workspace().await;
    let theirs = Api::with_token(&appliance, &token);

    for id in [
        id.as_str(),
        "zzzzzzzzzzzzzzzzzzzz",
        "short",
        "..%2F..%2Fetc",
        "00000000-0000-0000-0000-000000000000",
    ] {
        for route in pandastack_api::table::ROUTES.iter().filter(|route| route.template.contains("{id}")) {
            let path = route.template.replace("{id}", id);
            let runs = path.contains("exec") || path.contains("repl");
            let body = if runs { &br#"{"cmd":"true","code":"1"}"#[..] } else { b"" };
            let asked = format!("{path}?path=/etc/hostname");
            let mut reply = theirs.send(route.method, &asked, &[], body).await;
            // A fast machine asks more often than the workspace may.
            while reply.status == 429 {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                reply = theirs.send(route.method, &asked, &[], body).await;
            }
            assert_eq!(reply.status, 404, "{} {path}: {}", route.method, reply.text());
        }
    }
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    assert_eq!(theirs.get("/v1/sandboxes").await.json(), json!([]));
    assert_eq!(mine.send("DELETE", &format!("/v1/me/tokens/{prefix}"), &[], b"").await.status, 404);
    assert_eq!(mine.get(&format!("/v1/sandboxes/{id}")).await.status, 200);
}

#[tokio::test]
async fn tokens_are_made_listed_and_revoked() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let made = api.post("/v1/me/tokens", &json!({"label": "ci", "expires_in_days": 3})).await.json();
    let (token, prefix) = (made["token"].as_str().unwrap(), made["prefix"].as_str().unwrap());
    assert!(token.starts_with(prefix) && made["expires_at"].is_string());
    assert_eq!(Api::with_token(&appliance, token).get("/v1/me").await.json()["auth_method"], "token");
    let listed = api.get("/v1/me/tokens").await;
    assert_eq!(listed.json().as_array().unwrap().len(), 2);
    assert!(!listed.text().contains(token));

    assert_eq!(api.send("DELETE", &format!("/v1/me/tokens/{prefix}"), &[], b"").await.status, 204);
    assert_eq!(Api::with_token(&appliance, token).get("/v1/me").await.status, 401);
    for body in [
        json!({"label": 1}),
        json!({"label": "x".repeat(201)}),
        json!({"expires_in_days": -1}),
        json!({"expires_in_days": 99999999u64}),
    ] {
        assert_eq!(api.post("/v1/me/tokens", &body).await.status, 400, "{body}");
    }
}

#[tokio::test]
async fn templates_are_listed_and_found_by_alias() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let all = api.get("/v1/templates").await.json();
    assert_eq!((&all[0]["name"], &all[1]["name"]), (&json!("base"), &json!("code-interpreter")));
    assert_eq!(api.get("/v1/templates/ubuntu-24.04").await.json()["name"], "base");
    for name in ["nope", "..", "%00", "%ff"] {
        assert_eq!(api.get(&format!("/v1/templates/{name}")).await.status, 404, "{name}");
    }
}

#[tokio::test]
async fn too_many_requests_get_the_contracts_429() {
    let appliance = Appliance::start().await;
    let (token, _) = appliance.other_workspace().await;
    let api = Api::with_token(&appliance, &token);
    let mut refused: Option<Reply> = None;
    for _ in 0..2000 {
        let reply = api.get("/v1/me").await;
        if reply.status == 429 {
            refused = Some(reply);
            break;
        }
    }
    let refused = refused.expect("the limit is reached");
    assert_eq!(refused.header("retry-after"), Some("1"));
    let body = refused.json();
    assert!(body["error"].as_str().unwrap().starts_with("rate limit: "));
    assert_eq!(body["workspace"], "acme");
    assert_eq!(Api::new(&appliance).get("/v1/me").await.status, 200);
}

#[tokio::test]
async fn too_many_requests_at_once_get_a_429_and_a_stream_counts_to_its_end() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let limiter = &appliance.app.limiter;
    let enter = || limiter.enter("default", std::time::Instant::now());
    let id = api.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/exec/stream");
    let (stream, open) = api.open("POST", &path, &[], br#"{"cmd":"sleep 60"}"#).await;
    let mut held: Vec<_> = std::iter::from_fn(enter).collect();
    assert_eq!(held.len(), pandastack_api::limit::AT_ONCE - 1);
    let refused = api.get("/v1/me").await;
    assert_eq!((refused.status, refused.header("retry-after")), (429, Some("1")));
    assert!(refused.json()["error"].as_str().unwrap().starts_with("rate limit: "));
    assert_eq!(api.get("/version").await.status, 200);

    drop((stream, open));
    for _ in 0..100 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        if let Some(place) = enter() {
            held.push(place);
            break;
        }
    }
    assert_eq!(held.len(), pandastack_api::limit::AT_ONCE);
    held.pop();
    assert_eq!(api.get("/v1/me").await.status, 200);
}

#[tokio::test]
async fn a_create_whose_client_hangs_up_leaves_nothing() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    *appliance.vmm.create_delay.lock().unwrap() = std::time::Duration::from_millis(500);
    let hung_up =
        tokio::time::timeout(std::time::Duration::from_millis(200), api.post("/v1/sandboxes", &json!({})))
            .await;
    assert!(hung_up.is_err());
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    assert!(appliance.vmm.sandboxes.lock().unwrap().is_empty());
}
