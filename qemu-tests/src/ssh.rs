//! The operator's way in: a key of our own, brought by the system credential `pandastack.operator_key`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// An SSH key pair in a directory, and the host key that was seen.
#[derive(Debug, Clone)]
pub struct Operator {
    key: PathBuf,
    known_hosts: PathBuf,
}

impl Operator {
    /// The key in this directory, made when it is not there.
    ///
    /// # Errors
    /// When ssh-keygen fails.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        let operator =
            Self { key: directory.join("operator_key"), known_hosts: directory.join("known_hosts") };
        if !operator.key.exists() {
            let output = Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-C", "operator", "-f"])
                .arg(&operator.key)
                .output()
                .context("cannot run ssh-keygen; run `make tools`")?;
            if !output.status.success() {
                bail!("ssh-keygen: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
        }
        Ok(operator)
    }

    /// The public half, as the credential wants it.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn public_key(&self) -> Result<String> {
        let path = self.key.with_extension("pub");
        Ok(fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?
            .trim()
            .to_owned())
    }

    /// Forgets the appliance's host key: a new disk has a new one.
    pub fn forget_host(&self) {
        let _ = fs::remove_file(&self.known_hosts);
    }

    /// `ssh` to the appliance behind a forwarded port, ready for a command's words.
    #[must_use]
    pub fn command(&self, port: u16) -> Command {
        let mut ssh = Command::new("ssh");
        ssh.arg("-i").arg(&self.key).args(["-F", "none", "-p", &port.to_string()]);
        for option in [
            "IdentitiesOnly=yes",
            "BatchMode=yes",
            "StrictHostKeyChecking=accept-new",
            "HostKeyAlias=pandastack",
            "ConnectTimeout=10",
            "ServerAliveInterval=15",
            "LogLevel=ERROR",
        ] {
            ssh.args(["-o", option]);
        }
        ssh.args(["-o", &format!("UserKnownHostsFile={}", self.known_hosts.display())]).arg("root@127.0.0.1");
        ssh
    }

    /// The words of [`Self::command`], as a JSON array: for a program that runs lines of its own.
    ///
    /// # Errors
    /// When one of them is not UTF-8.
    pub fn words(&self, port: u16) -> Result<String> {
        let ssh = self.command(port);
        let words: Option<Vec<&str>> =
            std::iter::once(ssh.get_program()).chain(ssh.get_args()).map(std::ffi::OsStr::to_str).collect();
        Ok(serde_json::to_string(&words.context("a path that is not UTF-8")?)?)
    }

    /// Runs a shell line in the appliance. The caller judges the exit status.
    ///
    /// # Errors
    /// When ssh itself cannot be run.
    pub fn run(&self, port: u16, line: &str) -> Result<Output> {
        self.command(port).arg(line).stdin(Stdio::null()).output().context("ssh")
    }

    /// Runs a shell line that has to succeed and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with what it wrote to standard error.
    pub fn check(&self, port: u16, line: &str) -> Result<String> {
        let output = self.run(port, line)?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!(
                "in the appliance, {line:?} ended with {}: {}{}",
                output.status,
                stdout.trim(),
                stderr.trim()
            );
        }
        Ok(stdout)
    }

    /// Runs a shell line with a file as its standard input.
    ///
    /// # Errors
    /// When the file cannot be opened or the line fails.
    pub fn feed(&self, port: u16, line: &str, input: Stdio) -> Result<()> {
        let output =
            self.command(port).arg(line).stdin(input).stderr(Stdio::piped()).output().context("ssh")?;
        if !output.status.success() {
            bail!("in the appliance, {line:?} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }

    /// Waits until the appliance lets us in.
    ///
    /// # Errors
    /// At the deadline, with ssh's last complaint.
    pub fn wait(&self, port: u16, within: Duration) -> Result<()> {
        let deadline = std::time::Instant::now() + within;
        loop {
            let output = self.run(port, "true")?;
            if output.status.success() {
                return Ok(());
            }
            if std::time::Instant::now() >= deadline {
                bail!("no SSH after {within:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
