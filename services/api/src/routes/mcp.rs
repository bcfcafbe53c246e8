//! MCP over HTTP: a tool's call goes through the handler of the matching route, with its checks, and its text is that
//! handler's answer.
//!
//! Owns: how much of an answer becomes text, and what a client sees that waits for long. Refuses to know: JSON-RPC
//! ([`crate::mcp`]).

use std::{pin::Pin, sync::Arc, time::Instant};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, Limited};
use serde_json::Value;
use utoipa::ToSchema;
use warp::{Filter, Reply as _, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Pieces, UNREAD_FOR,
    exec::{self, DRIBBLE_AFTER, DRIBBLE_EVERY},
    files, finish, input, json, pieces, sandboxes, streamed, templates,
};
use crate::{
    app::App,
    auth::Caller,
    input::Input,
    limit::Rate,
    mcp::{
        MESSAGE_LIMIT, Outcome, Reply, Server, Step, called, rate_limited,
        tools::{Call, Deed, SANDBOX, WORKSPACE, shell_text},
        understand,
    },
    problem::Problem,
};

/// Bytes of each stream of a command: a model reads no more at once.
const STREAM_CAP: usize = 256 << 10;
/// Bytes of a file.
const FILE_LIMIT: usize = 1 << 20;
/// Bytes of any other answer.
const TEXT_LIMIT: usize = 4 << 20;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let one = warp::path!("v1" / "sandboxes" / String / "mcp")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(sandbox(a, id, i)));
    let all = warp::path!("v1" / "mcp")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(workspace(a, i)));
    let root = warp::path!("mcp")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(workspace_root(a, i)));
    one.or(all).unify().or(root).unify().boxed()
}

/// A message of JSON-RPC 2.0.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "only described; `crate::mcp` reads it")]
pub struct RpcRequest {
    /// `2.0`.
    #[schema(pattern = "^2\\.0$")]
    jsonrpc: String,
    /// A string or a number; absent for what needs no answer.
    id: Option<Value>,
    /// `initialize`, `ping`, `tools/list`, `tools/call` or `notifications/…`.
    method: String,
    /// Of the method.
    #[schema(value_type = Option<Object>)]
    params: Option<Value>,
}

/// Its answer: `result` or `error`.
#[derive(Debug, ToSchema)]
#[expect(dead_code, reason = "only described; `crate::mcp` writes it")]
pub struct RpcResponse {
    /// `2.0`.
    jsonrpc: String,
    /// That of the request.
    id: Option<Value>,
    /// What was asked for. That a tool failed is said in it (`isError`).
    #[schema(value_type = Option<Object>)]
    result: Option<Value>,
    /// `code` and `message`.
    #[schema(value_type = Option<Object>)]
    error: Option<Value>,
}

/// Tools for a model: sandboxes of the workspace, commands and files in them.
///
/// MCP over streamable HTTP without sessions, always with plain JSON answers. A workspace has 60 calls of tools in a minute.
#[utoipa::path(operation_id = "mcp", post, path = "/v1/mcp", tag = "mcp", request_body = RpcRequest,
    responses((status = 200, body = RpcResponse), (status = 202, description = "nothing to answer"),
        (status = 400, description = "no message of JSON-RPC 2.0", body = RpcResponse)))]
pub async fn workspace(app: Arc<App>, input: Input) -> Answer {
    let call = |desk: Desk, call: Call| async move { desk.call(call).await };
    let rate = app.tenancy.rate(&input.caller.workspace);
    serve(app, input, &WORKSPACE, Some(rate), call).await
}

/// The same as `/v1/mcp`.
#[utoipa::path(operation_id = "mcp_root", post, path = "/mcp", tag = "mcp", request_body = RpcRequest,
    responses((status = 200, body = RpcResponse), (status = 202, description = "nothing to answer"),
        (status = 400, description = "no message of JSON-RPC 2.0", body = RpcResponse)))]
pub async fn workspace_root(app: Arc<App>, input: Input) -> Answer {
    workspace(app, input).await
}

/// Tools for a model that is to see one sandbox only: `shell`, `read_file`, `write_file`, `list_dir`.
#[utoipa::path(operation_id = "sandbox_mcp", post, path = "/v1/sandboxes/{id}/mcp", tag = "mcp", request_body = RpcRequest,
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = RpcResponse), (status = 204, description = "nothing to answer"),
        (status = 400, description = "no message of JSON-RPC 2.0", body = RpcResponse),
        (status = 404, description = "no such sandbox", body = crate::wire::Error)))]
pub async fn sandbox(app: Arc<App>, id: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let call = move |desk: Desk, deed: Deed| async move {
        let runs = matches!(deed, Deed::Run { .. });
        let outcome = desk.within(id, deed).await;
        if runs { shell_text(outcome) } else { outcome }
    };
    serve(app, input, &SANDBOX, None, call).await
}

