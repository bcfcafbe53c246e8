//! Pause, resume, hibernate, wake, and what wakes by itself.

use std::{sync::atomic::Ordering, time::Duration};

use pandastack_bus::{Error, vmm::State};
use serde_json::json;

use crate::{client::Api, common::Appliance};

fn state(appliance: &Appliance, id: &str) -> State {
    appliance.vmm.sandboxes.lock().unwrap()[id].state
}

#[tokio::test]
async fn every_verb_may_be_repeated_in_every_form() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    for (verb, status, body) in [
        ("resume", 204, None),
        ("pause", 204, None),
        ("resume", 204, None),
        ("hibernate", 200, Some("hibernated")),
        ("stop", 200, Some("hibernated")),
        ("wake", 200, Some("running")),
        ("start", 200, Some("running")),
    ] {
        for (headers, sent) in [
            (&[][..], &b""[..]),
            (&[("content-type", "text/plain;charset=UTF-8")][..], b""),
            (&[][..], b"{}"),
        ] {
            let reply = api.send("POST", &format!("/v1/sandboxes/{id}/{verb}"), headers, sent).await;
            assert_eq!(reply.status, status, "{verb}: {}", reply.text());
            match body {
                Some(body) => assert_eq!(reply.json(), json!({"status": body})),
                None => assert!(reply.body.is_empty()),
            }
        }
        assert_eq!(api.send("POST", &format!("/v1/sandboxes/{id}/{verb}"), &[], b"[1]").await.status, 400);
    }
    assert_eq!(appliance.vmm.woken.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_wrong_state_is_a_409_and_a_full_disk_a_507() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let post = |verb: &'static str| {
        let path = format!("/v1/sandboxes/{id}/{verb}");
        let api = &api;
        async move { api.post(&path, &json!({})).await.status }
    };
    appliance.vmm.failures.lock().unwrap().push(Error::NoSpace("no room for its memory".into()));
    assert_eq!(post("hibernate").await, 507);
    assert_eq!(post("hibernate").await, 200);
    assert_eq!((post("pause").await, post("resume").await), (409, 409));
    assert_eq!(post("wake").await, 200);
    assert_eq!(post("pause").await, 204);
    assert_eq!(post("wake").await, 409);
    assert_eq!(state(&appliance, &id), State::Paused);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_sandbox_refuses_what_needs_its_guest_whoever_paused_it() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    for by_api in [true, false] {
        // An idle connection lies ready, and would take a request.
        assert_eq!(api.exec(&id, json!({"cmd": "true"})).await.status, 200);
        match by_api {
            true => assert_eq!(api.post(&format!("/v1/sandboxes/{id}/pause"), &json!({})).await.status, 204),
            false => {
                appliance.vmm.turn(&id, &[State::Running], State::Paused).await.unwrap();
                while !appliance.app.guests.still.is(&id) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
        for (method, below, body) in [
            ("POST", "exec", &br#"{"cmd":"true"}"#[..]),
            ("POST", "exec/stream", br#"{"cmd":"true"}"#),
            ("GET", "execs", b""),
            ("GET", "fs?path=/etc/hostname", b""),
            ("GET", "fs/stat?path=/etc/hostname", b""),
            ("PUT", "fs?path=/tmp/never", b"x"),
        ] {
            let reply = api.send(method, &format!("/v1/sandboxes/{id}/{below}"), &[], body).await;
            assert_eq!((reply.status, &reply.json()["error"]), (409, &json!("sandbox is paused")), "{below}");
        }
        assert_eq!(api.post(&format!("/v1/sandboxes/{id}/resume"), &json!({})).await.status, 204);
    }
    assert_eq!(api.exec(&id, json!({"cmd": "true"})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_the_guest_wakes_it_and_a_look_does_not() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let hibernate = || async {
        assert_eq!(api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await.status, 200);
    };
    hibernate().await;
    assert_eq!(api.get(&format!("/v1/sandboxes/{id}")).await.json()["status"], "hibernated");
    assert_eq!(api.get("/v1/sandboxes").await.json()[0]["status"], "hibernated");
    for below in ["lifecycle", "nowhere"] {
        api.get(&format!("/v1/sandboxes/{id}/{below}")).await;
    }
    assert_eq!(state(&appliance, &id), State::Hibernated);
    for (method, below, body) in [
        ("POST", "exec", &br#"{"cmd":"true"}"#[..]),
        ("POST", "exec/stream", br#"{"cmd":"true"}"#),
        ("GET", "execs", b""),
        ("GET", "fs?path=/etc/hostname", b""),
        ("GET", "fs/dir?path=/etc", b""),
    ] {
        let reply = api.send(method, &format!("/v1/sandboxes/{id}/{below}"), &[], body).await;
        assert_eq!((reply.status, state(&appliance, &id)), (200, State::Running), "{below}");
        hibernate().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wake_that_fails_is_a_503_with_its_reason() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await;
    for (error, retry) in [
        (Error::NoCapacity("no memory".into()), Some("5")),
        (Error::WrongState("another processor".into()), None),
    ] {
        *appliance.vmm.wake_failure.lock().unwrap() = Some(error.clone());
        let reply = api.exec(&id, json!({"cmd": "true"})).await;
        let sentence = format!("auto-wake: {}", error.message());
        assert_eq!((reply.status, &reply.json()["error"]), (503, &json!(sentence)));
        assert_eq!(reply.header("retry-after"), retry);
    }
    *appliance.vmm.wake_failure.lock().unwrap() = None;
    assert_eq!(api.exec(&id, json!({"cmd": "true"})).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_waits_while_its_sandbox_sleeps_and_wakes_nobody() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let dir = tempfile::tempdir().unwrap();
    let marks = dir.path().join("marks");
    let cmd =
        format!("echo x >> {}; for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done; exit 3", marks.display());
    let sleep = async {
        while !marks.exists() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        appliance.vmm.turn(&id, &[State::Running], State::Hibernated).await.unwrap();
        // Longer than a command's time, and than a lost connection is put up with in a running guest.
        tokio::time::sleep(Duration::from_secs(23)).await;
        assert_eq!(state(&appliance, &id), State::Hibernated);
        appliance.vmm.turn(&id, &[State::Hibernated], State::Running).await.unwrap();
    };
    let (reply, ()) = tokio::join!(api.exec(&id, json!({"cmd": cmd, "timeout_seconds": 10})), sleep);
    let result = reply.json();
    assert_eq!(
        (&result["stdout"], &result["exit_code"]),
        (&json!("1\n2\n3\n4\n5\n6\n"), &json!(3)),
        "{result}"
    );
    assert_eq!(std::fs::read_to_string(&marks).unwrap(), "x\n");
    assert_eq!(appliance.vmm.woken.load(Ordering::Relaxed), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_hangs_up_while_the_sandbox_sleeps_does_not_wake_it() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/exec/stream");
    let stream = api.open("POST", &path, &[], br#"{"cmd":"sleep 20"}"#).await;
    appliance.vmm.turn(&id, &[State::Running], State::Hibernated).await.unwrap();

    drop(stream);
    tokio::time::sleep(Duration::from_secs(2)).await;

    assert_eq!((state(&appliance, &id), appliance.vmm.woken.load(Ordering::Relaxed)), (State::Hibernated, 0));
}
