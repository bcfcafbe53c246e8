//! A command: what it shall be, its start, and following it to its end within its time.
//!
//! Refuses to know: what becomes of its output.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use pandastack_protocol::{Exec, ExecEvent};
use serde::Deserialize;
use tokio::time::Instant;
use utoipa::ToSchema;

use crate::{
    app::App,
    auth::Caller,
    guest::{GuestError, Session, Stdin},
    input::{Input, environment, text, whole},
    problem::Problem,
};

/// Bytes of a request body: a command, its environment and its standard input.
pub const BODY_LIMIT: usize = 4 << 20;
/// A frame of the guest's protocol is 1 MiB; this leaves room for its other fields.
const COMMAND_LIMIT: usize = 900 << 10;
/// Linux takes at most 128 KiB in one argument.
const ARGUMENT_LIMIT: usize = 100 << 10;
const MAX_TIMEOUT: u64 = 86_400;
/// How much later than the guest the host gives up on a command with a time limit.
const GRACE: Duration = Duration::from_secs(10);

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
    /// Standard input; empty when absent. Not together with `detach`.
    pub stdin: Option<String>,
    /// Whether the command goes on without a client: `exec` then answers 202 as soon as it was started, `exec/stream` leaves it
    /// running when the client hangs up.
    pub detach: Option<bool>,
}

/// A started command with its limits.
pub struct Running {
    /// Where it runs.
    pub session: Session,
    timeout: u64,
    deadline: Option<Instant>,
}

/// How following a command ended.
pub enum End {
    /// By itself.
    Exit {
        /// Its exit code.
        code: i32,
        /// Milliseconds it ran.
        duration_ms: u64,
    },
    /// Its time was up.
    TimedOut {
        /// Milliseconds it ran.
        duration_ms: u64,
    },
    /// How is unknown, or somebody else's to know; the sentence says it.
    Lost(&'static str),
}

impl Running {
    /// Follows a session; `timeout` seconds of its guest's time are its limit, 0 means none.
    pub fn new(session: Session, timeout: u64) -> Self {
        let mut running = Self { session, timeout, deadline: None };
        running.deadline = running.full_time();
        running
    }

    fn full_time(&self) -> Option<Instant> {
        // What it stood still so far does not count from here on.
        let whole = Duration::from_secs(self.timeout) + GRACE;
        (self.timeout > 0).then(|| (Instant::now() + whole).checked_sub(self.session.stood_still())).flatten()
    }

    /// The next event, or `None` when the command's time is up.
    async fn event(&mut self) -> Option<Result<ExecEvent, GuestError>> {
        loop {
            let Some(deadline) = self.deadline else { return Some(self.session.next().await) };
            let by = deadline + self.session.stood_still();
            if let Ok(event) = tokio::time::timeout_at(by, self.session.next()).await {
                return Some(event);
            }
            if self.session.stands_still().await {
                // Since when is not certain. In the guest its time is counted exactly.
                self.deadline = self.full_time();
            } else if deadline + self.session.stood_still() <= Instant::now() {
                return None;
            }
        }
    }

    /// The next output, or how it ended. Cancel-safe.
    pub async fn next(&mut self) -> Result<ExecEvent, End> {
        let Some(event) = self.event().await else {
            return Err(End::TimedOut { duration_ms: self.timeout * 1000 });
        };
        match event {
            Ok(ExecEvent::Exit(exit)) if exit.timed_out => {
                Err(End::TimedOut { duration_ms: exit.duration_ms })
            }
            Ok(ExecEvent::Exit(exit)) => Err(End::Exit { code: exit.code, duration_ms: exit.duration_ms }),
            Ok(output) => Ok(output),
            Err(GuestError::TakenOver) => Err(End::Lost(TAKEN_OVER)),
            Err(error) => {
                tracing::warn!(sandbox = self.session.sandbox(), %error, session = self.session.id(), "a command was lost");
                Err(End::Lost(LOST))
            }
        }
    }

    /// The sentence of a 504.
    pub fn timeout_sentence(&self) -> String {
        format!("command timeout after {}s", self.timeout)
    }
}

const LOST: &str = "the command's session in the guest was lost; how it ended is unknown";
const TAKEN_OVER: &str = "another request follows this command now";

/// Reads the request and starts its command.
pub async fn start(app: &Arc<App>, id: &str, input: &mut Input) -> Result<Running, Problem> {
    let wish: ExecRequest = input.json(BODY_LIMIT).await?;
    run(app, &input.caller, id, wish).await
}

/// Starts a command for a caller.
pub async fn run(app: &Arc<App>, caller: &Caller, id: &str, wish: ExecRequest) -> Result<Running, Problem> {
    let (exec, stdin, timeout) = specify(wish)?;
    app.own(caller, id).await?;
    let activity = app.touch.in_use(id);
    let session = Session::start(&app.guests, id, exec, stdin, activity)
        .await
        .map_err(|error| refuse(app, id, error))?;
    Ok(Running::new(session, timeout))
}

/// A guest's error as a problem; a sandbox that is gone is forgotten on the way.
pub fn refuse(app: &App, id: &str, error: GuestError) -> Problem {
    if matches!(&error, GuestError::Bus(pandastack_bus::Error::NotFound(_))) {
        app.forget(id);
        return Problem::no_sandbox(id);
    }
    error.starting(id)
}

fn specify(wish: ExecRequest) -> Result<(Exec, Option<Stdin>, u64), Problem> {
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
    let stdin = wish.stdin.filter(|stdin| !stdin.is_empty()).map(|stdin| Stdin::whole(Bytes::from(stdin)));
    if exec.detach && stdin.is_some() {
        // Nobody would be there to send it again when a connection is lost.
        return Err(Problem::invalid(
            "field `stdin` does not go with `detach`; write a file and redirect it",
        )
        .with("field", "stdin"));
    }
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
}
