//! Volumes on a real XFS: one writer or many readers, and files that are where they belong.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf};

use super::disk::{Disk, GROUP, access, bytes, fill_up, inode, list, spec, volume};
use pandastack_bus::{
    Error,
    quota::{Quota, Resource},
    storage::{Purpose, SnapshotSpec, StorageBackend as _, VolumeUse},
};
use pandastack_storage::Manager;

const M: &str = "mmmmmmmmmmmmmmmmmmmm";
const N: &str = "nnnnnnnnnnnnnnnnnnnn";
const ONE: &str = "11111111111111111111";
const TWO: &str = "22222222222222222222";
const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbbbbbb";

async fn hold(manager: &Manager, sandbox: &str, volumes: &[(&str, bool)]) -> pandastack_bus::Result<()> {
    let volumes: Vec<VolumeUse> = volumes.iter().map(|(name, read_only)| volume(name, *read_only)).collect();
    manager.hold_volumes(sandbox.into(), "work".into(), volumes).await
}

async fn create(manager: &Manager, name: &str) {
    manager.create_volume("work".into(), name.into(), 8).await.unwrap();
}

/// Files of all volumes.
fn disks(disk: &Disk) -> Vec<PathBuf> {
    list(&disk.state.join("volumes")).into_iter().map(|folder| folder.join("disk.img")).collect()
}

#[tokio::test]
async fn a_volume_is_made_listed_grown_and_deleted() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    let made = manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    manager.create_volume("other".into(), "data".into(), 1).await.unwrap();
    create(&manager, "a").await;

    assert_eq!((made.name.as_str(), made.size_mib, made.holders.len()), ("data", 8, 0));
    assert!(made.used_bytes > 0 && made.used_bytes < 8 << 20);
    let taken = manager.create_volume("work".into(), "data".into(), 8).await;
    assert!(matches!(taken, Err(Error::Exists(_))), "{taken:?}");
    let restarted = disk.open();
    for manager in [&manager, &restarted] {
        let names = async |workspace: &str| -> Vec<String> {
            let all = manager.volumes(workspace.into()).await.unwrap();
            all.into_iter().map(|info| info.workspace + "/" + &info.name).collect()
        };
        assert_eq!(names("work").await, ["work/a", "work/data"]);
        assert_eq!(names("").await, ["other/data", "work/a", "work/data"]);
        assert_eq!(manager.volume("work".into(), "data".into()).await.unwrap(), made);
    }
    for path in disks(&disk) {
        assert_eq!(access(&path), (0o660, GROUP));
        assert_eq!(bytes(&path, 1024 + 0x38, 2), [0x53, 0xEF], "ext4");
    }
    let manager = disk.open();
    assert_eq!(manager.grow_volume("work".into(), "data".into(), 32).await.unwrap().size_mib, 32);
    assert_eq!(manager.grow_volume("work".into(), "data".into(), 32).await.unwrap().size_mib, 32);
    assert!(disks(&disk).iter().any(|path| fs::metadata(path).unwrap().len() == 32 << 20));
    let less = manager.grow_volume("work".into(), "data".into(), 31).await;
    assert!(matches!(less, Err(Error::InvalidArgument(_))), "{less:?}");
    assert_eq!(disk.open().volume("work".into(), "data".into()).await.unwrap().size_mib, 32);

    assert!(manager.delete_volume("work".into(), "data".into()).await.unwrap());
    assert!(!manager.delete_volume("work".into(), "data".into()).await.unwrap());
    for gone in [
        manager.volume("work".into(), "data".into()).await,
        manager.grow_volume("work".into(), "data".into(), 64).await,
        disk.open().volume("work".into(), "data".into()).await,
    ] {
        assert!(matches!(gone, Err(Error::NotFound(_))), "{gone:?}");
    }
    assert_eq!(disks(&disk).len(), 2);
}

