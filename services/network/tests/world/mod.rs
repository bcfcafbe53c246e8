//! A world of network namespaces: the appliance, the internet, sandboxes and guests. Nothing of it is connected to the
//! machine that the test runs on, so nothing leaves it, whatever the rules under test do.
//!
//! ```text
//!   guest ── (frames copied) ── tap0 [sandbox] up0 ── v… [appliance] uplink 203.0.113.2 ── 203.0.113.1 [internet]
//! ```
#![allow(dead_code, reason = "each test file uses its part of the world")]

pub mod probe;

use std::{
    fs::File,
    future::Future,
    io::{Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
};

use nix::{
    libc,
    sched::{CloneFlags, setns, unshare},
};
use pandastack_bus::{SandboxId, network::Attachment};
use pandastack_network::{
    manager::{Config, Manager},
    tap,
};

/// Addresses that the internet answers on, each with what it stands for.
pub const PUBLIC: &str = "198.51.100.10";
/// Must never be reached by a guest.
pub const CLOSED: [&str; 8] = [
    "10.9.9.9",
    "169.254.169.254",
    "192.168.7.7",
    "172.16.3.3",
    "100.64.1.1",
    "192.0.0.8",
    "198.18.0.9",
    "240.1.2.3",
];
/// The appliance's own address.
pub const APPLIANCE: &str = "203.0.113.2";

/// A namespace that lives as long as a process that sleeps in it.
#[derive(Debug)]
pub struct Space {
    process: Child,
    file: File,
}

impl Space {
    /// A fresh namespace with its loopback interface up, as PID 1 leaves it.
    pub fn new() -> Self {
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null());
        // SAFETY: `unshare` is a single system call, which is all that runs between fork and exec.
        unsafe { command.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWNET)?)) };
        let process = command.spawn().expect("a process in a namespace of its own");
        let file = File::open(format!("/proc/{}/ns/net", process.id())).expect("its namespace");
        let space = Self { process, file };
        space.ip("link set lo up");
        space
    }

    /// A descriptor of the process, as the conductor sends it.
    pub fn pidfd(&self) -> OwnedFd {
        pidfd(self.process.id())
    }

    /// Runs something in the namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET).expect("entering the namespace");
                work()
            });
            inside.join().expect("the work in the namespace")
        })
    }

    /// Runs `ip` in the namespace.
    pub fn ip(&self, arguments: &str) -> String {
        self.run(|| tool("ip", arguments))
    }

    /// Ends the process; the namespace goes when the kernel gets to it.
    pub fn end(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.end();
    }
}

/// A pidfd of any process.
pub fn pidfd(process: u32) -> OwnedFd {
    // SAFETY: the call takes two numbers and answers a new descriptor or -1.
    let descriptor = unsafe { libc::syscall(libc::SYS_pidfd_open, process, 0) };
    assert!(descriptor >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor is fresh and nobody else's.
    unsafe { OwnedFd::from_raw_fd(i32::try_from(descriptor).expect("a descriptor")) }
}

/// Runs a program in the calling thread's namespace; answers what it printed.
pub fn tool(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split(' ')).output().expect("the program runs");
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments}: {complaint}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The appliance with its uplink; the test runs inside.
#[derive(Debug)]
pub struct World {
    /// Everything beyond the uplink.
    pub internet: Space,
    /// State of the daemon.
    pub state: tempfile::TempDir,
}

