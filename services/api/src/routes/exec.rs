//! Commands: the whole result at once, or as a stream of events.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, StatusCode, header};
use pandastack_protocol::{CHUNK, Exec, ExecEvent};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;
use warp::{Filter, Reply, filters::BoxedFilter, reply::Response};

use super::{Answer, Pieces, UNREAD_FOR, finish, input, pieces, streamed};
use crate::{
    app::App,
    guest::{GuestError, Session},
    input::{Input, environment, text, whole},
    output::{self, Collected, STREAM_CAP, Share, Utf8},
    problem::Problem,
    wire::Error,
};

/// Bytes of a request body: a command, its environment and its standard input.
const BODY_LIMIT: usize = 4 << 20;
/// A frame of the guest's protocol is 1 MiB; this leaves room for its other fields.
const COMMAND_LIMIT: usize = 900 << 10;
/// Linux takes at most 128 KiB in one argument.
const ARGUMENT_LIMIT: usize = 100 << 10;
const MAX_TIMEOUT: u64 = 86_400;
/// How much later than the guest the host gives up on a command with a time limit.
const GRACE: Duration = Duration::from_secs(10);
/// After so long a plain exec sends its headers, and spaces from then on: the clients wait at most 30 s for a byte.
const DRIBBLE_AFTER: Duration = Duration::from_secs(20);
const DRIBBLE_EVERY: Duration = Duration::from_secs(5);
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(10);
/// How long the reader of a stream may stand still: the command waits for it meanwhile, then both end.
const STALLED_FOR: Duration = Duration::from_secs(600);
/// Larger results are sent in pieces instead of being put together first.
const WHOLE: usize = 256 << 10;

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

/// A command for `/bin/sh -c`. Unknown fields are ignored.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct ExecRequest {
    /// The command.
    #[schema(required = true, nullable = false, min_length = 1)]
    pub cmd: Option<String>,
    /// Seconds after which everything of the command is killed; absent or 0 means never.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 86400)]
    pub timeout_seconds: Option<u64>,
    /// Absolute working directory; the user's home when absent.
    #[schema(max_length = 4096)]
    pub cwd: Option<String>,
    /// Environment variables beside the template's.
    pub env: Option<BTreeMap<String, String>>,
    /// User name or number; root when absent.
    #[schema(max_length = 64)]
    pub user: Option<String>,
    /// Standard input; empty when absent.
    pub stdin: Option<String>,
    /// Whether the command goes on when the client hangs up.
    pub detach: Option<bool>,
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

/// A started command with its limits.
struct Running {
    session: Session,
    timeout: u64,
    deadline: Option<Instant>,
}

/// How following a command ended.
enum End {
    Exit { code: i32, duration_ms: u64 },
    TimedOut { duration_ms: u64 },
    Lost,
}

impl Running {
    /// The next output, or how it ended. Cancel-safe.
    async fn next(&mut self) -> Result<ExecEvent, End> {
        let event = match self.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline, self.session.next())
                .await
                .map_err(|_| End::TimedOut { duration_ms: self.timeout * 1000 })?,
            None => self.session.next().await,
        };
        match event {
            Ok(ExecEvent::Exit(exit)) if exit.timed_out => {
                Err(End::TimedOut { duration_ms: exit.duration_ms })
            }
            Ok(ExecEvent::Exit(exit)) => Err(End::Exit { code: exit.code, duration_ms: exit.duration_ms }),
            Ok(output) => Ok(output),
            Err(error) => {
                tracing::warn!(sandbox = self.session.sandbox(), %error, session = self.session.id(), "a command was lost");
                Err(End::Lost)
            }
        }
    }

    fn timeout_sentence(&self) -> String {
        format!("command timeout after {}s", self.timeout)
    }
}

const LOST: &str = "the command's session in the guest was lost; how it ended is unknown";

async fn start(app: &Arc<App>, id: &str, input: &mut Input) -> Result<Running, Problem> {
    let wish: ExecRequest = input.json(BODY_LIMIT).await?;
    let (exec, stdin, timeout) = specify(wish)?;
    app.own(&input.caller, id).await?;
    let activity = app.touch.in_use(id);
    let session = Session::start(&app.guests, id, exec, stdin, activity).await.map_err(|error| {
        if matches!(&error, GuestError::Bus(pandastack_bus::Error::NotFound(_))) {
            app.forget(id);
            return Problem::no_sandbox(id);
        }
        error.starting(id)
    })?;
    let deadline = (timeout > 0).then(|| Instant::now() + Duration::from_secs(timeout) + GRACE);
    Ok(Running { session, timeout, deadline })
}

