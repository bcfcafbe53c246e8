//! The daemon as it really runs: not root, and with files of other users in the directories that it removes.
//! This test program starts itself again as that user, step by step.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    process::{Command, Stdio},
};

use super::disk::{DISK_MIB, Disk, GROUP, list, spec, volume};
use nix::unistd::Gid;
use pandastack_bus::{
    Error,
    storage::{Fill, Purpose, StorageBackend as _},
};
use pandastack_storage::{Config, Manager, layout::Sources};

const DAEMON: u32 = 45_990;
const FIRECRACKER: u32 = 45_992;
const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbbbbbb";

/// A step of the tests below: does nothing unless it was started by one of them.
#[tokio::test]
async fn step() {
    let Ok(step) = std::env::var("PANDASTACK_TEST_STEP") else { return };
    let path = |name| std::env::var_os(name).unwrap().into();
    let image: std::path::PathBuf = path("PANDASTACK_TEST_IMAGE");
    let sources = Sources {
        templates: image.join("templates"),
        firecracker: image.join("firecracker"),
        vmlinux: image.join("vmlinux"),
        initrd: image.join("initrd.img"),
    };
    let state: std::path::PathBuf = path("PANDASTACK_TEST_STATE");
    let differences = state.join("differences");
    let manager =
        Manager::open(Config { state, differences, sources, group: Some(Gid::from_raw(GROUP)) }).unwrap();
    manager.import_all().await;
    match step.as_str() {
        "make" => {
            for id in [A, B] {
                assert!(manager.prepare(id.into()).await.unwrap());
                manager.fill(id.into(), "base".into(), Fill::Pristine, 0).await.unwrap();
                manager.prepare_capture(id.into()).await.unwrap();
            }
        }
        "begin" => {
            manager.seal_template(B.into(), "base".into()).await.unwrap();
            assert!(manager.release(A.into()).await.unwrap());
            assert!(manager.prepare(A.into()).await.unwrap());
            manager.fill(A.into(), "base".into(), Fill::Baked, 0).await.unwrap();
            manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
            let uses = vec![volume("data", false)];
            manager.hold_volumes(A.into(), "work".into(), uses.clone()).await.unwrap();
            manager.insert_volumes(A.into(), A.into(), "work".into(), uses).await.unwrap();
            manager.begin_capture(A.into()).await.unwrap();
        }
        "commit" => {
            manager.capture_disks(A.into(), true).await.unwrap();
            manager.commit_capture(A.into(), spec(A, Purpose::Snapshot)).await.unwrap();
            assert!(manager.release(B.into()).await.unwrap());
            assert!(manager.prepare(B.into()).await.unwrap());
            manager.fill_snapshot(B.into(), A.into()).await.unwrap();
        }
        "seal" => manager.seal_template(B.into(), "base".into()).await.unwrap(),
        "release" => assert!(manager.release(A.into()).await.unwrap()),
        "release in part" => {
            let outcome = manager.release(A.into()).await;
            assert!(
                matches!(&outcome, Err(Error::Internal(text)) if text.contains("/s/deep")),
                "{outcome:?}"
            );
            assert!(!manager.release(A.into()).await.unwrap(), "it has vanished all the same");
        }
        other => panic!("{other}"),
    }
}

