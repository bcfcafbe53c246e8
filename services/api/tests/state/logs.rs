//! What programs wrote, read whole, by lines, and while it is written.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use pandastack_bus::vmm::State;
use serde_json::{Value, json};

use crate::{client::Api, common::Appliance};

/// Reads events until so many lines are there, and checks how they are framed.
async fn lines(body: &mut Incoming, count: usize) -> Vec<String> {
    let mut text = String::new();
    let found = |text: &str| {
        text.split("\n\n")
            .filter(|event| !event.is_empty() && !event.starts_with(':'))
            .filter_map(|event| event.strip_prefix("event: line\ndata: "))
            .filter_map(|data| serde_json::from_str::<Value>(data).ok())
            .map(|data| data["line"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let read = async {
        while found(&text).len() < count {
            let Some(frame) = body.frame().await else { break };
            text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(20), read).await;
    assert!(text.is_ascii());
    found(&text)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_is_text_with_the_streams_apart() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.exec(&id, json!({"cmd": "echo one; echo zwei é; printf '\\377'; echo bad >&2"})).await;
    let path = format!("/v1/sandboxes/{id}/logs");

    let both = api.get(&format!("{path}?stream=both&follow=false")).await;

    assert_eq!((both.status, both.header("content-type")), (200, Some("text/plain; charset=utf-8")));
    let mut sorted: Vec<_> = both.text().split_inclusive('\n').map(str::to_owned).collect();
    sorted.sort();
    assert_eq!(sorted, ["bad\n", "one\n", "zwei é\n", "\u{FFFD}\n"]);
    assert_eq!(api.get(&format!("{path}?stream=stderr")).await.text(), "bad\n");
    assert_eq!(api.get(&format!("{path}?stream=stdout&follow=0")).await.text(), "one\nzwei é\n\u{FFFD}\n");
    assert_eq!(api.get(&format!("{path}?stream=stdout&tail=2")).await.text(), "zwei é\n\u{FFFD}\n");
    assert_eq!(api.get(&format!("{path}?tail=0")).await.text(), "");
    assert_eq!(api.get(&format!("{path}?since=4102444800")).await.text(), "");
    assert_eq!(api.get(&format!("{path}?since=2020-01-01T00:00:00Z&stream=stderr")).await.text(), "bad\n");
    assert_eq!(api.get(&format!("{path}?session={}", "z".repeat(20))).await.text(), "");
    for bad in ["stream=all", "tail=-1", "follow=2", "since=x", "session=x"] {
        assert_eq!(api.get(&format!("{path}?{bad}")).await.status, 400, "{bad}");
    }
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    for query in ["", "?follow=1", "?stream=console", "?stream=console&follow=1"] {
        assert_eq!(foreign.get(&format!("{path}{query}")).await.status, 404, "{query}");
        let nobody = format!("/v1/sandboxes/{}/logs{query}", "0".repeat(20));
        assert_eq!(api.get(&nobody).await.status, 404, "{query}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_log_comes_whole_and_its_tail_is_its_end() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.exec(&id, json!({"cmd": "seq 1 60000"})).await;
    let path = format!("/v1/sandboxes/{id}/logs");
    let expected: String = (1..=60_000).map(|number| format!("{number}\n")).collect();

    assert!(api.get(&path).await.text() == expected);
    assert_eq!(api.get(&format!("{path}?tail=3")).await.text(), "59998\n59999\n60000\n");
    let tail = api.get(&format!("{path}?tail=10000")).await.text();
    assert_eq!((tail.lines().count(), tail.lines().next()), (10_000, Some("50001")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_misses_nothing_across_cuts_and_sleep_and_wakes_nobody() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.exec(&id, json!({"cmd": "echo before; echo apart >&2"})).await;
    let path = format!("/v1/sandboxes/{id}/logs?stream=stdout&follow=true");
    let (response, _open) = api.open("GET", &path, &[], b"").await;
    assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
    let mut body = response.into_body();
    assert_eq!(lines(&mut body, 1).await, ["before\n"]);

    appliance.vmm.cut().await;
    api.exec(&id, json!({"cmd": "echo 'after a cut'"})).await;
    assert_eq!(lines(&mut body, 1).await, ["after a cut\n"]);

    api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(appliance.vmm.woken.load(std::sync::atomic::Ordering::Relaxed), 0);
    api.exec(&id, json!({"cmd": "echo 'after a sleep'; printf open"})).await;
    assert_eq!(appliance.vmm.woken.load(std::sync::atomic::Ordering::Relaxed), 1);
    assert_eq!(lines(&mut body, 2).await, ["after a sleep\n", "open\n"]);

    api.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").await;
    appliance.vmm.cut().await;
    let end = tokio::time::timeout(Duration::from_secs(20), body.collect()).await.unwrap();
    assert!(end.is_ok(), "the end of a sandbox is a clean end");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_with_a_tail_begins_there() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.exec(&id, json!({"cmd": "seq 1 50"})).await;
    let path = format!("/v1/sandboxes/{id}/logs?follow=1&tail=");
    let (two, _open) = api.open("GET", &format!("{path}2"), &[], b"").await;
    let (none, _open_too) = api.open("GET", &format!("{path}0"), &[], b"").await;
    let (mut two, mut none) = (two.into_body(), none.into_body());
    assert_eq!(lines(&mut two, 2).await, ["49\n", "50\n"]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    api.exec(&id, json!({"cmd": "echo new"})).await;
    assert_eq!(lines(&mut two, 1).await, ["new\n"]);
    assert_eq!(lines(&mut none, 1).await, ["new\n"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hibernated_sandbox_is_woken_by_a_plain_read_unless_it_says_no() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.exec(&id, json!({"cmd": "echo here"})).await;
    let path = format!("/v1/sandboxes/{id}/logs");
    api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await;

    let refused = api.get(&format!("{path}?wake=false")).await;
    assert_eq!((refused.status, refused.json()["code"].clone()), (409, json!("hibernated")));
    assert_eq!(appliance.vmm.sandboxes.lock().unwrap()[&id].state, State::Hibernated);
    assert_eq!(api.get(&path).await.text(), "here\n");
    assert_eq!(appliance.vmm.sandboxes.lock().unwrap()[&id].state, State::Running);
    api.post(&format!("/v1/sandboxes/{id}/pause"), &json!({})).await;
    assert_eq!(api.get(&path).await.status, 409);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_is_text_or_lines() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/logs?stream=console");

    let text = api.get(&format!("{path}&tail=5&since=7")).await;
    assert_eq!(text.header("content-type"), Some("text/plain; charset=utf-8"));
    assert_eq!(text.text(), "boot \u{1b}[0mé\nlines=5 since=7 follow=false\n");
    let (response, _open) = api.open("GET", &format!("{path}&follow=1"), &[], b"").await;
    let mut body = response.into_body();
    let expected = ["boot \u{1b}[0mé\n", "lines=1000 since=0 follow=true\n"];
    assert_eq!(lines(&mut body, 2).await, expected);
    // Its machine ends.
    appliance.vmm.consoles.lock().unwrap().clear();
    assert!(body.collect().await.is_ok());
}
