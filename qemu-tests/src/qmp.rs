//! A client of QEMU's monitor protocol: one connection per use, every wait bounded.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A greeted connection to a running QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// When nobody listens at the socket, or QEMU does not greet within five seconds.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(socket).with_context(|| format!("no QEMU at {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        let mut qmp = Self { reader: BufReader::new(stream.try_clone()?), writer: stream };
        let greeting = qmp.read()?;
        if greeting.get("QMP").is_none() {
            bail!("not a QEMU monitor: {greeting}");
        }
        qmp.execute("qmp_capabilities", &json!({}), Duration::from_secs(5))?;
        Ok(qmp)
    }

    /// Runs one command and returns its answer; events in between are dropped.
    ///
    /// # Errors
    /// QEMU's own error text, or a timeout.
    pub fn execute(&mut self, command: &str, arguments: &Value, within: Duration) -> Result<Value> {
        let deadline = Instant::now() + within;
        self.reader.get_ref().set_read_timeout(Some(within))?;
        writeln!(self.writer, "{}", json!({"execute": command, "arguments": arguments}))?;
        while Instant::now() < deadline {
            let mut answer = self.read().with_context(|| format!("QEMU did not answer {command}"))?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or("no reason given"));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
        bail!("QEMU did not answer {command} within {within:?}")
    }

    /// Runs a command of the human monitor, where success is silence.
    ///
    /// # Errors
    /// What the monitor printed, or a timeout.
    pub fn monitor(&mut self, line: &str, within: Duration) -> Result<()> {
        let answer = self.execute("human-monitor-command", &json!({"command-line": line}), within)?;
        match answer.as_str().map(str::trim) {
            Some("") | None => Ok(()),
            Some(text) => bail!("{line}: {text}"),
        }
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            bail!("QEMU closed the connection");
        }
        Ok(serde_json::from_str(&line)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    fn serve(answers: &'static [&'static str]) -> (tempfile::TempDir, thread::JoinHandle<()>) {
        let directory = tempfile::tempdir().expect("directory");
        let listener = UnixListener::bind(directory.path().join("qmp")).expect("bind");
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut reader = BufReader::new(stream.try_clone().expect("clone"));
            for answer in answers {
                writeln!(stream, "{answer}").expect("write");
                if !answer.contains("event") {
                    let mut line = String::new();
                    let _ = reader.read_line(&mut line);
                }
            }
        });
        (directory, server)
    }

    #[test]
    fn events_are_skipped_and_errors_reported() {
        let (directory, server) = serve(&[
            r#"{"QMP":{}}"#,
            r#"{"return":{}}"#,
            r#"{"event":"RESET"}"#,
            r#"{"return":"Error: no such snapshot"}"#,
            r#"{"error":{"class":"GenericError","desc":"no"}}"#,
        ]);
        let mut qmp = Qmp::connect(&directory.path().join("qmp")).expect("connect");
        let error = qmp.monitor("loadvm x", Duration::from_secs(1)).expect_err("monitor error");
        assert_eq!(error.to_string(), "loadvm x: Error: no such snapshot");
        let error = qmp.execute("quit", &json!({}), Duration::from_secs(1)).expect_err("error");
        assert_eq!(error.to_string(), "QEMU refuses quit: no");
        drop(qmp);
        server.join().expect("server");
    }
}
