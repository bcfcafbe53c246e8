//! Language servers: the bytes of one in the guest, both ways.

use std::{sync::Arc, time::Duration};

use http::StatusCode;
use pandastack_protocol::{Exec, ExecEvent};
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use utoipa::ToSchema;
use warp::{
    Filter,
    filters::BoxedFilter,
    reply::Response,
    ws::{Message, Ws},
};

use super::{Gone, Incoming, Socket, open, upgrade};
use crate::{
    app::App,
    guest::{Session, Stdin},
    input::{Input, segment},
    output::Utf8,
    problem::Problem,
    routes::{Answer, command::refuse, finish, input, json as answer_json},
    wire::Error,
};

/// Bytes of one message.
const MESSAGE: usize = 1 << 20;
/// Bytes of input that may wait for the server before the client has to.
const WAITING: usize = 2 << 20;
const OUTPUT: usize = 64 << 10;
/// Bytes of a line of its standard error.
const LINE: usize = 16 << 10;
/// A connection on which nothing happens for so long ends.
const IDLE_FOR: Duration = Duration::from_secs(600);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// What a shell says when there is no such program.
const NOT_FOUND: i32 = 127;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let serve = warp::path!("v1" / "sandboxes" / String / "lsp" / String)
        .and(warp::get())
        .and(with(app))
        .and(upgrade())
        .and(input())
        .then(|id, language, a, ws, i| finish(serve(a, id, language, ws, i)));
    let languages =
        warp::path!("v1" / "lsp" / "languages").and(warp::get()).and(input()).then(|_| finish(languages()));
    serve.or(languages).unify().boxed()
}

/// Which language servers there are.
#[derive(Debug, Serialize, ToSchema)]
pub struct Languages {
    /// Names for the path.
    pub supported: Vec<&'static str>,
    /// Where they are.
    pub note: &'static str,
}

/// Lists the languages that have a server.
#[utoipa::path(operation_id = "lsp_languages", get, path = "/v1/lsp/languages", tag = "terminals",
    responses((status = 200, body = Languages)))]
pub async fn languages() -> Answer {
    let note = "the server runs in the sandbox; the template code-interpreter has it";
    Ok(answer_json(StatusCode::OK, &Languages { supported: vec!["python"], note }))
}

/// Starts a language server and carries its bytes.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/lsp/{language}", tag = "terminals",
    params(("id" = String, Path, description = "sandbox id"), ("language" = String, Path, description = "`python` or `py`")),
    responses((status = 101, description = "a WebSocket"), (status = 404, body = Error), (status = 409, body = Error),
        (status = 426, body = Error)))]
pub async fn serve(app: Arc<App>, id: String, language: String, ws: Option<Ws>, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let language = segment(&language);
    let server = match language.as_str() {
        "python" | "py" => "pylsp",
        _ => {
            return Err(Problem::invalid(
                "there is no language server for this language; there is one for `python`",
            ));
        }
    };
    if ws.is_none() {
        return Err(super::not_a_websocket());
    }
    let exec = Exec { argv: vec![server.to_owned()], ..Exec::default() };
    let activity = app.touch.in_use(&id);
    let session = Session::start(&app.guests, &id, exec, Some(Stdin::open(0)), activity)
        .await
        .map_err(|error| refuse(&app, &id, error))?;
    open(ws, MESSAGE, &app, &input.caller, &input.headers, move |socket| carry(socket, session))
}

async fn carry(mut socket: Socket, mut session: Session) {
    let mut errors = Lines::default();
    let mut idle_at = Instant::now() + IDLE_FOR;
    let last = loop {
        let has_room = session.input_waiting() < WAITING;
        tokio::select! {
            event = session.next() => match event {
                Ok(ExecEvent::Stdout(bytes)) => {
                    idle_at = Instant::now() + IDLE_FOR;
                    for part in bytes.chunks(OUTPUT) {
                        if socket.send(Message::binary(part.to_vec())).await.is_none() {
                            return;
                        }
                    }
                }
                Ok(ExecEvent::Stderr(bytes)) => {
                    for line in errors.push(&bytes) {
                        if socket.text(&json!({ "stream": "stderr", "line": line })).await.is_none() {
                            return;
                        }
                    }
                }
                Ok(ExecEvent::Exit(exit)) if exit.code == NOT_FOUND => break json!({
                    "error": "there is no language server in this sandbox",
                    "hint": "the template code-interpreter has one; or install python-lsp-server",
                }),
                Ok(ExecEvent::Exit(exit)) => break json!({ "exit": exit.code }),
                Err(error) => {
                    tracing::info!(sandbox = session.sandbox(), %error, "a language server was lost");
                    break json!({ "error": "the language server was lost", "hint": "connect again" });
                }
            },
            incoming = socket.receive(), if has_room => match incoming {
                Ok(Incoming::Binary(bytes)) => {
                    idle_at = Instant::now() + IDLE_FOR;
                    session.write(&bytes);
                }
                Ok(Incoming::Text(text)) => {
                    idle_at = Instant::now() + IDLE_FOR;
                    session.write(text.as_bytes());
                }
                Err(Gone::Closed) => return socket.close(1000, String::new()).await,
                Err(Gone::Lost) => return,
            },
            () = tokio::time::sleep(LOOK_AGAIN), if !has_room => {}
            () = tokio::time::sleep_until(idle_at) => return socket.close(1000, "idle".into()).await,
        }
    };
    if socket.text(&last).await.is_some() {
        socket.close(1000, String::new()).await;
    }
}

/// Cuts bytes into lines.
#[derive(Debug, Default)]
struct Lines {
    decoder: Utf8,
    rest: String,
}

impl Lines {
    fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.push_str(&self.decoder.push(bytes));
        let mut lines: Vec<String> = self.rest.split('\n').map(str::to_owned).collect();
        self.rest = lines.pop().unwrap_or_default();
        if self.rest.len() > LINE {
            lines.push(std::mem::take(&mut self.rest));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_and_endless_ones_in_parts() {
        let mut lines = Lines::default();
        assert_eq!(lines.push(b"a\nb"), ["a"]);
        assert_eq!(lines.push(b"c\n\nd"), ["bc", ""]);
        assert_eq!(lines.push(&[b'x'; LINE]).len(), 1);
        assert_eq!(lines.push(b"\n"), [""]);
    }
}
