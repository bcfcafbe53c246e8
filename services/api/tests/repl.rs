//! Code interpreter sessions through the API, with the real agent and a kernels' host that does what a cell tells it.
#![allow(clippy::unwrap_used)]

mod client;
mod common;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use client::Api;
use common::Appliance;
use pandastack_api::routes::kernels::Kernels;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
};

const SESSION: &str = "0123456789abcdef";

/// `guest-init connect`, whose binary is not part of this crate.
const CONNECT: &str = r#"
import os, socket, sys, threading
there = socket.socket(socket.AF_UNIX)
try:
    there.connect(sys.argv[1])
except OSError:
    sys.exit(69)
def send():
    while piece := os.read(0, 65536):
        there.sendall(piece)
threading.Thread(target=send, daemon=True).start()
while piece := there.recv(65536):
    os.write(1, piece)
"#;

/// A kernels' host. A cell's code is JSON: `answer`, a line to send, after `wait` milliseconds.
struct Host {
    folder: tempfile::TempDir,
    asked: Mutex<Vec<Value>>,
    /// Requests whose client went away before the answer.
    taken_back: Mutex<Vec<Value>>,
}

impl Host {
    /// One that is started by the first question that needs it.
    async fn start() -> (Arc<Self>, Appliance) {
        let host = Arc::new(Self {
            folder: tempfile::tempdir().unwrap(),
            asked: Mutex::default(),
            taken_back: Mutex::default(),
        });
        let listener = UnixListener::bind(host.path("hidden")).unwrap();
        let this = Arc::clone(&host);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&this).serve(stream));
            }
        });
        let start = format!("mv {} {}", host.path("hidden").display(), host.path("socket").display());
        let appliance = Appliance::start_at("127.0.0.1:0", kernels(&host.path("socket"), &start)).await;
        (host, appliance)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    async fn serve(self: Arc<Self>, stream: UnixStream) {
        let (read, mut write) = stream.into_split();
        let mut read = BufReader::new(read);
        let mut line = String::new();
        read.read_line(&mut line).await.unwrap();
        let question: Value = serde_json::from_str(&line).unwrap();
        self.asked.lock().unwrap().push(question.clone());
        let code: Value =
            question["code"].as_str().map_or(Value::Null, |code| serde_json::from_str(code).unwrap());
        let session = json!({"session": SESSION, "language": "python", "created": 1.5, "cells": 0});
        let answer = match question["do"].as_str().unwrap() {
            "open" if question["language"] == "python" => json!({"ok": session}).to_string(),
            "open" if question["language"] == "full" => {
                json!({"error": "limit", "message": "eight"}).to_string()
            }
            "open" => json!({"error": "unknown_language", "message": "no kernel for it"}).to_string(),
            "list" => {
                json!({"ok": [session, {"session": "../x", "language": "python", "created": 1, "cells": 0}]})
                    .to_string()
            }
            "close" => json!({"ok": true}).to_string(),
            _ => code["answer"].as_str().unwrap().to_owned(),
        };
        let wait = Duration::from_millis(code["wait"].as_u64().unwrap_or(0));
        let mut rest = [0];
        tokio::select! {
            () = tokio::time::sleep(wait) => drop(write.write_all(format!("{answer}\n").as_bytes()).await),
            _ = read.read(&mut rest) => self.taken_back.lock().unwrap().push(question),
        }
    }

    fn runs(&self) -> usize {
        self.asked.lock().unwrap().iter().filter(|question| question["do"] == "run").count()
    }
}

fn kernels(socket: &Path, start: &str) -> Kernels {
    let connector = ["python3", "-c", CONNECT, socket.to_str().unwrap()];
    Kernels {
        connector: connector.map(str::to_owned).to_vec(),
        starter: ["/bin/sh", "-c", start].map(str::to_owned).to_vec(),
    }
}

fn outcome(more: &Value) -> String {
    let mut outcome = json!({"stdout": "out\n", "stderr": "err\n", "exit": 0, "error": null, "results": [], "note": "",
        "duration_ms": 5, "truncated": false, "timed_out": false, "restarted": false});
    outcome.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"ok": outcome}).to_string()
}

fn cell(answer: &str, wait: u64) -> Value {
    json!({"code": json!({"answer": answer, "wait": wait}).to_string(), "timeout_ms": 60_000})
}

