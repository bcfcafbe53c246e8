//! Snapshots on a real XFS: what is made from them, what can go wrong with them, and how they go.

use std::{fs, os::unix::fs::FileExt};

use super::disk::{Disk, GROUP, MEMORY, PREPARED, access, bytes, inode, list, spec, volume};
use pandastack_bus::{
    Error, SandboxId,
    storage::{Fill, Purpose, SnapshotSpec, StorageBackend as _},
};
use pandastack_storage::{
    Manager,
    hashes::{self, Hashes},
    identity::Digest,
    layout::Layout,
    mac::Signer,
    snapshot::Snapshots,
};

const M: &str = "mmmmmmmmmmmmmmmmmmmm";
const N: &str = "nnnnnnnnnnnnnnnnnnnn";
const ONE: &str = "11111111111111111111";
const TWO: &str = "22222222222222222222";
const THREE: &str = "33333333333333333333";
const SANDBOX: &str = "ssssssssssssssssssss";

/// Why it cannot be restored; that it is not, and that nothing is made then, is looked at, too.
async fn unusable(disk: &Disk, manager: &Manager, id: &str) -> String {
    let info = manager.snapshot(id.into()).await.unwrap();
    if !info.unusable.is_empty() {
        manager.prepare(N.into()).await.unwrap();
        let refused = manager.fill_snapshot(N.into(), id.into()).await;
        let said = matches!(refused, Err(Error::WrongState(ref text)) if text.ends_with(&info.unusable));
        assert!(said, "{refused:?}");
        assert_eq!(list(&disk.sandbox(N)).len(), PREPARED);
    }
    info.unusable
}

#[tokio::test]
async fn children_share_memory_and_have_disks_of_their_own() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    disk.guest_writes(M, "root.img", 8 << 20, b"parent");
    disk.guest_writes(M, "w1.img", 4096, b"scribbled on a placeholder");
    disk.capture(&manager, M, b'x', spec(ONE, Purpose::Fork)).await;
    manager.prepare(N.into()).await.unwrap();

    for _ in 0..2 {
        manager.fill_snapshot(N.into(), ONE.into()).await.unwrap();
    }

    let (child, snapshot) = (disk.sandbox(N), disk.snapshot(ONE));
    for name in ["mem", "state"] {
        assert_eq!(inode(&child.join(name)), inode(&snapshot.join(name)), "{name}");
    }
    assert_eq!(access(&child.join("root.img")), (0o660, GROUP));
    disk.guest_writes(N, "root.img", 8 << 20, b"child!");
    for (path, expected) in [(&snapshot, b"parent"), (&disk.sandbox(M), b"parent"), (&child, b"child!")] {
        assert_eq!(bytes(&path.join("root.img"), 8 << 20, 6), expected);
    }
    assert_eq!(bytes(&child.join("w1.img"), 4096, 9), b"scribbled", "its memory knows of it");
    assert_eq!(access(&child.join("w1.img")), (0o660, GROUP));
    let other = manager.fill(N.into(), "base".into(), Fill::Baked, 0).await;
    assert!(matches!(other, Err(Error::WrongState(_))), "{other:?}");

    // The child lives on without the snapshot, and its own captures go over what it was made from.
    assert!(manager.delete_snapshot(ONE.into()).await.unwrap());
    assert!(!manager.delete_snapshot(ONE.into()).await.unwrap());
    assert_eq!(bytes(&child.join("mem"), 8192, 1), b"x");
    let (kind, _) = disk.capture(&manager, N, b'y', spec(TWO, Purpose::Snapshot)).await;
    assert_eq!(kind, pandastack_bus::storage::CaptureKind::Diff);
    assert_eq!(bytes(&disk.snapshot(TWO).join("w1.img"), 4096, 9), b"scribbled");
}

#[tokio::test]
async fn they_are_listed_by_workspace_and_purpose_and_known_after_a_restart() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    for (id, purpose) in [(ONE, Purpose::Snapshot), (TWO, Purpose::Hibernation), (THREE, Purpose::Snapshot)] {
        disk.capture(&manager, M, b'x', spec(id, purpose)).await;
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let other = SnapshotSpec { workspace: "other".into(), ..spec(N, Purpose::Snapshot) };
    disk.capture(&manager, M, b'x', other).await;

    let restarted = disk.open();
    for manager in [&manager, &restarted] {
        let ids = async |workspace: &str| -> Vec<String> {
            let all = manager.snapshots(workspace.into()).await.unwrap();
            all.into_iter().map(|info| info.spec.id).collect()
        };
        assert_eq!(ids("work").await, [THREE, ONE]);
        assert_eq!(ids("other").await, [N]);
        assert_eq!(ids("").await, [N, THREE, TWO, ONE]);
        assert!(ids("nobody").await.is_empty());
    }
    assert_eq!(restarted.snapshots("".into()).await.unwrap(), manager.snapshots("".into()).await.unwrap());
    let absent = manager.snapshot(M.into()).await;
    assert!(matches!(absent, Err(Error::NotFound(_))), "{absent:?}");
}

