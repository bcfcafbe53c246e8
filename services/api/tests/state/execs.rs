//! Detached commands: listed, read from an offset on, killed.

use std::time::Duration;

use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::{client::Api, common::Appliance};

/// The events of a whole stream.
fn events(text: &str) -> Vec<(String, Value)> {
    text.split("\n\n")
        .filter_map(|event| event.strip_prefix("event: ")?.split_once("\ndata: "))
        .map(|(name, data)| (name.to_owned(), serde_json::from_str(data).unwrap()))
        .collect()
}

/// What one of the streams said.
fn said(events: &[(String, Value)], stream: &str) -> String {
    events
        .iter()
        .filter(|(name, _)| name == stream)
        .map(|(_, data)| data["chunk"].as_str().unwrap())
        .collect()
}

async fn detached(api: &Api, id: &str, cmd: &str) -> String {
    let reply = api.exec(id, json!({"cmd": cmd, "detach": true})).await;
    assert_eq!(reply.status, 202, "{}", reply.text());
    assert!(reply.json()["pid"].as_u64().unwrap() > 0);
    reply.json()["session_id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_command_is_listed_and_read_from_any_offset() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let session = detached(&api, &id, "printf 'one\\n'; sleep 0.5; printf 'tw\\303'; sleep 0.3; printf '\\251\\n'; sleep 0.3; echo err >&2; exit 5").await;
    let path = format!("/v1/sandboxes/{id}/execs");
    let listed = api.get(&path).await.json();
    assert_eq!((&listed[0]["session_id"], &listed[0]["detached"]), (&json!(session), &json!(true)));
    assert!(listed[0]["exit_code"].is_null() && listed[0]["command"].as_str().unwrap().starts_with("printf"));

    let whole = api.get(&format!("{path}/{session}")).await;
    assert_eq!(whole.header("content-type"), Some("text/event-stream; charset=utf-8"));
    let whole = events(&whole.text());
    assert_eq!(
        (&*whole[0].0, &whole[0].1["session_id"], &whole[0].1["offset"]),
        ("session", &json!(session), &json!(0))
    );
    assert_eq!((said(&whole, "stdout"), said(&whole, "stderr")), ("one\ntwé\n".into(), "err\n".into()));
    let mut position = 0;
    for (name, data) in &whole[1..whole.len() - 1] {
        assert_eq!(data["offset"], position, "{name} {data}");
        position += data["chunk"].as_str().unwrap().len();
        assert_eq!(data["next"], position, "{name} {data}");
    }
    let (name, exit) = whole.last().unwrap();
    assert_eq!((&**name, &exit["exit_code"], &exit["next"]), ("exit", &json!(5), &json!(13)));

    let rest = events(&api.get(&format!("{path}/{session}?offset=4")).await.text());
    assert_eq!((said(&rest, "stdout"), &rest[0].1["offset"]), ("twé\n".into(), &json!(4)));
    let ended = events(&api.get(&format!("{path}/{session}?offset=13&wait=false")).await.text());
    assert_eq!(ended.iter().map(|(name, _)| &**name).collect::<Vec<_>>(), ["session", "exit"]);
    let listed = api.get(&path).await.json();
    assert_eq!((&listed[0]["exit_code"], &listed[0]["output_bytes"]), (&json!(5), &json!(13)));
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_without_waiting_ends_where_the_output_does() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let session = detached(&api, &id, "echo here; sleep 30").await;
    let path = format!("/v1/sandboxes/{id}/execs/{session}");
    while api.get(&format!("/v1/sandboxes/{id}/execs")).await.json()[0]["output_bytes"] != 5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    let now = events(&api.get(&format!("{path}?wait=false")).await.text());

    assert_eq!(
        (said(&now, "stdout"), now.last().unwrap()),
        ("here\n".into(), &("running".into(), json!({"next": 5})))
    );
    assert_eq!(api.send("DELETE", &path, &[], b"").await.status, 204);
    let last = events(&api.get(&path).await.text());
    assert_eq!(last.last().unwrap().1["exit_code"], 137);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_comes_back_misses_nothing_and_replaces_the_one_before() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let session = detached(
        &api,
        &id,
        "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line $i; done; sleep 2; echo end",
    )
    .await;
    let path = format!("/v1/sandboxes/{id}/execs/{session}");
    // One that has read all there is, and one that is gone before it read anything.
    let (first, open) = api.open("GET", &path, &[], b"").await;
    drop(api.open("GET", &path, &[], b"").await);
    appliance.vmm.cut().await;

    let whole = events(&api.get(&path).await.text());

    let mut expected: String = (1..=4000).map(|i| format!("line {i}\n")).collect();
    expected.push_str("end\n");
    assert!(said(&whole, "stdout") == expected, "{} bytes", said(&whole, "stdout").len());
    let replaced = first.into_body().collect().await.unwrap().to_bytes();
    drop(open);
    let replaced = events(std::str::from_utf8(&replaced).unwrap());
    assert_eq!(replaced.last().unwrap().1, json!({"error": "another request follows this command now"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_command_that_somebody_else_reads_is_not_killed() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let body = json!({"cmd": "echo a; sleep 1; echo b; exit 4"}).to_string();
    let (stream, open) =
        api.open("POST", &format!("/v1/sandboxes/{id}/exec/stream"), &[], body.as_bytes()).await;
    let session = stream.headers()["x-pandastack-session"].to_str().unwrap().to_owned();

    let path = format!("/v1/sandboxes/{id}/execs/{session}");
    let (read, before) = tokio::join!(api.get(&path), stream.into_body().collect());

    drop(open);
    let read = events(&read.text());
    assert_eq!((said(&read, "stdout"), &read.last().unwrap().1["exit_code"]), ("a\nb\n".into(), &json!(4)));
    assert!(String::from_utf8_lossy(&before.unwrap().to_bytes()).contains("another request follows"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_detached_commands_time_limit_is_told() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let wish = json!({"cmd": "echo part; sleep 60", "detach": true, "timeout_seconds": 1});
    let session = api.exec(&id, wish).await.json()["session_id"].as_str().unwrap().to_owned();

    let told = events(&api.get(&format!("/v1/sandboxes/{id}/execs/{session}")).await.text());

    assert_eq!(said(&told, "stdout"), "part\n");
    assert_eq!(told.last().unwrap(), &("error".into(), json!({"error": "command timeout"})));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let session = detached(&api, &id, "true").await;
    for body in [
        json!({"cmd": "true", "detach": "yes"}),
        json!({"cmd": "", "detach": true}),
        json!({"detach": true}),
        json!({"cmd": "cat", "detach": true, "stdin": "x"}),
    ] {
        assert_eq!(api.exec(&id, body.clone()).await.status, 400, "{body}");
    }
    let at = format!("/v1/sandboxes/{id}/execs");
    for query in ["offset=-1", "offset=x", "offset=1.5", "offset=99999999999999999999", "wait=maybe"] {
        assert_eq!(api.get(&format!("{at}/{session}?{query}")).await.status, 400, "{query}");
    }
    for other in ["nothing", "zzzzzzzzzzzzzzzzzzzz", "..%2F..", "%00", &"x".repeat(500)] {
        for query in ["", "?wait=false"] {
            assert_eq!(api.get(&format!("{at}/{other}{query}")).await.status, 404, "{other}");
        }
        assert_eq!(api.send("DELETE", &format!("{at}/{other}"), &[], b"").await.status, 404, "{other}");
    }
}
