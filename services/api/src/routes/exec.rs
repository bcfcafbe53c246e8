//! Commands: the whole result at once, or as a stream of events.

use std::{sync::Arc, time::Duration};

use http::{HeaderValue, StatusCode, header};
use pandastack_protocol::{CHUNK, ExecEvent};
use serde::Serialize;
use utoipa::ToSchema;
use warp::{Filter, Reply, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Pieces, UNREAD_FOR,
    command::{End, ExecRequest, Running, start},
    event_stream, finish, input, json, pieces, streamed,
};
use crate::{
    app::App,
    input::Input,
    output::{self, Collected, STREAM_CAP, Share, Utf8},
    problem::Problem,
    wire::Error,
};

/// After so long a plain exec sends its headers, and spaces from then on: the clients wait at most 30 s for a byte.
pub const DRIBBLE_AFTER: Duration = Duration::from_secs(20);
/// How often it sends one.
pub const DRIBBLE_EVERY: Duration = Duration::from_secs(5);
/// A stream says something at least so often.
pub const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);
/// How long the reader of a stream may stand still: the command waits for it meanwhile, then both end.
pub const STALLED_FOR: Duration = Duration::from_secs(600);
/// Larger results are sent in pieces instead of being put together first.
pub const WHOLE: usize = 256 << 10;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let plain = warp::path!("v1" / "sandboxes" / String / "exec")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(exec(a, id, i)));
    let stream = warp::path!("v1" / "sandboxes" / String / "exec" / "stream")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(exec_stream(a, id, i)));
    plain.or(stream).unify().boxed()
}

/// How a command ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecResult {
    /// What it wrote, UTF-8; anything else is replaced.
    pub stdout: String,
    /// The same for standard error.
    pub stderr: String,
    /// 0–125 its own, 126 not executable, 127 not found, 128+N killed by signal N, 124 its time was up.
    pub exit_code: i32,
    /// Milliseconds it ran.
    pub duration_ms: u64,
    /// More than 16 MiB were written to one of the two; the rest was thrown away.
    pub truncated: bool,
}

/// A command that goes on by itself.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detached {
    /// Names it in `GET` and `DELETE /v1/sandboxes/{id}/execs/{session}`.
    pub session_id: String,
    /// Process id in the guest; 0 for a program that could not be run.
    pub pid: u32,
}

/// A command whose time was up.
#[derive(Debug, Serialize, ToSchema)]
pub struct ExecTimeout {
    /// The sentence contains the word `timeout`.
    pub error: String,
    /// `command_timeout`; or another word, when the guest did not answer. Then what follows is absent.
    pub code: String,
    /// False.
    pub retryable: bool,
    /// The request's id.
    pub request_id: String,
    /// What was written until then.
    pub stdout: Option<String>,
    /// The same for standard error.
    pub stderr: Option<String>,
    /// 124.
    pub exit_code: Option<i32>,
    /// Milliseconds it ran.
    pub duration_ms: Option<u64>,
    /// Output is missing.
    pub truncated: Option<bool>,
}

/// A plain exec under way.
struct Whole {
    running: Running,
    /// Further keys of the result, each as JSON with a comma behind it.
    keys: String,
    stdout: Collected,
    stderr: Collected,
}

impl Whole {
    fn new(running: Running, keys: String, share: &Share, cap: usize) -> Self {
        let collected = || Collected::new(share, cap);
        Self { running, keys, stdout: collected(), stderr: collected() }
    }

    /// Collects until the end. Cancel-safe.
    async fn collect(&mut self) -> End {
        loop {
            match self.running.next().await {
                Ok(ExecEvent::Stdout(bytes)) => self.stdout.push(&bytes),
                Ok(ExecEvent::Stderr(bytes)) => self.stderr.push(&bytes),
                Ok(ExecEvent::Exit(_)) => {}
                Err(end) => return end,
            }
        }
    }

