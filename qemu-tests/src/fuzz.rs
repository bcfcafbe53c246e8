//! `make fuzz`: what strangers send, mutated, for as long as wanted.
//!
//! Three targets run in this process's children under libFuzzer, which follows coverage (`qemu-tests/fuzz`); then Schemathesis sends
//! every request of the served document to a throw-away appliance. Owns: their time, their directories in `.run/fuzz`, their
//! verdicts. Refuses to know: what any of them sends.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::{Appliance, api::Api, audit, clients};

const TOKEN: &str = "pds_00000000000000000000000000000fab";
/// The targets of the program, in order; their corpora are folders of these names.
const TARGETS: [&str; 3] = ["guest", "edge", "bodies"];
/// The name of the part that needs an appliance.
const API: &str = "api";
/// Seconds after which an input hangs.
const HANG: u32 = 20;

/// What `appliance fuzz` was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The instrumented program.
    pub program: PathBuf,
    /// Minutes of each part.
    pub minutes: u64,
    /// One part only.
    pub only: Option<String>,
}

impl Options {
    /// Reads `PROGRAM`, then `--minutes N` and `--only PART`; by default ten minutes of every part.
    ///
    /// # Errors
    /// Any other word, or no number.
    pub fn parse(words: &[&str]) -> Result<Self> {
        let Some((program, rest)) = words.split_first() else {
            bail!("fuzz takes the instrumented program first; `make fuzz` builds it");
        };
        let mut options = Self { program: program.into(), minutes: 10, only: None };
        for pair in rest.chunks(2) {
            match *pair {
                ["--minutes", minutes] => options.minutes = minutes.parse()?,
                ["--only", part] if part == API || TARGETS.contains(&part) => {
                    options.only = Some(part.to_owned());
                }
                _ => bail!("fuzz takes --minutes N and --only {}|{API}, not {pair:?}", TARGETS.join("|")),
            }
        }
        Ok(options)
    }

    fn wants(&self, part: &str) -> bool {
        self.only.as_ref().is_none_or(|only| only == part)
    }
}

/// Runs every part, one after the other.
///
/// # Errors
/// The first crash, hang or wrong answer; its input is kept in `.run/fuzz`.
pub fn run(directory: &Path, options: &Options) -> Result<ExitCode> {
    let started = Instant::now();
    let say = |text: &str| eprintln!("[fuzz {:5}s] {text}", started.elapsed().as_secs());
    for target in TARGETS.into_iter().filter(|target| options.wants(target)) {
        say(&format!("{target}, {} minutes", options.minutes));
        in_process(&directory.join("fuzz").join(target), target, options)?;
    }
    if options.wants(API) {
        against_an_appliance(options.minutes, &say)?;
    }
    say("no crash, no hang, no 500");
    Ok(ExitCode::SUCCESS)
}

fn in_process(at: &Path, target: &str, options: &Options) -> Result<()> {
    let (found, seeds) = (at.join("corpus"), at.join("seeds"));
    fs::create_dir_all(&found)?;
    fs::create_dir_all(&seeds)?;
    let failed = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut fuzz = Command::new(&options.program);
    fuzz.env("FUZZ_TARGET", target)
        .env("FUZZ_SEEDS", &seeds)
        .arg(format!("-max_total_time={}", 60 * options.minutes))
        .arg(format!("-timeout={HANG}"))
        .arg(format!("-artifact_prefix={}/", at.display()))
        .args([
            "-rss_limit_mb=2048",
            "-max_len=81920",
            "-len_control=20",
            "-print_final_stats=1",
            "-verbosity=1",
        ])
        .arg(&found)
        .arg(&seeds);
    if failed.is_dir() {
        fuzz.arg(failed);
    }
    let log = fs::File::create(at.join("log"))?;
    let status = fuzz
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()
        .with_context(|| format!("{} has not been built", options.program.display()))?;
    if !status.success() {
        let said = String::from_utf8_lossy(&fs::read(at.join("log"))?).into_owned();
        let end: Vec<&str> = said.lines().rev().take(60).collect();
        let end: Vec<&str> = end.into_iter().rev().collect();
        bail!(
            "{target} ended with {status}. Its input is in {}; once it is understood, put it into fuzz/corpus/{target}\n{}",
            at.display(),
            end.join("\n")
        );
    }
    Ok(())
}

fn against_an_appliance(minutes: u64, say: &dyn Fn(&str)) -> Result<()> {
    let mut running = Appliance::temporary()?.credential("pandastack.api_token", TOKEN).boot()?;
    say("booting a throw-away appliance");
    running.wait_healthy(Duration::from_secs(300))?;
    running.wait_ssh(Duration::from_secs(60))?;
    running.wait_baked(say)?;
    say(&format!("every request of the served document, {minutes} minutes"));
    let part = ["test_bad_input.py", "-k", "schemathesis"];
    clients::run_part(&running, TOKEN, &part, ("SCHEMATHESIS_SECONDS", (60 * minutes).to_string()))?;
    Api::new(running.api(), TOKEN).delete_all()?;
    audit::settle(&|line| running.ssh(line), Duration::from_secs(120))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let made = Options::parse(&["p", "--only", "edge", "--minutes", "2"]).expect("a good line");

        assert_eq!(made, Options { program: "p".into(), minutes: 2, only: Some("edge".into()) });
        assert!(made.wants("edge") && !made.wants(API));
        assert!(Options::parse(&["p"]).expect("nothing more is needed").wants(API));
        for words in [&[][..], &["p", "--minutes"], &["p", "--only", "nothing"], &["p", "--minutes", "x"]] {
            assert!(Options::parse(words).is_err(), "{words:?}");
        }
    }
}
