//! Captures on a real XFS: what a machine runs on is known exactly when it is, whatever ends in the middle.

use std::{fs, os::unix::fs::symlink};

use super::disk::{Disk, GROUP, MEMORY, PREPARED, access, bytes, fill_up, inode, list, spec, volume};
use pandastack_bus::{
    Error,
    storage::{CaptureKind, Purpose, SnapshotSpec, StorageBackend as _},
};

const M: &str = "mmmmmmmmmmmmmmmmmmmm";
const N: &str = "nnnnnnnnnnnnnnnnnnnn";
const ONE: &str = "11111111111111111111";
const TWO: &str = "22222222222222222222";

/// Files of an unfinished capture.
fn unfinished(disk: &Disk) -> usize {
    let captured = |path: &std::path::PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("c.");
    list(&disk.sandbox(M)).iter().filter(|path| captured(path)).count()
}

#[tokio::test]
async fn a_diff_goes_over_a_copy_of_the_base_and_is_the_base_afterwards() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let (folder, base) = (disk.sandbox(M), disk.bake("base").unwrap().join("mem"));
    disk.guest_writes(M, "root.img", 8 << 20, b"before");

    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Diff);
    assert!(!folder.join("mem").exists(), "what it runs on is not known");
    assert_ne!(inode(&folder.join("c.mem")), inode(&base));
    assert!(fs::read(folder.join("c.mem")).unwrap() == fs::read(&base).unwrap());
    for name in ["c.mem", "c.state"] {
        assert_eq!(access(&folder.join(name)), (0o660, GROUP), "{name}");
    }
    disk.firecracker_writes(M, b'x');
    manager.capture_disks(M.into(), false).await.unwrap();
    disk.guest_writes(M, "root.img", 8 << 20, b"after!");
    let info = manager.commit_capture(M.into(), spec(ONE, Purpose::Snapshot)).await.unwrap();

    let snapshot = disk.snapshot(ONE);
    assert_eq!((info.unusable.as_str(), &info.spec), ("", &spec(ONE, Purpose::Snapshot)));
    assert!(info.size_bytes >= MEMORY as u64);
    let mut memory = vec![b'a'; MEMORY];
    memory[8192..12288].fill(b'x');
    assert!(fs::read(snapshot.join("mem")).unwrap() == memory);
    assert_eq!(bytes(&snapshot.join("root.img"), 8 << 20, 6), b"before");
    assert_eq!(inode(&folder.join("mem")), inode(&snapshot.join("mem")));
    for name in ["mem", "state"] {
        assert_eq!(access(&snapshot.join(name)), (0o440, GROUP), "{name}");
    }
    assert_eq!(unfinished(&disk), 0);
    assert!(fs::read(&base).unwrap() == [b'a'; MEMORY], "others run on it");

    // The next one goes over this one.
    let (kind, _) = disk.capture(&manager, M, b'y', spec(TWO, Purpose::Fork)).await;
    assert_eq!(kind, CaptureKind::Diff);
    memory[8192..12288].fill(b'y');
    assert!(fs::read(disk.snapshot(TWO).join("mem")).unwrap() == memory);
    assert_eq!(bytes(&snapshot.join("mem"), 8192, 1), b"x", "a snapshot never changes");
}

#[tokio::test]
async fn a_difference_in_memory_is_laid_over_a_copy_of_the_base() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let difference = disk.differences.join(M);
    assert_eq!(access(&difference), (0o750, GROUP));
    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Diff);
    assert_eq!(access(&difference.join("mem")), (0o660, GROUP));

    disk.firecracker_writes_apart(M, b'x');
    manager.capture_disks(M.into(), false).await.unwrap();
    drop(manager);
    let manager = disk.open();
    manager.commit_capture(M.into(), spec(ONE, Purpose::Fork)).await.unwrap();

    let mut memory = vec![b'a'; MEMORY];
    memory[8192..12288].fill(b'x');
    memory[32768..36864].fill(0);
    assert!(fs::read(disk.snapshot(ONE).join("mem")).unwrap() == memory);
    assert!(!difference.join("mem").exists() && unfinished(&disk) == 0);

    // One that is cut off is no capture.
    manager.begin_capture(M.into()).await.unwrap();
    disk.firecracker_writes_apart(M, b'y');
    let file = fs::File::options().write(true).open(difference.join("mem")).unwrap();
    file.set_len(MEMORY as u64 / 2).unwrap();
    let torn = manager.commit_capture(M.into(), spec(TWO, Purpose::Snapshot)).await;
    assert!(matches!(torn, Err(Error::WrongState(_))), "{torn:?}");
    manager.abort_capture(M.into()).await.unwrap();
    assert!(!difference.join("mem").exists());

    // Without a known base nothing is laid over anything.
    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Full);
    assert!(!difference.join("mem").exists());
    manager.release(M.into()).await.unwrap();
    assert!(!difference.exists());
}