    /// The result as JSON, in pieces. `front` goes right behind the opening brace.
    fn pieces(&self, front: &str, exit_code: i32, duration_ms: u64) -> impl Iterator<Item = String> {
        let truncated = self.stdout.truncated || self.stderr.truncated;
        let tail =
            format!("\",\"exit_code\":{exit_code},\"duration_ms\":{duration_ms},\"truncated\":{truncated}}}");
        std::iter::once(format!("{{{front}{}\"stdout\":\"", self.keys))
            .chain(self.stdout.json_pieces())
            .chain(std::iter::once("\",\"stderr\":\"".to_owned()))
            .chain(self.stderr.json_pieces())
            .chain(std::iter::once(tail))
    }

    async fn send(&self, front: &str, exit_code: i32, duration_ms: u64, to: &Pieces) {
        for piece in self.pieces(front, exit_code, duration_ms) {
            if to.send(piece).await.is_none() {
                return;
            }
        }
    }

    /// The answer while its status is still free to choose.
    async fn answer(self, end: End, request_id: &str) -> Answer {
        let (status, front, exit_code, duration_ms) = match end {
            End::Exit { code, duration_ms } => (StatusCode::OK, String::new(), code, duration_ms),
            End::TimedOut { duration_ms } => {
                let sentence = serde_json::Value::from(self.running.timeout_sentence());
                let request_id = serde_json::Value::from(request_id);
                let front = format!(
                    "\"error\":{sentence},\"code\":\"command_timeout\",\"retryable\":false,\"request_id\":{request_id},"
                );
                (StatusCode::GATEWAY_TIMEOUT, front, 124, duration_ms)
            }
            End::Lost(why) => return Err(Problem::gave_up("session_lost", why)),
        };
        let small = self.stdout.len() + self.stderr.len() <= WHOLE;
        let mut response = if small {
            let whole: String = self.pieces(&front, exit_code, duration_ms).collect();
            let mut response = whole.into_response();
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            response
        } else {
            let (sender, arriving) = pieces(UNREAD_FOR);
            tokio::spawn(async move { self.send(&front, exit_code, duration_ms, &sender).await });
            streamed(arriving, "application/json")
        };
        *response.status_mut() = status;
        Ok(response)
    }

    /// The answer after its headers are out: whatever happens is a result.
    async fn dribble(mut self, to: Pieces) {
        let mut every = tokio::time::interval(DRIBBLE_EVERY);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let end = loop {
            tokio::select! {
                end = self.collect() => break end,
                _ = every.tick() => if to.send(" ").await.is_none() { return },
                () = to.closed() => return,
            }
        };
        let (code, duration_ms) = match end {
            End::Exit { code, duration_ms } => (code, duration_ms),
            End::TimedOut { duration_ms } => {
                self.stderr.note(&self.running.timeout_sentence());
                (124, duration_ms)
            }
            End::Lost(why) => {
                self.stderr.note(why);
                (137, 0)
            }
        };
        self.send("", code, duration_ms, &to).await;
    }
}

/// Runs a command to its end and answers with everything it wrote.
///
/// After 20 seconds the headers of a 200 are sent, then a space every few seconds until the JSON object is ready; from
/// then on a failure is a result with exit code 124 (time limit) or 137 (lost).
#[utoipa::path(post, path = "/v1/sandboxes/{id}/exec", tag = "exec",
    params(("id" = String, Path, description = "sandbox id")), request_body = ExecRequest,
    responses((status = 200, body = ExecResult), (status = 202, description = "with `detach`", body = Detached),
        (status = 404, body = Error), (status = 409, body = Error),
        (status = 413, body = Error), (status = 504, description = "the time limit passed", body = ExecTimeout),
        (status = 507, body = Error)))]
pub async fn exec(app: Arc<App>, id: String, input: Input) -> Answer {
    exec_capped(app, id, input, STREAM_CAP).await
}

/// As [`exec`], with at most `cap` bytes of each stream.
pub async fn exec_capped(app: Arc<App>, id: String, mut input: Input, cap: usize) -> Answer {
    let running = start(&app, &id, &mut input).await?;
    if running.session.is_detached() {
        let pid = running.session.started().map_or(0, |started| started.pid);
        return Ok(json(
            StatusCode::ACCEPTED,
            &Detached { session_id: running.session.id().to_owned(), pid },
        ));
    }
    let share = app.budget.of(&input.caller.workspace);
    to_the_end(running, String::new(), &share, cap, &input.request_id).await
}

