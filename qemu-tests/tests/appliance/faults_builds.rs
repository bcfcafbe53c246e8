//! Builds of templates that are interrupted in each of their stages: what was taken is done, and nothing else is left.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use qemu_tests::api::Api;
use serde_json::json;

use crate::{faults::wait_active, fixture::Fixture};

const PATIENCE: Duration = Duration::from_secs(1500);

pub fn killed_in_each_stage(fixture: &Fixture) -> Result<()> {
    for stage in ["making", "building", "adopting", "baking", "publishing"] {
        let api = fixture.api()?;
        let build = begin(&api, stage)?;
        let kill = "systemctl kill -s KILL pandastack-api.service";
        eprintln!("  {}", reach(fixture, &build, stage, kill)?);
        wait_active(fixture, "api")?;
        is_done(&api, &build, stage).with_context(|| format!("killed while {stage}"))?;
        fixture.assert_nothing_leaks().with_context(|| format!("killed while {stage}"))?;
    }
    Ok(())
}

pub fn cut_in_each_stage(fixture: &Fixture) -> Result<()> {
    for stage in ["building", "adopting", "baking"] {
        let build = begin(&fixture.api()?, stage)?;
        eprintln!("  {}", reach(fixture, &build, stage, "true")?);
        fixture.take()?.power_cut()?;
        fixture.start(|appliance| appliance)?;
        is_done(&fixture.api()?, &build, stage).with_context(|| format!("cut while {stage}"))?;
        fixture.assert_nothing_leaks().with_context(|| format!("cut while {stage}"))?;
    }
    Ok(())
}

/// Asks for a template of this name.
fn begin(api: &Api, name: &str) -> Result<String> {
    let form = format!(
        "name={name}&size_mb=128&memory_mb=512&dockerfile=FROM+base%0ARUN+echo+{name}+%3E+%2Fmade%0A"
    );
    let kind = "application/x-www-form-urlencoded";
    let answer = api.send_as(kind, "POST", "/v1/templates/build", form.into_bytes())?;
    ensure!(answer.status == 202, "{answer:?}");
    answer.text("id")
}

/// Does something the moment a build has got so far, without leaving the appliance; what was seen then.
fn reach(fixture: &Fixture, build: &str, stage: &str, then: &str) -> Result<String> {
    let script = format!(
        "record=$(find /var/lib/pandastack/api/builds/records -name '{build}*'); \
         for turn in $(seq 140); do now=$(date +%s); while [ $(($(date +%s) - now)) -lt 1 ]; do \
         if grep -qE '\"stage\":\"({stage}|done|failed)\"' $record; then {then}; grep -oE '\"stage\":\"[a-z]*' $record; exit 0; fi; done; done"
    );
    let until = Instant::now() + PATIENCE;
    loop {
        let seen = fixture.ssh(&format!("({script})"))?;
        if let Some((_, seen)) = seen.trim().rsplit_once('"') {
            // The last stage is a rename, and may be over before it is seen.
            ensure!(
                seen == stage || stage == "publishing",
                "{build} is {seen} already, it was to be {stage}"
            );
            return Ok(format!("{build} is {seen} when it is to be interrupted while {stage}"));
        }
        ensure!(Instant::now() < until, "{build} does not get so far");
    }
}

/// It ends as if nothing had happened, and what it made can be used and deleted.
fn is_done(api: &Api, build: &str, name: &str) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match api.call("GET", &format!("/v1/templates/builds/{build}"), None) {
            Ok(answer) if answer.body["status"] == "done" => break,
            Ok(answer) if answer.body["status"] == "failed" => bail!("{answer:?}"),
            Ok(answer) if answer.status == 404 => bail!("an acknowledged build is gone"),
            _ => thread::sleep(Duration::from_secs(1)),
        }
        ensure!(Instant::now() < until, "the build does not end");
    }
    let made = api.create(&json!({"template": name}))?;
    let said = api.exec(&made, "cat /made")?;
    ensure!(said == format!("{name}\n"), "the template has {said:?}");
    ensure!(api.delete(&made)?.status == 204, "the sandbox cannot be deleted");
    let deleted = api.call("DELETE", &format!("/v1/templates/{name}"), None)?;
    ensure!(deleted.status == 204, "{deleted:?}");
    Ok(())
}
