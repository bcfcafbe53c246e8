//! The tools of both endpoints: what a model reads about them, and what their arguments mean. Pure.

use std::collections::BTreeMap;

use http::StatusCode;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{Outcome, Server, Tool};
use crate::input::whole;

const DEFAULT_SECONDS: u64 = 60;
const MOST_SECONDS: u64 = 300;
const DEFAULT_SHELL_MS: u64 = 30_000;
const DEFAULT_DIRECTORY: &str = "/workspace";

/// A tool of the workspace's endpoint, called.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// `POST /v1/sandboxes`.
    CreateSandbox(NewSandbox),
    /// `GET /v1/sandboxes`.
    ListSandboxes,
    /// `DELETE /v1/sandboxes/{id}`.
    DeleteSandbox(String),
    /// `GET /v1/templates`.
    ListTemplates,
    /// Something in this sandbox.
    Within(String, Deed),
}

/// What is done in a sandbox; also a tool of a sandbox's own endpoint.
#[derive(Debug, Clone, PartialEq)]
pub enum Deed {
    /// `POST …/exec`.
    Run {
        /// For `/bin/sh -c`.
        command: String,
        /// Its time.
        timeout_seconds: u64,
    },
    /// `GET …/fs`.
    ReadFile(String),
    /// `PUT …/fs`.
    WriteFile(String, String),
    /// `GET …/fs/dir`.
    ListDir(String),
}

/// The body of a create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NewSandbox {
    #[serde(default = "interpreter")]
    template: String,
    #[serde(default, deserialize_with = "whole", skip_serializing_if = "Option::is_none")]
    ttl_seconds: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<BTreeMap<String, String>>,
}

fn interpreter() -> String {
    "code-interpreter".into()
}

/// The endpoint of a workspace.
pub const WORKSPACE: Server<Call> = Server {
    name: "pandastack",
    version: "1.0.0",
    instructions: "Sandboxes are virtual machines that start in milliseconds. Create one, run commands and read and \
        write files in it by its id, and delete it when you are done. What is installed or written in a sandbox stays in it.",
    protocol: "2025-03-26",
    quiet: StatusCode::ACCEPTED,
    tools: &[
        Tool {
            name: "create_sandbox",
            description: "Creates a sandbox and answers with it; its `id` is what the other tools call `sandbox_id`.",
            reads: false,
            schema: || {
                object(
                    json!({
                        "template": {"type": "string", "default": "code-interpreter", "description": "Name of a template; list_templates has them."},
                        "ttl_seconds": {"type": "integer", "minimum": 0, "description": "Seconds without use after which it is deleted."},
                        "metadata": {"type": "object", "additionalProperties": {"type": "string"}, "description": "Labels."}
                    }),
                    &[],
                )
            },
            parse: |arguments| Ok(Call::CreateSandbox(read(arguments)?)),
        },
        Tool {
            name: "list_sandboxes",
            description: "Lists the sandboxes of the workspace.",
            reads: true,
            schema: || object(json!({}), &[]),
            parse: |_| Ok(Call::ListSandboxes),
        },
        Tool {
            name: "delete_sandbox",
            description: "Deletes a sandbox with everything in it.",
            reads: false,
            schema: || object(json!({"sandbox_id": sandbox_id()}), &["sandbox_id"]),
            parse: |arguments| read(arguments).map(|One { sandbox_id }| Call::DeleteSandbox(sandbox_id)),
        },
        Tool {
            name: "run_command",
            description: "Runs a shell command in a sandbox to its end and answers with stdout, stderr and exit_code.",
            reads: false,
            schema: || {
                object(
                    json!({
                        "sandbox_id": sandbox_id(),
                        "command": {"type": "string", "description": "For /bin/sh -c."},
                        "timeout_seconds": {"type": "integer", "minimum": 1, "maximum": MOST_SECONDS, "default": DEFAULT_SECONDS,
                            "description": "Seconds after which it is killed."}
                    }),
                    &["sandbox_id", "command"],
                )
            },
            parse: |arguments| {
                let (id, Run { command, timeout_seconds }) = within(arguments)?;
                let timeout_seconds = timeout_seconds.unwrap_or(DEFAULT_SECONDS);
                if !(1..=MOST_SECONDS).contains(&timeout_seconds) {
                    return Err(format!("argument `timeout_seconds` must be 1 to {MOST_SECONDS}"));
                }
                Ok(Call::Within(id, Deed::Run { command, timeout_seconds }))
            },
        },
        Tool {
            name: "read_file",
            description: "Reads a file of a sandbox, at most 1 MiB. One that is not UTF-8 comes as base64.",
            reads: true,
            schema: || object(json!({"sandbox_id": sandbox_id(), "path": path()}), &["sandbox_id", "path"]),
            parse: |arguments| {
                within(arguments).map(|(id, At { path })| Call::Within(id, Deed::ReadFile(path)))
            },
        },
        Tool {
            name: "write_file",
            description: "Writes a file of a sandbox, whole; parent directories are made.",
            reads: false,
            schema: || {
                object(
                    json!({"sandbox_id": sandbox_id(), "path": path(), "content": content()}),
                    &["sandbox_id", "path", "content"],
                )
            },
            parse: |arguments| {
                let (id, Write { path, content }) = within(arguments)?;
                Ok(Call::Within(id, Deed::WriteFile(path, content)))
            },
        },
        Tool {
            name: "list_dir",
            description: "Lists a directory of a sandbox.",
            reads: true,
            schema: || object(json!({"sandbox_id": sandbox_id(), "path": directory()}), &["sandbox_id"]),
            parse: |arguments| {
                within(arguments).map(|(id, Dir { path })| Call::Within(id, Deed::ListDir(path)))
            },
        },
        Tool {
            name: "list_templates",
            description: "Lists the templates that sandboxes can be created from, with what is installed in each.",
            reads: true,
            schema: || object(json!({}), &[]),
            parse: |_| Ok(Call::ListTemplates),
        },
    ],
};

