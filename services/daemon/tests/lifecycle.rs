//! A daemon's life as PID 1 sees it: this test program starts itself again as the daemon, on a private bus.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

use std::{
    io::{BufRead, BufReader},
    os::unix::net::UnixDatagram,
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use pandastack_daemon::{Context, run};

const PATIENCE: Duration = Duration::from_secs(20);

/// The daemon under test: does nothing unless it was started by a test below.
#[test]
fn daemon() {
    let Ok(mode) = std::env::var("PANDASTACK_TEST_DAEMON") else { return };
    let code = run("probe", move |ctx: Context| async move {
        if mode == "fails" {
            return Err(std::io::Error::other("no luck"));
        }
        assert_eq!(ctx.credential("token")?.as_deref(), Some(&b"s3cret"[..]));
        assert_eq!(ctx.credential("absent")?, None);
        assert!(ctx.credential("../token").is_err());
        assert!(ctx.state_dir().is_dir());
        let mut reloads = ctx.reloads();
        // Work that does not end by itself does not keep the daemon from ending.
        tokio::task::spawn_blocking(|| std::thread::sleep(10 * PATIENCE));
        ctx.watchdog(|| async {});
        ctx.ready("serving\nnot another line");
        tokio::select! {
            () = ctx.stopped() => Ok(()),
            () = async { loop { reloads.changed().await.unwrap(); ctx.status(&format!("reload {}", *reloads.borrow())); } } => Ok(()),
        }
    });
    std::process::exit(if code == std::process::ExitCode::SUCCESS { 0 } else { 7 });
}

#[test]
fn it_becomes_ready_is_watched_reloads_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let Some(bus) = Bus::start() else { return };
    let pid1 = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    pid1.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut daemon = start("works", dir.path(), &bus.address);
    let pid = Pid::from_raw(daemon.0.id().cast_signed());

    assert_eq!(receive(&pid1), "READY=1\nSTATUS=serving\n");
    assert_eq!(receive(&pid1), "WATCHDOG=1\n");
    assert_eq!(receive(&pid1), "WATCHDOG=1\n");

    kill(pid, Signal::SIGHUP).unwrap();
    let mut told = Vec::new();
    while told.len() < 3 {
        let text = receive(&pid1);
        if text != "WATCHDOG=1\n" {
            told.push(text);
        }
    }
    assert!(told[0].starts_with("RELOADING=1\nMONOTONIC_USEC="), "{told:?}");
    told[1..].sort();
    assert_eq!(told[1..], ["READY=1\n", "STATUS=reload 1\n"]);

    kill(pid, Signal::SIGTERM).unwrap();
    while receive(&pid1) != "STOPPING=1\n" {}
    assert_eq!(daemon.wait().code(), Some(0));
}

#[test]
fn an_error_of_the_body_is_its_exit_code() {
    let dir = tempfile::tempdir().unwrap();
    let Some(bus) = Bus::start() else { return };
    assert_eq!(start("fails", dir.path(), &bus.address).wait().code(), Some(7));
}

#[test]
fn without_a_bus_it_fails_instead_of_waiting() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(start("works", dir.path(), "unix:path=/nonexistent/bus").wait().code(), Some(7));
}

#[test]
fn a_stuck_bus_is_not_petted_away() {
    let dir = tempfile::tempdir().unwrap();
    let Some(bus) = Bus::start() else { return };
    let pid1 = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    pid1.set_read_timeout(Some(PATIENCE)).unwrap();
    let _daemon = start("works", dir.path(), &bus.address);
    while receive(&pid1) != "WATCHDOG=1\n" {}

    kill(Pid::from_raw(bus.process.id().cast_signed()), Signal::SIGSTOP).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    pid1.set_nonblocking(true).unwrap();
    while pid1.recv(&mut [0; 512]).is_ok() {}
    std::thread::sleep(Duration::from_secs(1));
    assert!(pid1.recv(&mut [0; 512]).is_err(), "petted although nobody can reach it");
}

#[test]
fn with_its_bus_it_ends_and_can_be_started_anew() {
    let dir = tempfile::tempdir().unwrap();
    let Some(bus) = Bus::start() else { return };
    let pid1 = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    pid1.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut daemon = start("works", dir.path(), &bus.address);
    assert_eq!(receive(&pid1), "READY=1\nSTATUS=serving\n");

    drop(bus);

    assert_eq!(daemon.wait().code(), Some(7));
    while receive(&pid1) != "STATUS=the connection to the system bus was lost\n" {}
}

struct Daemon(Child);

impl Daemon {
    fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("it did not end");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(mode: &str, dir: &Path, bus: &str) -> Daemon {
    for name in ["state", "credentials"] {
        std::fs::create_dir(dir.join(name)).unwrap();
    }
    std::fs::write(dir.join("credentials/token"), b"s3cret").unwrap();
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["daemon", "--exact", "--nocapture"])
        .env("PANDASTACK_TEST_DAEMON", mode)
        .env("NOTIFY_SOCKET", dir.join("notify"))
        .env("WATCHDOG_USEC", "400000")
        .env("STATE_DIRECTORY", dir.join("state"))
        .env("CREDENTIALS_DIRECTORY", dir.join("credentials"))
        .env("DBUS_SYSTEM_BUS_ADDRESS", bus)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Daemon(child)
}

fn receive(socket: &UnixDatagram) -> String {
    let mut bytes = [0; 512];
    let length = socket.recv(&mut bytes).expect("PID 1 is told something in time");
    String::from_utf8(bytes[..length].to_vec()).unwrap()
}

struct Bus {
    process: Child,
    address: String,
}

impl Bus {
    /// A private bus; `None`, with a printed reason, where no `dbus-daemon` is installed.
    fn start() -> Option<Self> {
        let mut command = Command::new("dbus-daemon");
        command.args(["--session", "--nofork", "--nopidfile", "--print-address=1"]).stdout(Stdio::piped());
        let mut process = match command.spawn() {
            Ok(process) => process,
            Err(error) => {
                println!("skipped: dbus-daemon cannot be started: {error}");
                return None;
            }
        };
        let mut address = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut address).unwrap();
        Some(Self { process, address: address.trim().to_owned() })
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
