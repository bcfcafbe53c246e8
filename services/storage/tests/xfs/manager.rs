//! The manager on a real XFS: what appears, what vanishes, what is shared, and what a crash leaves.

use std::{
    fs,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt, symlink},
};

use super::disk::{DISK_MIB, Disk, GROUP, PREPARED, access, fill_up, inode, list, state_of};
use pandastack_bus::{
    Error,
    storage::{Fill, StorageBackend as _, TemplateState},
};
use pandastack_storage::{Manager, StorageError};

const A: &str = "aaaaaaaaaaaaaaaaaaaa";
const B: &str = "bbbbbbbbbbbbbbbbbbbb";
const C: &str = "cccccccccccccccccccc";

#[tokio::test]
async fn a_template_is_imported_once_and_again_when_its_disk_changes() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let source = disk.sources.templates.join("base/root.img");
    let target = disk.state.join("templates/base/disk/root.img");

    let manager = disk.open();
    assert_eq!(state_of(&manager, "base").await, TemplateState::Importing);
    manager.prepare(A.into()).await.unwrap();
    let early = manager.fill(A.into(), "base".into(), Fill::Pristine, 0).await;
    assert!(matches!(early, Err(Error::NotReady(_))), "{early:?}");
    let mut changes = manager.changes();
    manager.import_all().await;
    assert_eq!(changes.recv().await.unwrap().1, TemplateState::Unbaked);
    assert!(fs::read(&source).unwrap() == fs::read(&target).unwrap());
    assert!(fs::metadata(&target).unwrap().blocks() * 512 < 8 << 20, "zeros became holes");
    let first = inode(&target);
    drop(manager);

    let manager = disk.open();
    assert_eq!(state_of(&manager, "base").await, TemplateState::Unbaked, "known at once");
    manager.import_all().await;
    assert_eq!(inode(&target), first);
    assert!(manager.template("base-alias".into()).await.unwrap().size_bytes > 0);
    drop(manager);

    disk.add_template("base", "another disk");
    let manager = disk.open();
    assert_eq!(state_of(&manager, "base").await, TemplateState::Importing);
    manager.import_all().await;
    assert!(fs::read(&source).unwrap() == fs::read(&target).unwrap());
    drop(manager);

    // With a text of its own, only that counts.
    fs::write(disk.sources.templates.join("base/identity"), "1").unwrap();
    disk.open_imported().await;
    let second = inode(&target);
    disk.open_imported().await;
    assert_eq!(inode(&target), second);
    fs::write(disk.sources.templates.join("base/identity"), "2").unwrap();
    disk.open_imported().await;
    assert_ne!(inode(&target), second);
}

