//! The handle on a machine that runs: its ports, its power, its snapshots.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

use crate::accel::{self, Accelerator};
use crate::console::Console;
use crate::http;
use crate::qmp::Qmp;
use crate::ssh::Operator;
use crate::templates;

/// How the kernel complains when a processor's timer does not fire.
const LOST_TIMER: &str = "Possible timer handling issue on cpu";

/// A running appliance. Dropping it cuts the power, unless [`Running::detach`] let it go.
#[derive(Debug)]
pub struct Running {
    pub(crate) child: Option<Child>,
    pub(crate) temporary: Option<tempfile::TempDir>,
    /// Which accelerator, and why.
    pub choice: accel::Choice,
    /// The operator's key.
    pub operator: Operator,
    /// The serial console.
    pub console: Console,
    pub(crate) qmp: PathBuf,
    /// The API's port on 127.0.0.1.
    pub api_port: u16,
    /// The port of previews on 127.0.0.1.
    pub edge_port: u16,
    /// The SSH port on 127.0.0.1.
    pub ssh_port: u16,
}

impl Running {
    /// Whether hardware runs the processors, or emulation.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.choice.accelerator
    }

    /// The API's base address.
    #[must_use]
    pub fn api(&self) -> String {
        format!("http://127.0.0.1:{}", self.api_port)
    }

    /// Where previews are served.
    #[must_use]
    pub fn edge(&self) -> String {
        format!("http://127.0.0.1:{}", self.edge_port)
    }

    /// QEMU's process.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Runs a shell line as root in the appliance; it has to succeed.
    ///
    /// # Errors
    /// When it does not, with its standard error.
    pub fn ssh(&self, line: &str) -> Result<String> {
        self.operator.check(self.ssh_port, line)
    }

    /// Waits until SSH lets us in.
    ///
    /// # Errors
    /// At the deadline, with ssh's last complaint.
    pub fn wait_ssh(&self, within: Duration) -> Result<()> {
        self.operator.wait(self.ssh_port, within)
    }

    /// Waits until `GET /healthz` answers 200.
    ///
    /// # Errors
    /// At the deadline, or when QEMU has ended.
    pub fn wait_healthy(&mut self, within: Duration) -> Result<()> {
        self.wait_healthy_with(within, |_, _| {})
    }

    /// As [`Self::wait_healthy`], calling `progress` with the time passed and the console's last line about once a second.
    ///
    /// # Errors
    /// At the deadline, or when QEMU has ended.
    pub fn wait_healthy_with(
        &mut self,
        within: Duration,
        mut progress: impl FnMut(Duration, &str),
    ) -> Result<()> {
        let started = Instant::now();
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, self.api_port));
        let mut seen = 0;
        loop {
            self.look_at_the_kernel(&mut seen)?;
            if let Ok(200) = http::status(address, "/healthz", Duration::from_secs(5)) {
                return Ok(());
            }
            if let Some(status) = self.ended()? {
                bail!("QEMU ended with {status}; the console's last line: {:?}", self.console.last_line(200));
            }
            let passed = started.elapsed();
            if passed >= within {
                bail!(
                    "/healthz did not answer 200 within {within:?}; the console's last line: {:?}",
                    self.console.last_line(200)
                );
            }
            progress(passed, &self.console.last_line(100));
            sleep(Duration::from_secs(1));
        }
    }

    /// Tells of a kernel that gave up, which restarts by itself (`panic=` on its command line), and helps one that stalls.
    /// `seen` is how much of the console was looked at.
    ///
    /// The stall is emulation's only: QEMU now and then loses a timer of a processor at boot (seen with 10.0.13), and the kernel
    /// waits for it for ever. It says so; then the machine is reset, before anything of ours has started.
    fn look_at_the_kernel(&mut self, seen: &mut usize) -> Result<()> {
        if let Some(report) = self.console.panic(*seen, 60) {
            *seen = self.console.text().len();
            eprintln!("  the appliance's kernel gave up; it restarts:\n{report}");
        }
        if self.accelerator() != Accelerator::Tcg {
            return Ok(());
        }
        let text = self.console.text();
        let new = text.get(*seen..).unwrap_or_default();
        if new.contains(LOST_TIMER) {
            *seen = text.len();
            eprintln!("  the emulator lost a timer, the kernel stalls: resetting");
            self.monitor()?.execute("system_reset", &json!({}), Duration::from_secs(5))?;
        }
        Ok(())
    }

    /// Waits until sandboxes can be made of every template that is for all; `say` is told how far it is.
    ///
    /// # Errors
    /// When one cannot be used, or one of them takes longer than twenty minutes.
    pub fn wait_baked(&self, say: impl Fn(&str)) -> Result<()> {
        templates::wait_baked(|line| self.ssh(line), Duration::from_secs(1200), say)
    }

    /// Presses the power button and waits for the machine to be off.
    ///
    /// # Errors
    /// When it is not off at the deadline; it runs on then.
    pub fn power_down(&mut self, within: Duration) -> Result<()> {
        self.monitor()?.execute("system_powerdown", &json!({}), Duration::from_secs(5))?;
        let deadline = Instant::now() + within;
        while self.ended()?.is_none() {
            if Instant::now() >= deadline {
                bail!(
                    "the appliance did not shut down within {within:?}; last line: {:?}",
                    self.console.last_line(200)
                );
            }
            sleep(Duration::from_millis(100));
        }
        self.child = None;
        Ok(())
    }

    /// Cuts the power: QEMU dies at once, and whatever it had not written is gone.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn power_cut(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// Keeps memory, devices and disk as a snapshot in the overlay disk.
    ///
    /// # Errors
    /// When QEMU cannot (the disk has to be an overlay).
    pub fn save(&self, name: &str) -> Result<()> {
        self.monitor()?.monitor(&format!("savevm {name}"), Duration::from_secs(120))
    }

    /// Goes back to a snapshot. The appliance's clock goes back with it; every connection is lost.
    ///
    /// # Errors
    /// When there is no such snapshot.
    pub fn load(&self, name: &str) -> Result<()> {
        self.monitor()?.monitor(&format!("loadvm {name}"), Duration::from_secs(120))
    }

    /// Sets the appliance's clock to this machine's, which a loaded snapshot needs.
    ///
    /// # Errors
    /// When SSH fails.
    pub fn set_clock(&self) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        self.ssh(&format!("date -u -s @{}.{:03}", now.as_secs(), now.subsec_millis())).map(|_| ())
    }

    /// A connection to QEMU's monitor.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn monitor(&self) -> Result<Qmp> {
        Qmp::connect(&self.qmp)
    }

    /// Lets the machine run on when this handle and this process are gone.
    pub fn detach(mut self) {
        self.child = None;
        if let Some(directory) = self.temporary.take() {
            let _ = directory.keep();
        }
    }

    fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        match &mut self.child {
            Some(child) => Ok(child.try_wait()?),
            None => bail!("the appliance is off"),
        }
    }

    /// Waits until QEMU's monitor answers; `log` has what QEMU said otherwise.
    pub(crate) fn wait_for_monitor(&mut self, log: &Path) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let failure = match self.monitor() {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            if self.ended()?.is_some() || Instant::now() >= deadline {
                let said = fs::read_to_string(log).unwrap_or_default();
                let said: Vec<&str> =
                    said.lines().filter(|line| !line.contains("TCG doesn't support")).collect();
                bail!("QEMU did not start ({failure:#}): {}", said.join("\n"));
            }
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.power_cut();
    }
}
