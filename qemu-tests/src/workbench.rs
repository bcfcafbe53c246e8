//! The one appliance of a checkout, in `.run`: its disk, key and token are kept from run to run, and QEMU outlives the
//! command that started it.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::accel::{self, Accelerator};
use crate::appliance::Appliance;
use crate::console::Console;
use crate::disk::{self, Kept};
use crate::http;
use crate::image::Image;
use crate::qmp::Qmp;
use crate::ssh::Operator;

/// The port of this machine on which `make run` serves the API.
const API_PORT: u16 = 8080;
/// The port of this machine on which `make run` serves previews.
const EDGE_PORT: u16 = 8081;
const DISK_GIB: u64 = 40;
/// A unit's program, for `push`: the rest of /usr/lib/pandastack has no unit of its own.
const SERVICES: [&str; 5] = ["api", "edge", "vmm", "network", "storage"];

/// The `.run` directory of a checkout.
#[derive(Debug)]
pub struct Workbench {
    checkout: PathBuf,
    directory: PathBuf,
}

/// What is remembered of the running machine.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: i32,
    ssh_port: u16,
    accelerator: String,
}

impl Workbench {
    /// The one of the checkout that this program was built from, or that `PANDASTACK_RUN` names.
    ///
    /// # Errors
    /// When the directory cannot be made.
    pub fn here() -> Result<Self> {
        let mut checkout = std::env::current_dir()?;
        while !checkout.join("qemu-tests/Cargo.toml").exists() {
            if !checkout.pop() {
                bail!("not inside a checkout");
            }
        }
        let directory =
            std::env::var_os("PANDASTACK_RUN").map_or_else(|| checkout.join(".run"), PathBuf::from);
        fs::create_dir_all(&directory)?;
        Ok(Self { directory: fs::canonicalize(directory)?, checkout })
    }

    /// Where its files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The machine that runs, if the process of the record is still that QEMU.
    fn running(&self) -> Option<Record> {
        let record: Record = serde_json::from_slice(&fs::read(self.path("machine.json")).ok()?).ok()?;
        let command = fs::read(format!("/proc/{}/cmdline", record.pid)).ok()?;
        let ours = self.path("qmp").to_string_lossy().into_owned();
        String::from_utf8_lossy(&command).contains(&ours).then_some(record)
    }

    fn expect_running(&self) -> Result<Record> {
        self.running().context("no appliance runs; start it with `make run`")
    }

    fn operator(&self) -> Result<Operator> {
        Operator::in_directory(&self.directory)
    }

    /// The API token: made once, and known to the appliance by a system credential.
    fn token(&self) -> Result<String> {
        let path = self.path("env");
        if let Ok(text) = fs::read_to_string(&path)
            && let Some(token) = text.lines().find_map(|line| line.strip_prefix("PANDASTACK_API_KEY="))
        {
            return Ok(token.to_owned());
        }
        let mut bytes = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        let mut token = String::from("pds_");
        for byte in bytes {
            write!(token, "{byte:02x}")?;
        }
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        write!(file, "PANDASTACK_API=http://127.0.0.1:{API_PORT}\nPANDASTACK_API_KEY={token}\n")?;
        Ok(token)
    }
}

/// Boots the appliance and waits until its API answers and sandboxes can be made.
///
/// # Errors
/// When one runs already, the image does not fit the disk, QEMU does not start, the API does not answer in time, or a
/// template cannot be used. In the last two cases the machine is left running, for a look.
pub fn run(bench: &Workbench) -> Result<ExitCode> {
    if let Some(record) = bench.running() {
        eprintln!(
            "The appliance runs already (process {}). `make stop` ends it, `make shell` looks inside.",
            record.pid
        );
        return Ok(ExitCode::FAILURE);
    }
    let started = Instant::now();
    let say = |text: &str| eprintln!("[run {:3}s] {text}", started.elapsed().as_secs());
    let choice = accel::choose(&accel::probe());
    match choice.accelerator {
        Accelerator::Kvm => say(&format!("hardware acceleration: {}", choice.because)),
        Accelerator::Tcg => {
            say(&format!("software emulation, ten times slower than hardware: {}", choice.because));
        }
    }
    let image = Image::find()?;
    let (disk, how) = disk::kept(&image, &bench.directory, DISK_GIB)?;
    match how {
        Kept::New => {
            bench.operator()?.forget_host();
            say("a new disk");
        }
        Kept::Unchanged => say("the disk of the last run"),
        Kept::Flashed(partitions) => {
            say(&format!("the disk of the last run, with a new {}", partitions.join(", ")));
        }
    }
    let mut running = Appliance::in_directory(&bench.directory)?
        .disk(disk)
        .open_network()
        .api_port(API_PORT)
        .edge_port(EDGE_PORT)
        .credential("pandastack.api_token", bench.token()?)
        .boot()?;
    let pid = running.pid().context("QEMU has no process")?;
    let record = Record {
        pid: i32::try_from(pid)?,
        ssh_port: running.ssh_port,
        accelerator: format!("{:?}: {}", choice.accelerator, choice.because),
    };
    fs::write(bench.path("machine.json"), serde_json::to_vec_pretty(&record)?)?;
    say("booting; waiting for the API");
    let mut last = String::new();
    let mut quiet_since = Instant::now();
    let outcome =
        running.wait_healthy_with(Duration::from_secs(60) * choice.accelerator.patience(), |_, line| {
            // A line when there is news, and one now and then when there is none.
            if (line != last && quiet_since.elapsed() >= Duration::from_secs(3))
                || quiet_since.elapsed() >= Duration::from_secs(15)
            {
                say(&format!("waiting for the API; console: {line}"));
                line.clone_into(&mut last);
                quiet_since = Instant::now();
            }
        });
    running.detach();
    outcome.context(
        "the appliance does not answer (it still runs: `make console`, `make shell`, `make stop`)",
    )?;
    say(&format!("the API answers at http://127.0.0.1:{API_PORT}; address and key are in .run/env"));
    wait_for_templates(&bench.token()?, Duration::from_secs(120) * choice.accelerator.patience(), &say)?;
    say("sandboxes can be made of every template");
    Ok(ExitCode::SUCCESS)
}

