//! MCP: a JSON-RPC message in, and out what to do about it: an answer, or the call of a tool. Pure.
//!
//! Owns: the rules of JSON-RPC and of the protocol, the form of every answer. Refuses to know: HTTP, and how a tool does what
//! it does. Stateless: no session, no stream of the server's own, so every answer is one JSON object.

pub mod tools;

use http::StatusCode;
use serde_json::{Map, Number, Value, json};

/// Bytes of a message at most.
pub const MESSAGE_LIMIT: usize = 1 << 20;
/// Versions of the protocol, the newest first. They differ in nothing that we use.
const VERSIONS: [&str; 3] = ["2025-06-18", "2025-03-26", "2024-11-05"];

const PARSE_ERROR: i32 = -32700;
const INVALID_REQUEST: i32 = -32600;
const METHOD_NOT_FOUND: i32 = -32601;
const INVALID_PARAMS: i32 = -32602;
const RATE_LIMITED: i32 = -32000;

/// A tool whose call is a `C`.
#[derive(Debug, Clone, Copy)]
pub struct Tool<C> {
    /// Its name.
    pub name: &'static str,
    /// What a model reads about it.
    pub description: &'static str,
    /// Whether it changes nothing.
    pub reads: bool,
    /// JSON Schema of its arguments.
    pub schema: fn() -> Value,
    /// The call that arguments stand for, or what is wrong with them.
    pub parse: fn(Value) -> Result<C, String>,
}

/// One endpoint.
#[derive(Debug, Clone, Copy)]
pub struct Server<C: 'static> {
    /// Its name.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// What a model reads about all of it.
    pub instructions: &'static str,
    /// Version of the protocol for a client that names none.
    pub protocol: &'static str,
    /// Status of the answer to what needs none.
    pub quiet: StatusCode,
    /// Its tools.
    pub tools: &'static [Tool<C>],
}

/// What follows from a message.
#[derive(Debug, PartialEq)]
pub enum Step<C> {
    /// This answer.
    Reply(Reply),
    /// A tool is to be called; [`called`] makes an answer of its outcome.
    Call {
        /// Of the request.
        id: Value,
        /// What to do.
        call: C,
        /// Whether that changes nothing.
        reads: bool,
    },
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// HTTP status.
    pub status: StatusCode,
    /// JSON-RPC; nothing for what needs no answer.
    pub body: Option<Value>,
}

/// How a tool ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// For the model.
    pub text: String,
    /// It did not do what was asked.
    pub failed: bool,
}

/// What a message asks of an endpoint.
pub fn understand<C>(server: &Server<C>, bytes: &[u8]) -> Step<C> {
    let bad = |id: Value, sentence: &str| refused(StatusCode::BAD_REQUEST, id, INVALID_REQUEST, sentence);
    let message = match serde_json::from_slice::<Value>(bytes) {
        Ok(Value::Object(message)) => message,
        Ok(Value::Array(_)) => {
            return bad(Value::Null, "batches are not supported; send one message at a time");
        }
        Ok(_) => return bad(Value::Null, "a message is a JSON object"),
        Err(error) => {
            let sentence = format!("the request body is not valid JSON: {error}");
            return refused(StatusCode::BAD_REQUEST, Value::Null, PARSE_ERROR, &sentence);
        }
    };
    let Message { id, jsonrpc, method, params, is_response } = Message::of(message);
    let id = match id {
        None => None,
        Some(id @ (Value::Null | Value::String(_))) => Some(id),
        Some(Value::Number(id)) if is_whole(&id) => Some(Value::Number(id)),
        Some(_) => return bad(Value::Null, "`id` must be a string or a whole number"),
    };
    let shown = id.clone().unwrap_or(Value::Null);
    if jsonrpc.as_ref().and_then(Value::as_str) != Some("2.0") {
        return bad(shown, "`jsonrpc` must be \"2.0\"");
    }
    let method = match method {
        Some(Value::String(method)) => method,
        // We ask a client nothing, so what it answers concerns nobody.
        None if is_response => return quiet(server),
        _ => return bad(shown, "`method` must be a string"),
    };
    let Some(id) = id.filter(|_| !method.starts_with("notifications/")) else { return quiet(server) };
    let params = match params {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(params)) => params,
        Some(_) => return bad_params(id, "`params` must be an object"),
    };
    match method.as_str() {
        "initialize" => initialize(server, id, &params),
        "ping" => result(id, json!({})),
        "tools/list" => result(id, json!({"tools": server.tools.iter().map(described).collect::<Vec<_>>()})),
        "tools/call" => call(server, id, params),
        other => {
            let other: String = other.chars().take(64).collect();
            refused(StatusCode::OK, id, METHOD_NOT_FOUND, &format!("there is no method {other:?}"))
        }
    }
}

/// The answer to a call that was made.
pub fn called(id: Value, Outcome { text, failed }: Outcome) -> Reply {
    // Not copied: it may be long.
    let mut block = json!({"type": "text"});
    block["text"] = text.into();
    let mut result = json!({"isError": failed});
    result["content"] = Value::Array(vec![block]);
    answer(id, result)
}

