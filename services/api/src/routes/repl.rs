//! Code interpreter sessions: opened, listed, closed; and code that is run once, without a session.
//!
//! A session is a Jupyter kernel in the guest. It belongs to its sandbox and goes where that goes: into snapshots and forks,
//! asleep and awake. Nothing of it is kept here.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use pandastack_protocol::Exec;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer,
    command::{Running, refuse},
    exec::to_the_end,
    finish, input, json,
    kernels::{Unanswered, ask, start},
    no_content,
};
use crate::{
    app::App,
    guest::{Session, Stdin},
    input::{Input, JSON_LIMIT, segment, whole},
    output::STREAM_CAP,
    problem::{Problem, untimed},
    wire::{Error, rfc3339},
};

/// Bytes of code.
pub const CODE_LIMIT: usize = 1 << 20;
/// Bytes of a body with code in it: quotation marks and line ends take two.
pub const CODE_BODY_LIMIT: usize = 4 << 20;
/// The longest time limit: a day.
pub const MAX_TIMEOUT_MS: u64 = 86_400_000;
/// The clients wait 30 s for an answer, and a new session's cannot be delayed as a cell's can.
const OPENING: Duration = Duration::from_secs(27);
/// How long the kernels' host may take for what it does in passing.
const PASSING: Duration = Duration::from_secs(20);

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let all = warp::path!("v1" / "sandboxes" / String / "repl" / "sessions");
    let one = warp::path!("v1" / "sandboxes" / String / "repl" / "sessions" / String);
    let languages =
        warp::path!("v1" / "repl" / "languages").and(warp::get()).and(input()).then(|i| finish(languages(i)));
    let once = warp::path!("v1" / "sandboxes" / String / "repl")
        .and(warp::post())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(once(a, id, i)));
    let open = all.and(warp::post()).and(with(app)).and(input()).then(|id, a, i| finish(open(a, id, i)));
    let list = all.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(list(a, id, i)));
    let close =
        one.and(warp::delete()).and(with(app)).and(input()).then(|id, s, a, i| finish(close(a, id, s, i)));
    open.or(once).unify().or(list).unify().or(close).unify().or(languages).unify().boxed()
}

/// A session.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReplSession {
    /// Names it: 16 hexadecimal digits.
    pub id: String,
    /// The same.
    pub session_id: String,
    /// The sandbox it is in.
    pub sandbox_id: String,
    /// What it understands.
    pub language: String,
    /// RFC 3339, the guest's clock.
    pub created_at: String,
    /// Cells that were run.
    pub cells: u64,
}

/// The same as the kernels' host tells it.
#[derive(Debug, Deserialize)]
struct Told {
    session: String,
    language: String,
    created: f64,
    cells: u64,
}