#[tokio::test]
async fn a_damaged_one_says_so_and_is_never_restored() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    disk.capture(&manager, M, b'x', spec(ONE, Purpose::Snapshot)).await;
    let (folder, manifest) = (disk.snapshot(ONE), disk.snapshot(ONE).join("manifest.json"));
    let good = fs::read(&manifest).unwrap();
    let text = String::from_utf8(good.clone()).unwrap();
    assert_eq!(unusable(&disk, &disk.open(), ONE).await, "");

    let theirs = text.replace("\"work\"", "\"mine\"");
    assert_ne!(theirs, text);
    fs::write(&manifest, theirs).unwrap();
    let manager = disk.open();
    assert!(unusable(&disk, &manager, ONE).await.contains("changed"));
    fs::write(&manifest, "{").unwrap();
    let manager = disk.open();
    assert!(unusable(&disk, &manager, ONE).await.contains("cannot be read"));
    assert_eq!(manager.snapshots("".into()).await.unwrap()[0].spec.id, ONE, "so that it can be deleted");
    // One snapshot's manifest does not pass for that of another.
    disk.capture(&manager, M, b'x', spec(TWO, Purpose::Snapshot)).await;
    fs::copy(disk.snapshot(TWO).join("manifest.json"), &manifest).unwrap();
    assert!(unusable(&disk, &disk.open(), ONE).await.contains("another snapshot"));
    fs::write(&manifest, &good).unwrap();

    let aside = disk.dir.path().join("aside");
    fs::copy(folder.join("mem"), &aside).unwrap();
    fs::remove_file(folder.join("mem")).unwrap();
    assert!(unusable(&disk, &disk.open(), ONE).await.contains("missing"));
    std::os::unix::fs::symlink(&aside, folder.join("mem")).unwrap();
    assert!(unusable(&disk, &disk.open(), ONE).await.contains("missing"));
    fs::remove_file(folder.join("mem")).unwrap();
    fs::copy(&aside, folder.join("mem")).unwrap();
    assert_eq!(unusable(&disk, &disk.open(), ONE).await, "");

    // What is in the state is looked at when it is needed.
    fs::File::options().write(true).open(folder.join("state")).unwrap().write_all_at(b"R", 0).unwrap();
    let manager = disk.open();
    manager.prepare(N.into()).await.unwrap();
    assert!(matches!(manager.fill_snapshot(N.into(), ONE.into()).await, Err(Error::WrongState(_))));
    assert!(unusable(&disk, &manager, ONE).await.contains("state"));
    assert!(manager.delete_snapshot(ONE.into()).await.unwrap());
}

#[tokio::test]
async fn one_of_another_processor_is_refused() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    disk.capture(&manager, M, b'x', spec(ONE, Purpose::Snapshot)).await;
    let layout = Layout::new(&disk.state, &disk.differences);
    let signer = Signer::open(&layout.manifest_key()).unwrap();

    let elsewhere = Snapshots::open(&layout, signer, Digest::of(b"another processor")).unwrap();

    assert!(elsewhere.list("work")[0].unusable.contains("processor"));
}

#[tokio::test]
async fn its_firecracker_stays_as_long_as_it_needs_it() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    for id in [M, SANDBOX] {
        disk.restored(&manager, id).await;
    }
    let program = disk.sandbox(M).join("firecracker");
    disk.capture(&manager, M, b'x', spec(ONE, Purpose::Snapshot)).await;
    manager.prepare(THREE.into()).await.unwrap();
    drop(manager);
    fs::write(&disk.sources.firecracker, "newer program").unwrap();

    let manager = disk.open();
    let kept = || list(&disk.state.join("artefacts")).iter().any(|path| inode(path) == inode(&program));
    assert!(kept());
    assert_eq!(unusable(&disk, &manager, ONE).await, "");
    manager.prepare(TWO.into()).await.unwrap();
    let stale = manager.fill_snapshot(TWO.into(), ONE.into()).await;
    assert!(matches!(stale, Err(Error::WrongState(_))), "{stale:?}");
    manager.fill_snapshot(THREE.into(), ONE.into()).await.unwrap();
    manager.delete_snapshot(ONE.into()).await.unwrap();
    drop(manager);

    // Nobody needs it any more but the sandboxes that run it; captured, they bring it back.
    let manager = disk.open();
    assert!(!kept());
    disk.capture(&manager, SANDBOX, b'x', spec(TWO, Purpose::Snapshot)).await;
    assert!(kept());
    drop(manager);
    assert_eq!(unusable(&disk, &disk.open(), TWO).await, "");
    assert!(kept());
    let old = list(&disk.state.join("artefacts")).into_iter().find(|path| inode(path) == inode(&program));
    fs::remove_file(old.unwrap()).unwrap();
    assert!(unusable(&disk, &disk.open(), TWO).await.contains("Firecracker"));
}

