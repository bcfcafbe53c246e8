//! Terminals: a login shell on a pseudo-terminal of the guest.
//!
//! ```text
//!   client ── binary: keys ──────────────────────────────► shell
//!          ── text: {"resize":{"rows","cols"}} {"stdin"} {"signal"} ─►
//!          ◄─ binary: output ───────────────────────────── shell
//!          ◄─ text: {"exit":N} or {"error":"…"}, then close, whose reason is the same
//! ```
//!
//! A client that closes ends its shell. One whose connection breaks can come back within a minute, with the session of the
//! response's `X-PandaStack-Session`.

use std::{sync::Arc, time::Duration};

use http::HeaderValue;
use pandastack_protocol::{Exec, ExecEvent, Sessions, Window};
use serde::Deserialize;
use serde_json::json;
use utoipa::IntoParams;
use warp::{
    Filter,
    filters::BoxedFilter,
    reply::Response,
    ws::{Message, Ws},
};

use super::{Gone, Incoming, Socket, open, upgrade};
use crate::{
    app::App,
    guest::{GuestError, Session, Stdin, Wake},
    input::Input,
    problem::Problem,
    routes::{Answer, command::refuse, execs, finish, input},
    wire::Error,
};

/// Bytes of one message of a client: pasted text.
const MESSAGE: usize = 1 << 20;
/// Bytes of input that may wait for the shell before the client has to.
const WAITING: usize = 256 << 10;
/// Bytes of output in one message.
const OUTPUT: usize = 32 << 10;
/// The published command line loses what arrives together with the answer to its handshake.
const SETTLE: Duration = Duration::from_millis(50);
const LOOK_AGAIN: Duration = Duration::from_millis(20);
const DEFAULT: Window = Window { rows: 24, cols: 80 };
/// Largest number of rows or columns.
const LARGEST: u16 = 4096;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let ssh = warp::path!("v1" / "sandboxes" / String / "ssh")
        .and(warp::get())
        .and(with(app))
        .and(upgrade())
        .and(input())
        .then(|id, a, ws, i| finish(ssh(a, id, ws, i)));
    let pty = warp::path!("v1" / "sandboxes" / String / "exec" / "pty")
        .and(warp::get())
        .and(with(app))
        .and(upgrade())
        .and(input())
        .then(|id, a, ws, i| finish(pty(a, id, ws, i)));
    ssh.or(pty).unify().boxed()
}

/// What a terminal shall be.
#[derive(Debug, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TerminalQuery {
    /// Lines; 24 when absent or not positive.
    #[param(required = false)]
    pub rows: Option<i64>,
    /// Columns; 80 when absent or not positive.
    #[param(required = false)]
    pub cols: Option<i64>,
    /// A terminal to come back to.
    #[param(required = false)]
    pub session: Option<String>,
    /// First byte of its output wanted.
    #[param(required = false, minimum = 0)]
    pub offset: Option<u64>,
}

#[derive(Debug, PartialEq, Eq)]
struct Wishes {
    window: Window,
    session: Option<String>,
    offset: u64,
}

fn wishes(pairs: Vec<(String, String)>) -> Result<Wishes, Problem> {
    let mut wishes = Wishes { window: DEFAULT, session: None, offset: 0 };
    let size = |value: &str, default: u16| match value.parse::<i64>() {
        Ok(number) if number > 0 => number.min(LARGEST.into()) as u16,
        _ => default,
    };
    for (key, value) in pairs {
        match key.as_str() {
            "rows" => wishes.window.rows = size(&value, DEFAULT.rows),
            "cols" => wishes.window.cols = size(&value, DEFAULT.cols),
            "session" if !value.is_empty() => wishes.session = Some(value),
            "offset" => {
                wishes.offset = value.parse().map_err(|_| {
                    Problem::invalid("query parameter `offset` must be a whole number, 0 or more")
                })?;
            }
            _ => {}
        }
    }
    Ok(wishes)
}

/// Opens a terminal with a login shell, or comes back to one.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/ssh", tag = "terminals",
    params(("id" = String, Path, description = "sandbox id"), TerminalQuery),
    responses((status = 101, description = "a WebSocket"), (status = 404, body = Error), (status = 409, body = Error),
        (status = 426, body = Error)))]
pub async fn ssh(app: Arc<App>, id: String, ws: Option<Ws>, input: Input) -> Answer {
    // The published command line prints every message, this one, too. It alone names neither itself nor an origin.
    let quiet = !["origin", "user-agent"].iter().any(|name| input.headers.contains_key(*name));
    terminal(app, id, ws, input, quiet).await
}

/// The same as `ssh`.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/exec/pty", tag = "terminals",
    params(("id" = String, Path, description = "sandbox id"), TerminalQuery),
    responses((status = 101, description = "a WebSocket"), (status = 404, body = Error), (status = 409, body = Error),
        (status = 426, body = Error)))]
pub async fn pty(app: Arc<App>, id: String, ws: Option<Ws>, input: Input) -> Answer {
    terminal(app, id, ws, input, false).await
}

async fn terminal(app: Arc<App>, id: String, ws: Option<Ws>, input: Input, quiet: bool) -> Answer {
    let wishes = wishes(input.pairs()?)?;
    app.own(&input.caller, &id).await?;
    if ws.is_none() {
        return Err(super::not_a_websocket());
    }
    let session = match &wishes.session {
        None => start(&app, &id, wishes.window).await?,
        Some(session) => come_back(&app, &id, session, &wishes).await?,
    };
    let name = HeaderValue::from_str(session.id()).ok();
    let mut response =
        open(ws, MESSAGE, &app, &input.caller, &input.headers, move |socket| carry(socket, session, quiet))?;
    if let Some(name) = name {
        response.headers_mut().insert("x-pandastack-session", name);
    }
    Ok(response)
}

