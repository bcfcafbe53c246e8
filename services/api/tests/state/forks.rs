//! Forks, trees and promotion.

use std::time::Duration;

use pandastack_bus::Error;
use serde_json::{Value, json};

use crate::{client::Api, common::Appliance};

fn ids(children: &Value) -> Vec<String> {
    children.as_array().unwrap().iter().map(|child| child["id"].as_str().unwrap().to_owned()).collect()
}

async fn tree(api: &Api, parent: &str, wish: Value) -> Value {
    let reply = api.post(&format!("/v1/sandboxes/{parent}/fork-tree"), &wish).await;
    assert_eq!(reply.status, 201, "{}", reply.text());
    reply.json()
}

#[tokio::test]
async fn a_fork_is_answered_as_every_client_reads_it() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let parent = api.sandbox().await;
    let lifecycle = format!("/v1/sandboxes/{parent}/lifecycle");
    api.send("PATCH", &lifecycle, &[], br#"{"ttl_seconds":77,"persistent":true}"#).await;
    for body in [&b""[..], b"{}", br#"{"count":1,"mode":"warm"}"#, br#"{"mode":"cold","metadata":null}"#] {
        let reply = api.send("POST", &format!("/v1/sandboxes/{parent}/fork?warm=1"), &[], body).await;
        let fork = reply.json();
        assert_eq!(reply.status, 201, "{fork}");
        assert_eq!(fork["sandbox"], fork["children"][0]);
        assert_eq!((fork["children"].as_array().unwrap().len(), &fork["errors"]), (1, &json!([])));
        assert_eq!((&fork["parent_id"], &fork["sandbox"]["parent_id"]), (&json!(parent), &json!(parent)));
        assert!(fork["snapshot_id"].is_string() && fork["at"].is_string());
        let child = &fork["sandbox"];
        assert_eq!((&child["ttl_seconds"], &child["persistent"]), (&json!(77), &json!(false)));
        assert_eq!((&child["boot_mode"], &child["status"]), (&json!("fork"), &json!("running")));
        assert_eq!(child["metadata"]["fork_parent_id"], json!(parent));
    }
    assert_eq!(tree(&api, &parent, json!({})).await["children"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_trees_labels_are_ours_and_the_callers_are_kept() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let parent = api.sandbox().await;
    let made = tree(&api, &parent, json!({"count": 3, "metadata": {"explore": "1", "explore_ttl": "600",
        "fork_tree_id": "forged", "fork_index": "9", "workspace": "other", "app.id": "x", "secret.key": "hidden"}}))
    .await;
    let tree_id = made["tree_id"].as_str().unwrap();
    assert_eq!(tree_id.len(), 20);
    for (index, child) in made["children"].as_array().unwrap().iter().enumerate() {
        assert_eq!(
            child["metadata"],
            json!({"explore": "1", "explore_ttl": "600", "fork_tree_id": tree_id, "fork_tree_role": "child",
                "fork_parent_id": parent, "fork_index": index.to_string(), "workspace": "default"})
        );
        assert_eq!(child["ttl_seconds"], 600);
    }
    assert!(!format!("{:?}", appliance.vmm.sandboxes.lock().unwrap()).contains("hidden"));
}

#[tokio::test]
async fn a_wrong_wish_makes_nothing() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let parent = api.sandbox().await;
    for body in [
        json!({"count": 0}),
        json!({"count": 17}),
        json!({"count": -1}),
        json!({"count": 1.5}),
        json!({"count": "2"}),
        json!({"mode": "lukewarm"}),
        json!({"mode": 1}),
        json!({"metadata": []}),
        json!({"metadata": {"a": 1}}),
        json!({"metadata": {"": "x"}}),
        json!({"metadata": {"explore_ttl": "soon"}}),
        json!({"metadata": {"explore_ttl": "-1"}}),
        json!({"metadata": {"explore_ttl": "99999999"}}),
        json!([]),
        json!("text"),
    ] {
        for route in ["fork", "fork-tree"] {
            let reply = api.post(&format!("/v1/sandboxes/{parent}/{route}"), &body).await;
            assert_eq!(reply.status, 400, "{route} {body}: {}", reply.text());
        }
    }
    assert_eq!(appliance.vmm.sandboxes.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn what_could_not_be_made_is_told_and_nothing_at_all_is_an_error() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let parent = api.sandbox().await;
    appliance.vmm.stillborn.lock().unwrap().extend([0, 2]);
    let made = tree(&api, &parent, json!({"count": 4})).await;
    assert_eq!(
        made["errors"],
        json!([{"index": 0, "err": "no memory for it"}, {"index": 2, "err": "no memory for it"}])
    );
    let places: Vec<&Value> =
        made["children"].as_array().unwrap().iter().map(|child| &child["metadata"]["fork_index"]).collect();
    assert_eq!(places, [&json!("1"), &json!("3")]);

    let none = api.post(&format!("/v1/sandboxes/{parent}/fork"), &json!({})).await;
    assert_eq!((none.status, none.header("retry-after")), (503, Some("5")), "{}", none.text());
    for (error, status) in [
        (Error::NoSpace("disk full".into()), 507),
        (Error::Quota("too many".into()), 429),
        (Error::WrongState("being made".into()), 409),
        (Error::Timeout("slow".into()), 504),
        (Error::NotFound("gone".into()), 404),
    ] {
        *appliance.vmm.fork_failure.lock().unwrap() = Some(error);
        let refused = api.post(&format!("/v1/sandboxes/{parent}/fork"), &json!({})).await;
        assert_eq!(refused.status, status, "{}", refused.text());
    }
}

#[tokio::test]
async fn the_same_key_is_the_same_fork() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (parent, other) = (api.sandbox().await, api.sandbox().await);
    let keyed = |parent: &str, body: Value| {
        let (api, path) = (&api, format!("/v1/sandboxes/{parent}/fork-tree"));
        async move { api.send("POST", &path, &[("idempotency-key", "k")], body.to_string().as_bytes()).await }
    };
    let first = keyed(&parent, json!({"count": 2})).await;
    let second = keyed(&parent, json!({"count": 2})).await;
    assert_eq!((first.status, first.json()), (201, second.json()));
    assert!(!first.text().contains("secret."));
    assert_eq!(keyed(&parent, json!({"count": 3})).await.status, 422);
    assert_eq!(keyed(&other, json!({"count": 2})).await.status, 422);
    // The key of a create is another one.
    let created = api.send("POST", "/v1/sandboxes", &[("idempotency-key", "k")], b"").await;
    assert_eq!(created.status, 201);
    appliance.vmm.sandboxes.lock().unwrap().retain(|id, _| *id == parent);
    assert_eq!(keyed(&parent, json!({"count": 2})).await.status, 409);
}

#[tokio::test]
async fn a_fork_whose_client_hangs_up_leaves_nothing() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let parent = api.sandbox().await;
    *appliance.vmm.create_delay.lock().unwrap() = Duration::from_millis(400);
    let (path, wish) = (format!("/v1/sandboxes/{parent}/fork-tree"), json!({"count": 3}));

    let hung_up = tokio::time::timeout(Duration::from_millis(150), api.post(&path, &wish)).await;

    assert!(hung_up.is_err());
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(appliance.vmm.sandboxes.lock().unwrap().keys().collect::<Vec<_>>(), [&parent]);
}