#[tokio::test]
async fn without_a_known_base_all_is_captured() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    manager.begin_capture(M.into()).await.unwrap();
    disk.firecracker_writes(M, b'x');
    manager.capture_disks(M.into(), true).await.unwrap();
    for _ in 0..2 {
        manager.abort_capture(M.into()).await.unwrap();
    }
    assert_eq!(unfinished(&disk), 0);
    manager.abort_capture(N.into()).await.unwrap();

    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Full);
    assert_eq!(fs::metadata(disk.sandbox(M).join("c.mem")).unwrap().len(), 0);
    // Begun again over what the last one left.
    let (kind, _) = disk.capture(&manager, M, b'y', spec(ONE, Purpose::Snapshot)).await;
    assert_eq!(kind, CaptureKind::Full);
    assert_eq!(bytes(&disk.snapshot(ONE).join("mem"), 0, 1), [0]);
    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Diff);

    // A machine that was booted cold does not run on the memory in its directory.
    manager.ensure_kernel(M.into()).await.unwrap();
    assert_eq!(unfinished(&disk), 0);
    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Full);
    // Nor does one whose memory file can be written.
    fs::rename(disk.sandbox(M).join("c.mem"), disk.sandbox(M).join("mem")).unwrap();
    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Full);
}

#[tokio::test]
async fn a_capture_goes_on_after_a_restart_and_wherever_it_ends_the_next_one_is_right() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    drop(manager);

    disk.open().begin_capture(M.into()).await.unwrap();
    disk.firecracker_writes(M, b'x');
    disk.open().capture_disks(M.into(), true).await.unwrap();
    disk.open().commit_capture(M.into(), spec(ONE, Purpose::Snapshot)).await.unwrap();
    let manager = disk.open();
    assert_eq!(manager.snapshot(ONE.into()).await.unwrap().unusable, "");
    assert_eq!(inode(&disk.sandbox(M).join("mem")), inode(&disk.snapshot(ONE).join("mem")));

    for steps in 1..=3 {
        // Ended after so many steps, and nobody goes on.
        let manager = disk.open();
        assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Diff);
        disk.firecracker_writes(M, b'y');
        if steps > 1 {
            manager.capture_disks(M.into(), true).await.unwrap();
        }
        if steps > 2 {
            // Collected, but not published.
            let staged = disk.state.join("staging/snapshot.9");
            fs::create_dir(&staged).unwrap();
            fs::hard_link(disk.sandbox(M).join("c.mem"), staged.join("mem")).unwrap();
        }
        drop(manager);

        let manager = disk.open();
        assert!(list(&disk.state.join("staging")).is_empty());
        assert_eq!(manager.snapshots(String::new()).await.unwrap().len(), 1);
        assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Full, "{steps}");
        disk.firecracker_writes(M, b'z');
        manager.capture_disks(M.into(), true).await.unwrap();
        manager.commit_capture(M.into(), spec(TWO, Purpose::Fork)).await.unwrap();
        assert_eq!(bytes(&disk.snapshot(TWO).join("mem"), 0, 1), [0], "nothing of an older base");
        assert!(manager.delete_snapshot(TWO.into()).await.unwrap());
    }

    // Published, but ended before the machine was told: said again, it is.
    let manager = disk.open();
    disk.capture(&manager, M, b'q', spec(TWO, Purpose::Hibernation)).await;
    let (told, untold) = (disk.sandbox(M).join("mem"), disk.sandbox(M).join("c.mem"));
    fs::rename(&told, &untold).unwrap();
    fs::write(disk.sandbox(M).join("c.state"), "registers").unwrap();
    drop(manager);
    let manager = disk.open();
    manager.commit_capture(M.into(), spec(TWO, Purpose::Hibernation)).await.unwrap();
    assert_eq!((told.exists(), unfinished(&disk)), (true, 0));
    fs::rename(&told, &untold).unwrap();
    assert_eq!(disk.open().begin_capture(M.into()).await.unwrap(), CaptureKind::Full);
}