fn run(disk: &Disk, step: &str) {
    let output = Command::new("setpriv")
        .args([
            "--reuid",
            &DAEMON.to_string(),
            "--regid",
            &DAEMON.to_string(),
            "--groups",
            &GROUP.to_string(),
        ])
        .arg("--inh-caps=-all")
        .arg(disk.dir.path().join("program"))
        .args(["unprivileged::step", "--exact", "--nocapture"])
        .env("PANDASTACK_TEST_STEP", step)
        .env("PANDASTACK_TEST_STATE", &disk.state)
        .env("PANDASTACK_TEST_IMAGE", disk.dir.path().join("image"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{step}: {}{text}", String::from_utf8_lossy(&output.stdout));
}

fn mount() -> Option<Disk> {
    let disk = Disk::mount(&[])?;
    fs::set_permissions(disk.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // The build directory may be closed to that user.
    let program = disk.dir.path().join("program");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    chown(&disk.state, Some(DAEMON), Some(DAEMON)).unwrap();
    run(&disk, "make");
    Some(disk)
}

/// A file or directory that Firecracker made.
fn planted(path: &std::path::Path) {
    chown(path, Some(FIRECRACKER), Some(GROUP)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
}

/// Reads or writes as Firecracker would.
fn firecracker(script: &str) -> bool {
    let (user, group) = (FIRECRACKER.to_string(), GROUP.to_string());
    let mut command = Command::new("setpriv");
    command.args(["--reuid", &user, "--regid", &group, "--clear-groups", "sh", "-c", script]);
    command.stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn a_directory_with_files_of_others_is_released() {
    let Some(disk) = mount() else { return };
    let sockets = disk.sandbox(A).join("s");
    let _socket = std::os::unix::net::UnixListener::bind(sockets.join("api.sock")).unwrap();
    planted(&sockets.join("api.sock"));
    fs::create_dir(sockets.join("empty")).unwrap();
    planted(&sockets.join("empty"));
    let secret = disk.dir.path().join("secret");
    fs::write(&secret, "stays").unwrap();
    std::os::unix::fs::symlink(&secret, sockets.join("link")).unwrap();
    std::os::unix::fs::symlink(disk.dir.path(), sockets.join("folder")).unwrap();

    run(&disk, "release");

    assert!(!disk.sandbox(A).exists());
    assert!(disk.sandbox(B).exists());
    assert_eq!(fs::read(&secret).unwrap(), b"stays");
    assert!(list(&disk.state.join("trash")).is_empty());
}

#[test]
fn what_cannot_be_removed_is_reported_and_everything_else_goes() {
    let Some(disk) = mount() else { return };
    let deep = disk.sandbox(A).join("s/deep");
    fs::create_dir(&deep).unwrap();
    fs::write(deep.join("file"), "x").unwrap();
    planted(&deep);

    run(&disk, "release in part");

    assert!(!disk.sandbox(A).exists());
    let trash = list(&disk.state.join("trash"));
    assert_eq!(trash.len(), 1);
    assert_eq!(list(&trash[0]), [trash[0].join("s")], "the disk and the links are gone");
}

#[test]
fn firecracker_can_use_its_directory_and_change_nothing_in_it() {
    let Some(disk) = mount() else { return };
    let folder = disk.sandbox(B);
    let at = folder.display();
    // The unit binds the directory; here everything above it is opened instead.
    for above in [disk.state.clone(), disk.state.join("sandboxes")] {
        fs::set_permissions(above, fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert!(firecracker(&format!("test -x {at}/firecracker && cat {at}/vmlinux {at}/initrd.img >/dev/null")));
    assert!(firecracker(&format!(
        "echo memory >{at}/mem && echo registers >{at}/state && echo x >>{at}/root.img"
    )));
    assert!(firecracker(&format!("touch {at}/s/api.sock")));
    for script in [
        "rm {}/mem",
        "mv {}/mem {}/x",
        "touch {}/new",
        "echo x >{}/vmlinux",
        "echo x >{}/firecracker",
        "chmod 777 {}/mem",
        "rm -r {}/s",
    ] {
        assert!(!firecracker(&script.replace("{}", &at.to_string())), "{script}");
    }
    fs::File::options().write(true).open(folder.join("root.img")).unwrap().set_len(DISK_MIB << 20).unwrap();

    run(&disk, "seal");

    for name in ["mem", "state", "root.img"] {
        assert!(!firecracker(&format!("echo x >>{at}/{name}")), "{name} is sealed");
        assert!(firecracker(&format!("cat {at}/{name} >/dev/null")), "{name} can be read");
    }
}

#[test]
fn firecracker_writes_its_part_of_a_capture_and_nothing_of_a_snapshot() {
    let Some(disk) = mount() else { return };
    for above in [disk.state.clone(), disk.state.join("sandboxes")] {
        fs::set_permissions(above, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let (parent, child) = (disk.sandbox(A), disk.sandbox(B));
    let at = child.display();
    assert!(firecracker(&format!("truncate -s 1M {at}/mem && echo registers >{at}/state")));
    run(&disk, "begin");
    fs::set_permissions(disk.state.join("sandboxes"), fs::Permissions::from_mode(0o755)).unwrap();
    let at = parent.display();
    assert!(firecracker(&format!(
        "echo pages | dd of={at}/c.mem conv=notrunc && echo registers >{at}/c.state"
    )));
    assert!(firecracker(&format!("echo x | dd of={at}/w0.img conv=notrunc bs=1 seek=4194304")));
    for script in
        ["rm {}/c.mem", "mv {}/c.state {}/x", "ln -sf /etc/passwd {}/c.root.img", "echo x >>{}/r0.img"]
    {
        assert!(!firecracker(&script.replace("{}", &at.to_string())), "{script}");
    }

    run(&disk, "commit");

    fs::set_permissions(disk.state.join("sandboxes"), fs::Permissions::from_mode(0o755)).unwrap();
    for folder in [parent, child] {
        let at = folder.display();
        assert!(firecracker(&format!("cat {at}/mem {at}/state {at}/r0.img >/dev/null")));
        assert!(firecracker(&format!("echo x | dd of={at}/w0.img conv=notrunc")));
        for name in ["mem", "state", "r0.img"] {
            assert!(!firecracker(&format!("echo x >>{at}/{name}")), "{name}");
        }
    }
}
