//! What happened: listed, and followed without a gap or a double.

use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::Incoming;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{client::Api, common::Appliance};

/// A followed stream, read event by event.
struct Stream {
    body: Incoming,
    text: String,
    _open: crate::client::HangUp,
}

impl Stream {
    async fn open(api: &Api, path: &str, last: Option<&str>) -> Self {
        let headers: Vec<(&str, &str)> = last.map(|last| ("last-event-id", last)).into_iter().collect();
        let (response, open) = api.open("GET", path, &headers, b"").await;
        assert_eq!(response.headers()["content-type"], "text/event-stream; charset=utf-8");
        Self { body: response.into_body(), text: String::new(), _open: open }
    }

    /// The next event as id and data; `None` at the end.
    async fn next(&mut self) -> Option<(String, Value)> {
        let read = async {
            loop {
                if let Some((event, rest)) = self.text.split_once("\n\n") {
                    let (event, rest) = (event.to_owned(), rest.to_owned());
                    self.text = rest;
                    if event.starts_with(':') {
                        continue;
                    }
                    let event = event.strip_prefix("id: ").unwrap();
                    let (id, data) = event.split_once("\nevent: event\ndata: ").unwrap();
                    return Some((id.to_owned(), serde_json::from_str(data).unwrap()));
                }
                let frame = self.body.frame().await?.unwrap();
                self.text.push_str(std::str::from_utf8(frame.data_ref().unwrap()).unwrap());
            }
        };
        tokio::time::timeout(Duration::from_secs(20), read).await.expect("an event")
    }

    async fn kinds(&mut self, count: usize) -> Vec<String> {
        let mut kinds = Vec::new();
        while kinds.len() < count {
            let Some((id, data)) = self.next().await else { break };
            assert_eq!(data["seq"].to_string(), id);
            kinds.push(data["type"].as_str().unwrap().to_owned());
        }
        kinds
    }
}