/// The answer to a call that was one too many.
pub fn rate_limited(id: Value, sentence: &str) -> Reply {
    error(StatusCode::OK, id, RATE_LIMITED, sentence)
}

/// Only such a number comes back as it was given.
fn is_whole(number: &Number) -> bool {
    let exact = |float: f64| float.fract() == 0.0 && float.abs() < 9_007_199_254_740_992.0;
    number.is_i64() || number.is_u64() || number.as_f64().is_some_and(exact)
}

struct Message {
    id: Option<Value>,
    jsonrpc: Option<Value>,
    method: Option<Value>,
    params: Option<Value>,
    is_response: bool,
}

impl Message {
    fn of(mut message: Map<String, Value>) -> Self {
        Self {
            id: message.remove("id"),
            jsonrpc: message.remove("jsonrpc"),
            method: message.remove("method"),
            params: message.remove("params"),
            is_response: message.contains_key("result") || message.contains_key("error"),
        }
    }
}

fn initialize<C>(server: &Server<C>, id: Value, params: &Map<String, Value>) -> Step<C> {
    let version = match params.get("protocolVersion") {
        None | Some(Value::Null) => server.protocol,
        Some(Value::String(wished)) => {
            VERSIONS.iter().find(|known| *known == wished).copied().unwrap_or(VERSIONS[0])
        }
        Some(_) => return bad_params(id, "`protocolVersion` must be a string"),
    };
    let info = json!({"name": server.name, "version": server.version});
    let whole = json!({"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info,
        "instructions": server.instructions});
    result(id, whole)
}

fn described<C>(tool: &Tool<C>) -> Value {
    json!({"name": tool.name, "description": tool.description, "inputSchema": (tool.schema)(),
        "annotations": {"readOnlyHint": tool.reads}})
}

fn call<C>(server: &Server<C>, id: Value, mut params: Map<String, Value>) -> Step<C> {
    let Some(Value::String(name)) = params.remove("name") else {
        return bad_params(id, "`name` must be the name of a tool");
    };
    let Some(tool) = server.tools.iter().find(|tool| tool.name == name) else {
        let name: String = name.chars().take(64).collect();
        return bad_params(id, &format!("there is no tool {name:?}"));
    };
    let arguments = match params.remove("arguments") {
        None | Some(Value::Null) => json!({}),
        Some(arguments @ Value::Object(_)) => arguments,
        Some(_) => return bad_params(id, "`arguments` must be an object"),
    };
    match (tool.parse)(arguments) {
        Ok(call) => Step::Call { id, call, reads: tool.reads },
        Err(sentence) => bad_params(id, &sentence),
    }
}

fn quiet<C>(server: &Server<C>) -> Step<C> {
    Step::Reply(Reply { status: server.quiet, body: None })
}

fn result<C>(id: Value, result: Value) -> Step<C> {
    Step::Reply(answer(id, result))
}

fn bad_params<C>(id: Value, sentence: &str) -> Step<C> {
    refused(StatusCode::OK, id, INVALID_PARAMS, sentence)
}

fn refused<C>(status: StatusCode, id: Value, code: i32, sentence: &str) -> Step<C> {
    Step::Reply(error(status, id, code, sentence))
}

fn answer(id: Value, result: Value) -> Reply {
    Reply { status: StatusCode::OK, body: Some(frame(id, "result", result)) }
}

fn error(status: StatusCode, id: Value, code: i32, sentence: &str) -> Reply {
    Reply { status, body: Some(frame(id, "error", json!({"code": code, "message": sentence}))) }
}

