//! Snapshots of volumes on a real XFS: what is in them, what they cost, how they go.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::PathBuf,
};

use super::disk::{Disk, GROUP, access, bytes, fill_up, list, volume};
use pandastack_bus::{
    Error, Result,
    quota::{Quota, Resource},
    storage::{StorageBackend as _, VolumeInfo, VolumeSnapshotInfo, VolumeSnapshotSpec},
};
use pandastack_storage::Manager;

const ONE: &str = "11111111111111111111";
const TWO: &str = "22222222222222222222";
const THREE: &str = "33333333333333333333";
const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const MIB: u64 = 1 << 20;

fn wish(id: &str, name: &str) -> VolumeSnapshotSpec {
    VolumeSnapshotSpec {
        id: id.into(),
        workspace: "work".into(),
        volume: name.into(),
        label: "before the upgrade".into(),
        synced: true,
    }
}

async fn restore(manager: &Manager, snapshot: &str, name: &str, size_mib: u64) -> Result<VolumeInfo> {
    manager.restore_volume("work".into(), snapshot.into(), name.into(), size_mib).await
}

/// The file of the only volume or snapshot that is in none of `known`.
fn newest(disk: &Disk, folder: &str, known: &[PathBuf]) -> PathBuf {
    let all = list(&disk.state.join(folder)).into_iter().map(|path| path.join("disk.img"));
    let new: Vec<_> = all.filter(|path| !known.contains(path)).collect();
    assert_eq!(new.len(), 1, "{new:?}");
    new[0].clone()
}

fn write(path: &PathBuf, text: &[u8]) {
    fs::File::options().write(true).open(path).unwrap().write_all_at(text, 4 * MIB).unwrap();
}

#[tokio::test]
async fn a_snapshot_is_what_the_volume_was_and_outlives_it() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    let held = vec![volume("data", false)];
    manager.hold_volumes(A.into(), "work".into(), held).await.unwrap();
    let source = newest(&disk, "volumes", &[]);
    write(&source, b"first!");
    let taken = manager.snapshot_volume(wish(ONE, "data")).await.unwrap();
    write(&source, b"second");
    let snapshot = newest(&disk, "volume-snapshots", &[]);

    assert_eq!((&taken.spec, taken.size_mib), (&wish(ONE, "data"), 8));
    assert_eq!(access(&snapshot).0, 0o400, "no sandbox opens it");
    // Asked again, also after a restart, it is the same one.
    let asked_again = VolumeSnapshotSpec { synced: false, ..wish(ONE, "data") };
    for manager in [&manager, &disk.open()] {
        let again = manager.snapshot_volume(asked_again.clone()).await.unwrap();
        assert_eq!((again.spec, again.created_unix_ms), (taken.spec.clone(), taken.created_unix_ms));
        let other = manager.snapshot_volume(wish(ONE, "other")).await;
        assert!(matches!(other, Err(Error::Exists(_))), "{other:?}");
    }
    manager.drop_volumes(A.into()).await.unwrap();
    assert!(manager.delete_volume("work".into(), "data".into()).await.unwrap());

    let restarted = disk.open();
    let same = restore(&restarted, ONE, "data", 0).await.unwrap();
    let same_disk = newest(&disk, "volumes", &[]);
    let grown = restore(&restarted, ONE, "grown", 32).await.unwrap();
    let grown_disk = newest(&disk, "volumes", std::slice::from_ref(&same_disk));
    assert_eq!((same.size_mib, grown.size_mib, grown.holders.len()), (8, 32, 0));
    for (path, length) in [(&same_disk, 8 * MIB), (&grown_disk, 32 * MIB)] {
        assert_eq!(fs::metadata(path).unwrap().len(), length);
        assert_eq!(bytes(path, 4 * MIB, 6), b"first!");
        assert_eq!(bytes(path, 1024 + 0x38, 2), [0x53, 0xEF], "ext4");
        assert_eq!(access(path), (0o660, GROUP), "a volume like any other");
        write(path, b"theirs");
    }
    assert_eq!(bytes(&snapshot, 4 * MIB, 6), b"first!", "it is never written again");
    assert!(restarted.delete_volume_snapshot("work".into(), ONE.into()).await.unwrap());
    assert_eq!(bytes(&grown_disk, 4 * MIB, 6), b"theirs");
    assert!(list(&disk.state.join("volume-snapshots")).is_empty());
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test]
async fn they_share_their_blocks() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume("work".into(), "data".into(), 256).await.unwrap();
    let source = newest(&disk, "volumes", &[]);
    fs::File::options()
        .write(true)
        .open(&source)
        .unwrap()
        .write_all_at(&vec![7; 64 << 20], 64 * MIB)
        .unwrap();
    fs::File::open(&source).unwrap().sync_all().unwrap();
    let free = async || manager.usage().await.unwrap().free_bytes;
    let before = free().await;

    let taken = manager.snapshot_volume(wish(ONE, "data")).await.unwrap();
    restore(&manager, ONE, "copy", 0).await.unwrap();

    assert!(taken.used_bytes > 64 * MIB, "{taken:?}");
    assert!(before - free().await < 32 * MIB, "{before}");
    assert_eq!(fs::metadata(&source).unwrap().nlink(), 1);
}

