//! Commands and files through the API, with the real agent.
#![allow(clippy::unwrap_used)]

mod client;
mod common;

use std::{path::Path, sync::atomic::Ordering, time::Duration};

use client::Api;
use common::Appliance;
use http_body_util::BodyExt;
use serde_json::json;

async fn gone(path: &Path, within: Duration) -> bool {
    let pid = std::fs::read_to_string(path).unwrap().trim().to_owned();
    let deadline = std::time::Instant::now() + within;
    while std::time::Instant::now() < deadline {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat"));
        if state.is_err() || state.is_ok_and(|text| text.contains(") Z ")) {
            return true;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    false
}

async fn appears(path: &Path) {
    for _ in 0..200 {
        if std::fs::read_to_string(path).is_ok_and(|text| !text.trim().is_empty()) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("{} never appeared", path.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_runs_with_everything_it_was_given() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let reply = api.exec(&id, json!({"cmd": "echo hi; echo err >&2; exit 3", "timeout_seconds": 10})).await;
    let result = reply.json();
    assert_eq!(reply.status, 200, "{result}");
    assert_eq!(
        (&result["stdout"], &result["stderr"], &result["exit_code"], &result["truncated"]),
        (&json!("hi\n"), &json!("err\n"), &json!(3), &json!(false))
    );
    assert!(result["duration_ms"].is_u64());

    let wish = json!({"cmd": "cat; pwd; echo $X; printf '\\377é'", "cwd": "/tmp", "env": {"X": "ü"}, "stdin": "in\n"});
    assert_eq!(api.exec(&id, wish).await.json()["stdout"], "in\n/tmp\nü\n\u{FFFD}é");
    let big = "z".repeat(1_500_000);
    let echoed = api.exec(&id, json!({"cmd": "cat | tee /dev/stderr", "stdin": big})).await.json();
    assert!(echoed["stdout"] == json!(big) && echoed["stderr"] == json!(big));
    let long = format!("x='{}'; echo ${{#x}}", "y".repeat(300_000));
    assert_eq!(api.exec(&id, json!({"cmd": long})).await.json()["stdout"], "300000\n");

    for bad in [
        json!({}),
        json!({"cmd": ""}),
        json!({"cmd": 1}),
        json!({"cmd": "x", "timeout_seconds": -1}),
        json!({"cmd": "x", "cwd": "/nowhere/at/all"}),
        json!({"cmd": "x", "user": "nobody-of-that-name"}),
    ] {
        assert_eq!(api.exec(&id, bad.clone()).await.status, 400, "{bad}");
    }
    assert!(appliance.vmm.opened.load(Ordering::Relaxed) <= 2, "idle connections are used again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_limit_is_a_504_with_what_there_was() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let reply = api.exec(&id, json!({"cmd": "echo part; sleep 60", "timeout_seconds": 1})).await;
    let body = reply.json();
    assert_eq!(reply.status, 504, "{body}");
    assert_eq!(body["error"], "command timeout after 1s");
    assert_eq!((&body["stdout"], &body["exit_code"]), (&json!("part\n"), &json!(124)));
    assert_eq!(body["request_id"], reply.header("x-request-id").unwrap());

    let events = api
        .post(&format!("/v1/sandboxes/{id}/exec/stream"), &json!({"cmd": "sleep 60", "timeout_seconds": 1}))
        .await;
    assert_eq!(events.text(), "event: error\ndata: {\"error\":\"command timeout after 1s\"}\n\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_these_bytes() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let cmd = "printf 'a\\303'; sleep 0.3; printf '\\251\\n'; sleep 0.3; printf '\\342\\200\\250' >&2; sleep 0.3; exit 7";
    let reply = api.post(&format!("/v1/sandboxes/{id}/exec/stream"), &json!({"cmd": cmd})).await;
    assert_eq!(reply.header("content-type"), Some("text/event-stream; charset=utf-8"));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    let text = reply.text();
    let (before, exit) = text.split_once("event: exit\n").unwrap();
    assert_eq!(
        before,
        "event: stdout\ndata: {\"chunk\":\"a\"}\n\nevent: stdout\ndata: {\"chunk\":\"\\u00e9\\n\"}\n\n\
         event: stderr\ndata: {\"chunk\":\"\\u2028\"}\n\n"
    );
    assert!(exit.starts_with("data: {\"exit_code\":7,\"duration_ms\":") && exit.ends_with("}\n\n"), "{exit}");
}

#[tokio::test(flavor = "multi_thread")]
async fn output_without_end_is_cut_and_the_command_goes_on() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let result = api.exec(&id, json!({"cmd": "head -c 20000000 /dev/zero; echo end >&2"})).await.json();
    assert_eq!(result["truncated"], true);
    assert_eq!(result["stdout"].as_str().unwrap().len(), 16 << 20);
    assert_eq!((&result["stderr"], &result["exit_code"]), (&json!("end\n"), &json!(0)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_kills_unless_detached() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let dir = tempfile::tempdir().unwrap();
    for (route, detach, number) in [("exec", false, 0), ("exec/stream", false, 1), ("exec", true, 2)] {
        let pid = dir.path().join(number.to_string());
        let cmd = format!("echo $$ > {}; exec sleep 30", pid.display());
        let body = json!({"cmd": cmd, "detach": detach}).to_string();
        let path = format!("/v1/sandboxes/{id}/{route}");
        let request = api.open("POST", &path, &[], body.as_bytes());
        let mut streaming = None;
        if route == "exec" {
            let _ = tokio::time::timeout(Duration::from_millis(700), request).await;
        } else {
            streaming = Some(request.await);
        }
        appears(&pid).await;
        drop(streaming);
        assert_eq!(gone(&pid, Duration::from_secs(3)).await, !detach, "{route} detach={detach}");
        if detach {
            let pid = std::fs::read_to_string(&pid).unwrap();
            std::process::Command::new("kill").arg(pid.trim()).status().unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_connection_loses_nothing_and_runs_nothing_twice() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let dir = tempfile::tempdir().unwrap();
    let marks = dir.path().join("marks");
    let cmd =
        format!("echo x >> {}; for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 0.2; done", marks.display());
    let cut = async {
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            appliance.vmm.cut().await;
        }
    };
    let (reply, ()) = tokio::join!(api.exec(&id, json!({"cmd": cmd})), cut);
    assert_eq!(reply.json()["stdout"], "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n");
    assert_eq!(std::fs::read_to_string(&marks).unwrap(), "x\n");

    // An idle connection that broke is noticed before anything is asked on it.
    appliance.vmm.cut().await;
    assert_eq!(api.exec(&id, json!({"cmd": "echo again"})).await.json()["stdout"], "again\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_ends_a_download_at_once_and_no_command() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let dir = tempfile::tempdir().unwrap();
    let (large, begun) = (dir.path().join("large"), dir.path().join("begun"));
    std::fs::File::create(&large).unwrap().set_len(64 << 20).unwrap();
    let path = format!("/v1/sandboxes/{id}/fs?path={}", large.display());
    let (response, _open) = api.open("GET", &path, &[], b"").await;
    let mut body = response.into_body();
    body.frame().await.unwrap().unwrap();
    let cmd = format!("echo x > {}; sleep 2; echo done", begun.display());
    let capture = async {
        appears(&begun).await;
        appliance.vmm.capture(&id).await;
        loop {
            match body.frame().await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return true,
                None => return false,
            }
        }
    };

    let both = async { tokio::join!(api.exec(&id, json!({"cmd": cmd})), capture) };
    let (reply, broken) = tokio::time::timeout(Duration::from_secs(30), both).await.expect("it was told");

    assert!(broken, "a download that is not whole looks as if it were");
    assert_eq!(reply.json()["stdout"], "done\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_plain_exec_dribbles_and_its_timeout_is_a_result() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let long = api.exec(&id, json!({"cmd": "sleep 21; echo done"}));
    let late = api.exec(&id, json!({"cmd": "echo part; sleep 60", "timeout_seconds": 22}));
    let (long, late) = tokio::join!(long, late);
    assert_eq!(long.status, 200);
    assert!(long.text().starts_with(' '), "{}", long.text());
    assert_eq!(long.json()["stdout"], "done\n");
    assert_eq!((late.status, late.json()["exit_code"].clone()), (200, json!(124)));
    assert!(late.json()["stderr"].as_str().unwrap().contains("command timeout after 22s"));
}

#[tokio::test(flavor = "multi_thread")]
async fn files_go_both_ways() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let dir = tempfile::tempdir().unwrap();
    let base = format!("/v1/sandboxes/{id}/fs");
    let target = dir.path().join("new dir/file+1.bin");
    let path = target.to_str().unwrap().replace('+', "%2B").replace(' ', "+");
    let bytes: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7) as u8).collect();

    let written = api.send("PUT", &format!("{base}?path={path}"), &[], &bytes).await;
    assert_eq!(written.status, 200, "{}", written.text());
    assert_eq!(written.json(), json!({"path": target.to_str().unwrap(), "bytes": 5_000_000}));
    assert_eq!(std::fs::read(&target).unwrap(), bytes);
    let read = api.get(&format!("{base}?path={path}")).await;
    assert_eq!(read.header("content-length"), Some("5000000"));
    assert_eq!(read.header("content-type"), Some("application/octet-stream"));
    assert!(read.body == bytes);
    assert_eq!(api.send("PUT", &format!("{base}?path={path}"), &[], b"").await.json()["bytes"], 0);
    assert_eq!(api.get(&format!("{base}?path={path}")).await.body.len(), 0);
    assert!(api.get(&format!("{base}?path=/proc/self/status")).await.text().contains("Pid:"));

    let stat = api.get(&format!("{base}/stat?path={path}")).await.json();
    assert_eq!((&stat["name"], &stat["mode"], &stat["size"]), (&json!("file+1.bin"), &json!("f"), &json!(0)));
    assert_eq!(stat["permissions"], "0644");
    let folder = target.parent().unwrap().to_str().unwrap().replace(' ', "%20");
    let listing = api.get(&format!("{base}/dir?path={folder}")).await.json();
    assert_eq!(listing["entries"].as_array().unwrap().len(), 1, "{listing}");
    assert_eq!(listing["entries"][0]["is_dir"], false);
    assert!(!api.get(&format!("{base}/dir")).await.json()["entries"].as_array().unwrap().is_empty());

    assert_eq!(api.send("DELETE", &format!("{base}?path={folder}"), &[], b"").await.status, 204);
    for route in ["", "/stat", "/dir"] {
        assert_eq!(api.get(&format!("{base}{route}?path={folder}")).await.status, 404);
    }
    assert_eq!(api.send("DELETE", &format!("{base}?path={folder}"), &[], b"").await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_file_requests_are_refused_with_a_sentence() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let base = format!("/v1/sandboxes/{id}/fs");
    for query in ["", "?path=", "?path=etc", "?path=/tmp/../etc", "?path=/a%00b", "?path=%ff"] {
        for (method, route) in [("GET", ""), ("PUT", ""), ("DELETE", ""), ("GET", "/stat")] {
            let reply = api.send(method, &format!("{base}{route}{query}"), &[], b"x").await;
            assert_eq!(reply.status, 400, "{method} {route}{query}: {}", reply.text());
        }
    }
    assert_eq!(api.get(&format!("{base}/dir?path=/etc/passwd")).await.status, 400);
    assert_eq!(api.get(&format!("{base}?path=/etc")).await.status, 400);
    assert_eq!(api.send("PUT", &format!("{base}?path=/tmp"), &[], b"x").await.status, 400);
    assert_eq!(api.send("DELETE", &format!("{base}?path=/"), &[], b"").await.status, 400);

    let chunked =
        api.send("PUT", &format!("{base}?path=/tmp/x"), &[("transfer-encoding", "chunked")], b"x").await;
    assert_eq!(chunked.status, 411);
    // Refused from its length: the body is not even sent.
    let raw = raw_put(&appliance, &format!("{base}?path=/tmp/huge"), 1 << 60).await;
    assert!(raw.starts_with("HTTP/1.1 413"), "{raw}");
    assert!(!Path::new("/tmp/huge").exists());
}

async fn raw_put(appliance: &Appliance, path: &str, length: u64) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(appliance.address).await.unwrap();
    let head = format!(
        "PUT {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: {length}\r\n\r\nsome",
        common::TOKEN
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut text = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read(&mut text)).await.unwrap().unwrap();
    String::from_utf8_lossy(&text[..read]).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_breaks_off_leaves_nothing() {
    use tokio::io::AsyncWriteExt;
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("half");
    let mut stream = tokio::net::TcpStream::connect(appliance.address).await.unwrap();
    let head = format!(
        "PUT /v1/sandboxes/{id}/fs?path={} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-length: 1000\r\n\r\nhalf",
        path.display(),
        common::TOKEN
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    drop(stream);
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_sandbox_is_gone_for_execs_too() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    assert_eq!(api.exec(&id, json!({"cmd": "true"})).await.status, 200);
    // Behind the API's back, as the idle limit does it.
    appliance.vmm.sandboxes.lock().unwrap().clear();
    appliance.vmm.cut().await;
    assert_eq!(api.exec(&id, json!({"cmd": "true"})).await.status, 404);
    assert_eq!(api.get(&format!("/v1/sandboxes/{id}/fs?path=/etc/hostname")).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_kept_alive() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let body = json!({"cmd": "sleep 11; echo late"}).to_string();
    let (response, _open) =
        api.open("POST", &format!("/v1/sandboxes/{id}/exec/stream"), &[], body.as_bytes()).await;
    let text = response.into_body().collect().await.unwrap().to_bytes();
    let text = String::from_utf8(text.to_vec()).unwrap();
    assert!(text.starts_with(": keep-alive\n\nevent: stdout\ndata: {\"chunk\":\"late\\n\"}\n\n"), "{text}");
}
