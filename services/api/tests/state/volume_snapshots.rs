//! Snapshots of volumes, and volumes of them.

use std::sync::atomic::Ordering;

use pandastack_bus::Error;
use serde_json::{Value, json};

use crate::{client::Api, common::Appliance};

async fn taken(api: &Api, name: &str) -> Value {
    let reply = api.post(&format!("/v1/volumes/{name}/snapshots"), &json!({"label": "nightly"})).await;
    assert_eq!(reply.status, 201, "{}", reply.text());
    reply.json()
}

async fn with_volume(appliance: &Appliance, size: u64) -> Api {
    let api = Api::new(appliance);
    assert_eq!(api.post("/v1/volumes", &json!({"name": "data", "size_mb": size})).await.status, 201);
    api
}

#[tokio::test]
async fn one_is_taken_listed_outlives_its_volume_and_is_deleted() {
    let appliance = Appliance::start().await;
    let api = with_volume(&appliance, 64).await;
    assert_eq!(api.get("/v1/volumes/data/snapshots").await.json(), json!([]));
    let first = taken(&api, "data").await;
    assert_eq!(
        (&first["volume"], &first["label"], &first["synced"]),
        (&json!("data"), &json!("nightly"), &json!(true))
    );
    assert_eq!((&first["size_mb"], &first["size_bytes"]), (&json!(64), &json!(64 << 20)));
    assert_eq!(first["created_at"], "2026-01-02T03:04:05.25Z");
    let second = api.send("POST", "/v1/volumes/data/snapshots", &[], b"").await;
    assert_eq!((second.status, &second.json()["label"]), (201, &json!("")), "a body is not needed");
    api.post("/v1/volumes", &json!({"name": "other"})).await;
    let third = taken(&api, "other").await;

    assert_eq!(api.get("/v1/volumes/data/snapshots").await.json(), json!([second.json(), first]));
    assert_eq!(api.get("/v1/volume-snapshots").await.json(), json!([third, second.json(), first]));
    assert_eq!(api.send("DELETE", "/v1/volumes/data", &[], b"").await.status, 204);
    assert_eq!(api.get("/v1/volumes/data/snapshots").await.json(), json!([second.json(), first]));
    let path =
        |volume: &str, of: &Value| format!("/v1/volumes/{volume}/snapshots/{}", of["id"].as_str().unwrap());
    for (path, status) in [
        (path("other", &first), 404),
        (path("data", &first), 204),
        (path("data", &first), 404),
        (path("data", &second.json()), 204),
    ] {
        assert_eq!(api.send("DELETE", &path, &[], b"").await.status, status, "{path}");
    }
    assert_eq!(api.get("/v1/volumes/data/snapshots").await.status, 404, "nothing of it is left");
}

#[tokio::test]
async fn a_volume_is_made_of_one_as_large_or_larger() {
    let appliance = Appliance::start().await;
    let api = with_volume(&appliance, 64).await;
    let id = taken(&api, "data").await["id"].clone();
    let make = |name: &str, size: Value| {
        let body = json!({"name": name, "size_mb": size, "from_snapshot": id});
        let api = &api;
        async move { api.post("/v1/volumes", &body).await }
    };
    for (name, wished, size) in
        [("same", json!(null), 64), ("equal", json!(64), 64), ("more", json!(256), 256)]
    {
        let made = make(name, wished).await;
        assert_eq!((made.status, &made.json()["size_mb"]), (201, &json!(size)), "{name}");
    }
    for size in [json!(63), json!(0), json!(65537), json!("64"), json!(-1)] {
        let refused = make("less", size.clone()).await;
        assert_eq!((refused.status, &refused.json()["field"]), (400, &json!("size_mb")), "{size}");
    }
    assert_eq!(make("same", json!(null)).await.status, 409);
    assert_eq!(make("..", json!(null)).await.status, 400);
    for (snapshot, status) in [(json!("zzzzzzzzzzzzzzzzzzzz"), 404), (json!("../x"), 404), (json!(5), 400)] {
        let refused = api.post("/v1/volumes", &json!({"name": "x", "from_snapshot": snapshot})).await;
        assert_eq!(refused.status, status, "{snapshot}");
    }
    assert_eq!(api.get("/v1/volumes").await.json().as_array().unwrap().len(), 4);
}

#[tokio::test]
async fn a_foreign_one_is_not_there() {
    let appliance = Appliance::start().await;
    let api = with_volume(&appliance, 64).await;
    let (token, _) = appliance.other_workspace().await;
    let theirs = Api::with_token(&appliance, &token);
    let id = taken(&api, "data").await["id"].as_str().unwrap().to_owned();
    // Nor is it below a volume of theirs.
    assert_eq!(theirs.post("/v1/volumes", &json!({"name": "mine"})).await.status, 201);

    for (method, path) in [
        ("POST", "/v1/volumes/data/snapshots".to_owned()),
        ("GET", "/v1/volumes/data/snapshots".to_owned()),
        ("DELETE", format!("/v1/volumes/data/snapshots/{id}")),
        ("DELETE", format!("/v1/volumes/mine/snapshots/{id}")),
    ] {
        assert_eq!(theirs.send(method, &path, &[], b"{}").await.status, 404, "{method} {path}");
    }
    let copy = json!({"name": "copy", "from_snapshot": id});
    assert_eq!(theirs.post("/v1/volumes", &copy).await.status, 404);
    assert_eq!(theirs.get("/v1/volume-snapshots").await.json(), json!([]));
    assert_eq!(appliance.shelf.kept.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_wrong_is_refused_with_a_sentence_and_makes_nothing() {
    let appliance = Appliance::start().await;
    let api = with_volume(&appliance, 64).await;
    for body in [json!([]), json!({"label": 5}), json!({"label": "x".repeat(257)}), json!({"label": "\0"})] {
        let reply = api.post("/v1/volumes/data/snapshots", &body).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
    }
    for name in ["..", "%2e%2e", "a%2Fb", "nope"] {
        let path = format!("/v1/volumes/{name}/snapshots");
        assert_eq!(api.post(&path, &json!({})).await.status, 404, "{name}");
        assert_eq!(api.get(&path).await.status, 404, "{name}");
        assert_eq!(api.send("DELETE", &format!("{path}/x"), &[], b"").await.status, 404, "{name}");
    }
    appliance.shelf.full.store(true, Ordering::Relaxed);
    let full = api.post("/v1/volumes/data/snapshots", &json!({})).await;
    assert_eq!((full.status, &full.json()["reason"]), (507, &json!("below the reserve")));
    for (failure, status) in [
        (Error::Quota("max volumes reached".into()), 429),
        (Error::NotFound("volume \"data\" not found".into()), 404),
        (Error::NotReady("later".into()), 503),
    ] {
        appliance.vmm.failures.lock().unwrap().push(failure);
        assert_eq!(api.post("/v1/volumes/data/snapshots", &json!({})).await.status, status);
    }
    assert!(appliance.shelf.kept.lock().unwrap().is_empty());
}
