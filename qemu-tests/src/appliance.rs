//! One booted appliance: built up from what a test needs, then a handle on the running machine.
//!
//! ```no_run
//! # use std::time::Duration;
//! # fn main() -> anyhow::Result<()> {
//! let mut appliance = qemu_tests::Appliance::temporary()?.memory_mib(4096).boot()?;
//! appliance.wait_healthy(Duration::from_secs(120))?;
//! println!("{}", appliance.ssh("systemctl --failed")?);
//! appliance.power_down(Duration::from_secs(60))?;
//! # Ok(())
//! # }
//! ```

use std::fs::{self, File, Permissions};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use base64::Engine;

use crate::accel;
use crate::console::Console;
use crate::disk::{self, Disk};
use crate::image::Image;
use crate::machine::{Boot, Forward, Machine};
use crate::running::Running;
use crate::ssh::Operator;

/// The API's port in the appliance.
pub const API_PORT: u16 = 8080;
/// The port of previews in the appliance.
pub const EDGE_PORT: u16 = 8081;
const SSH_PORT: u16 = 22;

/// An appliance that has not been started.
#[derive(Debug)]
pub struct Appliance {
    image: Image,
    directory: PathBuf,
    temporary: Option<tempfile::TempDir>,
    disk: Option<Disk>,
    disk_gib: u64,
    memory_mib: u32,
    cpus: Option<u32>,
    uefi: bool,
    restricted: bool,
    api_port: Option<u16>,
    edge_port: Option<u16>,
    forwards: Vec<Forward>,
    credentials: Vec<(String, Vec<u8>)>,
    kernel_arguments: Vec<String>,
    network_extra: Vec<String>,
    log_writes: Option<PathBuf>,
    snapshot: Option<String>,
    extra: Vec<String>,
}

