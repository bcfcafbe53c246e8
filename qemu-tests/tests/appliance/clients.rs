//! The published clients, unmodified, in environments of their own in the cache.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use qemu_tests::{clients, image};

use crate::{
    fixture::{Fixture, REGISTRY},
    world,
};

pub fn python(fixture: &Fixture) -> Result<()> {
    fixture.wait_baked(Duration::from_secs(600))?;
    let _ = fs::remove_dir_all(results()?);
    let suite = clients::python_suite();
    install_typescript()?;
    let mut run = Command::new(clients::python()?);
    run.args(["-m", "pytest", "-p", "no:schemathesis"]).arg(&suite).current_dir(&suite);
    if let Some(only) = std::env::var_os("PYTEST_K") {
        run.arg("-k").arg(only);
    }
    finish(run, fixture)?;
    fixture.assert_nothing_leaks()
}

pub fn typescript(fixture: &Fixture) -> Result<()> {
    fixture.wait_baked(Duration::from_secs(600))?;
    let copy = install_typescript()?;
    let mut run = Command::new("node");
    run.args(["--test", "--test-concurrency=1", "--test-reporter=spec"]).args(SUITES).current_dir(&copy);
    finish(run, fixture)?;
    fixture.assert_nothing_leaks()
}

/// What the clients' tests have covered is what `docs/compatibility.md` says, and every line that must work is covered.
pub fn compatibility(_: &Fixture) -> Result<()> {
    if std::env::var_os("PYTEST_K").is_some() {
        eprintln!("  a part of the suite covers a part of the lines: nothing is compared");
        return Ok(());
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let told = Command::new(clients::python()?)
        .arg(root.join("clients/compatibility.py"))
        .arg(results()?)
        .arg(root.join("../docs/compatibility.md"))
        .output()?;
    if !told.status.success() {
        bail!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr));
    }
    Ok(())
}

const SUITES: [&str; 3] = ["suite.test.mjs", "state.test.mjs", "surface.test.mjs"];

/// Where the suites say what they covered.
fn results() -> Result<PathBuf> {
    let at = image::cache()?.join("clients/surface");
    fs::create_dir_all(&at).with_context(|| at.display().to_string())?;
    Ok(at)
}

/// The npm package beside a copy of its suite; the Python suite uses its command line.
fn install_typescript() -> Result<PathBuf> {
    let suite = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/typescript");
    let copy = image::cache()?.join("clients/typescript");
    fs::create_dir_all(&copy)?;
    for file in ["package.json", ".npmrc", "surface.mjs"].iter().chain(&SUITES) {
        fs::copy(suite.join(file), copy.join(file)).with_context(|| format!("a copy of {file}"))?;
    }
    if !copy.join("node_modules/@pandastack/sdk").exists() {
        let status =
            Command::new("npm").args(["install", "--silent"]).current_dir(&copy).status().context("npm")?;
        ensure!(status.success(), "npm install: {status}");
    }
    Ok(copy)
}

/// Runs a suite beside a played registry.
fn finish(mut run: Command, fixture: &Fixture) -> Result<()> {
    let registry = fixture.bring("registry")?;
    let addresses = [REGISTRY.split_once(':').map_or(REGISTRY, |(address, _)| address)];
    let images = "/run/suite/images";
    world::build(fixture, &addresses, &format!("{registry} {REGISTRY} {images}"))?;
    let status = run
        .env("PANDASTACK_API", fixture.base()?)
        .env("PANDASTACK_EDGE", fixture.edge()?)
        .env("PANDASTACK_PREVIEW_HOST", crate::fixture::PREVIEW_SUFFIX)
        .env("PANDASTACK_API_KEY", fixture.token())
        .env("PANDASTACK_FOREIGN_KEY", fixture.foreign_token()?)
        .env("PANDASTACK_SHELL", fixture.shell()?)
        .env("SUITE_REGISTRY", REGISTRY)
        .env("SUITE_IMAGES", images)
        .env("SURFACE_RESULTS", results()?)
        .env("NPM_PACKAGE", image::cache()?.join("clients/typescript/node_modules/@pandastack/sdk"))
        .env("HOME", fixture.directory())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .status();
    world::tear_down(fixture, &addresses)?;
    let status = status.context("the suite does not start")?;
    ensure!(status.success(), "the suite ended with {status}; its report is above");
    Ok(())
}