impl Told {
    /// `None` when it is not one of ours: what a guest says is checked.
    fn of(self, sandbox: &str) -> Option<ReplSession> {
        let plain = |text: &str| (1..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        (is_session(&self.session) && plain(&self.language)).then(|| ReplSession {
            id: self.session.clone(),
            session_id: self.session,
            sandbox_id: sandbox.to_owned(),
            language: self.language,
            // A number that is none, or out of range, is cut to it.
            created_at: rfc3339((self.created * 1000.0) as u64),
            cells: self.cells,
        })
    }
}

fn is_session(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The session that a path names.
pub fn session_of(raw: &str) -> Result<String, Problem> {
    let name = segment(raw);
    if is_session(&name) { Ok(name) } else { Err(no_session()) }
}

/// 404.
pub fn no_session() -> Problem {
    Problem::not_found("session not found")
}

/// Why a question that is not a cell was not answered.
pub fn unanswered(why: Unanswered) -> Problem {
    match why {
        Unanswered::Absent => no_session(),
        Unanswered::Refused(word, sentence) => match word.as_str() {
            "no_session" => no_session(),
            "unknown_language" => {
                Problem::new(StatusCode::BAD_REQUEST, "unknown_language", untimed(&sentence))
            }
            // Without Retry-After: it helps to close one, not to ask again.
            "limit" => Problem::new(StatusCode::TOO_MANY_REQUESTS, "limit", untimed(&sentence)),
            "failed" => Problem::unavailable("interpreter_failed", untimed(&sentence)),
            _ => Problem::invalid(untimed(&sentence)),
        },
        Unanswered::Late => Problem::gave_up("interpreter_silent", "the code interpreter does not answer"),
        Unanswered::Lost(why) => Problem::gave_up("interpreter_lost", why),
    }
}

/// A session that is wished for.
#[derive(Debug, Deserialize, ToSchema)]
pub struct OpenRequest {
    /// `python` when absent; what there are kernels for is the template's matter: in `code-interpreter` `python`, `javascript`
    /// and `bash`, and what these are also called (`py`, `python3`, `js`, `node`, `sh`).
    #[schema(max_length = 64)]
    pub language: Option<String>,
}

/// Opens a session: a kernel of its own, which keeps its variables, imports and working directory from cell to cell.
#[utoipa::path(operation_id = "open_session", post, path = "/v1/sandboxes/{id}/repl/sessions", tag = "repl",
    params(("id" = String, Path, description = "sandbox id")), request_body = OpenRequest,
    responses((status = 201, body = ReplSession), (status = 400, description = "among others: no kernel for that language", body = Error),
        (status = 404, body = Error), (status = 409, body = Error),
        (status = 429, description = "eight sessions are open", body = Error), (status = 507, body = Error)))]
pub async fn open(app: Arc<App>, id: String, mut input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let wish: OpenRequest = input.json(JSON_LIMIT).await?;
    let language = wish.language.filter(|language| !language.is_empty()).unwrap_or_else(|| "python".into());
    crate::input::text("language", &language, 64)?;
    let share = app.budget.of(&input.caller.workspace);
    let question = json!({"do": "open", "language": language.to_ascii_lowercase()});
    let opening = async {
        let first = ask::<Told>(&app, &id, &share, &question, OPENING).await?;
        let Err(Unanswered::Absent) = first else { return Ok(first) };
        if !start(&app, &id).await? {
            return Err(Problem::new(
                StatusCode::BAD_REQUEST,
                "unknown_language",
                format!(
                    "the template of this sandbox has no kernel for {language:?}, or for any other language"
                ),
            ));
        }
        ask::<Told>(&app, &id, &share, &question, OPENING).await
    };
    // Nobody gets a session whose opening is taken back.
    let Ok(opened) = tokio::time::timeout(OPENING, opening).await else {
        return Err(Problem::unavailable("interpreter_starting", "the code interpreter is still starting"));
    };
    match opened? {
        Ok(told) => match told.of(&id) {
            Some(session) => Ok(json(StatusCode::CREATED, &session)),
            None => Err(unanswered(Unanswered::Lost("the kernels' host does not speak our language"))),
        },
        Err(Unanswered::Absent) => {
            Err(Problem::unavailable("interpreter_failed", "the code interpreter ended while it was asked"))
        }
        Err(why) => Err(unanswered(why)),
    }
}

