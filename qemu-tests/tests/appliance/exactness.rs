//! Copies are exact, and whoever is copied hardly notices.

use anyhow::{Context, Result, ensure};
use qemu_tests::beat;
use serde_json::Value;

use crate::fixture::Fixture;

/// Longer than its pause by so much, and it is not the scheduling of an emulated machine any more, ms.
const GROSS_MS: f64 = 3000.0;

pub fn every_copy_agrees(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;

    beat::every_copy_agrees(&api, 4, 2, &|text| eprintln!("  {text}"))?;

    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

/// The HTTP answer does not say how long the parent stood still; vmm does.
pub fn a_parent_waits_for_its_pause_only(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let id = api.create_base()?;
    beat::start(&api, &id)?;

    for round in 0..4 {
        let idle = beat::ask(&api, &id, "state")?.gap_ms;
        let text = fixture.ssh(&format!(
            "busctl --json=short --timeout=60 call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Fork 'ssa(a{{ss}}tb)' '' {id} 1 0 300 false"
        ))?;
        let gap = beat::ask(&api, &id, "state")?.gap_ms;
        let told: Value = serde_json::from_str(&text)?;
        let paused = told["data"][0][2].as_f64().with_context(|| text.clone())? / 1000.0;
        let child = told["data"][0][3][0][0].as_str().with_context(|| text.clone())?.to_owned();
        eprintln!("  round {round}: paused {paused:.0} ms, longest gap {gap:.0} ms ({idle:.0} ms before)");
        ensure!(gap <= paused + idle + GROSS_MS, "paused {paused} ms, but nothing ran for {gap} ms");
        ensure!(api.delete(&child)?.status == 204, "the child cannot be deleted");
    }

    api.delete_all()?;
    fixture.assert_nothing_leaks()
}
