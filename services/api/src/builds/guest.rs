//! The machine of a build: files into it, its program, its result.
//!
//! Owns: those conversations and their bounds. Everything that comes from there is hostile: it ran what a tenant wrote.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pandastack_protocol::{ClientError, Exec, ExecEvent};
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{
    log::{Lines, Writer},
    store::Builds,
};
use crate::{
    app::App,
    guest::{GuestError, PART, Session},
};

/// How long the guest may take to bring a file onto its disk.
const FLUSH: Duration = Duration::from_secs(300);
/// How much later than the guest the host gives up on a command.
const GRACE: Duration = Duration::from_secs(60);
/// Bytes of a result.
const RESULT: usize = 64 << 10;
/// Variables of a template, and bytes of all of them.
const VARIABLES: usize = 256;
const ENVIRONMENT: usize = 32 << 10;

/// What stopped a build, as its owner is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// A sentence.
    Why(String),
    /// Its owner did.
    Cancelled,
}

impl Fault {
    /// A sentence of ours.
    pub fn why(text: impl Into<String>) -> Self {
        Self::Why(text.into())
    }
}

impl From<GuestError> for Fault {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Refused(failure) => {
                Self::why(format!("the build machine refused: {}", failure.message))
            }
            other => {
                tracing::warn!(error = %other, "the machine of a build is out of reach");
                Self::why("the build machine does not answer")
            }
        }
    }
}

impl From<ClientError> for Fault {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Guest(failure) => GuestError::Refused(failure).into(),
            other => GuestError::Lost(other.to_string()).into(),
        }
    }
}

/// What the program says of the root disk that it made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Found {
    /// Environment of every exec.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where an exec starts; `/` when empty.
    #[serde(default)]
    pub workdir: String,
    /// Bytes of its files.
    #[serde(default)]
    pub bytes: u64,
}

/// How a program ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// Its time was up.
    pub timed_out: bool,
    /// The last line that it wrote. Of what it writes to stdout and to stderr at about the same time, either may be last: they are
    /// two pipes. Who wants one order makes them one (`2>&1`).
    pub last: String,
}

/// A machine.
#[derive(Debug)]
pub struct Machine<'a> {
    /// What it is reached by.
    pub app: &'a Arc<App>,
    /// The sandbox that it is.
    pub sandbox: &'a str,
}

impl Machine<'_> {
    /// Writes a file; parents are made.
    ///
    /// # Errors
    /// The machine refuses or does not answer, or what is read ends early.
    pub async fn put(&self, path: &str, size: u64, mut from: impl AsyncRead + Unpin) -> Result<(), Fault> {
        let _activity = self.app.touch.in_use(self.sandbox);
        let (mut greeted, ()) = self.app.guests.write_file(self.sandbox, path, size, 0o644).await?;
        let (mut buffer, mut left) = (vec![0; 256 << 10], size);
        while left > 0 {
            let read = from.read(&mut buffer).await;
            let read = read.map_err(|error| lost_upload(&error.to_string()))?;
            if read == 0 {
                return Err(lost_upload("it is shorter than it was"));
            }
            left = left.saturating_sub(read as u64);
            greeted.client.write_chunk(&buffer[..read], PART).await?;
        }
        greeted.client.write_end(FLUSH).await?;
        self.app.guests.put(self.sandbox, greeted.client, greeted.pulse);
        Ok(())
    }

    /// Runs a program to its end; what it writes goes into a log if there is one.
    ///
    /// # Errors
    /// It could not be started, or how it ended is not known.
    pub async fn run(
        &self,
        argv: &[&str],
        limit: Duration,
        mut log: Option<(&Builds, &mut Writer)>,
    ) -> Result<Ended, Fault> {
        let activity = self.app.touch.in_use(self.sandbox);
        let exec = Exec {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            timeout_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            detach: true,
            ..Exec::default()
        };
        let mut session = Session::start(&self.app.guests, self.sandbox, exec, None, activity).await?;
        let (mut stdout, mut stderr, mut last) = (Lines::default(), Lines::default(), String::new());
        let follow = async {
            loop {
                let (lines, exit) = match session.next().await? {
                    ExecEvent::Stdout(bytes) => (stdout.push(&bytes), None),
                    ExecEvent::Stderr(bytes) => (stderr.push(&bytes), None),
                    ExecEvent::Exit(exit) => ([stdout.finish(), stderr.finish()].concat(), Some(exit)),
                };
                if let Some(line) = lines.iter().rev().find(|line| !line.trim().is_empty()) {
                    last.clone_from(line);
                }
                if let Some((builds, log)) = &mut log {
                    log.add(&lines).await.map_err(|error| unlogged(&error))?;
                    builds.grew();
                }
                if let Some(exit) = exit {
                    return Ok((exit.code, exit.timed_out));
                }
            }
        };
        let ended: Result<(i32, bool), Fault> = match tokio::time::timeout(limit + GRACE, follow).await {
            Ok(ended) => ended,
            Err(_) => Ok((124, true)),
        };
        let (code, timed_out) = ended?;
        Ok(Ended { code, timed_out, last: last.trim().chars().take(400).collect() })
    }

    /// Reads the result of the program.
    ///
    /// # Errors
    /// There is none, or it is none.
    pub async fn result(&self, path: &str) -> Result<Found, Fault> {
        let (mut greeted, _) = self.app.guests.read_file(self.sandbox, path).await?;
        let mut bytes = Vec::new();
        while let Some(part) = greeted.client.read_chunk(PART).await? {
            bytes.extend_from_slice(&part);
            if bytes.len() > RESULT {
                return Err(Fault::why("the result of the build is too long"));
            }
        }
        self.app.guests.put(self.sandbox, greeted.client, greeted.pulse);
        understand(&bytes).map_err(Fault::why)
    }
}