/// Waits until sandboxes can be made of every template: the first boot brings their disks in and bakes a snapshot of each.
fn wait_for_templates(token: &str, within: Duration, say: &dyn Fn(&str)) -> Result<()> {
    #[derive(Deserialize)]
    struct Template {
        name: String,
        status: String,
        meta: serde_json::Value,
    }
    let agent: ureq::Agent =
        ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(10))).build().into();
    let deadline = Instant::now() + within;
    let (mut last, mut said) = (String::new(), Instant::now());
    loop {
        let asked = agent
            .get(format!("http://127.0.0.1:{API_PORT}/v1/templates"))
            .header("authorization", format!("Bearer {token}"))
            .call()
            .and_then(|mut answer| answer.body_mut().read_json::<Vec<Template>>());
        let news = match asked {
            Ok(templates) => {
                if let Some(failed) = templates.iter().find(|template| template.status == "failed") {
                    bail!("template {} cannot be used: {}", failed.name, failed.meta["reason"]);
                }
                if !templates.is_empty() && templates.iter().all(|template| template.status == "baked") {
                    return Ok(());
                }
                let each = templates.iter().map(|template| format!("{}: {}", template.name, template.status));
                each.collect::<Vec<_>>().join(", ")
            }
            // Busy with its first boot.
            Err(error) => format!("no answer yet ({error})"),
        };
        if Instant::now() >= deadline {
            bail!("not all templates can be used after {within:?} (the appliance runs on): {news}");
        }
        if news != last || said.elapsed() >= Duration::from_secs(15) {
            say(&format!("preparing templates: {news}"));
            (last, said) = (news, Instant::now());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

/// A shutdown puts every persistent sandbox onto storage first; systemd allows its unit about ten minutes.
const SHUTDOWN: Duration = Duration::from_secs(660);

/// Shuts the appliance down; cuts the power when it takes longer than [`SHUTDOWN`].
///
/// # Errors
/// When the process cannot be ended.
pub fn stop(bench: &Workbench) -> Result<ExitCode> {
    let Some(record) = bench.running() else {
        eprintln!("No appliance runs.");
        return Ok(ExitCode::SUCCESS);
    };
    let started = Instant::now();
    let asked = Qmp::connect(&bench.path("qmp"))
        .and_then(|mut qmp| qmp.execute("system_powerdown", &json!({}), Duration::from_secs(5)));
    if let Err(error) = asked {
        eprintln!("QEMU does not take the power button ({error:#}); cutting the power");
    } else {
        eprintln!("shutting down");
        let mut told = Instant::now();
        while bench.running().is_some() && started.elapsed() < SHUTDOWN {
            std::thread::sleep(Duration::from_millis(200));
            if told.elapsed() >= Duration::from_secs(10) {
                told = Instant::now();
                eprintln!("[{:>3}s] persistent sandboxes go onto storage", started.elapsed().as_secs());
            }
        }
    }
    let clean = bench.running().is_none();
    if !clean {
        kill(Pid::from_raw(record.pid), Signal::SIGKILL)?;
        let killed = Instant::now();
        while bench.running().is_some() && killed.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let _ = fs::remove_file(bench.path("machine.json"));
    let how = if clean { "off" } else { "off, by cutting the power" };
    eprintln!("{how} after {:.1} s", started.elapsed().as_secs_f32());
    Ok(ExitCode::SUCCESS)
}

/// Says what runs.
///
/// # Errors
/// Never, so far; shares the signature of its neighbours.
pub fn status(bench: &Workbench) -> Result<ExitCode> {
    let Some(record) = bench.running() else {
        println!("off");
        return Ok(ExitCode::from(3));
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, API_PORT));
    let health = match http::status(address, "/healthz", Duration::from_secs(5)) {
        Ok(status) => format!("answers {status}"),
        Err(error) => format!("does not answer: {error:#}"),
    };
    println!("running: process {}", record.pid);
    println!("accelerator: {}", record.accelerator);
    println!("API: http://127.0.0.1:{API_PORT}, /healthz {health}");
    println!("SSH: port {}", record.ssh_port);
    println!("console: {}", Console::at(bench.path("console.log")).last_line(120));
    Ok(ExitCode::SUCCESS)
}

/// Follows the serial console until the appliance is off.
///
/// # Errors
/// When there is no log, or standard output closes.
pub fn console(bench: &Workbench) -> Result<ExitCode> {
    Console::at(bench.path("console.log"))
        .follow(&mut std::io::stdout().lock(), || bench.running().is_some())
        .context("no console log; start the appliance with `make run`")?;
    Ok(ExitCode::SUCCESS)
}

/// Becomes an SSH session into the appliance.
///
/// # Errors
/// When none runs or ssh is missing.
pub fn shell(bench: &Workbench, command: &[&str]) -> Result<ExitCode> {
    let record = bench.expect_running()?;
    Err(bench.operator()?.command(record.ssh_port).args(command).exec()).context("cannot run ssh")
}

/// Puts programs over the appliance's own, which live on a read-only file system, and restarts their units. It lasts until
/// the appliance restarts.
///
/// # Errors
/// When a file is none of the appliance's, or a unit does not start.
pub fn push(bench: &Workbench, files: &[&str]) -> Result<ExitCode> {
    let record = bench.expect_running()?;
    let operator = bench.operator()?;
    let mut units = String::new();
    for file in files {
        let path = Path::new(file);
        let name = path.file_name().and_then(|name| name.to_str()).context("not a file name")?;
        let target = match name {
            "vmlinux" | "initrd.img" => format!("/usr/lib/pandastack/guest/{name}"),
            "firecracker" => format!("/usr/lib/pandastack/{name}"),
            name if SERVICES.contains(&name) => {
                write!(units, " pandastack-{name}.service")?;
                format!("/usr/lib/pandastack/{name}")
            }
            _ => bail!(
                "{name} is none of the appliance's programs ({}, firecracker, vmlinux, initrd.img)",
                SERVICES.join(", ")
            ),
        };
        let input = File::open(path).with_context(|| format!("cannot open {file}"))?;
        // A fresh file each time: the old one may be running. The old mount goes, or they would pile up.
        let line = format!(
            "set -e; test -e {target} || {{ echo {target} is not in this image >&2; exit 1; }}; \
             mkdir -p /run/push; new=$(mktemp /run/push/{name}.XXXXXX); cat >$new; chmod 0755 $new; \
             while mountpoint -q {target}; do umount -l {target}; done; mount --bind $new {target}"
        );
        operator.feed(record.ssh_port, &line, Stdio::from(input))?;
        eprintln!("{target} is {file}");
    }
    restart(&operator, record.ssh_port, &units)
}

/// Lets the checkout's unit files win over the image's until the appliance restarts, and restarts the daemons.
///
/// # Errors
/// When the appliance does not take them.
pub fn push_units(bench: &Workbench) -> Result<ExitCode> {
    let record = bench.expect_running()?;
    let operator = bench.operator()?;
    let mut tar = Command::new("tar")
        .args(["--owner=0", "--group=0", "-c", "."])
        .current_dir(bench.checkout.join("systemd/system"))
        .stdout(Stdio::piped())
        .spawn()?;
    let stream = tar.stdout.take().context("tar has no output")?;
    let line = "mkdir -p /run/systemd/system && tar -x -C /run/systemd/system && systemctl daemon-reload";
    let fed = operator.feed(record.ssh_port, line, Stdio::from(stream));
    let status = tar.wait()?;
    fed?;
    if !status.success() {
        bail!("tar ended with {status}");
    }
    let units: String = SERVICES.iter().map(|name| format!(" pandastack-{name}.service")).collect();
    restart(&operator, record.ssh_port, &units)
}

fn restart(operator: &Operator, port: u16, units: &str) -> Result<ExitCode> {
    if !units.is_empty() {
        operator.check(
            port,
            &format!("systemctl restart{units} || {{ systemctl --no-pager status{units}; exit 1; }}"),
        )?;
        eprintln!("restarted{units}");
    }
    Ok(ExitCode::SUCCESS)
}
