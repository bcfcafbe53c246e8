//! Copies are exact, and whoever is copied hardly notices.

use anyhow::{Context, Result, ensure};
use qemu_tests::{api::ids, beat};

use crate::fixture::Fixture;

/// Longer than its pause by so much, and it is not the scheduling of an emulated machine any more, ms.
const GROSS_MS: f64 = 3000.0;

pub fn every_copy_agrees(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;

    beat::every_copy_agrees(&api, 4, 2, &|text| eprintln!("  {text}"))?;

    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

pub fn a_parent_waits_for_its_pause_only(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let id = api.create_base()?;
    beat::start(&api, &id)?;

    for round in 0..4 {
        let idle = beat::ask(&api, &id, "state")?.gap_ms;
        let answer = api.done(&id, "fork")?;
        let gap = beat::ask(&api, &id, "state")?.gap_ms;
        let paused = answer.body["paused_us"].as_f64().with_context(|| format!("{answer:?}"))? / 1000.0;
        eprintln!("  round {round}: paused {paused:.0} ms, longest gap {gap:.0} ms ({idle:.0} ms before)");
        ensure!(gap <= paused + idle + GROSS_MS, "paused {paused} ms, but nothing ran for {gap} ms");
        for child in ids(&answer.body["children"]) {
            ensure!(api.delete(&child)?.status == 204, "the child cannot be deleted");
        }
    }

    api.delete_all()?;
    fixture.assert_nothing_leaks()
}