async fn change(api: &Api, id: &str, verb: &str) {
    let reply = api.post(&format!("/v1/sandboxes/{id}/{verb}"), &json!({})).await;
    assert!(reply.status < 300, "{verb}: {}", reply.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_listed_for_who_owns_them() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (one, two) = (api.sandbox().await, api.sandbox().await);
    change(&api, &one, "pause").await;
    change(&api, &one, "resume").await;
    let path = format!("/v1/sandboxes/{one}/events");

    let listed = api.get(&path).await.json();
    let first = &listed["events"][0];
    assert_eq!((&first["sandbox_id"], &first["type"]), (&json!(one), &json!("sandbox.running")));
    assert!(first["time"].as_str().unwrap().ends_with('Z') && first["payload"].is_object());
    let kinds: Vec<_> =
        listed["events"].as_array().unwrap().iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["sandbox.running", "sandbox.paused", "sandbox.resumed"]);
    let tail = api.get(&format!("{path}?tail=1")).await.json();
    assert_eq!(tail["events"].as_array().unwrap().len(), 1);
    assert_eq!(tail["events"][0]["type"], "sandbox.resumed");
    assert_eq!(api.get(&format!("{path}?since=4102444800")).await.json(), json!({"events": []}));

    api.send("DELETE", &format!("/v1/sandboxes/{two}"), &[], b"").await;
    let all = api.get("/v1/events").await.json();
    assert_eq!(all["events"].as_array().unwrap().len(), 5);
    assert_eq!(all["events"][4]["type"], "sandbox.deleted");
    assert_eq!(api.get(&format!("/v1/sandboxes/{two}/events")).await.status, 404);
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    assert_eq!(foreign.get(&path).await.status, 404);
    assert_eq!(foreign.get(&format!("{path}?follow=1")).await.status, 404);
    assert_eq!(foreign.get("/v1/events").await.json(), json!({"events": []}));
    for bad in ["tail=x", "follow=2", "since=never", "last_event_id=-1"] {
        assert_eq!(api.get(&format!("{path}?{bad}")).await.status, 400, "{bad}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_goes_on_where_another_ended_and_ends_with_the_sandbox() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let other = api.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/events?follow=1");
    let mut stream = Stream::open(&api, &path, None).await;
    let (first, _) = stream.next().await.unwrap();
    change(&api, &other, "pause").await;
    change(&api, &id, "pause").await;
    assert_eq!(stream.kinds(1).await, ["sandbox.paused"]);
    drop(stream);
    change(&api, &id, "resume").await;
    // Nobody is told: the stream looks by itself.
    appliance.vmm.mute.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut again = Stream::open(&api, &path, Some(&first)).await;
    assert_eq!(again.kinds(2).await, ["sandbox.paused", "sandbox.resumed"]);
    change(&api, &id, "hibernate").await;
    assert_eq!(again.kinds(1).await, ["sandbox.hibernated"]);
    assert_eq!(appliance.vmm.woken.load(std::sync::atomic::Ordering::Relaxed), 0);
    appliance.vmm.mute.store(false, std::sync::atomic::Ordering::Relaxed);
    api.send("DELETE", &format!("/v1/sandboxes/{id}"), &[], b"").await;
    assert_eq!(again.kinds(2).await, ["sandbox.deleted"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn starts_are_counted_from_events() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    change(&api, &id, "hibernate").await;
    change(&api, &id, "wake").await;

    let stats = api.get("/v1/stats/boot?limit=1").await.json();

    assert_eq!((&stats["total_samples"], &stats["overall"]["count"]), (&json!(2), &json!(2)));
    assert_eq!(stats["by_template"]["base"]["p50_ms"], 12);
    assert_eq!(stats["recent"].as_array().unwrap().len(), 1);
    assert_eq!((&stats["recent"][0]["sandbox_id"], &stats["recent"][0]["boot_ms"]), (&json!(id), &json!(12)));
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token).get("/v1/stats/boot").await.json();
    assert_eq!((&foreign["total_samples"], &foreign["recent"]), (&json!(0), &json!([])));
    for bad in ["0", "501", "x"] {
        assert_eq!(api.get(&format!("/v1/stats/boot?limit={bad}")).await.status, 400);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]
    /// Whenever a stream is cut and opened again at the last event it brought, all streams together bring every event once.
    #[test]
    fn no_event_is_missed_or_doubled(cuts in proptest::collection::vec(1usize..5, 1..6), tail in 0usize..3) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let appliance = Appliance::start().await;
            let api = Api::new(&appliance);
            let id = api.sandbox().await;
            let info = appliance.vmm.sandboxes.lock().unwrap()[&id].clone();
            let total: usize = cuts.iter().sum();
            let mut stream = Stream::open(&api, &format!("/v1/events?follow=1&tail={tail}"), None).await;
            let writer = async {
                for number in 0..total {
                    appliance.vmm.happen(&info, &format!("event.{number}")).await;
                    if number % 3 == 0 {
                        tokio::time::sleep(Duration::from_millis(3)).await;
                    }
                }
            };
            let reader = async {
                let (mut kinds, mut last) = (Vec::new(), String::new());
                for (at, cut) in cuts.iter().enumerate() {
                    if at > 0 {
                        stream = Stream::open(&api, "/v1/events?follow=1", Some(&last)).await;
                    }
                    let mut left = *cut;
                    while left > 0 {
                        let (id, data) = stream.next().await.unwrap();
                        last = id;
                        let kind = data["type"].as_str().unwrap().to_owned();
                        if kind != "sandbox.running" {
                            kinds.push(kind);
                            left -= 1;
                        }
                    }
                }
                kinds
            };
            let ((), kinds) = tokio::join!(writer, reader);
            let expected: Vec<String> = (0..total).map(|number| format!("event.{number}")).collect();
            assert_eq!(kinds, expected);
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn series_are_asked_for_by_sandbox_and_by_workspace() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;

    let one = api.get(&format!("/v1/metrics/sandbox/{id}?from=1000&to=1600&step=1m")).await.json();
    let all = api.get("/v1/metrics/overview").await.json();

    assert_eq!(one["series"][0], json!({"name": format!("default {id} 600 60"), "points": [[1000, 1.5]]}));
    assert_eq!((&one["from"], &one["to"]), (&json!("1970-01-01T00:16:40Z"), &json!("1970-01-01T00:26:40Z")));
    assert_eq!((&one["step"], &all["step"]), (&json!("1m"), &json!("15s")));
    assert_eq!(all["series"][0]["name"], "default  3600 15");
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    assert_eq!(foreign.get(&format!("/v1/metrics/sandbox/{id}")).await.status, 404);
    assert_eq!(api.get("/v1/metrics/overview?step=2m").await.status, 400);
}