async fn run(api: &Api, sandbox: &str, cell: &Value) -> client::Reply {
    api.post(&format!("/v1/sandboxes/{sandbox}/repl/sessions/{SESSION}/run"), cell).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_opened_used_listed_and_closed() {
    let (host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let sessions = format!("/v1/sandboxes/{id}/repl/sessions");
    // Nothing starts the host but what needs it.
    assert_eq!(api.get(&sessions).await.json(), json!([]));
    assert_eq!(run(&api, &id, &cell("", 0)).await.status, 404);
    assert_eq!(api.send("DELETE", &format!("{sessions}/{SESSION}"), &[], b"").await.status, 404);
    assert!(host.asked.lock().unwrap().is_empty());

    let opened = api.post(&sessions, &json!({})).await;
    assert_eq!(opened.status, 201, "{}", opened.text());
    let expected = json!({"id": SESSION, "session_id": SESSION, "sandbox_id": id, "language": "python",
        "created_at": "1970-01-01T00:00:01.5Z", "cells": 0});
    assert_eq!(opened.json(), expected);
    assert_eq!(api.post(&sessions, &json!({"language": "Python"})).await.status, 201);
    assert_eq!(api.get(&sessions).await.json(), json!([expected]));

    let bundle = json!({"text/plain": "é\u{1F600}", "application/json": "{\"a\": 1}"});
    let ran =
        run(&api, &id, &cell(&outcome(&json!({"results": [bundle], "exit": 3, "error": "why"})), 0)).await;
    assert_eq!(ran.status, 200);
    assert_eq!(
        ran.json(),
        json!({"stdout": "out\n", "stderr": "err\n", "exit": 3, "exit_code": 3, "error": "why", "results": [bundle],
            "duration_ms": 5, "truncated": false, "restarted": false})
    );
    let big = "x\u{1}é\"".repeat(500_000);
    let ran =
        run(&api, &id, &cell(&outcome(&json!({"stdout": "", "results": [{"text/html": big}]})), 0)).await;
    assert_eq!(ran.status, 413);
    assert_eq!(api.send("DELETE", &format!("{sessions}/{SESSION}"), &[], b"").await.status, 204);
    assert_eq!(host.asked.lock().unwrap().last().unwrap(), &json!({"do": "close", "session": SESSION}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_without_kernels_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let none = kernels(&folder.path().join("socket"), "exit 69");
    let appliance = Appliance::start_at("127.0.0.1:0", none).await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let reply = api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({"language": "python"})).await;
    assert_eq!(reply.status, 400);
    assert!(reply.json()["error"].as_str().unwrap().contains("no kernel for \"python\""), "{}", reply.text());

    let broken = kernels(&folder.path().join("socket"), "echo connection refused >&2; exit 1");
    let appliance = Appliance::start_at("127.0.0.1:0", broken).await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let reply = api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({})).await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, Some("5")));
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_requests_are_refused_and_foreign_ones_find_nothing() {
    let (host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let sessions = format!("/v1/sandboxes/{id}/repl/sessions");
    assert_eq!(api.post(&sessions, &json!({"language": "cobol"})).await.status, 400);
    let full = api.post(&sessions, &json!({"language": "full"})).await;
    assert_eq!((full.status, full.header("retry-after")), (429, None));
    let asked = host.asked.lock().unwrap().len();
    for body in [json!({"language": 1}), json!({"language": "x".repeat(65)}), json!({"language": "\0"})] {
        assert_eq!(api.post(&sessions, &body).await.status, 400, "{body}");
    }
    for body in [
        json!({}),
        json!({"code": ""}),
        json!({"code": 1}),
        json!({"code": "1", "timeout_ms": -1}),
        json!({"code": "1", "timeout_ms": 86_400_001}),
    ] {
        let reply = run(&api, &id, &body).await;
        assert_eq!(reply.status, 400, "{body}");
    }
    assert_eq!(run(&api, &id, &json!({})).await.json()["error"], "code required");
    assert_eq!(run(&api, &id, &json!({"code": "x".repeat((1 << 20) + 1)})).await.status, 413);
    for name in ["nothing", "0123456789ABCDEF", "..%2F..", "%00", &"0".repeat(500)] {
        let reply = api.post(&format!("{sessions}/{name}/run"), &json!({"code": "1"})).await;
        assert_eq!((reply.status, &reply.json()["error"]), (404, &json!("session not found")), "{name}");
        assert_eq!(api.send("DELETE", &format!("{sessions}/{name}"), &[], b"").await.status, 404, "{name}");
    }
    let (token, _) = appliance.other_workspace().await;
    let foreign = Api::with_token(&appliance, &token);
    assert_eq!(foreign.get(&sessions).await.status, 404);
    assert_eq!(foreign.post(&sessions, &json!({})).await.status, 404);
    assert_eq!(run(&foreign, &id, &cell("", 0)).await.status, 404);
    assert_eq!(foreign.send("DELETE", &format!("{sessions}/{SESSION}"), &[], b"").await.status, 404);
    assert_eq!(foreign.post(&format!("/v1/sandboxes/{id}/repl"), &json!({"code": "1"})).await.status, 404);
    assert_eq!(host.asked.lock().unwrap().len(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cell_whose_time_is_up_is_a_timeout_with_what_it_wrote() {
    let (_host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({})).await;
    let answer = outcome(&json!({"exit": 124, "timed_out": true, "error": "Traceback"}));
    let late = run(&api, &id, &cell(&answer, 0)).await;
    let body = late.json();
    assert_eq!(
        (late.status, &body["error"], &body["code"]),
        (504, &json!("cell timeout after 60s"), &json!("cell_timeout"))
    );
    assert_eq!(
        (&body["stdout"], &body["exit"], &body["traceback"], &body["request_id"]),
        (&json!("out\n"), &json!(124), &json!("Traceback"), &json!(late.header("x-request-id").unwrap()))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_guest_makes_up_is_no_result() {
    let (_host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({})).await;
    let bundle = outcome(&json!({"results": [{"text/plain": 1}]}));
    for answer in ["", "null", "{}", "[1", "{\"ok\": 1}", "{\"ok\": {}}", &bundle, &"[".repeat(300_000)] {
        let reply = run(&api, &id, &cell(answer, 0)).await;
        assert_eq!(reply.status, 504, "{:.50}: {}", answer, reply.text());
        assert!(!reply.json()["error"].as_str().unwrap().contains("timeout"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_runs_no_cell_twice() {
    let (host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({})).await;
    let large = "y".repeat(900_000);
    let cell = cell(&outcome(&json!({"stdout": large})), 1500);
    let cut = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            appliance.vmm.cut().await;
        }
    };
    let (reply, ()) = tokio::join!(run(&api, &id, &cell), cut);
    assert!(reply.json()["stdout"] == json!(large));
    assert_eq!(host.runs(), 1);
    assert!(host.taken_back.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_takes_its_cell_back() {
    let (host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({})).await;
    let cell = cell(&outcome(&json!({})), 60_000);
    assert!(tokio::time::timeout(Duration::from_secs(2), run(&api, &id, &cell)).await.is_err());
    for _ in 0..100 {
        if host.taken_back.lock().unwrap().len() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((host.runs(), host.taken_back.lock().unwrap().len()), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_cell_dribbles_and_whatever_becomes_of_it_is_a_result() {
    let (_host, appliance) = Host::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    api.post(&format!("/v1/sandboxes/{id}/repl/sessions"), &json!({})).await;
    let (good, late, bad) = (
        cell(&outcome(&json!({})), 21_000),
        cell(&outcome(&json!({"timed_out": true, "error": "Traceback"})), 21_000),
        cell("nonsense", 21_000),
    );
    let (good, late, bad) = tokio::join!(run(&api, &id, &good), run(&api, &id, &late), run(&api, &id, &bad));
    assert!(good.text().starts_with(' '));
    assert_eq!((good.status, &good.json()["stdout"], good.json().get("error")), (200, &json!("out\n"), None));
    let told = late.json();
    assert_eq!((late.status, &told["exit"], &told["stdout"]), (200, &json!(124), &json!("out\n")));
    assert_eq!(told["error"], "cell timeout after 60s\nTraceback");
    assert_eq!(
        (bad.status, &bad.json()["exit_code"], &bad.json()["results"]),
        (200, &json!(137), &json!([]))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn code_runs_once_without_a_session() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let path = format!("/v1/sandboxes/{id}/repl");
    let known = api.get("/v1/repl/languages").await.json();
    assert_eq!(known, json!(["python", "javascript", "bash", "sh", "ruby"]));

    let python = json!({"code": "import sys\nprint('é', repr(sys.stdin.read()))\nprint('err', file=sys.stderr)\nsys.exit(3)"});
    let ran = api.post(&path, &python).await.json();
    assert_eq!(
        (&ran["language"], &ran["stdout"], &ran["stderr"], &ran["exit_code"]),
        (&json!("python"), &json!("é ''\n"), &json!("err\n"), &json!(3))
    );
    for language in ["bash", "sh"] {
        // A command that reads does not eat the program.
        let code = "cat; x=1\necho \"$x$(cat)\" >&2\nfalse";
        let ran = api.post(&path, &json!({"language": language, "code": code})).await.json();
        assert_eq!((&ran["stderr"], &ran["exit_code"]), (&json!("1\n"), &json!(1)), "{language} {ran}");
    }
    let late = api
        .post(
            &path,
            &json!({"code": "import time\nprint('part', flush=True)\ntime.sleep(60)", "timeout_ms": 900}),
        )
        .await;
    assert_eq!((late.status, &late.json()["error"]), (504, &json!("command timeout after 1s")));
    assert_eq!((&late.json()["stdout"], &late.json()["language"]), (&json!("part\n"), &json!("python")));
    for body in [json!({}), json!({"code": ""}), json!({"code": "1", "language": "cobol"})] {
        assert_eq!(api.post(&path, &body).await.status, 400, "{body}");
    }
}