#[tokio::test]
async fn promotion_deletes_the_siblings_of_that_tree_and_nobody_else() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (token, _) = appliance.other_workspace().await;
    let parent = api.sandbox().await;
    let others = ids(&tree(&api, &parent, json!({"count": 2})).await["children"]);
    let made = tree(&api, &parent, json!({"count": 4, "metadata": {"explore_ttl": "600"}})).await;
    let (tree_id, children) = (made["tree_id"].as_str().unwrap(), ids(&made["children"]));
    // Somebody else's, with the same label.
    {
        let mut all = appliance.vmm.sandboxes.lock().unwrap();
        let foreign = all.get_mut(&children[3]).unwrap();
        foreign.workspace = "acme".into();
    }
    appliance.vmm.undeletable.lock().unwrap().push(children[2].clone());
    let promote = |id: &str, body: Value| {
        let (api, path) = (&api, format!("/v1/sandboxes/{id}/promote"));
        async move { api.post(&path, &body).await }
    };

    let kept = promote(&others[0], json!({})).await.json();
    assert_eq!((&kept["deleted"], &kept["failures"]), (&json!([]), &json!({})));
    let won = promote(&children[0], json!({"cleanup_siblings": true, "tree_id": tree_id})).await;

    assert_eq!(won.status, 200, "{}", won.text());
    let won = won.json();
    assert_eq!((&won["winner"], &won["tree_id"]), (&json!(children[0]), &json!(tree_id)));
    assert_eq!(won["deleted"], json!([children[1]]));
    assert!(won["failures"][&children[2]].is_string(), "{won}");
    assert_eq!(
        api.get(&format!("/v1/sandboxes/{}/lifecycle", children[0])).await.json()["ttl_seconds"],
        3600
    );
    for id in [&parent, &others[0], &others[1], &children[2]] {
        assert_eq!(api.get(&format!("/v1/sandboxes/{id}")).await.status, 200);
    }
    assert_eq!(
        Api::with_token(&appliance, &token).get(&format!("/v1/sandboxes/{}", children[3])).await.status,
        200
    );
}

#[tokio::test]
async fn promotion_of_what_is_no_child_of_that_tree_is_refused() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let parent = api.sandbox().await;
    let children = ids(&tree(&api, &parent, json!({"metadata": {"explore_ttl": "60"}})).await["children"]);
    for (id, body, status) in [
        (&parent, json!({"cleanup_siblings": true}), 409),
        (&children[0], json!({"cleanup_siblings": true, "tree_id": "a".repeat(20)}), 409),
        (&children[0], json!({"tree_id": 5}), 400),
        (&children[0], json!({"tree_id": "x".repeat(65)}), 400),
        (&children[0], json!({"cleanup_siblings": "yes"}), 400),
    ] {
        let reply = api.post(&format!("/v1/sandboxes/{id}/promote"), &body).await;
        assert_eq!(reply.status, status, "{body}: {}", reply.text());
    }
    // A limit that somebody set since is kept.
    let lifecycle = format!("/v1/sandboxes/{}/lifecycle", children[0]);
    api.send("PATCH", &lifecycle, &[], br#"{"ttl_seconds":120}"#).await;
    assert_eq!(api.post(&format!("/v1/sandboxes/{}/promote", children[0]), &json!({})).await.status, 200);
    assert_eq!(api.get(&lifecycle).await.json()["ttl_seconds"], 120);
    assert_eq!(appliance.vmm.sandboxes.lock().unwrap().len(), 3);
}
