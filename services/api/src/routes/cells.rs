//! Cells: code that is run in a session, and what became of it.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Pieces, UNREAD_FOR,
    exec::{DRIBBLE_AFTER, DRIBBLE_EVERY, WHOLE},
    finish, input, json,
    kernels::{Question, Unanswered},
    pieces,
    repl::{CODE_BODY_LIMIT, code, limit_ms, session_of, unanswered},
    streamed,
};
use crate::{
    app::App,
    input::{Input, whole},
    output::Collected,
    problem::Problem,
    wire::Error,
};

const DEFAULT_TIMEOUT_MS: u64 = 30_000;
/// How much longer than its cell the kernels' host may take: a kernel may have to be started first, and one that does not
/// answer an interrupt be replaced afterwards.
const GRACE: Duration = Duration::from_secs(160);
const PIECE: usize = 64 << 10;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    warp::path!("v1" / "sandboxes" / String / "repl" / "sessions" / String / "run")
        .and(warp::post())
        .and(warp::any().map(move || Arc::clone(&app)))
        .and(input())
        .then(|id, session, app, input| finish(run(app, id, session, input)))
        .boxed()
}

/// A cell.
#[derive(Debug, Deserialize, ToSchema)]
pub struct RunRequest {
    /// What is run, at most 1 MiB.
    #[schema(required = true, nullable = false, min_length = 1)]
    pub code: Option<String>,
    /// Milliseconds after which the cell is interrupted; 30 000 when absent or 0. Waiting for other cells of the session counts.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 86_400_000)]
    pub timeout_ms: Option<u64>,
}

/// What became of a cell.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Execution {
    /// What it and its subprocesses wrote, at most 1 MiB.
    pub stdout: String,
    /// The same for standard error.
    pub stderr: String,
    /// 0; 1 after an exception; the code of a `SystemExit`.
    pub exit: i32,
    /// The same.
    pub exit_code: i32,
    /// Milliseconds it ran.
    pub duration_ms: u64,
    /// The value of its last expression and what it displayed, in order: representations by MIME type, all of them text
    /// (pictures as base64, JSON as JSON text).
    pub results: Vec<BTreeMap<String, String>>,
    /// Why it failed: the traceback, without colours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Something was thrown away: more than 1 MiB of a stream, 8 MiB of results, or 256 results.
    pub truncated: bool,
    /// The session got a new kernel, and what it had in memory is lost.
    pub restarted: bool,
}

/// A cell whose time was up; what it had written and shown until then is there.
#[derive(Debug, Serialize, ToSchema)]
pub struct CellTimeout {
    /// The sentence contains the word `timeout`.
    pub error: String,
    /// `cell_timeout`; or another word, when the kernel's host did not answer. Then what follows `request_id` is absent.
    pub code: String,
    /// False.
    pub retryable: bool,
    /// The request's id.
    pub request_id: String,
    /// As in a result.
    pub stdout: Option<String>,
    /// As in a result.
    pub stderr: Option<String>,
    /// 124.
    pub exit: Option<i32>,
    /// 124.
    pub exit_code: Option<i32>,
    /// Milliseconds it ran.
    pub duration_ms: Option<u64>,
    /// As in a result.
    pub results: Option<Vec<BTreeMap<String, String>>>,
    /// Where it was interrupted.
    pub traceback: Option<String>,
    /// Something was thrown away.
    pub truncated: Option<bool>,
    /// The kernel did not answer the interrupt and was replaced.
    pub restarted: Option<bool>,
}

/// What the kernels' host tells of a cell.
#[derive(Debug, Deserialize)]
pub struct Outcome {
    stdout: String,
    stderr: String,
    exit: i32,
    error: Option<String>,
    results: Vec<BTreeMap<String, String>>,
    duration_ms: u64,
    truncated: bool,
    timed_out: bool,
    restarted: bool,
    note: String,
}

