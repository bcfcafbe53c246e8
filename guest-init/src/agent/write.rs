//! Writing a file whole or not at all: a temporary file beside it, then a rename. Everything here blocks.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::{
        fd::AsFd,
        unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown},
    },
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    libc,
    sys::statvfs::fstatvfs,
};
use pandastack_protocol::{Code, Failure};

use super::files::{failure, refuse};

/// Space that no upload takes.
const RESERVE: u64 = 1 << 20;
/// From here on the space is taken before the first byte comes.
const ALLOCATE: u64 = 1 << 20;

/// A file on its way; dropping it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    file: File,
    temporary: PathBuf,
    target: PathBuf,
    size: u64,
    written: u64,
    placed: bool,
}

impl Writer {
    /// Prepares to write `size` bytes to `path`: parents, space, a temporary file. A symbolic link is written through.
    pub fn create(path: &Path, size: u64, mode: u32) -> Result<Self, Failure> {
        let fail = |error: io::Error| failure(path, &error);
        let ends_as_directory = path.as_os_str().as_encoded_bytes().ends_with(b"/");
        if ends_as_directory || path.file_name().is_none() {
            return Err(refuse(Code::IsADirectory, path, "is a directory"));
        }
        let target = resolve(path)?;
        let parent = target.parent().unwrap_or(Path::new("/"));
        let existing = match target.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {
                return Err(refuse(Code::IsADirectory, path, "is a directory"));
            }
            Ok(metadata) if !metadata.is_file() => {
                return Err(refuse(Code::Invalid, path, "not a regular file"));
            }
            Ok(metadata) => Some(metadata),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(fail(error)),
        };
        if existing.is_none() && !parent.is_dir() {
            DirBuilder::new().recursive(true).mode(0o755).create(parent).map_err(|error| {
                if error.kind() == io::ErrorKind::AlreadyExists {
                    refuse(Code::NotADirectory, path, "a parent is not a directory")
                } else {
                    fail(error)
                }
            })?;
        }
        let directory = File::open(parent).map_err(fail)?;
        let space = fstatvfs(&directory).map_err(|error| fail(error.into()))?;
        // Some file systems (of /proc, of FUSE) do not count blocks.
        if space.blocks() > 0 {
            let free = space.blocks_available().saturating_mul(space.fragment_size());
            if size.saturating_add(RESERVE) > free {
                let reason = format!("{size} bytes do not fit, {} are free", free.saturating_sub(RESERVE));
                return Err(refuse(Code::NoSpace, path, &reason));
            }
        }
        let temporary = parent.join(format!(".panda-{:016x}", random().map_err(fail)?));
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(fail)?;
        let writer = Self { file, temporary, target, size, written: 0, placed: false };
        if size >= ALLOCATE {
            let length = i64::try_from(size).map_err(|_| refuse(Code::NoSpace, path, "too large"))?;
            match fallocate(&writer.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, length) {
                Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => {}
                Err(error) => return Err(fail(error.into())),
            }
        }
        let mode = existing.as_ref().map_or(mode & 0o7777, |metadata| metadata.mode() & 0o7777);
        if let Some(metadata) = existing {
            fchown(&writer.file, Some(metadata.uid()), Some(metadata.gid())).map_err(fail)?;
        }
        writer.file.set_permissions(fs::Permissions::from_mode(mode)).map_err(fail)?;
        Ok(writer)
    }

    /// Adds bytes; more than announced are refused.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.written += bytes.len() as u64;
        if self.written > self.size {
            return Err(refuse(Code::Invalid, &self.target, "more bytes than announced"));
        }
        self.file.write_all(bytes).map_err(|error| failure(&self.target, &error))
    }

    /// Puts the file in its place and on disk; answers how long it is.
    pub fn finish(mut self) -> Result<u64, Failure> {
        if self.written != self.size {
            return Err(refuse(Code::Invalid, &self.target, "fewer bytes than announced"));
        }
        self.place().map_err(|error| failure(&self.target, &error))?;
        Ok(self.written)
    }

    fn place(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        match fs::rename(&self.temporary, &self.target) {
            Ok(()) => self.placed = true,
            // A file that something is mounted on (as /etc/hosts is) can only be written in place.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let mut target = OpenOptions::new()
                    .write(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
                    .open(&self.target)?;
                io::copy(&mut File::open(&self.temporary)?, &mut target)?;
                return target.sync_all();
            }
            Err(error) => return Err(error),
        }
        File::open(self.target.parent().unwrap_or(Path::new("/")))?.sync_all()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

/// Where an ordinary open for writing would end up: every symbolic link of the last component followed, also one that
/// leads nowhere yet.
fn resolve(path: &Path) -> Result<PathBuf, Failure> {
    const LINKS: usize = 40;
    let mut target = path.to_owned();
    for _ in 0..LINKS {
        match fs::read_link(&target) {
            Ok(link) => {
                let parent = target.parent().unwrap_or(Path::new("/")).to_owned();
                target = parent.join(link);
                if target.file_name().is_none() {
                    // `..` and the like can only be a directory.
                    return Ok(target);
                }
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOENT)) => {
                return Ok(target);
            }
            Err(error) => return Err(failure(path, &error)),
        }
    }
    Err(refuse(Code::Invalid, path, "too many symbolic links"))
}

fn random() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    // SAFETY: getrandom writes at most 8 bytes into the buffer.
    let count = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if count == 8 { Ok(u64::from_ne_bytes(bytes)) } else { Err(io::Error::last_os_error()) }
}

/// Free bytes of the root file system.
pub fn root_free() -> io::Result<u64> {
    let space = fstatvfs(File::open("/")?.as_fd())?;
    Ok(space.blocks_available().saturating_mul(space.fragment_size()))
}
