//! Volumes: from drives that the host has just put in place to mounted file systems.
//!
//! Owns which devices and paths a host may name, waiting for a drive's new size, mounting and growing, and taking all of
//! it back after a failure. Refuses to know whose a volume is, and enforces nothing: a drive that must not be written is
//! read-only on the host's side.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    mount::{MntFlags, MsFlags, mount, umount2},
};
use pandastack_protocol::{Code, Failure, Mount};

use super::{
    ext4, files,
    files::{failure, refuse},
};

/// Where volumes may be mounted.
const BELOW: &str = "/mnt/";
/// How long a drive may take to show the size of the file that the host put behind it: the kernel learns it from an
/// interrupt that may come after the request.
const SETTLE: Duration = Duration::from_secs(5);
/// The inode of every ext4's root directory.
const ROOT_INODE: u64 = 2;

/// Refuses mounts that make no sense; nothing was changed then.
pub fn check(mounts: &[Mount]) -> Result<(), Failure> {
    let (mut devices, mut paths) = (HashSet::new(), HashSet::new());
    for mount in mounts {
        // The first drive is the root disk.
        if !matches!(mount.device.as_bytes(), [b'v', b'd', b'b'..=b'z']) {
            return Err(invalid("the device of a volume is one of vdb to vdz"));
        }
        let path = files::checked(&mount.path)?;
        let below = mount.path.strip_prefix(BELOW).unwrap_or_default();
        if below.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(refuse(Code::Invalid, &path, "a volume is mounted at a plain path below /mnt"));
        }
        if !devices.insert(&mount.device) || !paths.insert(path) {
            return Err(invalid("two mounts name the same device or path"));
        }
    }
    Ok(())
}

/// Mounts all of them, or none; those that are there already are left alone. Blocks.
pub fn mount_all(mounts: &[Mount]) -> Result<(), Failure> {
    check(mounts)?;
    let mut placed = Vec::new();
    for mount in mounts {
        let drive = Path::new("/dev").join(&mount.device);
        match place(&drive, Path::new(&mount.path), mount.read_only, SETTLE) {
            Ok(new) => placed.extend(new),
            Err(failure) => {
                // Latest first: an earlier one may have made the directories that a later one is in.
                while placed.pop().is_some() {}
                return Err(failure);
            }
        }
    }
    placed.into_iter().for_each(Placed::keep);
    Ok(())
}

/// A mount, and the directories made for it. Dropping it takes both back, unless it is kept.
#[derive(Debug, Default)]
struct Placed {
    mounted: Option<PathBuf>,
    directories: Vec<PathBuf>,
}

impl Placed {
    fn keep(mut self) {
        self.mounted = None;
        self.directories.clear();
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        if let Some(path) = &self.mounted {
            // Also where a program is in it already.
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
        for directory in self.directories.iter().rev() {
            let _ = fs::remove_dir(directory);
        }
    }
}

/// Mounts the ext4 of `drive` at `path`; `None` where it is mounted already.
fn place(drive: &Path, path: &Path, read_only: bool, settle: Duration) -> Result<Option<Placed>, Failure> {
    let node = match drive.symlink_metadata() {
        Ok(node) if node.file_type().is_block_device() => node,
        Ok(_) => return Err(refuse(Code::Invalid, drive, "not a block device")),
        Err(error) => return Err(failure(drive, &error)),
    };
    let there = |found: fs::Metadata| found.dev() == node.rdev() && found.ino() == ROOT_INODE;
    if path.symlink_metadata().is_ok_and(there) {
        return Ok(None);
    }
    let grows = settled(drive, settle)?;
    let mut placed = Placed::default();
    make_directories(path, &mut placed.directories)?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    // The journal of a drive that cannot be written cannot be replayed.
    let (flags, data) = if read_only { (safe | MsFlags::MS_RDONLY, Some("noload")) } else { (safe, None) };
    mount(Some(drive), path, Some("ext4"), flags, data).map_err(|error| not_mounted(drive, error))?;
    placed.mounted = Some(path.to_owned());
    if grows && !read_only {
        ext4::grow(path).map_err(|error| Failure {
            code: Code::Internal,
            message: format!("growing the file system of {}: {error}", drive.display()),
        })?;
    }
    Ok(Some(placed))
}

/// Waits until the drive is as large as its file system says; answers whether it is larger.
fn settled(drive: &Path, limit: Duration) -> Result<bool, Failure> {
    let fail = |error: io::Error| failure(drive, &error);
    let device = File::open(drive).map_err(fail)?;
    flush(&device).map_err(fail)?;
    let Some(claimed) = ext4::claimed_bytes(&device).map_err(fail)? else {
        return Err(refuse(Code::Invalid, drive, "there is no ext4 file system on it"));
    };
    let deadline = Instant::now() + limit;
    loop {
        let bytes = ext4::device_bytes(&device).map_err(fail)?;
        if bytes >= claimed {
            return Ok(bytes > claimed);
        }
        if Instant::now() >= deadline {
            let reason = format!("the drive has {bytes} bytes, its file system needs {claimed}");
            return Err(refuse(Code::Invalid, drive, &reason));
        }
        sleep(Duration::from_millis(2));
    }
}

/// Forgets what was read before the host put another file behind the drive.
fn flush(device: &File) -> io::Result<()> {
    const BLKFLSBUF: libc::c_ulong = 0x1261;
    // SAFETY: BLKFLSBUF takes no argument.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKFLSBUF) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes what is missing of `path` and notes it in `made`. A link on the way is refused: it may lead out of `/mnt`.
fn make_directories(path: &Path, made: &mut Vec<PathBuf>) -> Result<(), Failure> {
    let mut ancestors: Vec<&Path> = path.ancestors().collect();
    ancestors.reverse();
    for directory in ancestors {
        match directory.symlink_metadata() {
            Ok(found) if found.is_dir() => {}
            Ok(_) => return Err(refuse(Code::NotADirectory, directory, "not a directory")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir(directory).map_err(|error| failure(directory, &error))?;
                made.push(directory.to_owned());
            }
            Err(error) => return Err(failure(directory, &error)),
        }
    }
    Ok(())
}

fn not_mounted(drive: &Path, error: Errno) -> Failure {
    let (code, reason) = match error {
        Errno::EINVAL | Errno::EUCLEAN => (Code::Invalid, "its file system is damaged"),
        Errno::EACCES | Errno::EROFS => (Code::Denied, "the drive is read-only"),
        Errno::EBUSY => (Code::Busy, "it is in use"),
        _ => (Code::Internal, "it cannot be mounted"),
    };
    refuse(code, drive, &format!("{reason} ({error})"))
}

fn invalid(message: &str) -> Failure {
    Failure { code: Code::Invalid, message: message.to_owned() }
}

#[cfg(test)]
#[path = "volumes_tests.rs"]
mod tests;