impl World {
    /// Runs a test in a new world, or says why there can be none and returns.
    pub fn run<Fut: Future<Output = ()>>(test: impl FnOnce(Arc<Self>) -> Fut + Send) {
        if let Some(reason) = impossible() {
            println!("skipped: {reason}");
            return;
        }
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).expect("a namespace for the appliance");
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()
                    .expect("a runtime in the namespace");
                runtime.block_on(async { test(Arc::new(Self::new())).await });
            });
            if let Err(panic) = inside.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn new() -> Self {
        let internet = Space::new();
        tool("ip", "link set lo up");
        let namespace = format!("link add uplink type veth peer name world netns {}", internet.process.id());
        tool("ip", &namespace);
        tool("ip", &format!("addr add {APPLIANCE}/24 dev uplink"));
        tool("ip", "link set uplink up");
        internet.ip("addr add 203.0.113.1/24 dev world");
        internet.ip("link set world up");
        for address in CLOSED.iter().chain(&[PUBLIC]) {
            internet.ip(&format!("addr add {address}/32 dev lo"));
        }
        tool("ip", "route add default via 203.0.113.1");
        // A neighbour on the same wire who knows our nets: only the appliance's own rules stand in the way.
        internet.ip("route add 10.200.0.0/16 via 203.0.113.2");
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").expect("forwarding in the appliance");
        Self { internet, state: tempfile::tempdir().expect("a directory") }
    }

    /// The daemon over this world's state.
    pub async fn manager(&self) -> Manager {
        Manager::start(self.config()).await.expect("the manager starts")
    }

    /// What the daemon is told.
    pub fn config(&self) -> Config {
        Config { records: self.state.path().join("owners"), nft: nft(), tap_group: Some(12_345) }
    }
}

fn nft() -> PathBuf {
    ["/usr/sbin/nft", "/sbin/nft"]
        .map(PathBuf::from)
        .into_iter()
        .find(|path| path.exists())
        .expect("nft is installed")
}

/// Why this machine cannot play the world, if it cannot.
fn impossible() -> Option<String> {
    if !["/usr/sbin/nft", "/sbin/nft"].iter().any(|path| Path::new(path).exists()) {
        return Some("nft is not installed".to_owned());
    }
    let attempt = std::thread::spawn(|| -> Result<(), String> {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|error| format!("no network namespace: {error}"))?;
        let works = |program: &str, arguments: &str| match Command::new(program)
            .args(arguments.split(' '))
            .output()
        {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                Err(format!("{program} {arguments}: {}", String::from_utf8_lossy(&output.stderr).trim()))
            }
            Err(error) => Err(format!("{program}: {error}")),
        };
        works("ip", "link add one type veth peer name two")?;
        works("nft", "add table inet attempt")?;
        tap::open("attempt", tap::Kind::Tap).map(drop).map_err(|error| error.to_string())
    });
    attempt.join().expect("the attempt").err()
}

/// A sandbox with a guest in it.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// The namespace of its unit.
    pub space: Space,
    /// What the daemon answered.
    pub attachment: Attachment,
    /// The machine at the other end of the tap.
    pub guest: Space,
}

impl Sandbox {
    /// Attaches a new sandbox, and plugs a guest into its tap.
    pub async fn new(manager: &Manager) -> Self {
        let (id, space) = (SandboxId::random(), Space::new());
        let attachment = manager.attach(id.as_str(), space.pidfd()).await.expect("attached");
        let guest = plug(&space);
        Self { id, space, attachment, guest }
    }
}

/// A guest with the baked addresses, whose network card is wired to the tap of a sandbox: each frame is copied.
fn plug(sandbox: &Space) -> Space {
    let guest = Space::new();
    let card = guest.run(|| tap::open("eth0", tap::Kind::Tap)).expect("the guest's card");
    let tap = sandbox.run(|| tap::open("tap0", tap::Kind::Tap)).expect("the sandbox's tap");
    wire(&card, &tap);
    wire(&tap, &card);
    guest.ip("link set eth0 address 06:00:ac:1f:ff:02 mtu 1450");
    guest.ip("addr add 172.31.255.2/30 dev eth0");
    guest.ip("link set eth0 up");
    guest.ip("route add default via 172.31.255.1");
    guest
}

fn wire(from: &File, to: &File) {
    let (mut from, mut to) = (from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"));
    std::thread::spawn(move || {
        let mut frame = vec![0; 70_000];
        loop {
            match from.read(&mut frame) {
                // A frame for an interface that is down is lost, as on any wire.
                Ok(length) => drop(to.write(&frame[..length])),
                // A card that is not up yet or any more.
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(20)),
            }
        }
    });
}
