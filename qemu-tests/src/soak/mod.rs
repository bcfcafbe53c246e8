//! Random state changes of sandboxes against a model of the contract: bounded in the test suite, as long as wanted by
//! `appliance soak`.
//!
//! [`model`] says what has to happen, [`driver`] makes it happen; this boots an appliance for it.

pub mod driver;
pub mod model;

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

pub use driver::Driver;

use crate::{Appliance, api::Api, audit, beat};

const TOKEN: &str = "pds_00000000000000000000000000000bad";
/// Requests between two looks at what is left over.
const AUDIT_EVERY: u64 = 500;
/// A run ends by itself, whatever it was asked for.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What `appliance soak` was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// State changes.
    pub steps: u64,
    /// Where the random numbers begin.
    pub seed: u64,
}

impl Options {
    /// Reads `--steps N` and `--seed N`; by default 10000 steps from a seed that differs from run to run.
    ///
    /// # Errors
    /// Any other word, or no number.
    pub fn parse(words: &[&str]) -> Result<Self> {
        let mut options = Self { steps: 10_000, seed: u64::from(std::process::id()) };
        for pair in words.chunks(2) {
            match *pair {
                ["--steps", steps] => options.steps = steps.parse()?,
                ["--seed", seed] => options.seed = seed.parse()?,
                _ => bail!("soak takes --steps N and --seed N, not {pair:?}"),
            }
        }
        Ok(options)
    }
}

/// Boots a throw-away appliance and changes states in it at random; now and then looks what is left over, and takes a
/// sandbox 16 ways.
///
/// # Errors
/// When the appliance does not come up, diverges from the model or leaks.
pub fn run(options: Options) -> Result<ExitCode> {
    let started = Instant::now();
    let say = |text: &str| eprintln!("[soak {:5}s] {text}", started.elapsed().as_secs());
    let mut running = Appliance::temporary()?
        // 16 children of 2 GiB are admitted at once.
        .memory_mib(12_288)
        .credential("pandastack.api_token", TOKEN)
        .boot()?;
    running.wait_healthy(Duration::from_secs(300))?;
    running.wait_ssh(Duration::from_secs(60))?;
    running.wait_baked(say)?;
    let (api, shell) = (Api::new(running.api(), TOKEN), |line: &str| running.ssh(line));
    say(&format!("seed {}, {} steps", options.seed, options.steps));
    let mut driver = Driver::new(&api, options.seed)?;
    while driver.steps < options.steps {
        let steps = AUDIT_EVERY.min(options.steps - driver.steps);
        driver.run(steps, LONGEST.saturating_sub(started.elapsed()))?;
        audit::settle(&shell, Duration::from_secs(120))?;
        say(&format!(
            "{} steps, {} of them rightly refused; nothing is left over",
            driver.steps, driver.refused
        ));
        if started.elapsed() > LONGEST {
            say("a day is enough");
            break;
        }
    }
    driver.finish()?;
    beat::every_copy_agrees(&api, 16, 3, &say)?;
    api.delete_all()?;
    audit::settle(&shell, Duration::from_secs(120))?;
    say("no divergence, no leak");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let made = Options::parse(&["--seed", "7", "--steps", "20"]).expect("both are numbers");

        assert_eq!(made, Options { steps: 20, seed: 7 });
        assert_eq!(Options::parse(&[]).expect("none are needed").steps, 10_000);
        for words in [&["--steps"][..], &["--steps", "x"], &["20"]] {
            assert!(Options::parse(words).is_err(), "{words:?}");
        }
    }
}