#[tokio::test]
async fn wrong_names_and_sizes_are_refused_and_leave_nothing() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    for (workspace, name, size) in [
        ("work", "", 8),
        ("work", "..", 8),
        ("work", "../x", 8),
        ("work", "a/b", 8),
        ("work", "ä", 8),
        ("work", &"x".repeat(65), 8),
        ("", "x", 8),
        ("work", "x", 0),
        ("work", "x", 65537),
        ("work", "x", u64::MAX),
    ] {
        let refused = manager.create_volume(workspace.into(), name.into(), size).await;
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{name:?} {size}: {refused:?}");
    }
    manager.create_volume("../../etc".into(), "x".repeat(64), 1).await.unwrap();
    let large = manager.create_volume("work".into(), "large".into(), 65536).await;
    assert!(matches!(large, Err(Error::NoSpace(_))), "larger than the partition: {large:?}");
    create(&manager, "x").await;
    let _ballast = fill_up(&disk, &manager.usage().await.unwrap());
    let full = manager.create_volume("work".into(), "y".into(), 1).await;
    assert!(matches!(full, Err(Error::NoSpace(_))), "{full:?}");
    let full = manager.grow_volume("work".into(), "x".into(), 16).await;
    assert!(matches!(full, Err(Error::NoSpace(_))), "{full:?}");
    assert_eq!(disks(&disk).len(), 2);
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn one_of_many_who_want_a_name_gets_it() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let manager = manager.clone();
            tokio::spawn(async move { manager.create_volume("work".into(), "data".into(), 8).await })
        })
        .collect();
    let mut made = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => made += 1,
            Err(Error::Exists(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((made, disks(&disk).len()), (1, 1));
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test]
async fn there_is_one_writer_or_only_readers_also_after_a_restart() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    for name in ["data", "logs"] {
        create(&manager, name).await;
    }
    for _ in 0..2 {
        hold(&manager, A, &[("data", false), ("logs", true)]).await.unwrap();
    }
    let restarted = disk.open();
    for manager in [&manager, &restarted] {
        for (sandbox, wanted) in [
            (B, &[("data", true)][..]),
            (B, &[("data", false)]),
            (B, &[("logs", false)]),
            (A, &[("logs", true)]),
        ] {
            let refused = hold(manager, sandbox, wanted).await;
            assert!(matches!(refused, Err(Error::WrongState(_))), "{sandbox} {wanted:?}: {refused:?}");
        }
        let both = hold(manager, B, &[("logs", true), ("data", true)]).await;
        assert!(matches!(both, Err(Error::WrongState(ref text)) if text.contains("data")), "{both:?}");
        let holders = manager.volume("work".into(), "logs".into()).await.unwrap().holders;
        assert_eq!(holders, [A], "all or none");
        for refused in [
            manager.delete_volume("work".into(), "logs".into()).await.map(drop),
            manager.grow_volume("work".into(), "data".into(), 64).await.map(drop),
        ] {
            assert!(matches!(refused, Err(Error::WrongState(_))), "{refused:?}");
        }
    }
    let manager = disk.open();
    hold(&manager, B, &[("logs", true)]).await.unwrap();
    assert_eq!(manager.volume("work".into(), "logs".into()).await.unwrap().holders, [A, B]);
    for _ in 0..2 {
        manager.drop_volumes(A.into()).await.unwrap();
    }
    let manager = disk.open();
    hold(&manager, N, &[("data", false)]).await.unwrap();
    manager.drop_volumes(B.into()).await.unwrap();
    assert!(manager.delete_volume("work".into(), "logs".into()).await.unwrap());

    for (wanted, found) in [
        (vec![("absent", true)], "NotFound"),
        (vec![("data", false), ("data", false)], "InvalidArgument"),
        (vec![("data", true); 5], "InvalidArgument"),
        (vec![("data", false); 5], "InvalidArgument"),
    ] {
        let refused = hold(&manager, B, &wanted).await.unwrap_err();
        assert!(format!("{refused:?}").starts_with(found), "{refused:?}");
    }
    let elsewhere = manager.hold_volumes(B.into(), "other".into(), vec![volume("data", true)]).await;
    assert!(matches!(elsewhere, Err(Error::NotFound(_))), "{elsewhere:?}");
    assert_eq!(list(&disk.state.join("holds")).len(), 1);
}