impl Outcome {
    /// Why it ended where it did, if its time was up.
    fn timeout(&self, limit_ms: u64) -> Option<String> {
        self.timed_out.then(|| {
            let note: String = self.note.chars().filter(|c| !c.is_control()).take(200).collect();
            let after = if note.is_empty() { String::new() } else { format!("; {note}") };
            format!("cell timeout after {}{after}", shown(limit_ms))
        })
    }

    fn into_execution(self) -> Execution {
        Execution {
            stdout: self.stdout,
            stderr: self.stderr,
            exit: self.exit,
            exit_code: self.exit,
            duration_ms: self.duration_ms,
            results: self.results,
            error: self.error,
            truncated: self.truncated,
            restarted: self.restarted,
        }
    }

    fn into_problem(self, sentence: &str) -> Problem {
        Problem::gave_up("cell_timeout", sentence)
            .with("stdout", self.stdout)
            .with("stderr", self.stderr)
            .with("exit", 124)
            .with("exit_code", 124)
            .with("duration_ms", self.duration_ms)
            .with("results", json!(self.results))
            .with("traceback", self.error)
            .with("truncated", self.truncated)
            .with("restarted", self.restarted)
    }
}

/// A time limit as people write it.
fn shown(limit_ms: u64) -> String {
    if limit_ms.is_multiple_of(1000) { format!("{}s", limit_ms / 1000) } else { format!("{limit_ms}ms") }
}

/// Runs a cell in a session.
///
/// When its time is up the cell is interrupted, and the session can be used on. After 20 seconds the headers of a 200 are
/// sent, then a space every few seconds until the JSON object is ready; from then on a cell whose time is up is a result with
/// exit code 124 and the sentence in `error`, and one whose kernel was lost one with 137. A client that hangs up interrupts
/// its cell.
#[utoipa::path(operation_id = "run_cell", post, path = "/v1/sandboxes/{id}/repl/sessions/{session}/run", tag = "repl",
    params(("id" = String, Path, description = "sandbox id"), ("session" = String, Path, description = "session id")),
    request_body = RunRequest,
    responses((status = 200, body = Execution), (status = 404, body = Error), (status = 409, body = Error),
        (status = 413, body = Error), (status = 504, description = "the time limit passed", body = CellTimeout),
        (status = 507, body = Error)))]
pub async fn run(app: Arc<App>, id: String, session: String, mut input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let wish: RunRequest = input.json(CODE_BODY_LIMIT).await?;
    let code = code(wish.code)?;
    let limit_ms = limit_ms(wish.timeout_ms, DEFAULT_TIMEOUT_MS)?;
    let session = session_of(&session)?;
    let share = app.budget.of(&input.caller.workspace);
    let asked = json!({"do": "run", "session": session, "code": code, "timeout_ms": limit_ms});
    drop(code);
    let limit = Duration::from_millis(limit_ms) + GRACE;
    let mut question = Question::put(&app, &id, &share, &asked, limit).await?;
    drop(asked);
    if let Ok(answered) = tokio::time::timeout(DRIBBLE_AFTER, question.answered()).await {
        let (outcome, held) =
            answered.and_then(|()| question.read::<Outcome>()).map_err(|why| lost(why, limit_ms))?;
        return match outcome.timeout(limit_ms) {
            Some(sentence) => Err(outcome.into_problem(&sentence)),
            None => Ok(whole_or_pieces(&outcome.into_execution(), held)),
        };
    }
    let (sender, arriving) = pieces(UNREAD_FOR);
    tokio::spawn(dribble(question, limit_ms, sender));
    Ok(streamed(arriving, "application/json"))
}

/// Why a cell has no outcome.
fn lost(why: Unanswered, limit_ms: u64) -> Problem {
    match why {
        Unanswered::Late => {
            let sentence =
                format!("cell timeout after {}; the kernels' host does not answer", shown(limit_ms));
            Problem::gave_up("interpreter_silent", sentence)
        }
        other => unanswered(other),
    }
}