#[tokio::test]
async fn a_disk_of_the_wrong_size_fails_and_says_so() {
    let Some(disk) = Disk::mount(&[]) else { return };
    fs::File::options()
        .write(true)
        .open(disk.sources.templates.join("base/root.img"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    let manager = disk.open();
    let import = tokio::time::timeout(std::time::Duration::from_secs(5), manager.import_all()).await;

    assert!(import.is_err(), "it tries again and again");
    let found = manager.template("base".into()).await.unwrap();
    assert_eq!(found.state, TemplateState::Failed);
    assert!(found.reason.contains("4096"), "{}", found.reason);
}

#[tokio::test]
async fn a_prepared_directory_gives_firecracker_what_it_needs_and_no_more() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;

    assert!(manager.prepare(A.into()).await.unwrap());
    assert!(!manager.prepare(A.into()).await.unwrap());

    let folder = disk.sandbox(A);
    assert_eq!(access(&folder), (0o750, GROUP));
    assert_eq!(access(&folder.join("s")), (0o770, GROUP));
    assert_eq!(access(&folder.join("firecracker")), (0o550, GROUP));
    assert_eq!(access(folder.parent().unwrap()), (0o710, GROUP));
    for name in ["w0.img", "w1.img", "w2.img", "w3.img"] {
        assert_eq!(access(&folder.join(name)), (0o660, GROUP), "{name}");
        assert_eq!(fs::metadata(folder.join(name)).unwrap().len(), 1 << 20);
    }
    for name in ["r0.img", "r1.img", "r2.img", "r3.img"] {
        assert_eq!(access(&folder.join(name)), (0o440, GROUP), "{name}");
        assert_eq!(inode(&folder.join(name)), inode(&disk.state.join("zero.img")));
    }
    assert_eq!(list(&folder).len(), PREPARED);
    assert_eq!(manager.owners().await.unwrap()[0].id, A);
}

#[tokio::test]
async fn a_bake_is_sealed_and_every_fill_shares_its_memory() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    let mut changes = manager.changes();
    let unbaked = {
        manager.prepare(B.into()).await.unwrap();
        manager.fill(B.into(), "base".into(), Fill::Baked, 0).await
    };
    assert!(matches!(unbaked, Err(Error::NotReady(_))), "{unbaked:?}");

    disk.bake_with(&manager, A, "base", b"memory").await;

    assert_eq!(changes.recv().await.unwrap().1, TemplateState::Baked);
    let bake = disk.bake("base").unwrap();
    for name in ["mem", "state", "root.img"] {
        assert_eq!(access(&bake.join(name)).0, 0o440, "{name}");
        assert_eq!(inode(&bake.join(name)), inode(&disk.sandbox(A).join(name)), "{name}");
    }
    // Asked again, because the answer was lost: nothing changes.
    manager.seal_template(A.into(), "base".into()).await.unwrap();
    assert_eq!(disk.bake("base").as_ref(), Some(&bake));
    assert!(manager.release(A.into()).await.unwrap());

    for _ in 0..2 {
        manager.fill(B.into(), "base".into(), Fill::Baked, 0).await.unwrap();
    }
    let folder = disk.sandbox(B);
    assert_eq!(inode(&folder.join("mem")), inode(&bake.join("mem")));
    assert_eq!(access(&folder.join("mem")), (0o440, GROUP));
    assert_eq!(access(&folder.join("root.img")), (0o660, GROUP));
    assert_ne!(inode(&folder.join("root.img")), inode(&bake.join("root.img")));
    assert!(fs::read(folder.join("root.img")).unwrap() == fs::read(bake.join("root.img")).unwrap());
    let other = manager.fill(B.into(), "base".into(), Fill::Pristine, 0).await;
    assert!(matches!(other, Err(Error::WrongState(_))), "{other:?}");

    // What one sandbox writes, nobody else sees.
    fs::File::options()
        .write(true)
        .open(folder.join("root.img"))
        .unwrap()
        .write_all_at(b"mine", 1 << 20)
        .unwrap();
    let mut bytes = [0; 4];
    fs::File::open(bake.join("root.img")).unwrap().read_exact_at(&mut bytes, 1 << 20).unwrap();
    assert_ne!(&bytes, b"mine");

    // A capture never goes into memory that others map.
    manager.prepare_capture(B.into()).await.unwrap();
    assert_ne!(inode(&folder.join("mem")), inode(&bake.join("mem")));
    assert_eq!(access(&folder.join("mem")), (0o660, GROUP));
    assert_eq!(fs::read(bake.join("mem")).unwrap(), b"memory");
}

#[tokio::test]
async fn a_disk_grows_and_never_shrinks() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.bake_with(&manager, A, "base", b"memory").await;
    manager.prepare(B.into()).await.unwrap();
    for mib in [1, DISK_MIB - 1, u64::MAX, u64::MAX >> 20, (1 << 20) + 1] {
        let refused = manager.fill(B.into(), "base".into(), Fill::Baked, mib).await;
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{mib}: {refused:?}");
    }
    assert_eq!(list(&disk.sandbox(B)).len(), PREPARED, "nothing was made");

    manager.fill(B.into(), "base".into(), Fill::Baked, DISK_MIB * 2).await.unwrap();
    assert_eq!(fs::metadata(disk.sandbox(B).join("root.img")).unwrap().len(), DISK_MIB << 21);
}

