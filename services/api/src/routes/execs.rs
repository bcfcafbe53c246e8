//! Commands that are there already: which there are, reading one from an offset on, killing one.
//!
//! A session belongs to its guest: it goes on through captures, hibernation and forks, and so does who reads it.

use std::sync::Arc;

use http::StatusCode;
use pandastack_bus::SandboxId;
use pandastack_protocol::{CHUNK, Code, ExecEvent, Request, SessionInfo, Sessions};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Pieces,
    command::{End, Running, refuse},
    event_stream,
    exec::{KEEP_ALIVE_EVERY, STALLED_FOR},
    finish, input, json, no_content, pieces,
};
use crate::{
    app::App,
    guest::{GuestError, Session, Wake},
    input::{Input, flag, segment},
    output::{self, Utf8},
    problem::Problem,
    wire::{Error, rfc3339},
};

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let all = warp::path!("v1" / "sandboxes" / String / "execs");
    let one = warp::path!("v1" / "sandboxes" / String / "execs" / String);
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(list(a, id, i)));
    let read = one.and(warp::get()).and(with(app)).and(input()).then(|id, s, a, i| finish(read(a, id, s, i)));
    let kill =
        one.and(warp::delete()).and(with(app)).and(input()).then(|id, s, a, i| finish(kill(a, id, s, i)));
    list.or(read).unify().or(kill).unify().boxed()
}

/// A command in a sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecSession {
    /// Names it.
    pub session_id: String,
    /// Its beginning, at most 256 characters.
    pub command: String,
    /// Process id in the guest.
    pub pid: u32,
    /// RFC 3339, the guest's clock.
    pub started_at: String,
    /// Goes on without a client.
    pub detached: bool,
    /// How it ended; null while it runs.
    pub exit_code: Option<i32>,
    /// Bytes it wrote so far to both of its streams.
    pub output_bytes: u64,
}

impl From<SessionInfo> for ExecSession {
    fn from(info: SessionInfo) -> Self {
        let command = info.command.strip_prefix("/bin/sh -c ").unwrap_or(&info.command);
        Self {
            command: command.chars().take(256).collect(),
            session_id: info.session,
            pid: info.pid,
            started_at: rfc3339(info.started.saturating_mul(1000)),
            detached: info.detached,
            exit_code: info.exit.map(|exit| exit.code),
            output_bytes: info.output_bytes,
        }
    }
}

/// From where, and for how long.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ReadQuery {
    /// First byte of output wanted, both streams counted together; 0 when absent.
    #[param(required = false, minimum = 0)]
    pub offset: Option<u64>,
    /// Whether to wait for what is yet to be written; true when absent.
    #[param(required = false)]
    pub wait: Option<bool>,
}

fn wishes(input: &Input) -> Result<(u64, bool), Problem> {
    let (mut offset, mut wait) = (0, true);
    for (key, value) in input.pairs()? {
        match key.as_str() {
            "offset" => {
                offset = value.parse().map_err(|_| {
                    Problem::invalid("query parameter `offset` must be a whole number, 0 or more")
                })?;
            }
            "wait" => wait = flag(&key, &value)?,
            _ => {}
        }
    }
    Ok((offset, wait))
}

/// The session that a path names.
pub fn session_of(raw: &str) -> Result<SandboxId, Problem> {
    let name = segment(raw);
    name.parse().map_err(|_| no_session(&name))
}

/// Nothing of this name.
pub fn no_session(name: &str) -> Problem {
    let shown: String = name.chars().take(64).collect();
    Problem::not_found(format!("exec session {shown:?} not found"))
}

/// A guest's error about a session.
pub fn refuse_session(app: &App, id: &str, session: &SandboxId, error: GuestError) -> Problem {
    match error {
        GuestError::Refused(failure) if failure.code == Code::NotFound => no_session(session.as_str()),
        other => refuse(app, id, other),
    }
}

async fn sessions(app: &App, id: &str) -> Result<Vec<SessionInfo>, Problem> {
    let (sessions, _) = app
        .guests
        .call::<Sessions>(id, &Request::Sessions {}, Wake::Yes)
        .await
        .map_err(|(error, _)| refuse(app, id, error))?;
    Ok(sessions.sessions)
}

/// The commands of a sandbox that run, or ended not long ago, oldest first.
#[utoipa::path(operation_id = "list_execs", get, path = "/v1/sandboxes/{id}/execs", tag = "exec",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Vec<ExecSession>), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn list(app: Arc<App>, id: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let _activity = app.touch.in_use(&id);
    let found: Vec<ExecSession> = sessions(&app, &id)
        .await?
        .into_iter()
        .filter(|info| info.session.parse::<SandboxId>().is_ok())
        .map(ExecSession::from)
        .collect();
    Ok(json(StatusCode::OK, &found))
}

/// Reads a command's output from an offset on, as events, until it ends.
///
/// First `session` with `{session_id, pid, offset, dropped}`: `offset` is where output begins, later than asked for when what
/// lies before is no longer kept. Then `stdout` and `stderr` with `{chunk, offset, next}`; a client that comes back asks for
/// the last `next`. At the end `exit` with `{exit_code, duration_ms, next}`, `error` with `{error}`, or, without `wait`,
/// `running` with `{next}`. Who read it before is told so with an `error`. The last half a megabyte of output can usually be
/// had again. Reading kills nothing.
#[utoipa::path(operation_id = "read_exec", get, path = "/v1/sandboxes/{id}/execs/{session}", tag = "exec",
    params(("id" = String, Path, description = "sandbox id"), ("session" = String, Path, description = "session id"), ReadQuery),
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 404, body = Error),
        (status = 409, body = Error)))]