fn specify(wish: ExecRequest) -> Result<(Exec, Option<Bytes>, u64), Problem> {
    let cmd = wish.cmd.unwrap_or_default();
    if cmd.is_empty() {
        return Err(Problem::invalid("cmd required").with("field", "cmd"));
    }
    if cmd.contains('\0') {
        return Err(Problem::invalid("field `cmd` has a NUL character").with("field", "cmd"));
    }
    let timeout = wish.timeout_seconds.unwrap_or(0);
    if timeout > MAX_TIMEOUT {
        return Err(Problem::invalid(format!("field `timeout_seconds` is over {MAX_TIMEOUT}"))
            .with("field", "timeout_seconds"));
    }
    let cwd = wish.cwd.unwrap_or_default();
    text("cwd", &cwd, 4096)?;
    if !cwd.is_empty() && !cwd.starts_with('/') {
        return Err(Problem::invalid("field `cwd` must be absolute").with("field", "cwd"));
    }
    let user = wish.user.unwrap_or_default();
    text("user", &user, 64)?;
    let env = wish.env.unwrap_or_default();
    environment(&env)?;
    let exec = Exec {
        argv: argv(&cmd),
        cwd,
        env,
        user,
        timeout_ms: timeout * 1000,
        detach: wish.detach.unwrap_or(false),
        ..Exec::default()
    };
    let size = serde_json::to_vec(&exec).map_or(usize::MAX, |frame| frame.len());
    if size > COMMAND_LIMIT {
        return Err(Problem::too_large(format!(
            "the command and its environment are over {} KiB; write a file and run that",
            COMMAND_LIMIT >> 10
        )));
    }
    let stdin = wish.stdin.filter(|stdin| !stdin.is_empty()).map(Bytes::from);
    Ok((exec, stdin, timeout))
}

/// `/bin/sh -c`, in a form that Linux takes also for long commands: pieces as positional parameters, put together again
/// before the command's first line runs and forgotten by it.
fn argv(cmd: &str) -> Vec<String> {
    let sh = || "/bin/sh".to_owned();
    if cmd.len() <= ARGUMENT_LIMIT {
        return vec![sh(), "-c".into(), cmd.to_owned()];
    }
    let mut pieces = Vec::new();
    let mut rest = cmd;
    while !rest.is_empty() {
        let mut cut = rest.len().min(ARGUMENT_LIMIT);
        while !rest.is_char_boundary(cut) {
            cut -= 1;
        }
        let (piece, after) = rest.split_at(cut);
        pieces.push(piece.to_owned());
        rest = after;
    }
    let together: String = (1..=pieces.len()).map(|number| format!("${{{number}}}")).collect();
    let mut argv = vec![sh(), "-c".into(), format!("eval \"set --\n{together}\""), sh()];
    argv.extend(pieces);
    argv
}

/// A plain exec under way.
struct Whole {
    running: Running,
    stdout: Collected,
    stderr: Collected,
}

impl Whole {
    fn new(running: Running, share: &Share) -> Self {
        let collected = || Collected::new(share, STREAM_CAP);
        Self { running, stdout: collected(), stderr: collected() }
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
        std::iter::once(format!("{{{front}\"stdout\":\""))
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
            End::Lost => return Err(Problem::gave_up("session_lost", LOST)),
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
            End::Lost => {
                self.stderr.note(LOST);
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
    responses((status = 200, body = ExecResult), (status = 404, body = Error), (status = 409, body = Error),
        (status = 413, body = Error), (status = 504, description = "the time limit passed", body = ExecTimeout),
        (status = 507, body = Error)))]
pub async fn exec(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let running = start(&app, &id, &mut input).await?;
    let mut whole = Whole::new(running, &app.budget.of(&input.caller.workspace));
    if let Ok(end) = tokio::time::timeout(DRIBBLE_AFTER, whole.collect()).await {
        return whole.answer(end, &input.request_id).await;
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
    let (sender, events) = pieces(STALLED_FOR);
    tokio::spawn(follow(running, sender));
    let mut response = streamed(events, "text/event-stream; charset=utf-8");
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
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
        End::Lost => output::error_event(LOST),
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

    fn refused(body: &str) -> String {
        specify(crate::input::parse_json(body.as_bytes()).unwrap()).unwrap_err().message
    }

    #[test]
    fn a_bad_command_is_refused_with_a_sentence() {
        assert_eq!(refused("{}"), "cmd required");
        assert_eq!(refused(r#"{"cmd":""}"#), "cmd required");
        for body in [
            r#"{"cmd":"a\u0000b"}"#,
            r#"{"cmd":"a","timeout_seconds":86401}"#,
            r#"{"cmd":"a","cwd":"x"}"#,
            r#"{"cmd":"a","env":{"":"x"}}"#,
            r#"{"cmd":"a","env":{"a=b":"x"}}"#,
            r#"{"cmd":"a","env":{"a":"\u0000"}}"#,
            r#"{"cmd":"a","user":"\u0000"}"#,
        ] {
            assert!(refused(body).contains("field"), "{body}");
        }
        assert!(refused(&format!("{{\"cmd\":\"{}\"}}", "x".repeat(COMMAND_LIMIT))).contains("write a file"));
    }

    #[test]
    fn a_long_command_runs_as_if_it_were_short() {
        let lines = "é".repeat(60_000);
        let cmd = format!("x='{lines}'\ncat <<'E'\n$#|${{#x}}\nE\necho \"$#|$0|\" ${{#x}}; exit 3");
        let argv = argv(&cmd);
        assert!(argv.iter().all(|argument| argument.len() <= ARGUMENT_LIMIT));
        assert!(argv.len() > 5);
        let run = std::process::Command::new(&argv[0]).args(&argv[1..]).output().unwrap();
        let short = std::process::Command::new("/bin/sh")
            .args(["-c", "cat <<'E'\n$#|${#x}\nE\nx=é; echo \"$#|$0|\" 1"])
            .output()
            .unwrap();
        assert_eq!(run.status.code(), Some(3));
        let text = String::from_utf8(run.stdout).unwrap();
        let same = String::from_utf8(short.stdout).unwrap();
        assert_eq!(text.lines().next(), same.lines().next());
        assert!(text.lines().nth(1).unwrap().starts_with("0|/bin/sh|"), "{text}");
    }

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