#[tokio::test]
async fn a_bake_of_another_kernel_goes_and_its_sandboxes_keep_what_they_have() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.bake_with(&manager, A, "base", b"memory").await;
    manager.prepare(B.into()).await.unwrap();
    manager.fill(B.into(), "base".into(), Fill::Baked, 0).await.unwrap();
    manager.prepare(C.into()).await.unwrap();
    let bake = disk.bake("base").unwrap();
    drop(manager);
    assert_eq!(state_of(&disk.open(), "base").await, TemplateState::Baked, "nothing changed: still baked");

    fs::write(&disk.sources.vmlinux, "newer kernel").unwrap();
    fs::write(&disk.sources.firecracker, "newer program").unwrap();
    let manager = disk.open();

    assert_eq!(state_of(&manager, "base").await, TemplateState::Unbaked);
    assert!(!bake.exists());
    assert_eq!(list(&disk.state.join("artefacts")).len(), 4, "three artefacts and current.json");
    assert_eq!(fs::read(disk.sandbox(B).join("mem")).unwrap(), b"memory");
    assert_eq!(fs::read(disk.sandbox(B).join("firecracker")).unwrap(), b"program");
    // A slot of the old Firecracker is of no use, and a kept disk boots with the new one.
    let stale = manager.fill(C.into(), "base".into(), Fill::Pristine, 0).await;
    assert!(matches!(stale, Err(Error::WrongState(_))), "{stale:?}");
    for _ in 0..2 {
        manager.ensure_kernel(B.into()).await.unwrap();
    }
    assert_eq!(fs::read(disk.sandbox(B).join("vmlinux")).unwrap(), b"newer kernel");
    assert_eq!(fs::read(disk.sandbox(B).join("firecracker")).unwrap(), b"newer program");
    assert!(list(&disk.state.join("staging")).is_empty());
}

#[tokio::test]
async fn what_a_crash_leaves_is_cleaned_and_nothing_half_done_counts() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.bake_with(&manager, A, "base", b"memory").await;
    manager.prepare(B.into()).await.unwrap();
    drop(manager);
    let (bake, template) = (disk.bake("base").unwrap(), disk.state.join("templates/base"));
    // In the middle of a fill.
    fs::write(disk.sandbox(B).join("root.img"), "half").unwrap();
    // In the middle of a release, an import, a preparation.
    for name in ["trash/cccccccccccccccccccc.3/s", "staging/disk-base.1", "staging/dddddddddddddddddddd.7/s"]
    {
        fs::create_dir_all(disk.state.join(name)).unwrap();
        fs::write(disk.state.join(name).join("file"), "x").unwrap();
    }
    // Not ours at all.
    fs::create_dir_all(disk.state.join("sandboxes/lost+found")).unwrap();
    fs::create_dir_all(template.join("bakes/junk")).unwrap();
    fs::create_dir_all(disk.state.join("templates/gone/disk")).unwrap();
    fs::write(disk.state.join("artefacts").join("0".repeat(64)), "old").unwrap();

    let manager = disk.open();

    assert_eq!(state_of(&manager, "base").await, TemplateState::Baked);
    for name in ["trash", "staging"] {
        assert!(list(&disk.state.join(name)).is_empty(), "{name}");
    }
    assert_eq!(list(&disk.state.join("sandboxes")).len(), 2);
    assert_eq!(list(&disk.state.join("templates")), std::slice::from_ref(&template));
    assert_eq!(disk.bake("base").as_ref(), Some(&bake));
    assert_eq!(list(&disk.state.join("artefacts")).len(), 4);
    manager.fill(B.into(), "base".into(), Fill::Baked, 0).await.unwrap();
    assert_eq!(fs::metadata(disk.sandbox(B).join("root.img")).unwrap().len(), DISK_MIB << 20);
    drop(manager);

    // A bake and a disk without their manifests are not there.
    fs::remove_file(bake.join("manifest.json")).unwrap();
    assert_eq!(state_of(&disk.open(), "base").await, TemplateState::Unbaked);
    assert!(!bake.exists());
    fs::remove_file(template.join("disk/manifest.json")).unwrap();
    let manager = disk.open();
    assert_eq!(state_of(&manager, "base").await, TemplateState::Importing);
    manager.import_all().await;
    assert_eq!(state_of(&manager, "base").await, TemplateState::Unbaked);
}

