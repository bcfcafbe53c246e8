//! Who changed what.

use serde_json::{Value, json};

use crate::{
    client::Api,
    common::{Appliance, TOKEN},
};

fn lines(log: &Value) -> Vec<(String, String, u64)> {
    let line = |entry: &Value| {
        let text = |key: &str| entry[key].as_str().unwrap().to_owned();
        (text("method"), text("path"), entry["status"].as_u64().unwrap())
    };
    log["entries"].as_array().unwrap().iter().map(line).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_to_change_something_is_told_to_its_workspace() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.exec(&id, json!({"cmd": "echo secret-in-the-body"})).await;
    api.get(&format!("/v1/sandboxes/{id}")).await;
    let by_query = format!("/v1/sandboxes/{id}/fs?path=/tmp/never-there&access_token={TOKEN}");
    api.send("DELETE", &by_query, &[("x-request-id", "mine-7")], b"").await;
    api.send("DELETE", &by_query, &[], b"").await;
    api.send("DELETE", &format!("/v1/me/tokens/{TOKEN}"), &[], b"").await;
    Api::without_token(&appliance).post("/v1/sandboxes", &json!({})).await;
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    foreign.post(&format!("/v1/sandboxes/{id}/pause"), &json!({})).await;

    let reply = api.get("/v1/audit").await;

    let text = reply.text();
    assert!(!text.contains("secret") && !text.contains(TOKEN) && !text.contains("never-there"), "{text}");
    let log = reply.json();
    assert_eq!(log["entries"][1]["request_id"], "mine-7");
    assert!(log["since"].as_str().unwrap().ends_with('Z') && log["entries"][0]["workspace"] == "default");
    let told: Vec<(String, String)> =
        lines(&log).into_iter().map(|(method, path, _)| (method, path)).collect();
    let expected = [
        ("DELETE", "/v1/me/tokens/pds_01234567…".to_owned()),
        ("DELETE", format!("/v1/sandboxes/{id}/fs")),
        ("POST", format!("/v1/sandboxes/{id}/exec")),
        ("POST", "/v1/sandboxes".to_owned()),
    ];
    assert_eq!(
        told,
        expected.map(|(method, path)| (method.to_owned(), path)),
        "the client's repetition of a 404 is left out"
    );
    assert_eq!(lines(&log)[3].2, 201);
    let other = foreign.get("/v1/audit").await.json();
    assert_eq!(lines(&other), [("POST".into(), format!("/v1/sandboxes/{id}/pause"), 404)]);
    assert_eq!(lines(&api.get("/v1/audit?limit=1").await.json()).len(), 1);
    assert_eq!(lines(&api.get("/v1/audit?since=4102444800").await.json()), []);
    for bad in ["limit=0", "limit=1001", "limit=x", "since=x"] {
        assert_eq!(api.get(&format!("/v1/audit?{bad}")).await.status, 400, "{bad}");
    }
}