#[tokio::test]
async fn a_commit_may_be_said_again() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let (_, info) = disk.capture(&manager, M, b'x', spec(ONE, Purpose::Hibernation)).await;
    let commit = async |spec| manager.commit_capture(M.into(), spec).await;

    assert_eq!(commit(spec(ONE, Purpose::Hibernation)).await.unwrap(), info);
    let other = commit(spec(ONE, Purpose::Snapshot)).await;
    assert!(matches!(other, Err(Error::Exists(_))), "{other:?}");
    // Another capture has begun meanwhile: its memory is not that of the snapshot.
    manager.begin_capture(M.into()).await.unwrap();
    assert_eq!(commit(spec(ONE, Purpose::Hibernation)).await.unwrap(), info);
    assert!(!disk.sandbox(M).join("mem").exists());
    assert!(manager.release(M.into()).await.unwrap());
    assert_eq!(commit(spec(ONE, Purpose::Hibernation)).await.unwrap(), info);
    let gone = commit(spec(TWO, Purpose::Snapshot)).await;
    assert!(matches!(gone, Err(Error::NotFound(_))), "{gone:?}");
}

#[tokio::test]
async fn only_a_whole_capture_becomes_a_snapshot_whatever_was_planted() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let folder = disk.sandbox(M);
    let refused = async |why: &str| {
        let outcome = manager.commit_capture(M.into(), spec(ONE, Purpose::Snapshot)).await;
        assert!(
            matches!(outcome, Err(Error::WrongState(ref text)) if !text.contains('/')),
            "{why}: {outcome:?}"
        );
        assert!(list(&disk.state.join("snapshots")).is_empty(), "{why}");
        assert!(list(&disk.state.join("staging")).is_empty(), "{why}");
    };
    let early = manager.capture_disks(M.into(), true).await;
    assert!(matches!(early, Err(Error::WrongState(_))), "{early:?}");
    refused("not begun").await;
    manager.begin_capture(M.into()).await.unwrap();
    refused("no state").await;
    disk.firecracker_writes(M, b'x');
    refused("no disks").await;
    manager.capture_disks(M.into(), true).await.unwrap();
    fs::File::options().write(true).open(folder.join("c.mem")).unwrap().set_len(4096).unwrap();
    refused("half of the memory").await;
    disk.firecracker_writes(M, b'x');
    // Firecracker cannot do this (the directory is closed to it); if it could, it would win nothing.
    let secret = disk.dir.path().join("secret");
    fs::write(&secret, vec![b's'; MEMORY]).unwrap();
    let mode = access(&secret);
    for name in ["c.mem", "c.state", "c.root.img"] {
        let aside = folder.join("aside");
        fs::rename(folder.join(name), &aside).unwrap();
        symlink(&secret, folder.join(name)).unwrap();
        refused(name).await;
        fs::remove_file(folder.join(name)).unwrap();
        nix::unistd::mkfifo(&folder.join(name), nix::sys::stat::Mode::S_IRWXU).unwrap();
        refused(name).await;
        fs::remove_file(folder.join(name)).unwrap();
        fs::rename(&aside, folder.join(name)).unwrap();
    }
    assert_eq!(access(&secret), mode);

    manager.commit_capture(M.into(), spec(ONE, Purpose::Snapshot)).await.unwrap();
}

#[tokio::test]
async fn what_makes_no_sense_is_refused() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    manager.begin_capture(M.into()).await.unwrap();
    disk.firecracker_writes(M, b'x');
    manager.capture_disks(M.into(), true).await.unwrap();
    let good = spec(ONE, Purpose::Snapshot);
    for bad in [
        SnapshotSpec { id: "../../etc".into(), ..good.clone() },
        SnapshotSpec { sandbox: String::new(), ..good.clone() },
        SnapshotSpec { workspace: String::new(), ..good.clone() },
        SnapshotSpec { env: [("A".into(), "x".repeat(2 << 20))].into(), ..good.clone() },
        SnapshotSpec { volumes: vec![volume("v", true); 5], ..good.clone() },
    ] {
        let outcome = manager.commit_capture(M.into(), bad).await;
        assert!(matches!(outcome, Err(Error::InvalidArgument(_))), "{outcome:?}");
    }
    manager.commit_capture(M.into(), good).await.unwrap();

    manager.prepare(N.into()).await.unwrap();
    let empty = manager.begin_capture(N.into()).await;
    assert!(matches!(empty, Err(Error::WrongState(_))), "{empty:?}");
    let absent = manager.begin_capture(TWO.into()).await;
    assert!(matches!(absent, Err(Error::NotFound(_))), "{absent:?}");
    assert_eq!(list(&disk.sandbox(N)).len(), PREPARED);
}

#[tokio::test]
async fn below_the_reserve_nothing_is_begun_and_the_base_stays_known() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let ballast = fill_up(&disk, &manager.usage().await.unwrap());

    let refused = manager.begin_capture(M.into()).await;
    assert!(matches!(refused, Err(Error::NoSpace(_))), "{refused:?}");
    assert_eq!(unfinished(&disk), 0);
    ballast.set_len(0).unwrap();
    assert_eq!(manager.begin_capture(M.into()).await.unwrap(), CaptureKind::Diff);
}
