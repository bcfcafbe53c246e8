//! Mounts, from the initramfs to the end.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    unistd::{chdir, chroot},
};

const NEW_ROOT: &str = "/newroot";

/// proc, sys and dev in the initramfs; they move to the root disk later.
pub(super) fn early() -> io::Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    ensure("/proc", "proc", quiet, None)?;
    ensure("/sys", "sysfs", quiet, None)?;
    match ensure("/dev", "devtmpfs", MsFlags::MS_NOSUID, Some("mode=755")) {
        // The kernel may have mounted it already.
        Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => Ok(()),
        other => other,
    }
}

/// Waits for the device, at most `limit`, and mounts its ext4; its journal is replayed by that. A disk that can only be
/// read is mounted read-only.
pub(super) fn root(device: &str, limit: Duration) -> io::Result<()> {
    let deadline = Instant::now() + limit;
    while !Path::new(device).exists() {
        if Instant::now() > deadline {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("{device} did not appear")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    fs::create_dir_all(NEW_ROOT)?;
    let writable = mount(Some(device), NEW_ROOT, Some("ext4"), MsFlags::MS_NOATIME, None::<&str>);
    if let Err(error) = writable {
        super::say(&format!("{device} cannot be mounted for writing: {error}"));
        let flags = MsFlags::MS_NOATIME | MsFlags::MS_RDONLY;
        mount(Some(device), NEW_ROOT, Some("ext4"), flags, None::<&str>)?;
    }
    Ok(())
}

/// Makes the root disk the root and frees the initramfs.
pub(super) fn switch_root() -> io::Result<()> {
    for name in ["dev", "proc", "sys"] {
        let target = Path::new(NEW_ROOT).join(name);
        fs::create_dir_all(&target)?;
        let source = Path::new("/").join(name);
        mount(Some(&source), &target, None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    }
    chdir(NEW_ROOT)?;
    empty_initramfs()?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
    chroot(".")?;
    chdir("/")?;
    Ok(())
}

/// Deletes what is in the initramfs, so that its memory is free and in no snapshot.
fn empty_initramfs() -> io::Result<()> {
    let device = fs::metadata("/")?.dev();
    delete_on(Path::new("/"), device);
    Ok(())
}

fn delete_on(directory: &Path, device: u64) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            delete_on(&path, device);
            let _ = fs::remove_dir(&path);
        } else {
            let _ = fs::remove_file(&path);
        }
    }
}

/// What programs expect beside the root disk. Goes on after a failure and reports the first.
pub(super) fn late() -> io::Result<()> {
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mut results = vec![
        ensure(
            "/dev/pts",
            "devpts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            Some("gid=5,mode=620,ptmxmode=666"),
        ),
        ensure("/dev/shm", "tmpfs", safe, Some("mode=1777")),
        ensure("/dev/mqueue", "mqueue", quiet, None),
        ensure("/run", "tmpfs", safe, Some("mode=755,size=20%")),
        ensure("/sys/fs/cgroup", "cgroup2", quiet, Some("nsdelegate,memory_recursiveprot")),
        fs::create_dir_all("/run/lock").and_then(|()| set_mode("/run/lock", 0o1777)),
        fs::create_dir_all("/tmp").and_then(|()| set_mode("/tmp", 0o1777)),
    ];
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        if !Path::new(link).exists() {
            results.push(symlink(target, link));
        }
    }
    for device in ["/dev/fuse", "/dev/net/tun"] {
        if Path::new(device).exists() {
            results.push(set_mode(device, 0o666));
        }
    }
    results.into_iter().collect()
}

/// Makes the root file system read-only, so that it is clean.
pub(super) fn read_only() -> io::Result<()> {
    let flags = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | MsFlags::MS_NOATIME;
    Ok(mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?)
}

fn set_mode(path: &str, mode: u32) -> io::Result<()> {
    if fs::metadata(path)?.mode() & 0o7777 == mode {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn ensure(path: &str, kind: &str, flags: MsFlags, data: Option<&str>) -> io::Result<()> {
    if !Path::new(path).is_dir() {
        fs::create_dir_all(path)?;
    }
    mount(Some(kind), path, Some(kind), flags, data)
        .map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("{path}: {error}")))
}
