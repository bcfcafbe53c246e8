//! Signed previews, as far as api has to do with them.

use serde_json::json;

use crate::{client::Api, common::Appliance};

#[tokio::test]
async fn previews_are_made_listed_and_revoked_by_their_owner_only() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let of = |below: &str| format!("/v1/sandboxes/{id}/{below}");

    for route in ["preview", "preview-token"] {
        let made = api.post(&of(route), &json!({"port": 3000, "paths": ["a", "/b"]})).await;
        assert_eq!(made.status, 200, "{}", made.text());
        let made = made.json();
        assert_eq!(made["url"], format!("http://test:8081/v1/p/{}/", made["token"].as_str().unwrap()));
        assert_eq!(
            (&made["sandbox_id"], &made["port"], &made["paths"]),
            (&json!(id), &json!(3000), &json!(["/a", "/b"]))
        );
        assert_eq!(made["expires_at"], "1970-01-01T01:16:40Z");
    }
    for (asked, seconds) in [(0, 3600), (5, 5), (10_000_000, 604_800)] {
        api.post(&of("preview"), &json!({"port": 1, "ttl_seconds": asked})).await;
        let last = appliance.edge.previews.lock().unwrap().last().unwrap().clone();
        assert_eq!(last.expires_unix - last.created_unix, seconds);
    }
    for bad in [
        json!({}),
        json!({"port": 22}),
        json!({"port": 3000, "paths": ["a|b"]}),
        json!({"port": 3000, "paths": ["a,b"]}),
        json!({"port": 3000, "ttl_seconds": -1}),
        json!({"port": 3000, "paths": "a"}),
    ] {
        assert_eq!(api.post(&of("preview"), &bad).await.status, 400, "{bad}");
    }
    assert_eq!(
        api.post("/v1/sandboxes/zzzzzzzzzzzzzzzzzzzz/preview", &json!({"port": 80})).await.status,
        404
    );

    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    assert_eq!(foreign.post(&of("preview"), &json!({"port": 80})).await.status, 404);
    assert_eq!(foreign.get(&of("preview-tokens")).await.status, 404);
    let all = api.get(&of("preview-tokens")).await.json();
    assert_eq!(all.as_array().unwrap().len(), 5);
    assert!(all[0].get("token").is_none());
    let first = of(&format!("preview-tokens/{}", all[0]["id"].as_str().unwrap()));
    assert_eq!(foreign.send("DELETE", &first, &[], b"").await.status, 404);
    assert_eq!(api.send("DELETE", &first, &[], b"").await.status, 204);
    assert_eq!(api.send("DELETE", &first, &[], b"").await.status, 404);
    assert_eq!(api.get(&of("preview-tokens")).await.json().as_array().unwrap().len(), 4);
}