/// The endpoint of one sandbox.
pub const SANDBOX: Server<Deed> = Server {
    name: "pandastack-sandbox",
    version: "0.1.0",
    instructions: "A virtual machine of your own: run shell commands, read and write files.",
    protocol: "2024-11-05",
    quiet: StatusCode::NO_CONTENT,
    tools: &[
        Tool {
            name: "shell",
            description: "Runs a shell command to its end; answers with what it wrote and its exit code.",
            reads: false,
            schema: || {
                object(
                    json!({
                        "command": {"type": "string", "description": "For /bin/sh -c."},
                        "timeout_ms": {"type": "integer", "minimum": 1, "maximum": MOST_SECONDS * 1000, "default": DEFAULT_SHELL_MS,
                            "description": "Milliseconds after which it is killed, rounded up to whole seconds."}
                    }),
                    &["command"],
                )
            },
            parse: |arguments| {
                let Shell { command, timeout_ms } = read(arguments)?;
                let timeout_ms = timeout_ms.unwrap_or(DEFAULT_SHELL_MS);
                if !(1..=MOST_SECONDS * 1000).contains(&timeout_ms) {
                    return Err(format!("argument `timeout_ms` must be 1 to {}", MOST_SECONDS * 1000));
                }
                Ok(Deed::Run { command, timeout_seconds: timeout_ms.div_ceil(1000) })
            },
        },
        Tool {
            name: "read_file",
            description: "Reads a file, at most 1 MiB. One that is not UTF-8 comes as base64.",
            reads: true,
            schema: || object(json!({"path": path()}), &["path"]),
            parse: |arguments| read(arguments).map(|At { path }| Deed::ReadFile(path)),
        },
        Tool {
            name: "write_file",
            description: "Writes a file, whole; parent directories are made.",
            reads: false,
            schema: || object(json!({"path": path(), "content": content()}), &["path", "content"]),
            parse: |arguments| read(arguments).map(|Write { path, content }| Deed::WriteFile(path, content)),
        },
        Tool {
            name: "list_dir",
            description: "Lists a directory.",
            reads: true,
            schema: || object(json!({"path": directory()}), &[]),
            parse: |arguments| read(arguments).map(|Dir { path }| Deed::ListDir(path)),
        },
    ],
};

#[derive(Deserialize)]
struct One {
    sandbox_id: String,
}

#[derive(Deserialize)]
struct Run {
    command: String,
    #[serde(default, deserialize_with = "whole")]
    timeout_seconds: Option<u64>,
}

#[derive(Deserialize)]
struct Shell {
    command: String,
    #[serde(default, deserialize_with = "whole")]
    timeout_ms: Option<u64>,
}

#[derive(Deserialize)]
struct At {
    path: String,
}

#[derive(Deserialize)]
struct Dir {
    #[serde(default = "workspace")]
    path: String,
}

#[derive(Deserialize)]
struct Write {
    path: String,
    content: String,
}

fn workspace() -> String {
    DEFAULT_DIRECTORY.into()
}

