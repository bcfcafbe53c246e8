//! Volumes: on the shelf and attached.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use crate::{client::Api, common::Appliance};

async fn made(api: &Api, name: &str) {
    assert_eq!(api.post("/v1/volumes", &json!({"name": name})).await.status, 201);
}

#[tokio::test]
async fn a_volume_is_made_listed_shown_grown_and_deleted() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let made = api.post("/v1/volumes", &json!({"name": "a.B_1-x"})).await;
    let volume = made.json();
    assert_eq!(made.status, 201, "{volume}");
    assert_eq!((&volume["name"], &volume["size_mb"]), (&json!("a.B_1-x"), &json!(256)));
    assert_eq!((&volume["size_bytes"], &volume["attached_to"]), (&json!(256 << 20), &json!([])));
    let taken = api.post("/v1/volumes", &json!({"name": "a.B_1-x", "size_mb": 64})).await;
    assert_eq!((taken.status, &taken.json()["error"]), (409, &json!("volume already exists")));
    assert_eq!(api.get("/v1/volumes").await.json(), json!([volume]));
    assert_eq!(api.get("/v1/volumes/a.B_1-x").await.json(), volume);

    let grow = |size: Value| {
        let body = json!({"size_mb": size}).to_string();
        let api = &api;
        async move { api.send("PATCH", "/v1/volumes/a.B_1-x", &[], body.as_bytes()).await }
    };
    assert_eq!(grow(json!(512)).await.json()["size_mb"], 512);
    for size in [json!(256), json!(0), json!(-1), json!("1024"), json!(65537), json!(1.5), json!(null)] {
        assert_eq!(grow(size.clone()).await.status, 400, "{size}");
    }
    assert_eq!(api.send("PATCH", "/v1/volumes/other", &[], br#"{"size_mb":64}"#).await.status, 404);
    for status in [204, 404] {
        assert_eq!(api.send("DELETE", "/v1/volumes/a.B_1-x", &[], b"").await.status, status);
    }
    assert_eq!(api.get("/v1/volumes/a.B_1-x").await.status, 404);
}

#[tokio::test]
async fn a_wrong_volume_is_refused_with_a_sentence() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for body in [
        json!({}),
        json!({"name": ""}),
        json!({"name": "."}),
        json!({"name": ".."}),
        json!({"name": "a/b"}),
        json!({"name": "é"}),
        json!({"name": "x".repeat(65)}),
        json!({"name": 5}),
        json!({"name": "x", "size_mb": 0}),
        json!({"name": "x", "size_mb": 65537}),
        json!({"name": "x", "size_mb": "64"}),
        json!({"name": "x", "size_mb": -1}),
        json!([]),
    ] {
        let reply = api.post("/v1/volumes", &body).await;
        assert_eq!(reply.status, 400, "{body}: {}", reply.text());
    }
    for name in ["..", "%2e%2e", "a%2Fb", "nope"] {
        assert_eq!(api.get(&format!("/v1/volumes/{name}")).await.status, 404, "{name}");
        assert_eq!(api.send("DELETE", &format!("/v1/volumes/{name}"), &[], b"").await.status, 404, "{name}");
    }
    assert!(appliance.shelf.volumes.lock().unwrap().is_empty());
}

#[tokio::test]
async fn no_room_has_the_contracts_form() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    made(&api, "one").await;
    appliance.shelf.full.store(true, Ordering::Relaxed);

    let reply = api.post("/v1/volumes", &json!({"name": "two"})).await;

    let body = reply.json();
    assert_eq!((reply.status, &body["error"]), (507, &json!("insufficient host storage headroom")));
    assert_eq!(
        (&body["reason"], &body["provisioned_bytes"]),
        (&json!("below the reserve"), &json!(256 << 20))
    );
    assert_eq!((&body["fs_size_bytes"], &body["fs_free_bytes"]), (&json!(1u64 << 40), &json!(5)));
    assert_eq!(body["free_reserve_bytes"], 7);
    assert!(body["oversub_factor"].is_number() && body["hint"].is_string());
}

#[tokio::test]
async fn volumes_are_attached_at_create_and_held_until_the_end() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    made(&api, "data").await;
    made(&api, "shared").await;
    let wish = json!({"volumes": [{"name": "shared", "read_only": true}, {"name": "data"}]});
    let sandbox = api.post("/v1/sandboxes", &wish).await.json();
    assert_eq!(
        sandbox["volumes"],
        json!([{"name": "shared", "path": "/mnt/shared", "read_only": true, "private": false},
            {"name": "data", "path": "/mnt/data", "read_only": false, "private": false}])
    );
    let id = sandbox["id"].as_str().unwrap();
    assert_eq!(api.get("/v1/volumes/data").await.json()["attached_to"], json!([id]));
    assert_eq!(api.send("DELETE", "/v1/volumes/data", &[], b"").await.status, 409);
    assert_eq!(api.send("PATCH", "/v1/volumes/data", &[], br#"{"size_mb":512}"#).await.status, 409);
    assert_eq!(api.post("/v1/sandboxes", &json!({"volumes": [{"name": "data"}]})).await.status, 409);
    api.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").await;
    assert_eq!(api.send("DELETE", "/v1/volumes/data", &[], b"").await.status, 204);
}

#[tokio::test]
async fn a_wrong_attachment_makes_nothing() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (token, _) = appliance.other_workspace().await;
    for name in ["a", "b", "c", "d", "e"] {
        made(&api, name).await;
    }
    let five = |read_only: bool| -> Value {
        ["a", "b", "c", "d", "e"].map(|name| json!({"name": name, "read_only": read_only})).into()
    };
    for (volumes, status) in [
        (five(false), 400),
        (five(true), 400),
        (json!([{"name": "a"}, {"name": "a", "read_only": true}]), 400),
        (json!([{"name": ".."}]), 400),
        (json!([{"name": "x", "read_only": "yes"}]), 400),
        (json!([{}]), 400),
        (json!(["a"]), 400),
        (json!([null]), 400),
        (json!({}), 400),
        (json!([{"name": "a"}, {"name": "nobody-has-this"}]), 404),
    ] {
        let reply = api.post("/v1/sandboxes", &json!({"volumes": volumes})).await;
        assert_eq!(reply.status, status, "{volumes}: {}", reply.text());
    }
    let with_snapshot = json!({"from_snapshot": "s".repeat(20), "volumes": [{"name": "a"}]});
    assert_eq!(api.post("/v1/sandboxes", &with_snapshot).await.status, 400);
    let theirs = Api::with_token(&appliance, &token);
    assert_eq!(theirs.post("/v1/sandboxes", &json!({"volumes": [{"name": "a"}]})).await.status, 404);
    assert_eq!(theirs.get("/v1/volumes").await.json(), json!([]));
    assert_eq!(theirs.get("/v1/volumes/a").await.status, 404);
    assert!(appliance.vmm.sandboxes.lock().unwrap().is_empty());
}
