//! MCP over real sockets, with the real agent as the guest.
#![allow(clippy::unwrap_used)]

mod client;
mod common;

use std::time::Duration;

use client::{Api, Reply};
use common::Appliance;
use pandastack_bus::Error;
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::{Value, json};

async fn rpc(api: &Api, path: &str, method: &str, params: Value) -> Reply {
    api.post(path, &json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": params})).await
}

/// Text of a tool's outcome, and whether it failed.
async fn tool(api: &Api, path: &str, name: &str, arguments: Value) -> (String, bool) {
    let reply = rpc(api, path, "tools/call", json!({"name": name, "arguments": arguments})).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let whole = reply.json();
    let result = &whole["result"];
    assert_eq!(result["content"][0]["type"], "text", "{whole}");
    (result["content"][0]["text"].as_str().unwrap().to_owned(), result["isError"].as_bool().unwrap())
}

#[tokio::test]
async fn the_endpoint_has_the_contracts_form() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for path in ["/mcp", "/v1/mcp"] {
        let hello = rpc(&api, path, "initialize", json!({"protocolVersion": "2025-06-18"})).await;
        let result = hello.json()["result"].clone();
        assert_eq!((hello.status, hello.header("content-type")), (200, Some("application/json")));
        assert_eq!(result["serverInfo"], json!({"name": "pandastack", "version": "1.0.0"}));
        assert_eq!(result["capabilities"], json!({"tools": {}}));
        let quiet = api.post(path, &json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
        assert_eq!((quiet.status, quiet.body.len()), (202, 0));
        for method in ["GET", "DELETE"] {
            let refused = api.send(method, path, &[("accept", "text/event-stream")], b"").await;
            assert_eq!((refused.status, refused.header("allow")), (405, Some("POST, OPTIONS")));
        }
        assert_eq!(api.send("POST", path, &[], b"[]").await.status, 400);
        assert_eq!(api.send("POST", path, &[], &vec![b' '; 2 << 20]).await.status, 413);
        let headers =
            [("mcp-protocol-version", "2025-06-18"), ("accept", "application/json, text/event-stream")];
        let pong = api.send("POST", path, &headers, br#"{"jsonrpc":"2.0","id":"p","method":"ping"}"#).await;
        assert_eq!(pong.json(), json!({"jsonrpc": "2.0", "id": "p", "result": {}}));
        assert_eq!(Api::without_token(&appliance).send("POST", path, &[], b"{}").await.status, 401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_tool_does_what_its_route_does() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a b+ü").to_str().unwrap().to_owned();
    let call = |name: &'static str, arguments: Value| {
        let api = &api;
        async move { tool(api, "/mcp", name, arguments).await }
    };

    let (made, failed) = call("create_sandbox", json!({"metadata": {"a": "b"}})).await;
    let made: Value = serde_json::from_str(&made).unwrap();
    assert!(!failed && made["template"] == "code-interpreter" && made["metadata"]["a"] == "b", "{made}");
    let id = made["id"].as_str().unwrap();
    let (listed, _) = call("list_sandboxes", json!({})).await;
    assert_eq!(serde_json::from_str::<Value>(&listed).unwrap(), api.get("/v1/sandboxes").await.json());
    let (templates, _) = call("list_templates", json!({})).await;
    assert_eq!(serde_json::from_str::<Value>(&templates).unwrap(), api.get("/v1/templates").await.json());

    let (ran, failed) = call("run_command", json!({"sandbox_id": id, "command": "echo é; exit 3"})).await;
    let ran: Value = serde_json::from_str(&ran).unwrap();
    assert_eq!((failed, &ran["stdout"], &ran["exit_code"]), (false, &json!("é\n"), &json!(3)));
    let slow = json!({"sandbox_id": id, "command": "echo part; sleep 60", "timeout_seconds": 1});
    let (late, failed) = call("run_command", slow).await;
    let late: Value = serde_json::from_str(&late).unwrap();
    assert_eq!(
        (failed, &late["error"], &late["stdout"]),
        (true, &json!("command timeout after 1s"), &json!("part\n"))
    );

    let write = json!({"sandbox_id": id, "path": file, "content": "té\0xt"});
    let (written, failed) = call("write_file", write).await;
    assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), json!({"path": file, "bytes": 6}));
    assert!(!failed);
    assert_eq!(call("read_file", json!({"sandbox_id": id, "path": file})).await, ("té\0xt".into(), false));
    std::fs::write(&file, [0xff, 0xfe, 0]).unwrap();
    let binary = call("read_file", json!({"sandbox_id": id, "path": file})).await;
    assert_eq!(binary, ("[binary; base64]\n//4A".into(), false));
    std::fs::write(&file, vec![b'x'; (1 << 20) + 1]).unwrap();
    let (long, failed) = call("read_file", json!({"sandbox_id": id, "path": file})).await;
    assert!(failed && long.contains("over 1024 KiB"), "{long}");
    let (listing, _) = call("list_dir", json!({"sandbox_id": id, "path": folder.path()})).await;
    assert_eq!(serde_json::from_str::<Value>(&listing).unwrap()["entries"][0]["name"], "a b+ü");

    for (name, arguments) in [
        ("read_file", json!({"sandbox_id": id, "path": "/nowhere/at/all"})),
        ("read_file", json!({"sandbox_id": id, "path": "relative"})),
        ("read_file", json!({"sandbox_id": "nobody", "path": "/x"})),
        ("run_command", json!({"sandbox_id": id, "command": ""})),
        ("create_sandbox", json!({"template": "nothing"})),
    ] {
        let (text, failed) = call(name, arguments).await;
        assert!(
            failed && serde_json::from_str::<Value>(&text).unwrap()["error"].is_string(),
            "{name}: {text}"
        );
    }
    assert_eq!(call("delete_sandbox", json!({"sandbox_id": id})).await, ("{}".into(), false));
    assert!(call("delete_sandbox", json!({"sandbox_id": id})).await.1);
}

#[tokio::test(flavor = "multi_thread")]
async fn long_output_is_cut_for_a_model() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let command = "head -c 1000000 /dev/zero | tr '\\0' '\"'; echo end >&2";
    let (ran, failed) =
        tool(&api, "/mcp", "run_command", json!({"sandbox_id": id, "command": command})).await;
    let ran: Value = serde_json::from_str(&ran).unwrap();
    assert_eq!((failed, &ran["truncated"], &ran["stderr"]), (false, &json!(true), &json!("end\n")));
    assert_eq!(ran["stdout"].as_str().unwrap().len(), 256 << 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sandboxs_own_endpoint_sees_that_sandbox_only() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let path = format!("/v1/sandboxes/{}/mcp", api.sandbox().await);
    let hello = rpc(&api, &path, "initialize", json!({})).await.json();
    assert_eq!(hello["result"]["protocolVersion"], "2024-11-05");
    assert_eq!(hello["result"]["serverInfo"], json!({"name": "pandastack-sandbox", "version": "0.1.0"}));
    let quiet = api.post(&path, &json!({"jsonrpc": "2.0", "method": "notifications/initialized"})).await;
    assert_eq!((quiet.status, quiet.body.len()), (204, 0));
    let listed = rpc(&api, &path, "tools/list", json!({})).await.json();
    let names: Vec<_> =
        listed["result"]["tools"].as_array().unwrap().iter().map(|tool| tool["name"].clone()).collect();
    assert_eq!(names, ["shell", "read_file", "write_file", "list_dir"]);

    let shell = tool(&api, &path, "shell", json!({"command": "echo a; echo b >&2; exit 3"})).await;
    assert_eq!(shell, ("a\n\n[stderr]\nb\n\n[exit code 3]".into(), false));
    let (late, failed) = tool(&api, &path, "shell", json!({"command": "sleep 60", "timeout_ms": 200})).await;
    assert!(failed && late.contains("command timeout"), "{late}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x");
    assert!(!tool(&api, &path, "write_file", json!({"path": file, "content": "text"})).await.1);
    assert_eq!(tool(&api, &path, "read_file", json!({"path": file})).await, ("text".into(), false));
    assert!(tool(&api, &path, "list_dir", json!({"path": folder.path()})).await.0.contains("\"x\""));
}

#[tokio::test]
async fn the_sixty_first_call_of_a_minute_is_refused() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for _ in 0..60 {
        assert!(!tool(&api, "/mcp", "list_sandboxes", json!({})).await.1);
    }
    let refused = rpc(&api, "/v1/mcp", "tools/call", json!({"name": "list_sandboxes"})).await;
    assert_eq!((refused.status, &refused.json()["error"]["code"]), (200, &json!(-32000)));
    assert_eq!(rpc(&api, "/v1/mcp", "ping", json!({})).await.json()["result"], json!({}));
    let (token, _) = appliance.other_workspace().await;
    assert!(!tool(&Api::with_token(&appliance, &token), "/mcp", "list_sandboxes", json!({})).await.1);
}