#[tokio::test]
async fn they_are_a_workspaces_own() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    for (workspace, name) in [("work", "data"), ("work", "logs"), ("other", "data")] {
        manager.create_volume(workspace.into(), name.into(), 8).await.unwrap();
    }
    for (id, workspace, name) in [(ONE, "work", "data"), (TWO, "work", "logs"), (THREE, "other", "data")] {
        let spec = VolumeSnapshotSpec { workspace: workspace.into(), ..wish(id, name) };
        manager.snapshot_volume(spec).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let restarted = disk.open();
    for manager in [&manager, &restarted] {
        let ids = async |workspace: &str| -> Vec<String> {
            let all: Vec<VolumeSnapshotInfo> = manager.volume_snapshots(workspace.into()).await.unwrap();
            all.into_iter().map(|info| info.spec.id).collect()
        };
        assert_eq!(ids("work").await, [TWO, ONE]);
        assert_eq!(ids("").await, [THREE, TWO, ONE]);
        assert!(ids("nobody").await.is_empty());
        let foreign = restore(manager, THREE, "mine", 0).await;
        assert!(matches!(foreign, Err(Error::NotFound(_))), "{foreign:?}");
        assert!(!manager.delete_volume_snapshot("work".into(), THREE.into()).await.unwrap());
    }
    assert!(restarted.delete_volume_snapshot("work".into(), ONE.into()).await.unwrap());
    assert!(!restarted.delete_volume_snapshot("work".into(), ONE.into()).await.unwrap());
    assert_eq!(disk.open().volume_snapshots("".into()).await.unwrap().len(), 2);
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_leaves_nothing() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    manager.snapshot_volume(wish(ONE, "data")).await.unwrap();
    for (bad, error) in [
        (wish("../x", "data"), "InvalidArgument"),
        (wish(TWO, "../data"), "InvalidArgument"),
        (wish(TWO, "absent"), "NotFound"),
        (VolumeSnapshotSpec { workspace: "other".into(), ..wish(TWO, "data") }, "NotFound"),
        (VolumeSnapshotSpec { label: "x".repeat(257), ..wish(TWO, "data") }, "InvalidArgument"),
        (VolumeSnapshotSpec { label: "\0".into(), ..wish(TWO, "data") }, "InvalidArgument"),
    ] {
        let refused = manager.snapshot_volume(bad.clone()).await.unwrap_err();
        assert!(format!("{refused:?}").starts_with(error), "{bad:?}: {refused:?}");
    }
    for (snapshot, name, size, error) in [
        (ONE, "x", 7, "InvalidArgument"),
        (ONE, "x", 65537, "InvalidArgument"),
        (ONE, "x", u64::MAX, "InvalidArgument"),
        (ONE, "..", 0, "InvalidArgument"),
        (ONE, "data", 0, "Exists"),
        (TWO, "x", 0, "NotFound"),
        ("../x", "x", 0, "InvalidArgument"),
        (ONE, "x", 65536, "NoSpace"),
    ] {
        let refused = restore(&manager, snapshot, name, size).await.unwrap_err();
        assert!(format!("{refused:?}").starts_with(error), "{name} {size}: {refused:?}");
    }
    let _ballast = fill_up(&disk, &manager.usage().await.unwrap());
    let full = manager.snapshot_volume(wish(TWO, "data")).await;
    assert!(matches!(full, Err(Error::NoSpace(_))), "{full:?}");
    assert!(matches!(restore(&manager, ONE, "x", 0).await, Err(Error::NoSpace(_))));
    assert_eq!(list(&disk.state.join("volume-snapshots")).len(), 1);
    assert_eq!(list(&disk.state.join("volumes")).len(), 1);
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test]
async fn a_snapshot_counts_as_a_volume_of_its_size_also_when_many_are_wanted_at_once() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    manager.set_quota("work".into(), Resource::Volumes, 4).await.unwrap();
    manager.set_quota("work".into(), Resource::VolumeMib, 24).await.unwrap();
    let take = |id: &str| manager.snapshot_volume(wish(id, "data"));

    let (a, b, c) = tokio::join!(take(ONE), take(TWO), take(THREE));

    let all = [a, b, c];
    assert_eq!(all.iter().filter(|made| made.is_ok()).count(), 2, "{all:?}");
    assert!(all.iter().all(|made| matches!(made, Ok(_) | Err(Error::Quota(_)))), "{all:?}");
    let made = all.into_iter().flatten().next().unwrap().spec.id;
    assert!(matches!(restore(&manager, &made, "copy", 0).await, Err(Error::Quota(_))));
    assert_eq!(
        disk.open().quotas("work".into()).await.unwrap(),
        [Quota::new(Resource::Volumes, Some(4), 3), Quota::new(Resource::VolumeMib, Some(24), 24)]
    );
    assert!(take(&made).await.is_ok(), "the one that is there is no new one");
    assert!(manager.delete_volume_snapshot("work".into(), made).await.unwrap());
    assert!(manager.create_volume("work".into(), "more".into(), 8).await.is_ok());
}

#[tokio::test]
async fn what_an_end_in_the_middle_left_is_removed_and_what_is_damaged_stays() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    for id in [ONE, TWO] {
        manager.snapshot_volume(wish(id, "data")).await.unwrap();
    }
    drop(manager);
    let folder = disk.state.join("volume-snapshots");
    fs::create_dir(disk.state.join("staging/volume-snapshot.9")).unwrap();
    fs::create_dir(folder.join("not-an-id")).unwrap();
    fs::write(folder.join(TWO).join("manifest.json"), "{").unwrap();

    let manager = disk.open();

    let ids: Vec<_> =
        manager.volume_snapshots("".into()).await.unwrap().into_iter().map(|info| info.spec.id).collect();
    assert_eq!(ids, [ONE]);
    assert!(folder.join(TWO).exists() && !folder.join("not-an-id").exists());
    assert!(list(&disk.state.join("staging")).is_empty());
    let taken = manager.snapshot_volume(wish(TWO, "data")).await;
    assert!(taken.is_err(), "its place is taken: {taken:?}");
    assert!(restore(&manager, ONE, "copy", 0).await.is_ok());
}
