//! The published clients, unmodified, in environments of their own in the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use qemu_tests::image;

use crate::fixture::Fixture;

pub fn python(fixture: &Fixture) -> Result<()> {
    fixture.wait_baked(Duration::from_secs(600))?;
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/python");
    let python = virtual_environment(&suite.join("requirements.txt"))?;
    let mut run = Command::new(python);
    run.args(["-m", "pytest", "-p", "no:schemathesis"]).arg(&suite).current_dir(&suite);
    if let Some(only) = std::env::var_os("PYTEST_K") {
        run.arg("-k").arg(only);
    }
    finish(run, fixture)?;
    fixture.assert_nothing_leaks()
}

pub fn typescript(fixture: &Fixture) -> Result<()> {
    fixture.wait_baked(Duration::from_secs(600))?;
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/typescript");
    let copy = image::cache()?.join("clients/typescript");
    fs::create_dir_all(&copy)?;
    for file in ["package.json", ".npmrc", "suite.test.mjs", "state.test.mjs"] {
        fs::copy(suite.join(file), copy.join(file))?;
    }
    if !copy.join("node_modules/@pandastack/sdk").exists() {
        let status =
            Command::new("npm").args(["install", "--silent"]).current_dir(&copy).status().context("npm")?;
        ensure!(status.success(), "npm install: {status}");
    }
    let mut run = Command::new("node");
    run.args(["--test", "--test-concurrency=1", "--test-reporter=spec", "suite.test.mjs", "state.test.mjs"])
        .current_dir(&copy);
    finish(run, fixture)?;
    fixture.assert_nothing_leaks()
}

fn finish(mut run: Command, fixture: &Fixture) -> Result<()> {
    let status = run
        .env("PANDASTACK_API", fixture.base()?)
        .env("PANDASTACK_EDGE", fixture.edge()?)
        .env("PANDASTACK_PREVIEW_HOST", crate::fixture::PREVIEW_SUFFIX)
        .env("PANDASTACK_API_KEY", fixture.token())
        .env("PANDASTACK_FOREIGN_KEY", fixture.foreign_token()?)
        .env("HOME", fixture.directory())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status()?;
    ensure!(status.success(), "the suite ended with {status}; its report is above");
    Ok(())
}

fn virtual_environment(requirements: &Path) -> Result<PathBuf> {
    let at = image::cache()?.join("clients/python");
    let (python, mark) = (at.join("bin/python"), at.join("requirements.installed"));
    let wanted = fs::read(requirements)?;
    if fs::read(&mark).ok().as_ref() != Some(&wanted) {
        let _ = fs::remove_dir_all(&at);
        let made =
            Command::new("python3").args(["-m", "venv"]).arg(&at).status().context("python3 -m venv")?;
        ensure!(made.success(), "python3 -m venv: {made}");
        let status =
            Command::new(&python).args(["-m", "pip", "install", "-q", "-r"]).arg(requirements).status()?;
        ensure!(status.success(), "pip install: {status}");
        fs::write(&mark, wanted)?;
    }
    Ok(python)
}
