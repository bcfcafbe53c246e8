//! A bare restore: what Firecracker alone needs for what a create does, prepared the same way.
//!
//! Same template, memory file in page cache, tap there, reflink made. Timed: the process is started, the snapshot is
//! loaded and resumed, the agent answers its first `Hello`.

use std::{
    fs, io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use pandastack_protocol::Client;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

use crate::http::Connection;

/// Microseconds of each step.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// Process start to API socket.
    pub spawn: f64,
    /// Load and resume.
    pub load: f64,
    /// First answered `Hello`.
    pub hello: f64,
}

impl Timing {
    /// All of it.
    pub fn total(&self) -> f64 {
        self.spawn + self.load + self.hello
    }
}

/// A guest restored without any service of ours; killed and removed when dropped.
#[derive(Debug)]
pub struct Bare {
    child: Child,
    dir: PathBuf,
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Size of what stands where a volume may be put, bytes; as storage makes it.
const PLACEHOLDER: u64 = 1 << 20;
const TUNSETIFF: nix::libc::c_ulong = 0x4004_54ca;

mod ioctls {
    nix::ioctl_write_int_bad!(
        /// `TUNSETPERSIST`: the tap outlives the descriptor that made it.
        tun_set_persist,
        0x4004_54cb
    );
    nix::ioctl_write_int_bad!(
        /// `FICLONE`: shares the blocks of another file.
        file_clone,
        0x4004_9409
    );
}

/// Restores a guest from the files of `bake` (`mem`, `state`, `root.img`) and placeholder drives in a directory below
/// `scratch`, which must be on the same file system.
pub async fn restore(bake: &Path, firecracker: &Path, scratch: &Path, name: &str) -> Result<(Bare, Timing)> {
    let dir = scratch.join(name);
    fs::create_dir_all(dir.join("s"))?;
    for file in ["mem", "state"] {
        fs::hard_link(bake.join(file), dir.join(file)).with_context(|| format!("linking {file}"))?;
    }
    reflink(&bake.join("root.img"), &dir.join("root.img"))?;
    for kind in ["w", "r"] {
        for number in 0..4 {
            let drive = fs::File::create_new(dir.join(format!("{kind}{number}.img")))?;
            drive.set_len(PLACEHOLDER).context("a placeholder drive")?;
        }
    }

    let started = Instant::now();
    let child = spawn(firecracker, &dir)?;
    let bare = Bare { child, dir: dir.clone() };
    let api = connect(&dir.join("s/api.sock")).await?;
    let spawn = micros(started);

    let mut http = Connection::over(api).await?;
    let load = json!({
        "snapshot_path": "/vm/state",
        "mem_backend": {"backend_type": "File", "backend_path": "/vm/mem"},
        "enable_diff_snapshots": true,
        "resume_vm": true,
    });
    let before = Instant::now();
    http.call("PUT", "/snapshot/load", None, Some(&load)).await?;
    let loaded = micros(before);

    let before = Instant::now();
    let _client = greet(&dir.join("s/v.sock")).await?;
    Ok((bare, Timing { spawn, load: loaded, hello: micros(before) }))
}

/// Dials the agent behind Firecracker's host socket until it greets back.
pub async fn greet(socket: &Path) -> Result<Client<UnixStream>> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match try_greet(socket).await {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

async fn try_greet(socket: &Path) -> Result<Client<UnixStream>> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {}\n", pandastack_protocol::PORT).as_bytes()).await?;
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        if line.len() > 32 {
            bail!("no OK from Firecracker");
        }
        line.push(stream.read_u8().await?);
    }
    Ok(Client::greet(stream, u64::from(std::process::id()), Duration::from_secs(2)).await?)
}

fn spawn(firecracker: &Path, dir: &Path) -> Result<Child> {
    let dir = dir.to_owned();
    let mut command = Command::new(firecracker);
    command.args(["--api-sock", "/vm/s/api.sock", "--id", "bare"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let prepare = move || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some(&dir), "/vm", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        make_tap()
    };
    // SAFETY: the closure makes system calls on data it owns; it runs in a child of a process whose other threads hold
    // no lock that it takes.
    unsafe {
        use std::os::unix::process::CommandExt;
        command.pre_exec(prepare);
    }
    command.spawn().context("starting Firecracker")
}

fn make_tap() -> io::Result<()> {
    let tun = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0u8; 40];
    request[..4].copy_from_slice(b"tap0");
    // IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    request[16..18].copy_from_slice(&0x5002u16.to_ne_bytes());
    // SAFETY: the request is a whole `struct ifreq` and outlives the call.
    if unsafe { nix::libc::ioctl(tun.as_raw_fd(), TUNSETIFF, request.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes a plain number.
    unsafe { ioctls::tun_set_persist(tun.as_raw_fd(), 1) }?;
    Ok(())
}

fn reflink(from: &Path, to: &Path) -> Result<()> {
    let (source, target) = (fs::File::open(from)?, fs::File::create(to)?);
    // SAFETY: both descriptors are open files.
    unsafe { ioctls::file_clone(target.as_raw_fd(), source.as_raw_fd()) }.context("reflink")?;
    Ok(())
}

async fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(error).context("Firecracker's socket"),
            Err(_) => tokio::time::sleep(Duration::from_micros(500)).await,
        }
    }
}

fn micros(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e6
}
