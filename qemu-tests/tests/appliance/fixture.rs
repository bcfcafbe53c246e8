//! The appliance that the tests share.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use qemu_tests::{Appliance, Running, api::Api, audit, image, templates};

/// Token that is preset by a system credential.
const TOKEN: &str = "pds_0123456789abcdef0123456789abcdef";

/// Suffix of the host names of previews.
pub const PREVIEW_SUFFIX: &str = "preview.test";

/// The only registry that the operator allows: a played one ([`crate::world`]).
pub const REGISTRY: &str = "198.51.100.20:5000";

pub struct Fixture {
    running: Mutex<Option<Running>>,
    directory: PathBuf,
    foreign: Mutex<Option<String>>,
}

impl Fixture {
    /// Boots a fresh disk and waits for the API.
    pub fn boot() -> Result<Self> {
        // A directory that KEEP_APPLIANCE left behind saves the wait for the bakes while a test is being written.
        let directory = match std::env::var_os("SUITE_DIRECTORY") {
            Some(kept) => PathBuf::from(kept),
            None => image::cache()?.join("vm").join(format!("suite-{}", std::process::id())),
        };
        let fixture = Self { running: Mutex::new(None), directory, foreign: Mutex::new(None) };
        fixture.start(|appliance| appliance)?;
        Ok(fixture)
    }

    /// Boots the disk as it is.
    pub fn start(&self, change: impl FnOnce(Appliance) -> Appliance) -> Result<()> {
        let appliance = Appliance::in_directory(&self.directory)?
            .credential("pandastack.api_token", TOKEN)
            .credential("pandastack.preview_suffix", PREVIEW_SUFFIX)
            .credential("pandastack.registries", format!("{REGISTRY} insecure"));
        let running = change(appliance).boot()?;
        eprintln!("booting, {:?} ({})", running.accelerator(), running.choice.because);
        // Let go of when it does not come up.
        *self.lock() = Some(running);
        self.wait_for_boot().inspect_err(|_| drop(self.lock().take()))
    }

    /// Waits until the API and SSH of an appliance that boots answer.
    pub fn wait_for_boot(&self) -> Result<()> {
        let started = Instant::now();
        let mut guard = self.lock();
        let running = guard.as_mut().context("the appliance is off")?;
        let mut said = 0;
        running.wait_healthy_with(Duration::from_secs(300), |passed, line| {
            if passed.as_secs() / 10 > said {
                said = passed.as_secs() / 10;
                eprintln!("  {} s: {line}", passed.as_secs());
            }
        })?;
        running.wait_ssh(Duration::from_secs(60))?;
        eprintln!("  the API answers after {:.0} s", started.elapsed().as_secs_f64());
        Ok(())
    }

    /// Waits until the kernel of the running appliance has given up.
    pub fn wait_for_panic(&self) -> Result<()> {
        let console = self.lock().as_ref().context("the appliance is off")?.console.clone();
        console.wait_for("Kernel panic", Duration::from_secs(60))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Takes the running appliance out, for a test that ends it.
    pub fn take(&self) -> Result<Running> {
        self.lock().take().context("the appliance is off")
    }

    pub fn directory(&self) -> &PathBuf {
        &self.directory
    }

    /// Root's shell in the appliance; the line has to succeed.
    pub fn ssh(&self, line: &str) -> Result<String> {
        self.lock().as_ref().context("the appliance is off")?.ssh(line)
    }

    /// The words that run a line in root's shell, as JSON.
    pub fn shell(&self) -> Result<String> {
        let guard = self.lock();
        let running = guard.as_ref().context("the appliance is off")?;
        running.operator.words(running.ssh_port)
    }

    /// As [`Self::ssh`], with the exit code instead of an error.
    pub fn try_ssh(&self, line: &str) -> Result<(i32, String)> {
        let text = self.ssh(&format!("({line}) 2>&1; code=$?; echo; echo \"exit $code\""))?;
        let (body, code) = text.trim_end().rsplit_once("exit ").context("no exit code")?;
        Ok((code.trim().parse()?, body.trim_end().to_owned()))
    }

    /// Copies a program of the suite into the appliance.
    pub fn bring(&self, program: &str) -> Result<String> {
        let at = PathBuf::from(env!("CARGO_BIN_EXE_appliance")).with_file_name(program);
        let guard = self.lock();
        let running = guard.as_ref().context("the appliance is off")?;
        let target = format!("/run/suite/{program}");
        running.operator.feed(
            running.ssh_port,
            &format!("mkdir -p /run/suite && cat > {target} && chmod 755 {target}"),
            fs::File::open(&at).with_context(|| format!("{} has not been built", at.display()))?.into(),
        )?;
        Ok(target)
    }

    pub fn base(&self) -> Result<String> {
        Ok(self.lock().as_ref().context("the appliance is off")?.api())
    }

    /// Where previews are served.
    pub fn edge(&self) -> Result<String> {
        Ok(self.lock().as_ref().context("the appliance is off")?.edge())
    }

    pub fn api(&self) -> Result<Api> {
        Ok(Api::new(self.base()?, TOKEN))
    }

    pub fn token(&self) -> &'static str {
        TOKEN
    }

    /// A token of another workspace, made the way an operator makes one.
    pub fn foreign_token(&self) -> Result<String> {
        let mut kept = self.foreign.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(token) = &*kept {
            return Ok(token.clone());
        }
        let call = "busctl call ai.pandastack.api1 /ai/pandastack/api1 ai.pandastack.api1.Manager";
        self.ssh(&format!("{call} CreateWorkspace s stranger"))?;
        let answer = self.ssh(&format!("{call} CreateToken ssu stranger suite 1"))?;
        let token = answer.trim().trim_start_matches("s \"").trim_end_matches('"').to_owned();
        *kept = Some(token.clone());
        Ok(token)
    }

    /// Waits until sandboxes can be made of every template that is for all.
    pub fn wait_baked(&self, within: Duration) -> Result<()> {
        templates::wait_baked(|line| self.ssh(line), within, |states| eprintln!("  {states}"))
    }

    /// Nothing without an owner is left, once things have come to rest.
    pub fn assert_nothing_leaks(&self) -> Result<()> {
        audit::settle(&|line| self.ssh(line), Duration::from_secs(90))
    }

    /// Prints what a person would look at first.
    pub fn explain(&self, name: &str) {
        let lines = "journalctl -b --no-pager -o short-monotonic -p info -t api -t edge -t vmm -t storage -t network -n 40; systemctl --failed --no-legend";
        match self.ssh(lines) {
            Ok(text) => eprintln!("--- {name}: the daemons' last lines\n{text}---"),
            Err(error) => {
                eprintln!("--- {name}: no journal: {error:#}; the console's last lines");
                let console = fs::read(self.directory.join("console.log")).unwrap_or_default();
                let text = String::from_utf8_lossy(&console);
                let lines: Vec<&str> = text.lines().collect();
                eprintln!("{}\n---", lines[lines.len().saturating_sub(40)..].join("\n"));
            }
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        drop(self.lock().take());
        if std::env::var_os("KEEP_APPLIANCE").is_none() {
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}