/// Reads what the program found.
///
/// # Errors
/// One sentence on what is wrong.
fn understand(bytes: &[u8]) -> Result<Found, String> {
    let mut found: Found =
        serde_json::from_slice(bytes).map_err(|_| "the result of the build cannot be read".to_owned())?;
    if found.workdir.is_empty() {
        found.workdir = "/".into();
    }
    if !found.workdir.starts_with('/') || found.workdir.contains('\0') || found.workdir.len() > 4096 {
        return Err("the working directory of the image is not an absolute path".into());
    }
    let size: usize = found.env.iter().map(|(name, value)| name.len() + value.len()).sum();
    if found.env.len() > VARIABLES || size > ENVIRONMENT {
        return Err(format!("the image has over {VARIABLES} variables or {} KiB of them", ENVIRONMENT >> 10));
    }
    let wrong = |(name, value): (&String, &String)| {
        name.is_empty() || name.contains(['=', '\0']) || value.contains('\0')
    };
    if found.env.iter().any(wrong) {
        return Err("the image has a variable that cannot be one".into());
    }
    Ok(found)
}

fn lost_upload(why: &str) -> Fault {
    tracing::error!(why, "the upload of a build cannot be read");
    Fault::why("what was uploaded cannot be read any more")
}

/// The log cannot be written.
pub fn unlogged(error: &std::io::Error) -> Fault {
    tracing::error!(%error, "the log of a build cannot be written");
    Fault::why("the log of the build cannot be written")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_result_is_taken_only_if_it_makes_sense() {
        let found = understand(br#"{"env":{"PATH":"/bin"},"workdir":"","bytes":5,"more":1}"#).unwrap();
        assert_eq!((found.workdir.as_str(), found.bytes, found.env["PATH"].as_str()), ("/", 5, "/bin"));
        for bad in [
            "",
            "5",
            r#"{"workdir":"x"}"#,
            r#"{"workdir":"/\u0000"}"#,
            r#"{"env":{"A=B":""}}"#,
            r#"{"env":{"":"x"}}"#,
            r#"{"env":{"A":"\u0000"}}"#,
            r#"{"env":{"A":1}}"#,
            r#"{"bytes":-1}"#,
        ] {
            assert!(understand(bad.as_bytes()).is_err(), "{bad}");
        }
        let many: BTreeMap<String, String> = (0..300).map(|n| (format!("V{n}"), String::new())).collect();
        assert!(understand(serde_json::json!({"env": many}).to_string().as_bytes()).is_err());
        let large = serde_json::json!({"env": {"A": "x".repeat(ENVIRONMENT)}}).to_string();
        assert!(understand(large.as_bytes()).is_err());
    }

    proptest! {
        #[test]
        fn no_result_panics(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = understand(&bytes);
        }
    }
}
