//! The daemon on a private bus, through the proxy that its callers use.

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::Duration,
};

use futures_util::StreamExt as _;
use nix::unistd::Gid;
use pandastack_bus::{
    Error,
    storage::{Fill, StorageProxy, TemplateState},
    zbus,
};
use pandastack_storage::{Config, layout::Sources, serve};

use super::disk::{Disk, GROUP};

const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const PATIENCE: Duration = Duration::from_secs(20);

/// The daemon: does nothing unless it was started by the test below.
#[test]
fn daemon() {
    let Some(image) = std::env::var_os("PANDASTACK_TEST_DAEMON") else { return };
    let image = std::path::PathBuf::from(image);
    let sources = Sources {
        templates: image.join("templates"),
        firecracker: image.join("firecracker"),
        vmlinux: image.join("vmlinux"),
        initrd: image.join("initrd.img"),
    };
    let code = pandastack_daemon::run("storage-test", |ctx| {
        let state = ctx.state_dir().to_owned();
        let differences = state.join("differences");
        let config = Config { state, differences, sources, group: Some(Gid::from_raw(GROUP)) };
        serve(ctx, config)
    });
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn it_serves_its_interface_signals_and_errors_and_stops() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let Some((_bus, address)) = start_bus() else { return };
    let connection = zbus::connection::Builder::address(address.as_str()).build().await.unwrap();
    let storage = StorageProxy::new(&connection).await.unwrap();
    let mut changes = storage.receive_template_changed().await.unwrap();
    let mut daemon = Process(
        Command::new(std::env::current_exe().unwrap())
            .args(["bus::daemon", "--exact", "--nocapture"])
            .env("PANDASTACK_TEST_DAEMON", disk.dir.path().join("image"))
            .env("STATE_DIRECTORY", &disk.state)
            .env("DBUS_SYSTEM_BUS_ADDRESS", &address)
            .stdout(Stdio::null())
            .spawn()
            .unwrap(),
    );

    let change = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap();
    let change = change.args().unwrap();
    assert_eq!((change.name, change.state), ("base", "unbaked"));
    let found = storage.template("base-alias".into()).await.unwrap();
    assert_eq!((found.name.as_str(), found.state), ("base", TemplateState::Unbaked));
    assert!(storage.prepare(A.into()).await.unwrap());
    let refused = storage.fill(A.into(), "base".into(), Fill::Baked, 0).await;
    assert!(matches!(&refused, Err(Error::NotReady(text)) if text.contains("base")), "{refused:?}");
    storage.fail_template("base".into(), "the guest did not answer".into()).await.unwrap();
    let change = tokio::time::timeout(PATIENCE, changes.next()).await.unwrap().unwrap();
    assert_eq!(change.args().unwrap().state, "failed");
    assert!(storage.release(A.into()).await.unwrap());
    assert!(storage.usage().await.unwrap().free_bytes > 0);

    let pid = nix::unistd::Pid::from_raw(daemon.0.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    let status = tokio::task::spawn_blocking(move || daemon.0.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
}

/// A private bus; `None`, with a printed reason, where no `dbus-daemon` is installed.
fn start_bus() -> Option<(Process, String)> {
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
    Some((Process(process), address.trim().to_owned()))
}