/// Answers one message. `rate` bounds the calls of tools.
async fn serve<C, F>(
    app: Arc<App>,
    mut input: Input,
    server: &'static Server<C>,
    rate: Option<Rate>,
    work: impl FnOnce(Desk, C) -> F,
) -> Answer
where
    F: Future<Output = Outcome> + Send + 'static,
{
    let message = input.bytes(MESSAGE_LIMIT).await?;
    let (id, call, reads) = match understand(server, &message) {
        Step::Reply(reply) => return Ok(response(reply)),
        Step::Call { id, call, reads } => (id, call, reads),
    };
    drop(message);
    if let Some(rate) = rate
        && !app.limiter.tool(&input.caller.workspace, Instant::now(), rate)
    {
        let sentence = format!("rate limit: more than {} tool calls in a minute", rate.tool_calls);
        return Ok(response(rate_limited(id, &sentence)));
    }
    let desk = Desk { app, caller: input.caller, request_id: input.request_id };
    if let Err(problem) = desk.caller.grant.check_asked(reads) {
        return Ok(response(called(id, desk.failure(&problem))));
    }
    let mut work = Box::pin(work(desk, call));
    if let Ok(outcome) = tokio::time::timeout(DRIBBLE_AFTER, &mut work).await {
        return Ok(response(called(id, outcome)));
    }
    let (to, arriving) = pieces(UNREAD_FOR);
    tokio::spawn(dribble(id, work, to));
    Ok(streamed(arriving, "application/json"))
}

/// Spaces until the outcome is there; that it is a 200 was known from the start.
async fn dribble(id: Value, mut work: Pin<Box<impl Future<Output = Outcome>>>, to: Pieces) {
    let mut every = tokio::time::interval(DRIBBLE_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let outcome = loop {
        tokio::select! {
            outcome = &mut work => break outcome,
            _ = every.tick() => if to.send(" ").await.is_none() { return },
            // The work ends with its client, as without MCP.
            () = to.closed() => return,
        }
    };
    to.send(called(id, outcome).body.unwrap_or_default().to_string()).await;
}

fn response(reply: Reply) -> Response {
    match reply.body {
        Some(body) => json(reply.status, &body),
        None => reply.status.into_response(),
    }
}

/// Where the calls of one caller are done.
struct Desk {
    app: Arc<App>,
    caller: Caller,
    request_id: String,
}

impl Desk {
    /// A request for a handler, as if it had come by HTTP.
    fn input(&self, query: String, body: impl Into<Bytes>) -> Input {
        let body: Bytes = body.into();
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
        let body = futures_util::stream::once(std::future::ready(Ok(body)));
        Input {
            caller: self.caller.clone(),
            request_id: self.request_id.clone(),
            query,
            headers,
            body: Box::pin(body),
        }
    }

    async fn call(self, call: Call) -> Outcome {
        let app = Arc::clone(&self.app);
        let answer = match call {
            Call::CreateSandbox(wish) => {
                let wish = serde_json::to_vec(&wish).unwrap_or_default();
                sandboxes::create(app, self.input(String::new(), wish)).await
            }
            Call::ListSandboxes => sandboxes::list(app, self.input(String::new(), "")).await,
            Call::DeleteSandbox(id) => sandboxes::delete(app, id, self.input(String::new(), "")).await,
            Call::ListTemplates => templates::list(app, self.input(String::new(), "")).await,
            Call::Within(id, deed) => return self.within(id, deed).await,
        };
        self.text(answer).await
    }

    async fn within(self, id: String, deed: Deed) -> Outcome {
        let app = Arc::clone(&self.app);
        let answer = match deed {
            Deed::Run { command, timeout_seconds } => {
                let wish =
                    serde_json::json!({"cmd": command, "timeout_seconds": timeout_seconds}).to_string();
                exec::exec_capped(app, id, self.input(String::new(), wish), STREAM_CAP).await
            }
            Deed::ReadFile(path) => {
                let answer = files::read(app, id, self.input(at(&path), "")).await;
                return self.file(answer).await;
            }
            Deed::WriteFile(path, content) => files::write(app, id, self.input(at(&path), content)).await,
            Deed::ListDir(path) => files::dir(app, id, self.input(at(&path), "")).await,
        };
        self.text(answer).await
    }

    /// A handler's JSON.
    async fn text(&self, answer: Answer) -> Outcome {
        match self.collect(answer, TEXT_LIMIT).await {
            // 204.
            Ok((bytes, true)) if bytes.is_empty() => Outcome { text: "{}".into(), failed: false },
            // What took long begins with spaces.
            Ok((bytes, good)) => Outcome {
                text: String::from_utf8_lossy(bytes.trim_ascii_start()).into_owned(),
                failed: !good,
            },
            Err(problem) => self.failure(&problem),
        }
    }

    /// A handler's bytes.
    async fn file(&self, answer: Answer) -> Outcome {
        match self.collect(answer, FILE_LIMIT).await {
            Ok((bytes, good)) => {
                let text = match String::from_utf8(bytes.into()) {
                    Ok(text) => text,
                    Err(binary) => format!("[binary; base64]\n{}", STANDARD.encode(binary.as_bytes())),
                };
                Outcome { text, failed: !good }
            }
            Err(problem) => self.failure(&problem),
        }
    }

    fn failure(&self, problem: &Problem) -> Outcome {
        Outcome { text: problem.body(&self.request_id).to_string(), failed: true }
    }

    /// The body of an answer, and whether it is a success.
    async fn collect(&self, answer: Answer, limit: usize) -> Result<(Bytes, bool), Problem> {
        let response = answer?;
        let good = response.status().is_success();
        match Limited::new(response.into_body(), limit).collect().await {
            Ok(whole) => Ok((whole.to_bytes(), good)),
            Err(error) if error.is::<http_body_util::LengthLimitError>() => Err(Problem::too_large(format!(
                "the answer is over {} KiB; ask for less, or have a command show a part of it",
                limit >> 10
            ))),
            Err(_) => Err(Problem::new(StatusCode::BAD_GATEWAY, "cut", "the answer broke off")),
        }
    }
}

/// The query string for a path.
fn at(path: &str) -> String {
    format!("path={}", percent_encoding::utf8_percent_encode(path, percent_encoding::NON_ALPHANUMERIC))
}