/// The open sessions of a sandbox, oldest first.
#[utoipa::path(operation_id = "list_sessions", get, path = "/v1/sandboxes/{id}/repl/sessions", tag = "repl",
    params(("id" = String, Path, description = "sandbox id")),
    responses((status = 200, body = Vec<ReplSession>), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn list(app: Arc<App>, id: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let share = app.budget.of(&input.caller.workspace);
    let found = match ask::<Vec<Told>>(&app, &id, &share, &json!({"do": "list"}), PASSING).await? {
        Ok(found) => found,
        Err(Unanswered::Absent) => Vec::new(),
        Err(why) => return Err(unanswered(why)),
    };
    let found: Vec<ReplSession> = found.into_iter().filter_map(|told| told.of(&id)).take(64).collect();
    Ok(json(StatusCode::OK, &found))
}

/// Closes a session and ends its kernel, in the middle of a cell, too.
#[utoipa::path(operation_id = "close_session", delete, path = "/v1/sandboxes/{id}/repl/sessions/{session}", tag = "repl",
    params(("id" = String, Path, description = "sandbox id"), ("session" = String, Path, description = "session id")),
    responses((status = 204), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn close(app: Arc<App>, id: String, session: String, input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let session = session_of(&session)?;
    let share = app.budget.of(&input.caller.workspace);
    let question = json!({"do": "close", "session": session});
    ask::<bool>(&app, &id, &share, &question, PASSING).await?.map_err(unanswered)?;
    Ok(no_content())
}

/// Languages of code that is run once, with the command that reads the program from its standard input.
const INTERPRETERS: [(&str, &[&str]); 5] = [
    ("python", &["python3", "-"]),
    ("javascript", &["node", "-"]),
    ("bash", &["/bin/sh", "-c", FROM_FILE, "sh", "bash"]),
    ("sh", &["/bin/sh", "-c", FROM_FILE, "sh", "sh"]),
    ("ruby", &["ruby", "-"]),
];
/// A shell reads its program as it goes, and so would the program's own commands: it gets it from a file instead.
const FROM_FILE: &str = "f=$(mktemp \"${TMPDIR:-/tmp}/repl.XXXXXXXX\") && cat >\"$f\" || exit 1\n\
                         \"$1\" \"$f\" </dev/null; c=$?; rm -f \"$f\"; exit $c";

/// The language that a name means, with its command.
fn interpreter(name: &str) -> Option<(&'static str, &'static [&'static str])> {
    let name = match name.to_ascii_lowercase().as_str() {
        "" | "py" | "python3" => "python".to_owned(),
        "js" | "node" => "javascript".to_owned(),
        other => other.to_owned(),
    };
    INTERPRETERS.into_iter().find(|(language, _)| *language == name)
}

/// The languages that code may be in.
#[utoipa::path(get, path = "/v1/repl/languages", tag = "repl", responses((status = 200, body = Vec<String>)))]
pub async fn languages(_input: Input) -> Answer {
    Ok(json(StatusCode::OK, &INTERPRETERS.map(|(language, _)| language)))
}

/// Code that is run once.
#[derive(Debug, Deserialize, ToSchema)]
pub struct OnceRequest {
    /// `python` when absent; `py`, `python3`, `node`, `js`, `javascript`, `bash`, `sh`, `ruby`.
    #[schema(max_length = 64)]
    pub language: Option<String>,
    /// The program, at most 1 MiB.
    #[schema(required = true, nullable = false, min_length = 1)]
    pub code: Option<String>,
    /// Milliseconds after which everything of it is killed, counted in whole seconds; absent or 0 means never.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 86_400_000)]
    pub timeout_ms: Option<u64>,
}

/// How it ended.
#[derive(Debug, Serialize, ToSchema)]
pub struct OnceResult {
    /// What the language was taken for.
    pub language: String,
    /// What it wrote, UTF-8; anything else is replaced.
    pub stdout: String,
    /// The same for standard error.
    pub stderr: String,
    /// Its exit code; 127 when the template has no interpreter for the language.
    pub exit_code: i32,
    /// Milliseconds it ran.
    pub duration_ms: u64,
    /// More than 16 MiB were written to one of the two; the rest was thrown away.
    pub truncated: bool,
}

/// Runs code with an interpreter of its own that ends with it. After 20 seconds it is answered as `exec` is.
#[utoipa::path(operation_id = "run_once", post, path = "/v1/sandboxes/{id}/repl", tag = "repl",
    params(("id" = String, Path, description = "sandbox id")), request_body = OnceRequest,
    responses((status = 200, body = OnceResult), (status = 404, body = Error), (status = 409, body = Error),
        (status = 413, body = Error), (status = 504, description = "the time limit passed", body = Error),
        (status = 507, body = Error)))]
pub async fn once(app: Arc<App>, id: String, mut input: Input) -> Answer {
    app.own(&input.caller, &id).await?;
    let wish: OnceRequest = input.json(CODE_BODY_LIMIT).await?;
    let name = wish.language.unwrap_or_default();
    let Some((language, command)) = interpreter(&name) else {
        let known = INTERPRETERS.map(|(language, _)| language).join(", ");
        let shown: String = name.chars().take(64).collect();
        return Err(Problem::invalid(format!("field `language`: {shown:?} is none of {known}"))
            .with("field", "language"));
    };
    let code = code(wish.code)?;
    let seconds = limit_ms(wish.timeout_ms, 0)?.div_ceil(1000);
    let argv = command.iter().map(|&word| word.to_owned()).collect();
    let exec = Exec { argv, timeout_ms: seconds * 1000, ..Exec::default() };
    let activity = app.touch.in_use(&id);
    let session = Session::start(&app.guests, &id, exec, Some(Stdin::whole(Bytes::from(code))), activity)
        .await
        .map_err(|error| refuse(&app, &id, error))?;
    let share = app.budget.of(&input.caller.workspace);
    let keys = format!("\"language\":\"{language}\",");
    to_the_end(Running::new(session, seconds), keys, &share, STREAM_CAP, &input.request_id).await
}

/// The code of a request.
pub fn code(given: Option<String>) -> Result<String, Problem> {
    let code = given.unwrap_or_default();
    if code.is_empty() {
        return Err(Problem::invalid("code required").with("field", "code"));
    }
    if code.len() > CODE_LIMIT {
        return Err(Problem::too_large(format!(
            "field `code` is over {} KiB; write a file and run that",
            CODE_LIMIT >> 10
        )));
    }
    Ok(code)
}

/// A time limit in milliseconds; absent and 0 mean `otherwise`.
pub fn limit_ms(given: Option<u64>, otherwise: u64) -> Result<u64, Problem> {
    let limit = given.filter(|limit| *limit > 0).unwrap_or(otherwise);
    if limit > MAX_TIMEOUT_MS {
        return Err(Problem::invalid(format!("field `timeout_ms` is over {MAX_TIMEOUT_MS}"))
            .with("field", "timeout_ms"));
    }
    Ok(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn languages_have_the_names_that_clients_use() {
        for (name, language) in [
            ("", "python"),
            ("py", "python"),
            ("Python3", "python"),
            ("node", "javascript"),
            ("js", "javascript"),
            ("bash", "bash"),
            ("sh", "sh"),
            ("ruby", "ruby"),
        ] {
            assert_eq!(interpreter(name).unwrap().0, language, "{name}");
        }
        assert!(interpreter("cobol").is_none() && interpreter("python ").is_none());
    }

    #[test]
    fn what_a_guest_tells_of_its_sessions_is_checked() {
        let told = |session: &str, language: &str, created: f64| {
            Told { session: session.into(), language: language.into(), created, cells: 3 }.of("box")
        };
        let good = told("0123456789abcdef", "python", 1.25).unwrap();
        assert_eq!(
            (good.created_at.as_str(), &*good.sandbox_id, good.cells),
            ("1970-01-01T00:00:01.25Z", "box", 3)
        );
        assert_eq!(told("0123456789abcdef", "x", f64::NAN).unwrap().created_at, "1970-01-01T00:00:00Z");
        assert_eq!(told("0123456789abcdef", "x", f64::INFINITY).unwrap().created_at, "1970-01-01T00:00:00Z");
        for bad in ["", "0123456789abcde", "0123456789abcdeF", "../../etc/passwd"] {
            assert!(told(bad, "python", 0.0).is_none() && session_of(bad).is_err(), "{bad}");
        }
        assert!(told("0123456789abcdef", "py\nthon", 0.0).is_none());
    }

    #[test]
    fn a_word_of_the_host_has_its_status() {
        let status = |word: &str| unanswered(Unanswered::Refused(word.into(), "a timeout".into()));
        for (word, code) in
            [("no_session", 404), ("unknown_language", 400), ("limit", 429), ("failed", 503), ("what", 400)]
        {
            let problem = status(word);
            assert_eq!(problem.status.as_u16(), code);
            // Only a cell's own time limit has that word in its sentence.
            assert!(!problem.message.contains("timeout"), "{word}");
        }
        assert_eq!(status("limit").retry_after, None);
    }
}
