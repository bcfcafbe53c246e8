//! Snapshots, and sandboxes from them.

use std::time::Duration;

use pandastack_bus::{Error, storage::Purpose};
use serde_json::json;

use crate::{client::Api, common::Appliance};

#[tokio::test]
async fn a_snapshot_is_taken_listed_shown_used_and_deleted() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (id, other) = (api.sandbox().await, api.sandbox().await);
    let taken = api.post(&format!("/v1/sandboxes/{id}/snapshots"), &json!({})).await;
    let snapshot = taken.json();
    assert_eq!(taken.status, 201, "{snapshot}");
    assert_eq!((&snapshot["sandbox_id"], &snapshot["template"]), (&json!(id), &json!("base")));
    assert_eq!(
        (&snapshot["size_bytes"], &snapshot["created_at"]),
        (&json!(1u64 << 30), &json!("2026-01-02T03:04:05.25Z"))
    );
    assert!(snapshot.get("mem_path").is_none() && snapshot.get("unusable").is_none());
    let first = snapshot["id"].as_str().unwrap();
    let second = api.send("POST", &format!("/v1/sandboxes/{other}/snapshots"), &[], b"").await.json();

    let all = api.get("/v1/snapshots").await.json();
    assert_eq!((&all[0]["id"], &all[1]["id"]), (&second["id"], &json!(first)), "newest first");
    assert_eq!(api.get(&format!("/v1/snapshots?sandbox_id={id}")).await.json(), json!([snapshot]));
    assert_eq!(api.get("/v1/snapshots?sandbox_id=zzzzzzzzzzzzzzzzzzzz").await.json(), json!([]));
    assert_eq!(api.get("/v1/snapshots?sandbox_id=..").await.status, 400);
    assert_eq!(api.get(&format!("/v1/snapshots/{first}")).await.json(), snapshot);

    let wish = json!({"template": "no-such", "from_snapshot": first, "disk_gb": 1, "metadata": {"a": "b"}});
    let made = api.post("/v1/sandboxes", &wish).await;
    assert_eq!((made.status, &made.json()["from_snapshot"]), (201, &json!(first)), "{}", made.text());
    assert_eq!(made.json()["template"], "base");

    for status in [204, 404] {
        assert_eq!(api.send("DELETE", &format!("/v1/snapshots/{first}"), &[], b"").await.status, status);
    }
    assert_eq!(api.get(&format!("/v1/snapshots/{first}")).await.status, 404);
    assert_eq!(api.post("/v1/sandboxes", &wish).await.status, 404);
}

#[tokio::test]
async fn what_is_not_a_tenants_snapshot_is_not_there() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (token, _) = appliance.other_workspace().await;
    let theirs = Api::with_token(&appliance, &token);
    let id = api.sandbox().await;
    let info = appliance.vmm.sandboxes.lock().unwrap()[&id].clone();
    let mut hidden = Vec::new();
    for (number, purpose) in [Purpose::Fork, Purpose::Hibernation, Purpose::Snapshot].into_iter().enumerate()
    {
        hidden.push(format!("{}{number}", "s".repeat(19)));
        appliance.shelf.capture(hidden[number].clone(), &info, purpose);
    }
    for (who, hidden) in [(&api, &hidden[..2]), (&theirs, &hidden[..])] {
        for snapshot in hidden.iter().map(String::as_str).chain(["x", "..", "%00", "zzzzzzzzzzzzzzzzzzzz"]) {
            let path = format!("/v1/snapshots/{snapshot}");
            assert_eq!(who.get(&path).await.status, 404, "{snapshot}");
            assert_eq!(who.send("DELETE", &path, &[], b"").await.status, 404, "{snapshot}");
            assert_eq!(who.post("/v1/sandboxes", &json!({"from_snapshot": snapshot})).await.status, 404);
        }
    }
    assert_eq!(theirs.get("/v1/snapshots").await.json(), json!([]));
    assert_eq!(api.get("/v1/snapshots").await.json().as_array().unwrap().len(), 1);
    assert_eq!(appliance.shelf.snapshots.lock().unwrap().len(), 3);
}

#[tokio::test]
async fn an_unusable_snapshot_is_a_409_with_its_sentence() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let taken = api.post(&format!("/v1/sandboxes/{id}/snapshots"), &json!({})).await.json();
    let snapshot = taken["id"].as_str().unwrap();
    appliance.shelf.snapshots.lock().unwrap().get_mut(snapshot).unwrap().unusable =
        "made on another processor".into();

    let refused = api.post("/v1/sandboxes", &json!({"from_snapshot": snapshot})).await;

    assert_eq!((refused.status, &refused.json()["error"]), (409, &json!("made on another processor")));
    assert_eq!(
        api.get(&format!("/v1/snapshots/{snapshot}")).await.json()["unusable"],
        "made on another processor"
    );
}

#[tokio::test]
async fn patience_is_longer_than_the_buss_and_ends_in_one_snapshot() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    appliance
        .vmm
        .failures
        .lock()
        .unwrap()
        .extend([Error::Timeout("slow".into()), Error::Timeout("slow".into())]);

    let taken = api.post(&format!("/v1/sandboxes/{id}/snapshots"), &json!({})).await;

    assert_eq!(taken.status, 201);
    assert_eq!(*appliance.vmm.snapshots_asked.lock().unwrap(), vec![taken.json()["id"].as_str().unwrap(); 3]);
    for (error, status) in [
        (Error::NoSpace("disk full".into()), 507),
        (Error::WrongState("being made".into()), 409),
        (Error::NoCapacity("busy".into()), 503),
        (Error::NotFound("gone".into()), 404),
    ] {
        appliance.vmm.failures.lock().unwrap().push(error);
        assert_eq!(api.post(&format!("/v1/sandboxes/{id}/snapshots"), &json!({})).await.status, status);
    }
}

#[tokio::test]
async fn a_snapshot_whose_client_hangs_up_does_not_stay() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    appliance.vmm.failures.lock().unwrap().extend((0..3).map(|_| Error::Timeout("slow".into())));
    let path = format!("/v1/sandboxes/{id}/snapshots");
    let wish = json!({});

    let hung_up = tokio::time::timeout(Duration::from_millis(100), api.post(&path, &wish)).await;

    assert!(hung_up.is_err());
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if appliance.vmm.snapshots_asked.lock().unwrap().len() == 4 {
            break;
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(appliance.shelf.snapshots.lock().unwrap().is_empty());
}