/// What vmm answers becomes a tool's failure, never one of HTTP; and what is not known to exist is not run.
#[tokio::test(flavor = "multi_thread")]
async fn no_message_gets_a_5xx() {
    let appliance = Appliance::start().await;
    let api = std::sync::Arc::new(Api::new(&appliance));
    appliance.vmm.failures.lock().unwrap().push(Error::Internal("secret detail".into()));
    let (text, failed) = tool(&api, "/mcp", "create_sandbox", json!({})).await;
    assert!(failed && text.contains("internal") && !text.contains("secret detail"), "{text}");

    let handle = tokio::runtime::Handle::current();
    let sandbox = format!("/v1/sandboxes/{}/mcp", api.sandbox().await);
    // Nothing here may run: the guest is this machine.
    let names = [
        "list_sandboxes",
        "delete_sandbox",
        "run_command",
        "read_file",
        "write_file",
        "list_dir",
        "shell",
        "x",
    ];
    let ids = proptest::sample::select(vec!["", "zzzzzzzzzzzzzzzzzzzz", "..", "é", "a\0b"]);
    let odd = prop_oneof![
        Just(Value::Null),
        any::<i64>().prop_map(Value::from),
        ".{0,9}".prop_map(Value::from),
        proptest::collection::vec(any::<bool>(), 0..3).prop_map(Value::from)
    ];
    let arguments = (ids, odd.clone(), odd.clone())
        .prop_map(|(id, one, two)| json!({"sandbox_id": id, "path": one, "command": one, "content": two, "timeout_seconds": two}));
    let message = (proptest::sample::select(names.to_vec()), prop_oneof![arguments, odd.clone()], odd)
        .prop_map(|(name, arguments, id)| {
            json!({"jsonrpc": "2.0", "id": id, "method": "tools/call",
            "params": {"name": name, "arguments": arguments}})
        });
    let run = tokio::task::spawn_blocking(move || {
        let config = ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() };
        TestRunner::new(config).run(&message, |message| {
            let reply = handle.block_on(api.post("/v1/mcp", &message));
            prop_assert!(reply.status < 500, "{message}: {}", reply.text());
            // There the tools have other names; a shell command would run.
            if message["params"]["name"] != "shell" && message["params"]["name"] != "write_file" {
                let reply = handle.block_on(api.post(&sandbox, &message));
                prop_assert!(reply.status < 500, "{message}: {}", reply.text());
            }
            Ok(())
        })
    });
    tokio::time::timeout(Duration::from_secs(120), run).await.unwrap().unwrap().unwrap();
}
