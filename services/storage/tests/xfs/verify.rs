//! Snapshots against their hash trees on a real XFS: what is found, what follows, and what does not.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::PathBuf,
};

use super::disk::{Disk, PREPARED, list, spec, volume};
use pandastack_bus::{
    Error,
    storage::{Purpose, SnapshotSpec, StorageBackend as _, Verdict, Verification},
};
use pandastack_storage::Manager;

const M: &str = "mmmmmmmmmmmmmmmmmmmm";
const N: &str = "nnnnnnnnnnnnnnnnnnnn";
const ONE: &str = "11111111111111111111";
const TWO: &str = "22222222222222222222";

/// A tenant's snapshot with a volume in it and a hash tree.
async fn hashed(disk: &Disk) -> Manager {
    let manager = disk.open_imported().await;
    disk.restored(&manager, M).await;
    manager.create_volume("work".into(), "data".into(), 8).await.unwrap();
    let uses = vec![volume("data", false)];
    manager.hold_volumes(M.into(), "work".into(), uses.clone()).await.unwrap();
    manager.insert_volumes(M.into(), M.into(), "work".into(), uses.clone()).await.unwrap();
    let both = SnapshotSpec { volumes: uses, ..spec(ONE, Purpose::Snapshot) };
    disk.capture(&manager, M, b'x', both).await;
    manager.hash_missing().await;
    manager
}

async fn check(manager: &Manager) -> Verification {
    manager.verify_snapshot(ONE.into()).await.unwrap()
}

/// What it says of itself; that nothing is made of it then is looked at, too.
async fn refused(disk: &Disk, manager: &Manager) -> String {
    let why = manager.snapshot(ONE.into()).await.unwrap().unusable;
    manager.prepare(N.into()).await.unwrap();
    let fill = manager.fill_snapshot(N.into(), ONE.into()).await;
    assert!(matches!(fill, Err(Error::WrongState(ref text)) if text.ends_with(&why)), "{fill:?}");
    assert_eq!(list(&disk.sandbox(N)).len(), PREPARED);
    let copy = manager.copy_snapshot(ONE.into(), spec(TWO, Purpose::Snapshot)).await;
    assert!(matches!(copy, Err(Error::WrongState(_))), "{copy:?}");
    why
}

/// Flips a bit in the middle of a file; again, it is as before.
fn flip(path: &PathBuf) {
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let at = file.metadata().unwrap().size() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    fs::set_permissions(path, mode).unwrap();
}

#[tokio::test]
async fn a_flipped_bit_is_found_wherever_it_is_and_refused_until_it_is_whole_again() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = hashed(&disk).await;
    let whole = Verification { verdict: Verdict::Whole, files: vec![], reason: String::new() };
    assert_eq!(check(&manager).await, whole);

    for (name, word) in [
        ("mem", "its memory"),
        ("root.img", "its root disk"),
        ("w0.img", "a disk of its volumes"),
        ("state", "the state of its machine"),
    ] {
        let path = disk.snapshot(ONE).join(name);
        flip(&path);

        let found = check(&manager).await;

        assert_eq!((found.verdict, found.files.as_slice()), (Verdict::Damaged, &[name.to_owned()][..]));
        assert!(found.reason.ends_with(word), "{found:?}");
        assert_eq!(refused(&disk, &manager).await, found.reason);
        let restarted = disk.open();
        assert_eq!(refused(&disk, &restarted).await, found.reason, "also after a restart");
        assert_eq!(check(&restarted).await, found, "again");
        flip(&path);
        for manager in [&restarted, &manager] {
            assert_eq!(check(manager).await, whole, "{name}");
            assert_eq!(manager.snapshot(ONE.into()).await.unwrap().unusable, "");
        }
    }
    manager.prepare(N.into()).await.unwrap();
    manager.fill_snapshot(N.into(), ONE.into()).await.unwrap();
}