fn frame(id: Value, key: &str, value: Value) -> Value {
    let mut frame = json!({"jsonrpc": "2.0"});
    frame["id"] = id;
    frame[key] = value;
    frame
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        tools::{Call, SANDBOX, WORKSPACE},
        *,
    };

    fn asked(message: &Value) -> Step<Call> {
        understand(&WORKSPACE, message.to_string().as_bytes())
    }

    fn body(step: Step<Call>) -> (u16, Value) {
        match step {
            Step::Reply(Reply { status, body }) => (status.as_u16(), body.unwrap_or_default()),
            Step::Call { .. } => panic!("{step:?}"),
        }
    }

    #[test]
    fn each_wrong_message_has_its_code() {
        let raw = |text: &str| body(understand(&WORKSPACE, text.as_bytes()));
        for (text, status, code) in [
            ("", 400, PARSE_ERROR),
            ("{", 400, PARSE_ERROR),
            ("[]", 400, INVALID_REQUEST),
            (r#"[{"jsonrpc":"2.0","id":1,"method":"ping"}]"#, 400, INVALID_REQUEST),
            ("7", 400, INVALID_REQUEST),
            (r#"{"id":1,"method":"ping"}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":2.0,"id":1,"method":"ping"}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":{},"method":"ping"}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1.5,"method":"ping"}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":123456789012345678901234,"method":"ping"}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":5}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1}"#, 400, INVALID_REQUEST),
            (r#"{"jsonrpc":"2.0","id":1,"method":"nothing"}"#, 200, METHOD_NOT_FOUND),
            (r#"{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}"#, 200, INVALID_PARAMS),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":5}}"#,
                200,
                INVALID_PARAMS,
            ),
            (r#"{"jsonrpc":"2.0","id":1,"method":"tools/call"}"#, 200, INVALID_PARAMS),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"nothing"}}"#,
                200,
                INVALID_PARAMS,
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"list_sandboxes","arguments":[]}}"#,
                200,
                INVALID_PARAMS,
            ),
            (
                r#"{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"read_file"}}"#,
                200,
                INVALID_PARAMS,
            ),
        ] {
            let (got, whole) = raw(text);
            assert_eq!((got, &whole["error"]["code"]), (status, &json!(code)), "{text}: {whole}");
            assert!(whole["error"]["message"].as_str().is_some_and(|sentence| sentence.len() > 5), "{whole}");
        }
    }

    #[test]
    fn a_known_version_is_echoed_and_another_answered_with_the_newest() {
        for (wished, spoken) in [
            (json!("2025-06-18"), "2025-06-18"),
            (json!("2025-03-26"), "2025-03-26"),
            (json!("2024-11-05"), "2024-11-05"),
            (json!("2099-01-01"), "2025-06-18"),
            (Value::Null, "2025-03-26"),
        ] {
            let message = json!({"jsonrpc": "2.0", "id": "a", "method": "initialize", "params": {"protocolVersion": wished}});
            let (status, whole) = body(asked(&message));
            assert_eq!((status, &whole["id"]), (200, &json!("a")));
            assert_eq!(whole["result"]["protocolVersion"], spoken);
            assert_eq!(whole["result"]["serverInfo"]["name"], "pandastack");
        }
        let whole = understand(&SANDBOX, br#"{"jsonrpc":"2.0","id":1,"method":"initialize"}"#);
        let Step::Reply(Reply { body: Some(whole), .. }) = whole else { panic!("{whole:?}") };
        assert_eq!(whole["result"]["protocolVersion"], "2024-11-05");
    }

    #[test]
    fn what_needs_no_answer_gets_none() {
        for message in [
            json!({"jsonrpc": "2.0", "method": "notifications/initialized"}),
            json!({"jsonrpc": "2.0", "id": 4, "method": "notifications/cancelled"}),
            json!({"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "delete_sandbox"}}),
            json!({"jsonrpc": "2.0", "id": 4, "result": {}}),
        ] {
            assert_eq!(asked(&message), Step::Reply(Reply { status: StatusCode::ACCEPTED, body: None }));
        }
    }

    #[test]
    fn every_tool_has_a_schema_that_names_its_arguments() {
        let (_, whole) = body(asked(&json!({"jsonrpc": "2.0", "id": 1, "method": "tools/list"})));
        let tools = whole["result"]["tools"].as_array().unwrap();
        assert_eq!(tools.len(), WORKSPACE.tools.len());
        for tool in tools {
            let schema = &tool["inputSchema"];
            assert_eq!(schema["type"], "object", "{tool}");
            for name in schema["required"].as_array().into_iter().flatten() {
                assert!(schema["properties"][name.as_str().unwrap()].is_object(), "{tool}");
            }
            let call =
                json!({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool["name"]}});
            let wanted = schema["required"].as_array().is_some_and(|names| !names.is_empty());
            assert_eq!(matches!(asked(&call), Step::Reply(_)), wanted, "{tool}");
        }
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(".{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn any_message() -> impl Strategy<Value = Value> {
        let method = prop_oneof![
            Just(json!("initialize")),
            Just(json!("ping")),
            Just(json!("tools/list")),
            Just(json!("tools/call")),
            any_json()
        ];
        let names: Vec<&str> = WORKSPACE.tools.iter().map(|tool| tool.name).collect();
        let params = prop_oneof![
            (proptest::sample::select(names), any_json())
                .prop_map(|(name, arguments)| json!({"name": name, "arguments": arguments})),
            any_json()
        ];
        prop_oneof![
            (any_json(), method, params).prop_map(
                |(id, method, params)| json!({"jsonrpc": "2.0", "id": id, "method": method, "params": params})
            ),
            any_json()
        ]
    }

    proptest! {
        #[test]
        fn any_message_is_answered_in_the_protocols_form(message in any_message()) {
            let id = message.get("id").cloned();
            if let Step::Reply(Reply { status, body }) = asked(&message) {
                prop_assert!(status.as_u16() < 500);
                match body {
                    None => prop_assert_eq!(status, StatusCode::ACCEPTED),
                    Some(body) => {
                        prop_assert_eq!(&body["jsonrpc"], "2.0");
                        prop_assert!(body.get("result").is_some() != body.get("error").is_some());
                        prop_assert!(body["id"].is_null() || Some(&body["id"]) == id.as_ref());
                        prop_assert!(status == StatusCode::OK || body.get("error").is_some());
                    }
                }
            }
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            understand(&WORKSPACE, &bytes);
            understand(&SANDBOX, &bytes);
        }
    }
}