impl Appliance {
    /// One that keeps its files (disk, key, console log, sockets) in `directory`.
    ///
    /// # Errors
    /// When no image has been built or the directory cannot be made.
    pub fn in_directory(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory)?;
        // QEMU's socket addresses are limited to 108 bytes, and the monitor is found by it later.
        let directory = fs::canonicalize(directory)?;
        if directory.as_os_str().len() > 90 {
            bail!("{} is too long a path for a socket in it", directory.display());
        }
        Ok(Self {
            image: Image::find()?,
            directory,
            temporary: None,
            disk: None,
            disk_gib: 40,
            memory_mib: 6144,
            cpus: None,
            uefi: false,
            restricted: true,
            api_port: None,
            edge_port: None,
            forwards: Vec::new(),
            credentials: Vec::new(),
            kernel_arguments: Vec::new(),
            network_extra: Vec::new(),
            log_writes: None,
            snapshot: None,
            extra: Vec::new(),
        })
    }

    /// One in a directory of its own that disappears with it.
    ///
    /// # Errors
    /// As [`Self::in_directory`].
    pub fn temporary() -> Result<Self> {
        // Not /tmp, which may be memory: a disk grows to some GiB.
        let base = crate::image::cache()?.join("vm");
        fs::create_dir_all(&base)?;
        let directory = tempfile::Builder::new().prefix("a").tempdir_in(base)?;
        let mut appliance = Self::in_directory(directory.path())?;
        appliance.temporary = Some(directory);
        Ok(appliance)
    }

    /// Size of the virtual disk in GiB (default 40). It takes space only as it fills.
    #[must_use]
    pub fn disk_gib(mut self, gib: u64) -> Self {
        self.disk_gib = gib;
        self
    }

    /// A disk that exists already. Without one, boot makes an overlay over the image, or takes the one it made in
    /// this directory before.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disk = Some(disk);
        self
    }

    /// Memory in MiB (default 6144).
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Processors (default: as many as the accelerator needs).
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = Some(cpus);
        self
    }

    /// Boot through firmware and boot loader instead of directly.
    #[must_use]
    pub fn uefi(mut self) -> Self {
        self.uefi = true;
        self
    }

    /// Let the appliance reach this machine's network. Tests never do.
    #[must_use]
    pub fn open_network(mut self) -> Self {
        self.restricted = false;
        self
    }

    /// The host port of the API (default: any free one).
    #[must_use]
    pub fn api_port(mut self, port: u16) -> Self {
        self.api_port = Some(port);
        self
    }

    /// The host port of previews (default: any free one).
    #[must_use]
    pub fn edge_port(mut self, port: u16) -> Self {
        self.edge_port = Some(port);
        self
    }

    /// One more port into the appliance.
    #[must_use]
    pub fn forward(mut self, host: u16, guest: u16) -> Self {
        self.forwards.push(Forward { host, guest });
        self
    }

    /// A system credential. `pandastack.operator_key` is always there.
    #[must_use]
    pub fn credential(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.credentials.push((name.to_owned(), value.as_ref().to_vec()));
        self
    }

    /// A word for the kernel command line.
    #[must_use]
    pub fn kernel_argument(mut self, word: &str) -> Self {
        self.kernel_arguments.push(word.to_owned());
        self
    }

    /// An option of QEMU's user network, for example `guestfwd=tcp:10.0.2.100:80-cmd:…`.
    #[must_use]
    pub fn network_option(mut self, option: &str) -> Self {
        self.network_extra.push(option.to_owned());
        self
    }

    /// Record every write and flush of the disk in this file, for replay at any point.
    #[must_use]
    pub fn log_writes(mut self, path: PathBuf) -> Self {
        self.log_writes = Some(path);
        self
    }

    /// Start from a snapshot that [`Running::save`] put into this directory's disk: same memory, processors and image.
    #[must_use]
    pub fn from_snapshot(mut self, name: &str) -> Self {
        self.snapshot = Some(name.to_owned());
        self
    }

    /// A word for QEMU's command line.
    #[must_use]
    pub fn qemu_argument(mut self, word: &str) -> Self {
        self.extra.push(word.to_owned());
        self
    }

    /// Starts QEMU. Returns as soon as its monitor answers; the appliance is still booting then.
    ///
    /// # Errors
    /// When QEMU does not start, with what it said.
    pub fn boot(mut self) -> Result<Running> {
        let choice = accel::choose(&accel::probe());
        let operator = Operator::in_directory(&self.directory)?;
        self.credentials.push(("pandastack.operator_key".to_owned(), operator.public_key()?.into_bytes()));
        let disk = self.ready_disk()?;
        // Held until QEMU is about to start, so that one call does not get the same port twice.
        let (api_port, edge_port, ssh_port) = {
            let (api, edge, ssh) = (free_port(self.api_port)?, free_port(self.edge_port)?, free_port(None)?);
            (api.local_addr()?.port(), edge.local_addr()?.port(), ssh.local_addr()?.port())
        };
        let mut forwards = vec![
            Forward { host: api_port, guest: API_PORT },
            Forward { host: edge_port, guest: EDGE_PORT },
            Forward { host: ssh_port, guest: SSH_PORT },
        ];
        forwards.append(&mut self.forwards);
        if let Some(log) = &self.log_writes {
            File::create(log).with_context(|| format!("cannot make {}", log.display()))?;
        }
        let console = self.directory.join("console.log");
        if console.exists() {
            fs::rename(&console, self.directory.join("console.log.1"))?;
        }
        let qmp = self.directory.join("qmp");
        let _ = fs::remove_file(&qmp);
        let cpus = self.cpus.unwrap_or_else(|| choice.accelerator.processors());
        let mut words = choice.accelerator.kernel_arguments(cpus);
        words.extend(self.kernel_arguments.iter().cloned());
        let machine = Machine {
            accelerator: choice.accelerator,
            memory_mib: self.memory_mib,
            cpus,
            uuid: self.uuid()?,
            boot: self.boot_method(&words)?,
            disk,
            log_writes: self.log_writes.clone(),
            forwards,
            restricted: self.restricted,
            network_extra: self.network_extra.clone(),
            smbios_files: self.write_smbios(&words)?,
            console: console.clone(),
            qmp: qmp.clone(),
            load_snapshot: self.snapshot.clone(),
            extra: self.extra.clone(),
        };
        let child = start(&machine, &self.directory)?;
        let mut running = Running {
            child: Some(child),
            temporary: self.temporary,
            choice,
            operator,
            console: Console::at(console),
            qmp,
            api_port,
            edge_port,
            ssh_port,
        };
        running.wait_for_monitor(&self.directory.join("qemu.log"))?;
        Ok(running)
    }

    fn ready_disk(&self) -> Result<Disk> {
        if let Some(disk) = &self.disk {
            return Ok(disk.clone());
        }
        let path = self.directory.join("disk.qcow2");
        if path.exists() {
            return Ok(Disk { path, format: "qcow2" });
        }
        disk::overlay(&self.image, path, self.disk_gib)
    }

    fn boot_method(&self, words: &[String]) -> Result<Boot> {
        if self.uefi {
            let firmware = Path::new("/usr/share/OVMF");
            let variables = self.directory.join("uefi-variables.fd");
            if !variables.exists() {
                fs::copy(firmware.join("OVMF_VARS_4M.fd"), &variables)
                    .context("no UEFI firmware; run `make tools`")?;
            }
            return Ok(Boot::Uefi { code: firmware.join("OVMF_CODE_4M.fd"), variables });
        }
        let mut command_line = self.image.command_line()?;
        for word in words {
            command_line.push(' ');
            command_line.push_str(word);
        }
        Ok(Boot::Direct { kernel: self.image.kernel(), initrd: self.image.initrd(), command_line })
    }

    /// One file per credential, readable by us alone; and one with the words that the boot loader of a UEFI boot adds to its
    /// image's command line.
    fn write_smbios(&self, words: &[String]) -> Result<Vec<PathBuf>> {
        let directory = self.directory.join("credentials");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir(&directory)?;
        fs::set_permissions(&directory, Permissions::from_mode(0o700))?;
        let mut files = Vec::new();
        for (name, value) in &self.credentials {
            let path = directory.join(name);
            let value = base64::engine::general_purpose::STANDARD.encode(value);
            fs::write(&path, format!("io.systemd.credential.binary:{name}={value}"))?;
            files.push(path);
        }
        if self.uefi && !words.is_empty() {
            let path = directory.join("command-line");
            fs::write(&path, format!("io.systemd.stub.kernel-cmdline-extra={}", words.join(" ")))?;
            files.push(path);
        }
        Ok(files)
    }

    /// The firmware's identity: made once per directory, because the appliance's machine-id follows from it.
    fn uuid(&self) -> Result<String> {
        let path = self.directory.join("uuid");
        if let Ok(uuid) = fs::read_to_string(&path) {
            return Ok(uuid.trim().to_owned());
        }
        let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
        fs::write(&path, &uuid)?;
        Ok(uuid.trim().to_owned())
    }
}

fn free_port(wanted: Option<u16>) -> Result<TcpListener> {
    let port = wanted.unwrap_or(0);
    TcpListener::bind((Ipv4Addr::LOCALHOST, port))
        .with_context(|| format!("port {port} of this machine is in use"))
}

/// The emulator that `image/tools` put into the cache, or the machine's own.
fn emulator() -> Result<PathBuf> {
    let own = crate::image::cache()?.join("tools/bin/qemu-system-x86_64");
    Ok(if own.exists() { own } else { PathBuf::from("qemu-system-x86_64") })
}

fn start(machine: &Machine, directory: &Path) -> Result<Child> {
    let log = File::create(directory.join("qemu.log"))?;
    Command::new(emulator()?)
        .args(machine.arguments())
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Ctrl-C at the terminal is for us; whether the machine ends with us is our decision.
        .process_group(0)
        .spawn()
        .context("cannot run qemu-system-x86_64; run `make tools`")
}