pub async fn read(app: Arc<App>, id: String, session: String, input: Input) -> Answer {
    let (offset, wait) = wishes(&input)?;
    app.own(&input.caller, &id).await?;
    let session = session_of(&session)?;
    let activity = app.touch.in_use(&id);
    let until = match wait {
        true => None,
        false => {
            let all = sessions(&app, &id).await?;
            let info = all.into_iter().find(|info| info.session == session.as_str());
            let info = info.ok_or_else(|| no_session(session.as_str()))?;
            // What ended is read to its end.
            info.exit.is_none().then_some(info.output_bytes)
        }
    };
    let followed = Session::follow(&app.guests, &id, session.as_str(), offset, activity)
        .await
        .map_err(|error| refuse_session(&app, &id, &session, error))?;
    let (sender, events) = pieces(STALLED_FOR);
    tokio::spawn(tell(Running::new(followed, 0), wait, until, sender));
    Ok(event_stream(events))
}

/// Tells what happens; with `until` only what is there already.
async fn tell(mut running: Running, wait: bool, until: Option<u64>, to: Pieces) {
    let (pid, dropped) = running.session.started().map_or((0, 0), |started| (started.pid, started.dropped));
    let first = json!({"session_id": running.session.id(), "pid": pid, "offset": running.session.offset(),
        "dropped": dropped});
    if to.send(output::plain_event("session", &first)).await.is_none() {
        return;
    }
    let (mut stdout, mut stderr) = (Utf8::default(), Utf8::default());
    let mut read_to = 0;
    let end = loop {
        if until.is_some_and(|until| running.session.offset() >= until) {
            break None;
        }
        let event = tokio::select! {
            event = running.next() => event,
            () = tokio::time::sleep(KEEP_ALIVE_EVERY) => {
                if !wait {
                    break None;
                }
                if to.send(output::KEEP_ALIVE).await.is_none() {
                    return;
                }
                continue;
            }
            () = to.closed() => return,
        };
        let (name, decoder, bytes) = match event {
            Ok(ExecEvent::Stdout(bytes)) => ("stdout", &mut stdout, bytes),
            Ok(ExecEvent::Stderr(bytes)) => ("stderr", &mut stderr, bytes),
            Ok(ExecEvent::Exit(_)) => continue,
            Err(end) => break Some(end),
        };
        let mut at = running.session.offset().saturating_sub(bytes.len() as u64);
        for part in bytes.chunks(CHUNK) {
            let offset = at.saturating_sub(decoder.held() as u64);
            let text = decoder.push(part);
            at = at.saturating_add(part.len() as u64);
            read_to = at.saturating_sub(decoder.held() as u64);
            if !text.is_empty() && to.send(output::placed_event(name, &text, offset, read_to)).await.is_none()
            {
                return;
            }
        }
    };
    let next = running.session.offset();
    let Some(end) = end else {
        // A character that is not complete comes with the rest of it.
        let next = if stdout.held() + stderr.held() > 0 { read_to } else { next };
        to.send(output::plain_event("running", &json!({"next": next}))).await;
        return;
    };
    for (name, decoder) in [("stdout", &mut stdout), ("stderr", &mut stderr)] {
        let offset = next.saturating_sub(decoder.held() as u64);
        let text = decoder.finish();
        if !text.is_empty() && to.send(output::placed_event(name, &text, offset, next)).await.is_none() {
            return;
        }
    }
    let last = match end {
        End::Exit { code, duration_ms } => {
            output::plain_event("exit", &json!({"exit_code": code, "duration_ms": duration_ms, "next": next}))
        }
        End::TimedOut { .. } => output::error_event("command timeout"),
        End::Lost(why) => output::error_event(why),
    };
    to.send(last).await;
}

/// Kills a command with everything it started. Of one that has ended nothing is left to kill.
#[utoipa::path(operation_id = "kill_exec", delete, path = "/v1/sandboxes/{id}/execs/{session}", tag = "exec",
    params(("id" = String, Path, description = "sandbox id"), ("session" = String, Path, description = "session id")),
    responses((status = 204), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn kill(app: Arc<App>, id: String, session: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let session = session_of(&session)?;
    let _activity = app.touch.in_use(&id);
    let request = Request::Kill { session: session.to_string() };
    match app.guests.call::<serde::de::IgnoredAny>(&id, &request, Wake::Yes).await {
        Ok(_) => Ok(no_content()),
        Err((error, _)) => Err(refuse_session(&app, &id, &session, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str) -> Result<(u64, bool), Problem> {
        wishes(&Input {
            caller: crate::auth::Caller::default(),
            request_id: String::new(),
            query: query.into(),
            headers: http::HeaderMap::new(),
            body: Box::pin(futures_util::stream::empty()),
        })
    }

    #[test]
    fn an_offset_is_a_number_and_waiting_is_the_default() {
        assert_eq!(asked("").unwrap(), (0, true));
        assert_eq!(asked("offset=18446744073709551615&wait=false").unwrap(), (u64::MAX, false));
        for bad in
            ["offset=", "offset=-1", "offset=x", "offset=1.5", "offset=18446744073709551616", "wait=perhaps"]
        {
            assert_eq!(asked(bad).unwrap_err().status.as_u16(), 400, "{bad}");
        }
    }
}