#[tokio::test]
async fn a_missing_template_partition_costs_nothing() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.bake_with(&manager, A, "base", b"memory").await;
    drop(manager);
    let aside = disk.dir.path().join("aside");
    fs::rename(&disk.sources.templates, &aside).unwrap();

    assert!(disk.open().templates().await.unwrap().is_empty());

    fs::rename(&aside, &disk.sources.templates).unwrap();
    assert_eq!(state_of(&disk.open(), "base").await, TemplateState::Baked);
}

#[tokio::test]
async fn only_a_whole_capture_of_the_right_template_is_sealed() {
    let Some(disk) = Disk::mount(&[]) else { return };
    disk.add_template("other", "other disk");
    let manager = disk.open_imported().await;
    let seal = async |id: &str, template: &str| manager.seal_template(id.into(), template.into()).await;

    assert!(matches!(seal(A, "base").await, Err(Error::NotFound(_))));
    manager.prepare(A.into()).await.unwrap();
    assert!(matches!(seal(A, "base").await, Err(Error::WrongState(_))), "empty");
    manager.fill(A.into(), "base".into(), Fill::Pristine, 0).await.unwrap();
    assert_eq!(fs::read(disk.sandbox(A).join("vmlinux")).unwrap(), b"kernel");
    assert!(matches!(seal(A, "base").await, Err(Error::WrongState(_))), "no capture");
    manager.prepare_capture(A.into()).await.unwrap();
    assert!(matches!(seal(A, "base").await, Err(Error::WrongState(_))), "an empty capture");
    fs::write(disk.sandbox(A).join("mem"), b"memory").unwrap();
    fs::write(disk.sandbox(A).join("state"), b"registers").unwrap();
    assert!(matches!(seal(A, "other").await, Err(Error::WrongState(_))), "another template");
    assert!(matches!(seal(A, "nobody").await, Err(Error::NotFound(_))));
    // Firecracker cannot do this (the directory is closed to it); if it could, it would win nothing.
    let secret = disk.dir.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    fs::rename(disk.sandbox(A).join("mem"), disk.sandbox(A).join("mem.real")).unwrap();
    symlink(&secret, disk.sandbox(A).join("mem")).unwrap();
    assert!(matches!(seal(A, "base").await, Err(Error::WrongState(_))), "a link");
    assert_ne!(access(&secret).0, 0o440);
    assert_eq!(disk.bake("base"), None);
    assert!(list(&disk.state.join("staging")).is_empty());
    fs::rename(disk.sandbox(A).join("mem.real"), disk.sandbox(A).join("mem")).unwrap();
    seal(A, "base").await.unwrap();
    assert_eq!(state_of(&manager, "base").await, TemplateState::Baked);
}

#[tokio::test]
async fn a_failed_bake_is_told_and_can_be_tried_again() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.fail_template("base-alias".into(), "x".repeat(5000)).await.unwrap();

    let found = manager.template("base".into()).await.unwrap();
    assert_eq!((found.state, found.reason.len()), (TemplateState::Failed, 1000));
    manager.prepare(B.into()).await.unwrap();
    let refused = manager.fill(B.into(), "base".into(), Fill::Baked, 0).await;
    assert!(matches!(refused, Err(Error::WrongState(_))), "{refused:?}");
    disk.bake_with(&manager, A, "base", b"memory").await;
    let found = manager.template("base".into()).await.unwrap();
    assert_eq!((found.state, found.reason.as_str()), (TemplateState::Baked, ""));
}