#[tokio::test]
async fn a_file_that_is_cut_gone_or_replaced_is_found() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = hashed(&disk).await;
    let (memory, root) = (disk.snapshot(ONE).join("mem"), disk.snapshot(ONE).join("root.img"));
    let length = fs::metadata(&memory).unwrap().len();
    let file = fs::File::options().write(true).open(&memory).unwrap();
    // What is cut off is nothing but zeros, and yet it is not what was captured.
    file.set_len(length - 4096).unwrap();
    assert_eq!(check(&manager).await.files, ["mem"]);
    file.set_len(length).unwrap();
    file.write_all_at(&vec![b'a'; 4096], length - 4096).unwrap();
    assert_eq!(check(&manager).await.verdict, Verdict::Whole);

    let aside = disk.dir.path().join("aside");
    fs::rename(&memory, disk.state.join("aside")).unwrap();
    fs::copy(&root, &aside).unwrap();
    fs::remove_file(&root).unwrap();
    std::os::unix::fs::symlink(&aside, &root).unwrap();
    let found = check(&manager).await;
    assert_eq!((found.verdict, found.files), (Verdict::Damaged, vec!["mem".into(), "root.img".into()]));
    refused(&disk, &manager).await;
    assert!(manager.delete_snapshot(ONE.into()).await.unwrap(), "it can be deleted");
    let gone = manager.verify_snapshot(ONE.into()).await;
    assert!(matches!(gone, Err(Error::NotFound(_))), "{gone:?}");
}

#[tokio::test]
async fn without_a_tree_that_is_ours_it_says_so() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = hashed(&disk).await;
    let path = disk.snapshot(ONE).join("hashes.json");
    let good = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();

    let found = check(&manager).await;
    assert_eq!((found.verdict, found.files.len()), (Verdict::Unhashed, 0));
    assert!(found.reason.contains("no hash tree"), "{found:?}");
    assert_eq!(manager.snapshot(ONE.into()).await.unwrap().unusable, "", "nothing is known against it");
    flip(&disk.snapshot(ONE).join("state"));
    assert_eq!(check(&manager).await.files, ["state"], "which has a digest of its own");
    flip(&disk.snapshot(ONE).join("state"));

    let text = String::from_utf8(good.clone()).unwrap();
    let (before, after) = text.split_once("\"root\":\"").unwrap();
    let other =
        format!("{before}\"root\":\"{}{}", if after.starts_with('0') { "1" } else { "0" }, &after[1..]);
    for bad in [other.as_bytes(), b"{", b""] {
        fs::write(&path, bad).unwrap();
        let found = check(&manager).await;
        assert_eq!((found.verdict, found.files), (Verdict::Damaged, vec!["hashes.json".into()]));
        assert!(refused(&disk, &manager).await.contains("hash tree"));
    }
    fs::write(&path, good).unwrap();
    assert_eq!(check(&manager).await.verdict, Verdict::Whole);

    disk.capture(&manager, M, b'y', spec(TWO, Purpose::Fork)).await;
    let fork = manager.verify_snapshot(TWO.into()).await.unwrap();
    assert_eq!(fork.verdict, Verdict::Unhashed, "only tenants' snapshots have one");
    for (id, error) in [(N, "NotFound"), ("../x", "InvalidArgument")] {
        let refused = manager.verify_snapshot(id.into()).await.unwrap_err();
        assert!(format!("{refused:?}").starts_with(error), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_work_goes_on_and_a_deletion_ends_it() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = hashed(&disk).await;
    let checks: Vec<_> = (0..4)
        .map(|_| {
            let manager = manager.clone();
            tokio::spawn(async move { manager.verify_snapshot(ONE.into()).await })
        })
        .collect();
    manager.prepare(N.into()).await.unwrap();
    manager.fill_snapshot(N.into(), ONE.into()).await.unwrap();
    assert!(manager.delete_snapshot(ONE.into()).await.unwrap());

    for check in checks {
        match check.await.unwrap() {
            Ok(found) => assert_eq!(found.verdict, Verdict::Whole),
            Err(error) => assert!(matches!(error, Error::NotFound(_)), "{error:?}"),
        }
    }
    assert!(!disk.snapshot(ONE).exists());
    assert!(list(&disk.state.join("trash")).is_empty());
}
