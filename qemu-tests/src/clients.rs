//! The published Python clients: where they are installed (an environment of their own in the cache), and their suite against an
//! appliance that was booted for one part of it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{Running, image};

/// Folder of the suite for the Python clients.
#[must_use]
pub fn python_suite() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/python")
}

/// The interpreter of the environment, which is made anew when the requirements are others than its own.
///
/// # Errors
/// When something cannot be installed.
pub fn python() -> Result<PathBuf> {
    let requirements = python_suite().join("requirements.txt");
    let at = image::cache()?.join("clients/python");
    let (python, mark) = (at.join("bin/python"), at.join("requirements.installed"));
    let wanted = fs::read(&requirements).with_context(|| requirements.display().to_string())?;
    if fs::read(&mark).ok().as_ref() != Some(&wanted) {
        let _ = fs::remove_dir_all(&at);
        let made =
            Command::new("python3").args(["-m", "venv"]).arg(&at).status().context("python3 -m venv")?;
        ensure!(made.success(), "python3 -m venv: {made}");
        let status =
            Command::new(&python).args(["-m", "pip", "install", "-q", "-r"]).arg(&requirements).status()?;
        ensure!(status.success(), "pip install: {status}");
        fs::write(&mark, wanted)?;
    }
    Ok(python)
}

/// Runs a part of the suite, in one workspace, and waits for it.
///
/// # Errors
/// When a test of it fails; its report is on standard output.
pub fn run_part(running: &Running, token: &str, words: &[&str], set: (&str, String)) -> Result<()> {
    let status = Command::new(python()?)
        .args(["-m", "pytest", "-p", "no:schemathesis"])
        .args(words)
        .current_dir(python_suite())
        .env("PANDASTACK_API", running.api())
        .env("PANDASTACK_EDGE", running.edge())
        .env("PANDASTACK_SHELL", running.operator.words(running.ssh_port)?)
        .env("PANDASTACK_API_KEY", token)
        .env("PANDASTACK_FOREIGN_KEY", token)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env(set.0, set.1)
        .status()?;
    ensure!(status.success(), "the suite ended with {status}; its report is above");
    Ok(())
}
