//! Every body of the API, through the real gate and routes, in front of daemons that only remember.
//!
//! The first two bytes choose an operation of the served document, the rest is its body. The sandbox and whatever a body makes are
//! there, but no guest answers: a fuzzed command must not run anywhere, least of all here. No answer is a 500, and a refusal has
//! the contract's form.

use std::{cell::LazyCell, collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use pandastack_api::{gate::Gate, limit, openapi, routes};
use pandastack_bus::vmm::{SandboxInfo, SandboxSpec, State, VmmBackend};
use serde_json::{Map, Value, json};
use tokio::runtime::{Builder, Runtime};

use crate::api_common::{Appliance, TOKEN};

/// Bytes before the body.
pub const HEAD: usize = 2;
/// An answer that takes longer is a hang: no guest is waited for.
const LIMIT: Duration = Duration::from_secs(10);

struct Operation {
    method: String,
    path: String,
    /// A body that its schema allows.
    example: Vec<u8>,
}

struct Bench {
    runtime: Runtime,
    appliance: Appliance,
    gate: Gate,
    sandbox: SandboxInfo,
    operations: Vec<Operation>,
}

thread_local! {
    static BENCH: LazyCell<Bench> = LazyCell::new(Bench::new);
}

impl Bench {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (appliance, sandbox) = runtime.block_on(async {
            let appliance = Appliance::start().await;
            let most = limit::Rate { per_second: limit::MOST, burst: limit::MOST, tool_calls: limit::MOST };
            appliance.app.tenancy.set_rate("default", Some(most)).await.expect("a rate");
            appliance.vmm.shut.store(true, Ordering::Relaxed);
            let spec = json!({"workspace": "default", "template": "base", "metadata": {}, "ttl_seconds": 60,
                "persistent": false, "disk_mib": 0});
            let spec: SandboxSpec = serde_json::from_value(spec).expect("a wish");
            let sandbox = appliance.vmm.create("seed".into(), spec).await.expect("a sandbox");
            (appliance, sandbox)
        });
        let gate = Gate::new(std::sync::Arc::clone(&appliance.app), routes::all(&appliance.app));
        let operations = operations(&document());
        Self { runtime, appliance, gate, sandbox, operations }
    }

    /// What an input changed is forgotten: every input finds the same.
    fn forget(&self) {
        let vmm = &self.appliance.vmm;
        let fresh =
            [(self.sandbox.id.clone(), SandboxInfo { state: State::Running, ..self.sandbox.clone() })];
        *vmm.sandboxes.lock().expect("nobody panicked") = fresh.into();
        vmm.requests.lock().expect("nobody panicked").clear();
        vmm.history.lock().expect("nobody panicked").clear();
        vmm.touched.lock().expect("nobody panicked").clear();
        vmm.snapshots_asked.lock().expect("nobody panicked").clear();
        let shelf = &self.appliance.shelf;
        shelf.snapshots.lock().expect("nobody panicked").clear();
        shelf.volumes.lock().expect("nobody panicked").clear();
    }
}

fn document() -> Value {
    serde_json::to_value(openapi::document()).expect("the document is JSON")
}

/// Every operation that may have a body of JSON.
fn operations(document: &Value) -> Vec<Operation> {
    let mut found = Vec::new();
    for (method, path) in openapi::operations() {
        // What a program in a guest reads is no body of ours.
        if method == "GET" || path.contains("/proxy/") {
            continue;
        }
        let operation = &document["paths"][&path][method.to_ascii_lowercase()];
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        let example = example(document, schema, 0).to_string().into_bytes();
        found.push(Operation { method: method.to_owned(), path, example });
    }
    assert!(found.len() > 20 && found.iter().any(|one| one.example.len() > 20), "the document has bodies");
    found
}

/// A value that a schema allows.
fn example(document: &Value, schema: &Value, depth: usize) -> Value {
    if depth > 6 {
        return Value::Null;
    }
    if let Some(reference) = schema["$ref"].as_str() {
        let target = document.pointer(reference.trim_start_matches('#')).unwrap_or(&Value::Null);
        return example(document, target, depth + 1);
    }
    for key in ["oneOf", "anyOf", "allOf"] {
        let mut choices = schema[key].as_array().into_iter().flatten();
        if let Some(choice) = choices.rfind(|one| one["type"] != "null") {
            return example(document, choice, depth + 1);
        }
    }
    if let Some(first) = schema["enum"].get(0) {
        return first.clone();
    }
    let kind = match &schema["type"] {
        Value::Array(kinds) => kinds.iter().find(|kind| *kind != "null").cloned().unwrap_or_default(),
        kind => kind.clone(),
    };
    match kind.as_str() {
        Some("string") => json!("base"),
        Some("integer" | "number") => json!(1),
        Some("boolean") => json!(true),
        Some("array") => json!([example(document, &schema["items"], depth + 1)]),
        _ => {
            let properties = schema["properties"].as_object().cloned().unwrap_or_default();
            let fields =
                properties.iter().map(|(name, one)| (name.clone(), example(document, one, depth + 1)));
            Value::Object(fields.collect::<Map<_, _>>())
        }
    }
}