#[tokio::test]
async fn below_the_reserve_nothing_is_made_and_everything_can_be_released() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    manager.prepare(A.into()).await.unwrap();
    let usage = manager.usage().await.unwrap();
    assert_eq!(usage.reserve_bytes, 2 << 30);
    let _ballast = fill_up(&disk, &usage);

    let refused = manager.fill(A.into(), "base".into(), Fill::Pristine, 0).await;
    assert!(matches!(refused, Err(Error::NoSpace(_))), "{refused:?}");
    assert!(matches!(manager.prepare_capture(A.into()).await, Err(Error::NoSpace(_))));
    assert_eq!(list(&disk.sandbox(A)).len(), PREPARED);
    assert!(manager.release(A.into()).await.unwrap());
    assert!(!manager.release(A.into()).await.unwrap());
}

#[tokio::test]
async fn wrong_names_are_refused() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    for id in ["", "..", "../../etc", "AAAAAAAAAAAAAAAAAAAA", "aaaa/aaaaaaaaaaaaaaa"] {
        let (prepared, released) = (manager.prepare(id.into()).await, manager.release(id.into()).await);
        assert!(matches!(prepared, Err(Error::InvalidArgument(_))), "{id:?}: {prepared:?}");
        assert!(matches!(released, Err(Error::InvalidArgument(_))), "{id:?}: {released:?}");
    }
    manager.prepare(A.into()).await.unwrap();
    for template in ["", "..", "nobody", "../base", &"x".repeat(10_000)] {
        let refused = manager.fill(A.into(), template.into(), Fill::Baked, 0).await;
        assert!(matches!(refused, Err(Error::NotFound(ref text)) if text.len() < 200), "{refused:?}");
    }
    for unknown in [
        manager.fill(B.into(), "base".into(), Fill::Pristine, 0).await,
        manager.ensure_kernel(B.into()).await,
        manager.prepare_capture(B.into()).await,
    ] {
        assert!(matches!(unknown, Err(Error::NotFound(_))), "{unknown:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_and_the_same_at_once() {
    let Some(disk) = Disk::mount(&[]) else { return };
    let manager = disk.open_imported().await;
    disk.bake_with(&manager, A, "base", b"memory").await;
    let ids: Vec<_> = (0..40).map(|_| pandastack_bus::SandboxId::random().to_string()).collect();
    let tasks: Vec<_> = ids
        .iter()
        .flat_map(|id| [id.clone(), id.clone()])
        .map(|id| {
            let manager = manager.clone();
            tokio::spawn(async move {
                let made = manager.prepare(id.clone()).await.unwrap();
                manager.fill(id.clone(), "base".into(), Fill::Baked, 0).await.unwrap();
                made
            })
        })
        .collect();
    let mut made = 0;
    for task in tasks {
        made += u32::from(task.await.unwrap());
    }
    assert_eq!(made, 40, "each was made once");
    let took = std::time::Instant::now();
    for id in &ids {
        assert!(manager.release(id.clone()).await.unwrap());
    }
    println!("release: {:?} each", took.elapsed() / 40);
    assert_eq!(manager.owners().await.unwrap().len(), 1);

    let mut fills = Vec::new();
    for id in &ids {
        manager.prepare(id.clone()).await.unwrap();
        let took = std::time::Instant::now();
        manager.fill(id.clone(), "base".into(), Fill::Baked, 0).await.unwrap();
        fills.push(took.elapsed());
    }
    fills.sort();
    println!("fill: p50 {:?}, worst {:?}", fills[20], fills[39]);
}

#[test]
fn without_reflink_it_does_not_start() {
    let Some(disk) = Disk::mount(&["-m", "reflink=0"]) else { return };
    let refused = Manager::open(disk.config()).unwrap_err();

    assert!(matches!(refused, StorageError::NoReflink { .. }), "{refused:?}");
    assert!(refused.to_string().contains("reflink=1"), "{refused}");
    writeln!(std::io::stdout(), "{refused}").unwrap();
}
