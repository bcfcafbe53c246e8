//! Random state changes on the appliance, compared with a model after each; `appliance soak` does it for longer.

use std::time::Duration;

use anyhow::{Result, ensure};
use qemu_tests::soak::Driver;

use crate::fixture::Fixture;

const STEPS: u64 = 60;
const WITHIN: Duration = Duration::from_secs(150);

pub fn random_state_changes(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let seed = match std::env::var("MODEL_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => u64::from(std::process::id()),
    };
    eprintln!("  MODEL_SEED={seed}");

    let mut driver = Driver::new(&api, seed)?;
    driver.run(STEPS, WITHIN)?;
    driver.finish()?;

    eprintln!("  {} steps, {} of them rightly refused", driver.steps, driver.refused);
    ensure!(driver.steps > 10, "only {} steps in {WITHIN:?}", driver.steps);
    fixture.assert_nothing_leaks()
}
