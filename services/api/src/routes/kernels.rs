//! Questions to the kernels' host in a guest: a line of JSON there, a line of JSON back.
//!
//! ```text
//!   api ── exec session ──► connector ── Unix socket ──► kernels' host ──► kernels
//! ```
//!
//! The question is a command in the guest like any other, so it outlives lost connections, is put once, and is taken back
//! when it is dropped. Owns: that command, the start of the host where it does not run, limits on the answer.
//! Refuses to know: what is asked.

use std::{sync::Arc, time::Duration};

use pandastack_protocol::{Exec, ExecEvent};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::command::{End, Running, refuse};
use crate::{
    app::App,
    guest::{Session, Stdin},
    output::{Collected, Share},
    problem::Problem,
};

/// Bytes of an answer: two streams of 1 MiB, each byte escaped, and 8 MiB of results.
const ANSWER_CAP: usize = 24 << 20;
/// The connector found nobody. Its other codes say that something broke.
const ABSENT: i32 = 69;
/// How long the host may take to come up, with its imports read from a cold disk.
const START: Duration = Duration::from_secs(120);

/// How the guest is asked, as command lines.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// Passes standard input to the host and answers with what comes back; ends with 69 when there is no host.
    pub connector: Vec<String>,
    /// Starts the host and ends when it takes questions; ends with 69 when the guest has none.
    pub starter: Vec<String>,
}

impl Default for Kernels {
    fn default() -> Self {
        // The agent's own binary is in no file system of the guest; the process that becomes it still is the agent.
        let connector = ["/proc/self/exe", "connect", "/run/pandastack/kernels/socket"];
        let start = "test -f /usr/lib/pandastack/kernels/__main__.py || exit 69\n\
                     exec python3 /usr/lib/pandastack/kernels start";
        Self {
            connector: connector.map(str::to_owned).to_vec(),
            starter: ["/bin/sh", "-c", start].map(str::to_owned).to_vec(),
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Unanswered {
    /// No host runs. Nothing was asked.
    Absent,
    /// The host said no, with a word and a sentence. Nothing was done.
    Refused(String, String),
    /// It did not answer in time.
    Late,
    /// What became of the question is unknown; the sentence says it.
    Lost(&'static str),
}

/// A question that was put. Dropping it takes it back.
pub struct Question {
    running: Running,
    answer: Collected,
}

#[derive(Deserialize)]
struct Said<T> {
    ok: Option<T>,
    #[serde(default)]
    error: String,
    #[serde(default)]
    message: String,
}

impl Question {
    /// Asks a sandbox of the caller's, which is woken for it.
    pub async fn put(
        app: &Arc<App>,
        id: &str,
        share: &Share,
        question: &impl Serialize,
        limit: Duration,
    ) -> Result<Self, Problem> {
        let mut line = serde_json::to_vec(question).map_err(|_| Problem::internal())?;
        line.push(b'\n');
        let running = run(app, id, &app.kernels.connector, Some(Stdin::whole(line.into())), limit).await?;
        Ok(Self { running, answer: Collected::new(share, ANSWER_CAP) })
    }

    /// Waits for the answer. Cancel-safe.
    pub async fn answered(&mut self) -> Result<(), Unanswered> {
        loop {
            match self.running.next().await {
                Ok(ExecEvent::Stdout(bytes)) => self.answer.push(&bytes),
                Ok(_) => {}
                Err(End::Exit { code: 0, .. }) => return Ok(()),
                Err(End::Exit { code: ABSENT, .. }) if self.answer.is_empty() => {
                    return Err(Unanswered::Absent);
                }
                Err(End::Exit { .. }) => return Err(Unanswered::Lost(BROKEN)),
                Err(End::TimedOut { .. }) => return Err(Unanswered::Late),
                Err(End::Lost(why)) => return Err(Unanswered::Lost(why)),
            }
        }
    }

    /// What was answered, and the part of the budget that it takes.
    pub fn read<T: DeserializeOwned>(self) -> Result<(T, Collected), Unanswered> {
        if self.answer.truncated {
            return Err(Unanswered::Lost(TOO_LARGE));
        }
        understand(self.answer.bytes()).map(|value| (value, self.answer))
    }
}

/// What a line of the kernels' host says. It was written by a guest.
pub fn understand<T: DeserializeOwned>(line: &[u8]) -> Result<T, Unanswered> {
    let said: Said<T> = serde_json::from_slice(line).map_err(|_| Unanswered::Lost(BROKEN))?;
    match said.ok {
        Some(value) => Ok(value),
        None if said.error.is_empty() => Err(Unanswered::Lost(BROKEN)),
        None => Err(Unanswered::Refused(said.error, said.message)),
    }
}

const BROKEN: &str = "the kernels' host in the sandbox ended, or does not speak our language";
const TOO_LARGE: &str = "there is no memory for so large an answer";

/// Asks and reads the answer.
pub async fn ask<T: DeserializeOwned>(
    app: &Arc<App>,
    id: &str,
    share: &Share,
    question: &impl Serialize,
    limit: Duration,
) -> Result<Result<T, Unanswered>, Problem> {
    let mut question = Question::put(app, id, share, question, limit).await?;
    let answered = question.answered().await;
    Ok(answered.and_then(|()| question.read()).map(|(value, _)| value))
}

/// Starts the kernels' host of a sandbox; `false` when its template has none.
pub async fn start(app: &Arc<App>, id: &str) -> Result<bool, Problem> {
    let mut running = run(app, id, &app.kernels.starter, None, START).await?;
    loop {
        match running.next().await {
            Ok(_) => {}
            Err(End::Exit { code: 0, .. }) => return Ok(true),
            Err(End::Exit { code: ABSENT, .. }) => return Ok(false),
            Err(End::Exit { code, .. }) => {
                tracing::info!(sandbox = id, code, "the kernels' host did not start");
                return Err(failed());
            }
            Err(End::TimedOut { .. } | End::Lost(_)) => return Err(failed()),
        }
    }
}

fn failed() -> Problem {
    Problem::unavailable("interpreter_failed", "the code interpreter of this sandbox does not start")
}

async fn run(
    app: &Arc<App>,
    id: &str,
    argv: &[String],
    stdin: Option<Stdin>,
    limit: Duration,
) -> Result<Running, Problem> {
    let timeout_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    let exec = Exec { argv: argv.to_vec(), timeout_ms, ..Exec::default() };
    let activity = app.touch.in_use(id);
    let session = Session::start(&app.guests, id, exec, stdin, activity)
        .await
        .map_err(|error| refuse(app, id, error))?;
    Ok(Running::new(session, limit.as_secs()))
}
