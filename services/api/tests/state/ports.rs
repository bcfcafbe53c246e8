//! Ports: named, detected, and gone with their sandbox.

use serde_json::json;
use tokio::net::TcpListener;

use crate::{client::Api, common::Appliance};

#[tokio::test(flavor = "multi_thread")]
async fn ports_are_named_found_and_forgotten() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/ports");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let shown = |port: u16| {
        let (api, path) = (&api, &path);
        async move {
            let all = api.get(path).await.json();
            all.as_array().unwrap().iter().find(|one| one["port"] == port).cloned()
        }
    };
    let proxy_url = format!("/v1/sandboxes/{id}/proxy/{port}/");
    let detected = json!({"port": port, "listening": true, "source": "detected", "proxy_url": proxy_url});
    assert_eq!(shown(port).await, Some(detected.clone()));

    let named = api.post(&path, &json!({"port": port})).await;
    assert_eq!(named.status, 201);
    let answer = json!({"port": port, "label": "service", "listening": false, "source": "user", "proxy_url": proxy_url});
    assert_eq!(named.json(), answer);
    assert_eq!(api.post(&path, &json!({"port": port, "label": "web"})).await.json()["label"], "web");
    let both =
        json!({"port": port, "label": "web", "listening": true, "source": "user", "proxy_url": proxy_url});
    assert_eq!(shown(port).await, Some(both));
    assert_eq!(
        api.get(&format!("/v1/sandboxes/{id}")).await.json()["metadata"][format!("port.{port}")],
        "web"
    );

    let own = format!("{path}/{port}");
    assert_eq!(api.send("DELETE", &own, &[], b"").await.status, 204);
    assert_eq!(api.send("DELETE", &own, &[], b"").await.status, 404);
    assert_eq!(shown(port).await, Some(detected));
    let numbers: Vec<u64> = api
        .get(&path)
        .await
        .json()
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["port"].as_u64().unwrap())
        .collect();
    assert!(numbers.is_sorted() && !numbers.contains(&22), "{numbers:?}");

    for bad in [
        json!({}),
        json!({"port": 0}),
        json!({"port": 22}),
        json!({"port": 65536}),
        json!({"port": "80"}),
        json!({"port": 80, "label": "x".repeat(65)}),
        json!({"port": 80, "label": 1}),
    ] {
        assert_eq!(api.post(&path, &bad).await.status, 400, "{bad}");
    }
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    for (method, path) in [("GET", &path), ("POST", &path), ("DELETE", &own)] {
        assert_eq!(foreign.send(method, path, &[], br#"{"port":80}"#).await.status, 404, "{method}");
    }

    api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await;
    assert_eq!(api.post(&path, &json!({"port": 80})).await.status, 201, "a name needs no guest");
    assert_eq!(api.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "hibernated");
    assert_eq!(shown(80).await.unwrap()["label"], "service");
    assert_eq!(api.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "running");
}
