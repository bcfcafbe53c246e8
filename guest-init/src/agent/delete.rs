//! Deleting a tree: never through a symbolic link, never across a mount, with bounded depth and descriptors however deep
//! the tree is. Everything here blocks.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use nix::libc;
use pandastack_protocol::{Code, Failure};

use super::files::{failure, refuse};

/// Directories open at once; what is deeper is moved up first.
const DEPTH: usize = 32;

/// Deletes a file, or a directory with all that is in it. Not `/`, and nothing that is mounted.
pub fn delete(path: &Path) -> Result<(), Failure> {
    let fail = |error: io::Error| failure(path, &error);
    // `a/.` and `a/..` name directories that cannot be deleted by that name.
    let last = path.as_os_str().as_bytes().split(|byte| *byte == b'/').rfind(|part| !part.is_empty());
    let name = match last {
        None => return Err(refuse(Code::Invalid, path, "the root cannot be deleted")),
        Some(b"." | b"..") => return Err(refuse(Code::Invalid, path, "must not end in . or ..")),
        Some(name) => {
            CString::new(name).map_err(|_| refuse(Code::Invalid, path, "a path must not contain NUL"))?
        }
    };
    let parent = CString::new(path.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes())
        .map_err(|_| refuse(Code::Invalid, path, "a path must not contain NUL"))?;
    let parent = open_directory(libc::AT_FDCWD, &parent, 0).map_err(fail)?;
    match remove(&parent, &name, None, 0) {
        Ok(()) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Err(refuse(Code::Denied, path, "something is mounted there"))
        }
        Err(error) => Err(fail(error)),
    }
}

/// Removes `name` in `parent`. `top` is the directory that too deep ones move to.
fn remove(parent: &OwnedFd, name: &CStr, top: Option<&OwnedFd>, depth: usize) -> io::Result<()> {
    let (directory, mounted) = look(parent, name)?;
    if mounted {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    if !directory {
        return unlink(parent, name, 0);
    }
    let inner = open_directory(parent.as_raw_fd(), name, libc::O_NOFOLLOW)?;
    let top_of_inner = top.unwrap_or(&inner);
    // Moving up adds names to the top while it is read: go on until nothing is found.
    loop {
        let mut found = false;
        for child in names(&inner)? {
            found = true;
            if depth + 1 >= DEPTH && look(&inner, &child).is_ok_and(|(directory, _)| directory) {
                let moved = CString::new(format!(".panda-delete-{:x}-{depth}", counter()))?;
                // SAFETY: both names are C strings that outlive the call.
                let result = unsafe {
                    libc::renameat(
                        inner.as_raw_fd(),
                        child.as_ptr(),
                        top_of_inner.as_raw_fd(),
                        moved.as_ptr(),
                    )
                };
                if result < 0 {
                    return Err(io::Error::last_os_error());
                }
                continue;
            }
            match remove(&inner, &child, Some(top_of_inner), depth + 1) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
        if !found {
            break;
        }
    }
    unlink(parent, name, libc::AT_REMOVEDIR)
}

fn counter() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Whether it is a directory, and whether something is mounted on it.
fn look(parent: &OwnedFd, name: &CStr) -> io::Result<(bool, bool)> {
    // SAFETY: all zeroes is a valid statx; the name outlives the call.
    let (result, found) = unsafe {
        let mut found: libc::statx = std::mem::zeroed();
        let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
        (libc::statx(parent.as_raw_fd(), name.as_ptr(), flags, libc::STATX_TYPE, &mut found), found)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let directory = u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
    Ok((directory, found.stx_attributes & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0))
}

fn open_directory(parent: i32, name: &CStr, flags: i32) -> io::Result<OwnedFd> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC | flags;
    // SAFETY: the name outlives the call.
    let fd = unsafe { libc::openat(parent, name.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn unlink(parent: &OwnedFd, name: &CStr, flags: i32) -> io::Result<()> {
    // SAFETY: the name outlives the call.
    let result = unsafe { libc::unlinkat(parent.as_raw_fd(), name.as_ptr(), flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Some names of a directory, a bounded number.
fn names(directory: &OwnedFd) -> io::Result<Vec<CString>> {
    const BATCH: usize = 1024;
    let own = nix::fcntl::openat(
        directory,
        ".",
        nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )?;
    let mut list = nix::dir::Dir::from_fd(own)?;
    let mut names = Vec::new();
    for item in list.iter().take(BATCH + 2) {
        let name = item?.file_name().to_owned();
        if !matches!(name.as_bytes(), b"." | b"..") {
            names.push(name);
        }
    }
    Ok(names)
}
