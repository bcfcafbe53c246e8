//! `make bench`: boots a throw-away appliance, runs the measurements inside it and prints their table.
//!
//! What is measured, and against what, is in `qemu-tests/inside`; this is the way there and back.

use std::{
    fs::{self, File},
    path::Path,
    process::{ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::Appliance;

const TOKEN: &str = "pds_00000000000000000000000000000bee";
const TEMPLATE: &str = "base";
/// As [`TEMPLATE`] with 256 MiB of memory; only there for the measurements.
const SMALL: &str = "small";
/// Puts [`SMALL`] in the place of all of the image's templates but those that are measured, with the disk of [`TEMPLATE`]: no
/// other is baked for nothing. The daemons look at their start.
const ADD_SMALL: &str = r#"set -e
at=/usr/share/pandastack/templates; size=$(($(stat -c %s $at/base/root.img) >> 20))
mkdir -p /run/suite/image; mount --bind $at /run/suite/image; mount --make-private /run/suite/image
mount -t tmpfs -o mode=755 suite-templates $at
mkdir $at/base $at/small $at/code-interpreter
for name in base code-interpreter; do mount --bind /run/suite/image/$name $at/$name; done
touch $at/small/root.img; mount --bind /run/suite/image/base/root.img $at/small/root.img
printf 'name = "small"
vcpus = 2
memory_mib = 256
disk_mib = %s
[env]
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
' $size > $at/small/template.toml
systemctl restart pandastack-storage pandastack-vmm"#;

/// Runs the benchmarks and writes their table to `bench.json` in `directory`.
///
/// # Errors
/// When the appliance does not come up or a measurement fails.
pub fn run(directory: &Path, rounds: u32) -> Result<ExitCode> {
    let started = Instant::now();
    let say = |text: &str| eprintln!("[bench {:3}s] {text}", started.elapsed().as_secs());
    let mut running = Appliance::temporary()?
        // 20 creates of 2 GiB are admitted at once: each counts with what it may take in its first seconds.
        .memory_mib(14_336)
        .credential("pandastack.api_token", TOKEN)
        .boot()?;
    say(&format!("booting a throw-away appliance ({:?}: {})", running.accelerator(), running.choice.because));
    running.wait_healthy(Duration::from_secs(300))?;
    running.wait_ssh(Duration::from_secs(60))?;
    running.ssh(ADD_SMALL).context("adding the small template")?;
    say("waiting until all templates are baked, so that nothing else runs");
    running.wait_baked(say)?;
    let program = std::env::current_exe()?.with_file_name("bench");
    let target = "/run/suite/bench";
    running.operator.feed(
        running.ssh_port,
        &format!("mkdir -p /run/suite && cat > {target} && chmod 755 {target}"),
        Stdio::from(
            File::open(&program).with_context(|| format!("{} has not been built", program.display()))?,
        ),
    )?;
    say(&format!("measuring, {rounds} rounds"));
    // In the guests' slice, so that a bare Firecracker runs on the processors that guests have.
    let slice = "systemd-run --quiet --pipe --wait --collect --slice=pandastack-sandboxes.slice";
    let text = running.ssh(&format!("{slice} {target} {TOKEN} {TEMPLATE} {SMALL} {rounds}"))?;
    let table: Value = serde_json::from_str(text.trim()).context("the measurements are not JSON")?;
    fs::write(directory.join("bench.json"), serde_json::to_vec_pretty(&table)?)?;
    print_table(&table)?;
    say("done; also in .run/bench.json");
    Ok(ExitCode::SUCCESS)
}

fn print_table(table: &Value) -> Result<()> {
    println!("| name | unit | p50 | p95 | p99 | ratio | against |");
    println!("|---|---|---|---|---|---|---|");
    for (name, row) in table.as_object().context("the table is not an object")? {
        let number = |key: &str| row[key].as_f64().unwrap_or(f64::NAN);
        let (ratio, against) = match row["against"].as_str() {
            Some(against) if !against.is_empty() => (format!("{:.2}", number("ratio")), against),
            _ => (String::new(), ""),
        };
        println!(
            "| {name} | {} | {:.0} | {:.0} | {:.0} | {ratio} | {against} |",
            row["unit"].as_str().unwrap_or_default(),
            number("p50"),
            number("p95"),
            number("p99"),
        );
    }
    Ok(())
}
