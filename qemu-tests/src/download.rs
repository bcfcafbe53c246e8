//! `appliance download`: a preview under load for as many bytes as wanted, byte for byte.
//!
//! Owns: a throw-away appliance for it. What is loaded, and what has to hold meanwhile, is in `clients/python/test_preview_load.py`, which the
//! suite runs with fewer bytes.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{Appliance, clients};

const TOKEN: &str = "pds_0000000000000000000000000000d017";

/// What `appliance download` was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Bytes of each download, MiB.
    pub mib: u64,
}

impl Options {
    /// Reads `--mib N`; 1024 by default.
    ///
    /// # Errors
    /// Any other word, or no number above 0.
    pub fn parse(words: &[&str]) -> Result<Self> {
        match *words {
            [] => Ok(Self { mib: 1024 }),
            ["--mib", mib] if mib.parse::<u64>().is_ok_and(|mib| mib > 0) => Ok(Self { mib: mib.parse()? }),
            _ => bail!("download takes --mib N, not {words:?}"),
        }
    }
}

/// Boots a throw-away appliance and downloads from a preview of it.
///
/// # Errors
/// When a byte is another one, a connection is lost, or the appliance does not come up.
pub fn run(options: Options) -> Result<ExitCode> {
    let started = Instant::now();
    let say = |text: &str| eprintln!("[download {:4}s] {text}", started.elapsed().as_secs());
    let mut running = Appliance::temporary()?.credential("pandastack.api_token", TOKEN).boot()?;
    running.wait_healthy(Duration::from_secs(300))?;
    running.wait_ssh(Duration::from_secs(60))?;
    running.wait_baked(say)?;
    say(&format!("downloads of {} MiB", options.mib));
    clients::run_part(&running, TOKEN, &["test_preview_load.py"], ("DOWNLOAD_MIB", options.mib.to_string()))?;
    say("every byte, and no connection lost");
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        assert_eq!(Options::parse(&[]).expect("none are needed"), Options { mib: 1024 });
        assert_eq!(Options::parse(&["--mib", "8"]).expect("a number"), Options { mib: 8 });
        for words in [&["--mib"][..], &["--mib", "0"], &["8"]] {
            assert!(Options::parse(words).is_err(), "{words:?}");
        }
    }
}