/// Follows a command and answers with everything it wrote, `cap` bytes of each stream, and with `keys`: more of the result's
/// object, each as JSON with a comma behind it.
pub async fn to_the_end(
    running: Running,
    keys: String,
    share: &Share,
    cap: usize,
    request_id: &str,
) -> Answer {
    let mut whole = Whole::new(running, keys, share, cap);
    if let Ok(end) = tokio::time::timeout(DRIBBLE_AFTER, whole.collect()).await {
        return whole.answer(end, request_id).await;
    }
    let (sender, arriving) = pieces(UNREAD_FOR);
    tokio::spawn(whole.dribble(sender));
    Ok(streamed(arriving, "application/json"))
}

/// Runs a command and answers with events as it writes: `stdout` and `stderr` with `{"chunk": text}`, at the end `exit`
/// with `{"exit_code": n}`, or `error` with `{"error": sentence}`.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/exec/stream", tag = "exec",
    params(("id" = String, Path, description = "sandbox id")), request_body = ExecRequest,
    responses((status = 200, content_type = "text/event-stream", body = String), (status = 404, body = Error),
        (status = 409, body = Error), (status = 413, body = Error), (status = 507, body = Error)))]
pub async fn exec_stream(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let running = start(&app, &id, &mut input).await?;
    let session = HeaderValue::from_str(running.session.id()).ok();
    let (sender, events) = pieces(STALLED_FOR);
    tokio::spawn(follow(running, sender));
    let mut response = event_stream(events);
    if let Some(session) = session {
        response.headers_mut().insert("x-pandastack-session", session);
    }
    Ok(response)
}

async fn follow(mut running: Running, to: Pieces) {
    let (mut stdout, mut stderr) = (Utf8::default(), Utf8::default());
    let end = loop {
        let event = tokio::select! {
            event = running.next() => event,
            () = tokio::time::sleep(KEEP_ALIVE_EVERY) => {
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
            Err(end) => break end,
        };
        if send_output(name, decoder, &bytes, &to).await.is_none() {
            return;
        }
    };
    for (name, text) in [("stdout", stdout.finish()), ("stderr", stderr.finish())] {
        if !text.is_empty() && to.send(output::chunk_event(name, &text)).await.is_none() {
            return;
        }
    }
    let last = match end {
        End::Exit { code, duration_ms } => output::exit_event(code, duration_ms),
        End::TimedOut { .. } => output::error_event(&running.timeout_sentence()),
        End::Lost(why) => output::error_event(why),
    };
    to.send(last).await;
}

/// Output as events, none of them of more than [`CHUNK`] bytes of it, however much a guest packs into a message.
async fn send_output(name: &str, decoder: &mut Utf8, bytes: &[u8], to: &Pieces) -> Option<()> {
    for part in bytes.chunks(CHUNK) {
        let text = decoder.push(part);
        if !text.is_empty() {
            to.send(output::chunk_event(name, &text)).await?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_large_message_becomes_small_events_and_no_character_is_torn() {
        let text = format!("x{}", "é".repeat(CHUNK));
        let (to, arriving) = pieces(UNREAD_FOR);
        let bytes = text.clone().into_bytes();
        let sent = tokio::spawn(async move {
            let mut decoder = Utf8::default();
            send_output("stdout", &mut decoder, &bytes, &to).await.unwrap();
            assert_eq!(decoder.finish(), "");
        });
        let (mut arriving, mut whole, mut events) = (arriving, String::new(), 0);
        while let Some(event) = std::future::poll_fn(|cx| arriving.poll(cx)).await {
            let event = event.unwrap();
            assert!(event.len() <= 6 * CHUNK + 64);
            let data = event.strip_prefix(b"event: stdout\ndata: ").unwrap();
            let data: serde_json::Value = serde_json::from_slice(data).unwrap();
            whole.push_str(data["chunk"].as_str().unwrap());
            events += 1;
        }
        sent.await.unwrap();
        assert!(whole == text && events == 3, "{events}");
    }
}
