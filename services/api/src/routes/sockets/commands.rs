//! Commands side by side on one WebSocket.
//!
//! ```text
//!   client ── {"id","cmd","timeout_seconds"?,"cwd"?,"env"?,"user"?,"stdin"?} ─►
//!          ── {"id","cancel":true} ─►
//!          ◄─ {"id","stream":"stdout"|"stderr","data"} … {"id","exit":N} or {"id","error"}
//! ```
//!
//! Every command ends with one `exit` or `error`, a cancelled one with exit code 137. All that run end with the connection.

use std::{collections::HashMap, sync::Arc};

use pandastack_protocol::{CHUNK, ExecEvent};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use warp::{Filter, filters::BoxedFilter, reply::Response, ws::Ws};

use super::{Incoming, Socket, open, upgrade};
use crate::{
    app::App,
    auth::Caller,
    input::{Input, parse_json},
    output::Utf8,
    routes::{
        Answer,
        command::{BODY_LIMIT, End, ExecRequest, run},
        finish, input,
    },
    wire::Error,
};

/// Commands of one connection at the same time.
const COMMANDS: usize = 64;
/// Characters of an id that a client gives to a command.
const ID: usize = 256;
/// Messages that wait for the client, of all commands of a connection together.
const DEPTH: usize = 4;
/// What a killed command's exit code is.
const KILLED: i32 = 137;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    warp::path!("v1" / "sandboxes" / String / "exec" / "ws")
        .and(warp::get())
        .and(warp::any().map(move || Arc::clone(&app)))
        .and(upgrade())
        .and(input())
        .then(|id, a, ws, i| finish(exec_ws(a, id, ws, i)))
        .boxed()
}

/// Opens a WebSocket on which commands run side by side.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/exec/ws", tag = "exec",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 101, description = "a WebSocket"), (status = 404, body = Error), (status = 426, body = Error)))]
pub async fn exec_ws(app: Arc<App>, id: String, ws: Option<Ws>, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let (served, caller) = (Arc::clone(&app), input.caller.clone());
    open(ws, BODY_LIMIT, &app, &input.caller, &input.headers, move |socket| async move {
        Commands { app: served, caller, sandbox: id, running: HashMap::new(), tasks: JoinSet::new() }
            .serve(socket)
            .await;
    })
}

/// What a client says.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Order {
    id: Option<String>,
    cancel: bool,
}

/// The commands of one connection.
struct Commands {
    app: Arc<App>,
    caller: Caller,
    sandbox: String,
    running: HashMap<String, oneshot::Sender<()>>,
    tasks: JoinSet<String>,
}

impl Commands {
    async fn serve(mut self, mut socket: Socket) {
        let (to, mut messages) = mpsc::channel::<Value>(DEPTH);
        let activity = self.app.touch.in_use(&self.sandbox);
        loop {
            let sent = tokio::select! {
                Some(message) = messages.recv() => socket.text(&message).await,
                Some(ended) = self.tasks.join_next() => {
                    if let Ok(id) = ended {
                        self.running.remove(&id);
                    }
                    Some(())
                }
                incoming = socket.receive() => match incoming {
                    Ok(Incoming::Text(text)) => self.order(text.as_bytes(), &to, &mut socket).await,
                    Ok(Incoming::Binary(bytes)) => self.order(&bytes, &to, &mut socket).await,
                    Err(_) => None,
                },
            };
            if sent.is_none() {
                break;
            }
        }
        // Dropped, each of them kills its command.
        self.tasks.shutdown().await;
        drop(activity);
    }

    /// Does what the client says; `None` when it cannot be answered.
    async fn order(&mut self, text: &[u8], to: &mpsc::Sender<Value>, socket: &mut Socket) -> Option<()> {
        let order: Order = match serde_json::from_slice(text) {
            Ok(order) => order,
            Err(error) => return socket.text(&json!({ "error": format!("bad json: {error}") })).await,
        };
        let Some(id) = order.id.filter(|id| !id.is_empty() && id.chars().count() <= ID) else {
            return socket.text(&json!({ "error": "id required" })).await;
        };
        if order.cancel {
            let Some(cancel) = self.running.get_mut(&id) else {
                return socket.text(&json!({ "id": id, "error": "no such command" })).await;
            };
            // Its last message says so, behind what it wrote. Its id is free after that.
            let _ = std::mem::replace(cancel, oneshot::channel().0).send(());
            return Some(());
        }
        let refusal = |sentence: String| json!({ "id": id, "error": sentence });
        let wish: ExecRequest = match parse_json(text) {
            Ok(wish) => wish,
            Err(problem) => return socket.text(&refusal(problem.message)).await,
        };
        if wish.detach == Some(true) {
            return socket.text(&refusal("`detach` goes with `exec` and `exec/stream`".into())).await;
        }
        if self.running.contains_key(&id) {
            return socket.text(&refusal("a command with this id runs".into())).await;
        }
        if self.running.len() >= COMMANDS {
            return socket.text(&refusal(format!("more than {COMMANDS} commands at once"))).await;
        }
        let (app, caller, sandbox) = (Arc::clone(&self.app), self.caller.clone(), self.sandbox.clone());
        let (to, name) = (to.clone(), id.clone());
        let (cancel, cancelled) = oneshot::channel();
        self.tasks.spawn(async move {
            // `None` is a client that is gone, and with it all of them.
            let followed = follow(&app, &caller, &sandbox, wish, &name, &to);
            tokio::select! {
                _ = followed => {}
                Ok(()) = cancelled => drop(to.send(json!({ "id": name, "exit": KILLED })).await),
            }
            name
        });
        self.running.insert(id, cancel);
        Some(())
    }
}

/// Runs a command and says what it writes; `None` when nobody listens.
async fn follow(
    app: &Arc<App>,
    caller: &Caller,
    sandbox: &str,
    wish: ExecRequest,
    id: &str,
    to: &mpsc::Sender<Value>,
) -> Option<()> {
    let mut running = match run(app, caller, sandbox, wish).await {
        Ok(running) => running,
        Err(problem) => return to.send(json!({ "id": id, "error": problem.message })).await.ok(),
    };
    let (mut stdout, mut stderr) = (Utf8::default(), Utf8::default());
    let output = |stream: &str, data: String| json!({ "id": id, "stream": stream, "data": data });
    let end = loop {
        let (name, decoder, bytes) = match running.next().await {
            Ok(ExecEvent::Stdout(bytes)) => ("stdout", &mut stdout, bytes),
            Ok(ExecEvent::Stderr(bytes)) => ("stderr", &mut stderr, bytes),
            Ok(ExecEvent::Exit(_)) => continue,
            Err(end) => break end,
        };
        for part in bytes.chunks(CHUNK) {
            let text = decoder.push(part);
            if !text.is_empty() {
                to.send(output(name, text)).await.ok()?;
            }
        }
    };
    for (name, text) in [("stdout", stdout.finish()), ("stderr", stderr.finish())] {
        if !text.is_empty() {
            to.send(output(name, text)).await.ok()?;
        }
    }
    let last = match end {
        End::Exit { code, .. } => json!({ "id": id, "exit": code }),
        End::TimedOut { .. } => json!({ "id": id, "error": running.timeout_sentence() }),
        End::Lost(why) => json!({ "id": id, "error": why }),
    };
    to.send(last).await.ok()
}