#[tokio::test]
async fn held_volumes_take_the_place_of_drives_and_children_get_clones() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    for name in ["data", "logs"] {
        create(&manager, name).await;
    }
    let uses = vec![volume("logs", true), volume("data", false)];
    let insert = async |id: &str, sandbox: &str| {
        manager.insert_volumes(id.into(), sandbox.into(), "work".into(), uses.clone()).await
    };
    assert!(matches!(insert(M, A).await, Err(Error::WrongState(_))), "nobody holds them");
    manager.hold_volumes(A.into(), "work".into(), uses.clone()).await.unwrap();
    assert!(matches!(insert(M, B).await, Err(Error::WrongState(_))), "somebody else holds them");
    assert!(matches!(insert(N, A).await, Err(Error::NotFound(_))));
    for _ in 0..2 {
        insert(M, A).await.unwrap();
    }
    let folder = disk.sandbox(M);
    let inodes: Vec<_> = disks(&disk).iter().map(|path| inode(path)).collect();
    for name in ["w0.img", "r0.img"] {
        assert!(inodes.contains(&inode(&folder.join(name))), "{name}");
    }
    disk.guest_writes(M, "w0.img", 4 << 20, b"parent");

    let both = SnapshotSpec { volumes: uses.clone(), ..spec(ONE, Purpose::Fork) };
    disk.capture(&manager, M, b'x', both).await;
    disk.guest_writes(M, "w0.img", 4 << 20, b"later!");
    manager.prepare(N.into()).await.unwrap();
    manager.fill_snapshot(N.into(), ONE.into()).await.unwrap();

    let child = disk.sandbox(N);
    assert_eq!(bytes(&child.join("w0.img"), 4 << 20, 6), b"parent", "as it was then");
    assert_eq!(access(&child.join("w0.img")), (0o660, GROUP));
    assert_eq!(access(&child.join("r0.img")), (0o440, GROUP));
    disk.guest_writes(N, "w0.img", 4 << 20, b"child!");
    assert_eq!(bytes(&folder.join("w0.img"), 4 << 20, 6), b"later!", "the parent keeps the volume");
    for name in ["w0.img", "r0.img"] {
        assert_eq!(fs::metadata(child.join(name)).unwrap().nlink(), 1, "{name}");
    }

    // Asleep, a clone is part of the sandbox, and a volume stays where it is.
    for (machine, snapshot, cloned) in [(N, TWO, true), (M, B, false)] {
        manager.begin_capture(machine.into()).await.unwrap();
        disk.firecracker_writes(machine, b'y');
        manager.capture_disks(machine.into(), false).await.unwrap();
        manager.commit_capture(machine.into(), spec(snapshot, Purpose::Hibernation)).await.unwrap();
        for name in ["w0.img", "r0.img"] {
            assert_eq!(disk.snapshot(snapshot).join(name).exists(), cloned, "{machine} {name}");
        }
        manager.release(machine.into()).await.unwrap();
    }
    assert_eq!(disks(&disk).iter().filter(|path| path.exists()).count(), 2);
    manager.drop_volumes(A.into()).await.unwrap();
    assert!(manager.delete_volume("work".into(), "data".into()).await.unwrap());
}

#[tokio::test]
async fn a_workspace_has_so_many_volumes_and_so_much_of_them_also_at_once() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    let limit = |resource, limit| manager.set_quota("work".into(), resource, limit);
    limit(Resource::Volumes, 2).await.unwrap();
    limit(Resource::VolumeMib, 20).await.unwrap();
    assert!(matches!(limit(Resource::Vcpus, 1).await, Err(Error::InvalidArgument(_))));
    let create = |name: &str, mib| manager.create_volume("work".into(), name.into(), mib);

    let (a, b, c, d) = tokio::join!(create("a", 8), create("b", 8), create("c", 8), create("d", 8));

    let all = [a, b, c, d];
    assert_eq!(all.iter().filter(|made| made.is_ok()).count(), 2, "{all:?}");
    assert!(all.iter().all(|made| matches!(made, Ok(_) | Err(Error::Quota(_)))), "{all:?}");
    let made: Vec<String> = all.iter().flatten().map(|info| info.name.clone()).collect();
    assert_eq!(disks(&disk).len(), 2);
    let grow = |name: &str, mib| manager.grow_volume("work".into(), name.into(), mib);
    assert!(matches!(grow(&made[0], 16).await, Err(Error::Quota(_))));
    assert!(matches!(grow(&made[0], 64).await, Err(Error::BeyondQuota(_))));
    assert_eq!(grow(&made[0], 12).await.unwrap().size_mib, 12);
    assert!(manager.create_volume("other".into(), "a".into(), 64).await.is_ok());
    let again = disk.open();
    let lines = again.quotas("work".into()).await.unwrap();
    assert_eq!(
        lines,
        [Quota::new(Resource::Volumes, Some(2), 2), Quota::new(Resource::VolumeMib, Some(20), 20)]
    );
    assert!(manager.delete_volume("work".into(), made[1].clone()).await.unwrap());
    assert!(create("e", 8).await.is_ok());
}