/// A small answer whole, a large one in pieces. `held` is its part of the budget.
fn whole_or_pieces(execution: &Execution, held: Collected) -> Response {
    if held.len() <= WHOLE {
        return json(StatusCode::OK, execution);
    }
    let text = Bytes::from(serde_json::to_vec(execution).unwrap_or_default());
    let (sender, arriving) = pieces(UNREAD_FOR);
    tokio::spawn(async move {
        send(text, &sender).await;
        drop(held);
    });
    streamed(arriving, "application/json")
}

async fn send(mut text: Bytes, to: &Pieces) {
    while !text.is_empty() {
        let piece = text.split_to(text.len().min(PIECE));
        if to.send(piece).await.is_none() {
            return;
        }
    }
}

/// The answer after its headers are out: whatever happens is a result.
async fn dribble(mut question: Question, limit_ms: u64, to: Pieces) {
    let mut every = tokio::time::interval(DRIBBLE_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let answered = loop {
        tokio::select! {
            answered = question.answered() => break answered,
            _ = every.tick() => if to.send(" ").await.is_none() { return },
            () = to.closed() => return,
        }
    };
    let (execution, _held) = match answered.and_then(|()| question.read::<Outcome>()) {
        Ok((mut outcome, held)) => {
            if let Some(sentence) = outcome.timeout(limit_ms) {
                let traceback = outcome.error.take().filter(|_| !outcome.restarted);
                outcome.error =
                    Some([Some(sentence), traceback].into_iter().flatten().collect::<Vec<_>>().join("\n"));
                outcome.exit = 124;
            }
            (outcome.into_execution(), Some(held))
        }
        Err(why) => {
            let error = Some(lost(why, limit_ms).message);
            (Execution { exit: 137, exit_code: 137, error, ..Execution::default() }, None)
        }
    };
    send(serde_json::to_vec(&execution).unwrap_or_default().into(), &to).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(more: &str) -> Outcome {
        serde_json::from_str(&format!(
            "{{\"stdout\":\"o\",\"stderr\":\"e\",\"exit\":0,\"error\":null,\"results\":[{{\"text/plain\":\"1\"}}],\
             \"duration_ms\":5,\"truncated\":false,\"restarted\":false{more}}}"
        ))
        .unwrap()
    }

    #[test]
    fn a_timeout_says_so_in_the_clients_word() {
        let late = outcome(",\"timed_out\":true,\"note\":\"the kernel\\nwas replaced\"");
        let sentence = late.timeout(1500).unwrap();
        assert_eq!(sentence, "cell timeout after 1500ms; the kernelwas replaced");
        let problem = late.into_problem(&sentence);
        assert_eq!((problem.status.as_u16(), problem.retry_after), (504, None));
        let body = problem.body("x");
        assert_eq!(
            (&body["stdout"], &body["exit"], &body["results"][0]["text/plain"]),
            (&json!("o"), &json!(124), &json!("1"))
        );
        assert_eq!(outcome(",\"timed_out\":false,\"note\":\"\"").timeout(30_000), None);
        assert!(lost(Unanswered::Late, 30_000).message.contains("cell timeout after 30s"));
    }

    #[test]
    fn values_of_a_result_are_strings_or_it_is_not_taken() {
        let text = "{\"stdout\":\"\",\"stderr\":\"\",\"exit\":0,\"error\":null,\"results\":[{\"application/json\":{}}],\
                    \"duration_ms\":5,\"truncated\":false,\"restarted\":false,\"timed_out\":false,\"note\":\"\"}";
        assert!(serde_json::from_str::<Outcome>(text).is_err());
        let execution = json!(outcome(",\"timed_out\":false,\"note\":\"\"").into_execution());
        assert_eq!(
            (&execution["exit"], &execution["exit_code"], execution.get("error")),
            (&json!(0), &json!(0), None)
        );
    }
}