fn read<T: DeserializeOwned>(arguments: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(arguments).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if path == "." { inner.to_string() } else { format!("argument `{path}`: {inner}") }
    })
}

fn within<T: DeserializeOwned>(arguments: Value) -> Result<(String, T), String> {
    let One { sandbox_id } = read(arguments.clone())?;
    Ok((sandbox_id, read(arguments)?))
}

fn object(properties: Value, required: &[&str]) -> Value {
    let mut schema = json!({"type": "object", "required": required});
    schema["properties"] = properties;
    schema
}

fn sandbox_id() -> Value {
    json!({"type": "string", "description": "Id of a sandbox."})
}

fn path() -> Value {
    json!({"type": "string", "description": "Absolute path."})
}

fn directory() -> Value {
    json!({"type": "string", "default": DEFAULT_DIRECTORY, "description": "Absolute path."})
}

fn content() -> Value {
    json!({"type": "string", "description": "Its whole content."})
}

/// The result of a command as a sandbox's own endpoint shows it. What is no result stays as it is.
pub fn shell_text(outcome: Outcome) -> Outcome {
    let Ok(result) = serde_json::from_str::<Value>(&outcome.text) else { return outcome };
    let (Some(stdout), Some(code)) = (result["stdout"].as_str(), result["exit_code"].as_i64()) else {
        return outcome;
    };
    let mut text = stdout.to_owned();
    for (title, part) in [("stderr", &result["stderr"]), ("error", &result["error"])] {
        if let Some(part) = part.as_str().filter(|part| !part.is_empty()) {
            text.push_str(&format!("\n[{title}]\n{part}"));
        }
    }
    text.push_str(&format!("\n[exit code {code}]"));
    Outcome { text, failed: outcome.failed }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, arguments: Value) -> Result<Call, String> {
        (WORKSPACE.tools.iter().find(|tool| tool.name == name).unwrap().parse)(arguments)
    }

    #[test]
    fn defaults_are_the_contracts() {
        let Ok(Call::CreateSandbox(new)) = parse("create_sandbox", json!({})) else { panic!() };
        assert_eq!(serde_json::to_value(new).unwrap(), json!({"template": "code-interpreter"}));
        assert_eq!(
            parse("run_command", json!({"sandbox_id": "s", "command": "ls", "else": 1})).unwrap(),
            Call::Within("s".into(), Deed::Run { command: "ls".into(), timeout_seconds: 60 })
        );
        assert_eq!(
            parse("list_dir", json!({"sandbox_id": "s"})).unwrap(),
            Call::Within("s".into(), Deed::ListDir("/workspace".into()))
        );
        let shell = (SANDBOX.tools[0].parse)(json!({"command": "ls", "timeout_ms": 1001})).unwrap();
        assert_eq!(shell, Deed::Run { command: "ls".into(), timeout_seconds: 2 });
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (name, arguments, needle) in [
            ("create_sandbox", json!({"template": 5}), "`template`"),
            ("create_sandbox", json!({"ttl_seconds": -1}), "`ttl_seconds`"),
            ("create_sandbox", json!({"metadata": {"a": 1}}), "`metadata.a`"),
            ("delete_sandbox", json!({}), "sandbox_id"),
            ("run_command", json!({"sandbox_id": "s"}), "command"),
            ("run_command", json!({"sandbox_id": "s", "command": "x", "timeout_seconds": 301}), "1 to 300"),
            ("run_command", json!({"sandbox_id": "s", "command": "x", "timeout_seconds": 0}), "1 to 300"),
            ("write_file", json!({"sandbox_id": "s", "path": "/x", "content": 1}), "`content`"),
        ] {
            let sentence = parse(name, arguments.clone()).unwrap_err();
            assert!(sentence.contains(needle), "{name} {arguments}: {sentence}");
        }
    }

    #[test]
    fn a_result_becomes_text() {
        let shown = |result: Value| shell_text(Outcome { text: result.to_string(), failed: false }).text;
        assert_eq!(shown(json!({"stdout": "a\n", "stderr": "", "exit_code": 0})), "a\n\n[exit code 0]");
        assert_eq!(
            shown(json!({"stdout": "", "stderr": "b", "exit_code": 3})),
            "\n[stderr]\nb\n[exit code 3]"
        );
        assert_eq!(
            shown(json!({"error": "command timeout after 1s", "stdout": "", "stderr": "", "exit_code": 124})),
            "\n[error]\ncommand timeout after 1s\n[exit code 124]"
        );
        assert_eq!(shown(json!({"error": "sandbox not found"})), r#"{"error":"sandbox not found"}"#);
    }
}