#[tokio::test]
async fn a_copy_has_the_volumes_that_its_source_left_where_they_were() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let uses = vec![volume("data", false)];
    manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    manager.hold_volumes(SANDBOX.into(), "work".into(), uses.clone()).await.unwrap();
    manager.insert_volumes(M.into(), SANDBOX.into(), "work".into(), uses.clone()).await.unwrap();
    disk.guest_writes(M, "w0.img", 4 << 20, b"kept");
    let asleep = SnapshotSpec { volumes: uses.clone(), ..spec(ONE, Purpose::Hibernation) };
    manager.begin_capture(M.into()).await.unwrap();
    disk.firecracker_writes(M, b'x');
    manager.capture_disks(M.into(), false).await.unwrap();
    manager.commit_capture(M.into(), asleep).await.unwrap();
    manager.release(M.into()).await.unwrap();
    assert!(!disk.snapshot(ONE).join("w0.img").exists());
    let copy = SnapshotSpec { volumes: uses, ..spec(TWO, Purpose::Snapshot) };

    for _ in 0..2 {
        let info = manager.copy_snapshot(ONE.into(), copy.clone()).await.unwrap();
        assert_eq!((info.spec, info.unusable.as_str()), (copy.clone(), ""));
    }
    assert!(manager.delete_snapshot(ONE.into()).await.unwrap());

    assert_eq!(unusable(&disk, &disk.open(), TWO).await, "");
    manager.prepare(N.into()).await.unwrap();
    manager.fill_snapshot(N.into(), TWO.into()).await.unwrap();
    assert_eq!(bytes(&disk.sandbox(N).join("mem"), 8192, 1), b"x");
    assert_eq!(bytes(&disk.sandbox(N).join("w0.img"), 4 << 20, 4), b"kept");
    // Not of somebody else's volume, nor of what is not there.
    manager.drop_volumes(SANDBOX.into()).await.unwrap();
    let theirs = SnapshotSpec { id: THREE.into(), volumes: vec![volume("data", true)], ..copy.clone() };
    let refused = manager.copy_snapshot(TWO.into(), theirs).await;
    assert!(matches!(refused, Err(Error::WrongState(_))), "{refused:?}");
    let absent = manager.copy_snapshot(ONE.into(), SnapshotSpec { id: THREE.into(), ..copy }).await;
    assert!(matches!(absent, Err(Error::NotFound(_))), "{absent:?}");
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test]
async fn a_tenants_snapshot_gets_a_hash_tree_that_is_ours() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    for (id, purpose) in [(ONE, Purpose::Snapshot), (TWO, Purpose::Fork)] {
        disk.capture(&manager, M, b'x', spec(id, purpose)).await;
    }
    let copy = spec(THREE, Purpose::Snapshot);
    manager.copy_snapshot(ONE.into(), copy).await.unwrap();

    // A restart loses none of them.
    disk.open().hash_missing().await;

    let signer = Signer::open(&Layout::new(&disk.state, &disk.differences).manifest_key()).unwrap();
    let read = |id: &str| -> (Hashes, bool) {
        signer.read(hashes::KIND, &fs::read(disk.snapshot(id).join("hashes.json")).unwrap()).unwrap()
    };
    let (found, authentic) = read(ONE);
    assert!(authentic);
    assert_eq!((found.snapshot.as_str(), found.files.len()), (ONE, 2), "memory and root disk");
    assert_eq!(found.root, read(THREE).0.root, "the same contents");
    assert!(!disk.snapshot(TWO).join("hashes.json").exists());
    assert_eq!(unusable(&disk, &disk.open(), ONE).await, "");
    assert!(manager.delete_snapshot(ONE.into()).await.unwrap());
    assert!(list(&disk.state.join("trash")).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_while_it_is_used_it_is_wholly_there_or_not_at_all() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    let mut outcomes = [0, 0];
    for round in 0..8 {
        let children: Vec<_> = (0..6).map(|_| SandboxId::random().to_string()).collect();
        for child in &children {
            manager.prepare(child.clone()).await.unwrap();
        }
        let id = SandboxId::random().to_string();
        disk.capture(&manager, M, b'x', spec(&id, Purpose::Fork)).await;
        let fills: Vec<_> = children
            .iter()
            .map(|child| {
                let (manager, child, id) = (manager.clone(), child.clone(), id.clone());
                tokio::spawn(async move { manager.fill_snapshot(child, id).await })
            })
            .collect();
        for _ in 0..round {
            tokio::task::yield_now().await;
        }
        assert!(manager.delete_snapshot(id.clone()).await.unwrap());
        for (child, fill) in children.iter().zip(fills) {
            let folder = disk.sandbox(child);
            match fill.await.unwrap() {
                Ok(()) => {
                    assert_eq!(fs::metadata(folder.join("mem")).unwrap().len(), MEMORY as u64);
                    outcomes[0] += 1;
                }
                Err(Error::NotFound(_)) => {
                    assert_eq!(list(&folder).len(), PREPARED);
                    outcomes[1] += 1;
                }
                Err(other) => panic!("{other:?}"),
            }
            manager.release(child.clone()).await.unwrap();
        }
        assert!(!disk.snapshot(&id).exists());
    }
    println!("filled {}, too late {}", outcomes[0], outcomes[1]);
    assert!(list(&disk.state.join("trash")).is_empty());
}