async fn start(app: &Arc<App>, id: &str, window: Window) -> Result<Session, Problem> {
    let exec = Exec {
        // The agent sets SHELL from the user's entry.
        argv: ["/bin/sh", "-c", "exec \"${SHELL:-/bin/sh}\" -l"].map(str::to_owned).to_vec(),
        tty: Some(window),
        ..Exec::default()
    };
    let activity = app.touch.in_use(id);
    let started = Session::start(&app.guests, id, exec, Some(Stdin::open(0)), activity).await;
    started.map_err(|error| refuse(app, id, error))
}

async fn come_back(app: &Arc<App>, id: &str, raw: &str, wishes: &Wishes) -> Result<Session, Problem> {
    let name = execs::session_of(raw)?;
    let found: Sessions = app
        .guests
        .call(id, &pandastack_protocol::Request::Sessions {}, Wake::Yes)
        .await
        .map_err(|(error, _)| refuse(app, id, error))?
        .0;
    let info = found.sessions.into_iter().find(|info| info.session == name.as_str());
    let detached = info.ok_or_else(|| execs::no_session(name.as_str()))?.detached;
    let activity = app.touch.in_use(id);
    let mut session = Session::follow(&app.guests, id, name.as_str(), wishes.offset, activity)
        .await
        .map_err(|error| execs::refuse_session(app, id, &name, error))?;
    session.take_over(detached);
    session.resize(wishes.window);
    Ok(session)
}

/// What a client can say in text.
#[derive(Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
struct Control {
    resize: Option<Size>,
    stdin: Option<String>,
    signal: Option<u32>,
}

#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Size {
    rows: i64,
    cols: i64,
}

impl Size {
    fn window(&self) -> Option<Window> {
        let within = |number: i64| (number > 0).then(|| number.min(LARGEST.into()) as u16);
        Some(Window { rows: within(self.rows)?, cols: within(self.cols)? })
    }
}

fn obey(session: &mut Session, text: &str) {
    // What nobody understands is ignored: a terminal has no place for an answer.
    let Ok(control) = serde_json::from_str::<Control>(text) else { return };
    if let Some(window) = control.resize.and_then(|size| size.window()) {
        session.resize(window);
    }
    if let Some(input) = control.stdin {
        session.write(input.as_bytes());
    }
    if let Some(signal) = control.signal.filter(|signal| (1..=64).contains(signal)) {
        session.signal(signal);
    }
}

/// Carries keys and output until one of both ends.
async fn carry(mut socket: Socket, mut session: Session, quiet: bool) {
    tokio::time::sleep(SETTLE).await;
    let last = loop {
        let has_room = session.input_waiting() < WAITING;
        tokio::select! {
            event = session.next() => match event {
                Ok(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) => {
                    for part in bytes.chunks(OUTPUT) {
                        if socket.send(Message::binary(part.to_vec())).await.is_none() {
                            return session.leave();
                        }
                    }
                }
                Ok(ExecEvent::Exit(exit)) => break json!({ "exit": exit.code }),
                Err(GuestError::TakenOver) => break json!({ "error": "another client has this terminal now" }),
                Err(error) => {
                    tracing::info!(sandbox = session.sandbox(), %error, "a terminal was lost");
                    break json!({ "error": "the terminal's session in the guest was lost" });
                }
            },
            incoming = socket.receive(), if has_room => match incoming {
                Ok(Incoming::Binary(bytes)) => session.write(&bytes),
                Ok(Incoming::Text(text)) => obey(&mut session, &text),
                // Dropped, the session ends.
                Err(Gone::Closed) => return socket.close(1000, String::new()).await,
                Err(Gone::Lost) => return session.leave(),
            },
            () = tokio::time::sleep(LOOK_AGAIN), if !has_room => {}
        }
    };
    if !quiet && socket.text(&last).await.is_none() {
        return;
    }
    socket.close(1000, last.to_string()).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(text: &str) -> Result<Wishes, Problem> {
        wishes(crate::input::pairs(text).unwrap())
    }

    #[test]
    fn sizes_that_make_no_sense_are_the_usual_one() {
        for text in ["", "rows=0&cols=-3", "rows=&cols=x", "rows=1e3"] {
            assert_eq!(query(text).unwrap().window, DEFAULT, "{text}");
        }
        assert_eq!(query("rows=7&cols=99999").unwrap().window, Window { rows: 7, cols: LARGEST });
        assert!(query("offset=-1").is_err());
        let back = query("session=abc&offset=9").unwrap();
        assert_eq!((back.session.as_deref(), back.offset), (Some("abc"), 9));
    }

    #[test]
    fn controls_are_understood() {
        let read = |text| serde_json::from_str::<Control>(text).unwrap();
        assert_eq!(
            read(r#"{"resize":{"rows":3,"cols":4}}"#).resize.unwrap().window(),
            Some(Window { rows: 3, cols: 4 })
        );
        assert_eq!(read(r#"{"resize":{"rows":0,"cols":4}}"#).resize.unwrap().window(), None);
        assert_eq!(read(r#"{"stdin":"x"}"#).stdin.as_deref(), Some("x"));
        assert_eq!(read(r#"{"other":1}"#), Control::default());
    }
}
