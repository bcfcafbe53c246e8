//! A disk as it is flashed: booted by firmware and boot loader, nothing preset.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_tests::{Appliance, api::Api};

use crate::fixture::Fixture;

pub fn a_flashed_disk_boots_and_shows_its_first_token_once(_: &Fixture) -> Result<()> {
    let mut running = Appliance::temporary()?.memory_mib(3072).uefi().boot()?;

    running.wait_healthy(Duration::from_secs(420))?;
    running.wait_ssh(Duration::from_secs(60))?;
    let console = running.console.text();
    let tokens: Vec<&str> = console
        .match_indices("pds_")
        .filter_map(|(at, _)| console.get(at..at + 36))
        .filter(|token| token[4..].bytes().all(|byte| byte.is_ascii_hexdigit()))
        .collect();
    let [token] = tokens[..] else { anyhow::bail!("{} tokens on the console", tokens.len()) };
    let me = Api::new(running.api(), token).call("GET", "/v1/me", None)?;
    let journal = running.ssh(&format!("journalctl -b --no-pager -o cat | grep -c {token} || true"))?;
    let firmware = running.ssh("cat /sys/firmware/efi/fw_platform_size")?;
    let guests = running
        .ssh("cat /sys/fs/cgroup/pandastack.slice/pandastack-sandboxes.slice/cpuset.cpus.effective")?;

    ensure!(me.status == 200, "{me:?}");
    ensure!(journal.trim() == "0", "the journal holds the token");
    ensure!(firmware.trim() == "64", "{firmware:?}");
    let named = running.ssh("grep -o 'pandastack.guest_cpus=[^ ]*' /proc/cmdline || true")?;
    if let Some(named) = named.trim().strip_prefix("pandastack.guest_cpus=") {
        ensure!(guests.trim() == named, "guests may use {guests:?}, not {named}");
    }
    running.power_down(Duration::from_secs(120)).context("a clean shutdown")?;
    Ok(())
}