/// Names of all fields in the document.
#[must_use]
pub fn names() -> Vec<String> {
    fn gather(value: &Value, into: &mut BTreeSet<String>) {
        if let Some(properties) = value["properties"].as_object() {
            into.extend(properties.keys().cloned());
        }
        match value {
            Value::Array(all) => all.iter().for_each(|value| gather(value, into)),
            Value::Object(all) => all.values().for_each(|value| gather(value, into)),
            _ => {}
        }
    }
    let mut names = BTreeSet::new();
    gather(&document(), &mut names);
    names.into_iter().collect()
}

/// Sends an input.
pub fn run(input: &[u8]) {
    let Some((head, body)) = input.split_at_checked(HEAD) else { return };
    BENCH.with(|bench| {
        bench.forget();
        let which = usize::from(u16::from_le_bytes([head[0], head[1]]));
        let operation = &bench.operations[which % bench.operations.len()];
        bench.runtime.block_on(async {
            tokio::time::timeout(LIMIT, ask(bench, operation, body)).await.expect("the API hangs");
        });
        assert_eq!(bench.appliance.vmm.opened.load(Ordering::Relaxed), 0, "a guest was reached");
    });
}

async fn ask(bench: &Bench, operation: &Operation, body: &[u8]) {
    let path = operation.path.replace("{id}", &bench.sandbox.id);
    let path: String = path
        .split('/')
        .map(|part| if part.starts_with('{') { "x1" } else { part })
        .fold(String::new(), |all, part| if part.is_empty() { all } else { format!("{all}/{part}") });
    let request = Request::builder()
        .method(operation.method.as_str())
        .uri(&path)
        .header("authorization", format!("Bearer {TOKEN}"))
        .header("content-type", "application/json")
        .header("accept", "application/json, text/event-stream")
        .body(Full::new(Bytes::copy_from_slice(body)))
        .expect("a request");
    let (head, body) = bench.gate.answer(request).await.into_parts();
    let body = body.collect().await.expect("a body").to_bytes();
    let text = String::from_utf8_lossy(&body);
    let told = || format!("{} {path}: {} {text}", operation.method, head.status);
    // 507 and 503 are the refusals for lack of means, 504 that of time.
    let fault = matches!(head.status.as_u16(), 500..=502 | 505..=506);
    assert!(!fault, "{}", told());
    if head.status == StatusCode::SERVICE_UNAVAILABLE {
        assert!(head.headers.contains_key("retry-after"), "{}", told());
    }
    if head.status.is_client_error() || head.status.is_server_error() {
        let value: Value = serde_json::from_slice(&body).unwrap_or_else(|_| panic!("no JSON: {}", told()));
        let sentence = if value["jsonrpc"] == "2.0" { &value["error"]["message"] } else { &value["error"] };
        assert!(sentence.as_str().is_some_and(|sentence| !sentence.is_empty()), "{}", told());
    }
}

/// Every operation with a body that its schema allows, and the tools of MCP.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    BENCH.with(|bench| {
        let mut seeds = Vec::new();
        for (at, operation) in bench.operations.iter().enumerate() {
            let mut bodies = vec![operation.example.clone(), b"{}".to_vec()];
            if operation.path.ends_with("/mcp") {
                let call = |name: &str| {
                    let arguments = json!({"sandbox_id": bench.sandbox.id, "command": "true", "path": "/x", "content": "x",
                        "template": "base", "ttl_seconds": 5, "metadata": {"a": "b"}, "timeout_seconds": 1});
                    json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}})
                };
                let tools = [
                    "create_sandbox", "list_sandboxes", "delete_sandbox", "list_templates", "exec", "run_command", "read_file",
                    "write_file", "list_directory",
                ];
                bodies.extend(tools.iter().map(|name| call(name).to_string().into_bytes()));
                let params = json!({"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "a", "version": "1"}});
                for method in ["initialize", "tools/list", "ping", "notifications/initialized", "resources/list"] {
                    let message = json!({"jsonrpc": "2.0", "id": 1, "method": method, "params": params});
                    bodies.push(message.to_string().into_bytes());
                }
            }
            let head = (at as u16).to_le_bytes();
            seeds.extend(bodies.iter().map(|body| [&head[..], body].concat()));
        }
        seeds
    })
}
