//! Files that are either wholly there or not at all, also after a power cut.
//!
//! Blocking: async code calls these through `spawn_blocking`.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::fcntl::OFlag;

/// Replaces `path` by `bytes`: a temporary file in the same directory, fsync, rename, fsync of the directory. Durable
/// when it returns. `mode` holds whatever the umask is.
///
/// # Errors
/// The old content is untouched unless the very last step (the directory's fsync) failed; then either may be on disk.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    write_staged(path, bytes, mode).map_err(|failure| failure.error)
}

/// Removes a file durably. Answers `false` when there was none.
///
/// # Errors
/// The file cannot be removed, or its directory cannot be synced (then it may come back after a power cut).
pub fn remove_durably(path: &Path) -> io::Result<bool> {
    remove_staged(path).map_err(|failure| failure.error)
}

/// Makes the names in a directory durable.
///
/// # Errors
/// The directory cannot be opened or its fsync fails.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Reads a file of at most `limit` bytes; `None` when there is none.
///
/// # Errors
/// It is longer (`FileTooLarge`), a symbolic link, not a regular file, or cannot be read.
pub fn read_limited(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(Some(bytes)) }
}

/// Removes what an interrupted [`write_atomic`] left in `directory`. Nobody may be writing there.
///
/// # Errors
/// The directory cannot be read or a leftover cannot be removed.
pub fn remove_leftovers(directory: &Path) -> io::Result<u32> {
    let mut removed = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if is_temporary(&entry.file_name()) && !entry.file_type()?.is_dir() {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

/// A failed change, and whether the disk may hold something else than what was acknowledged.
pub(crate) struct Failure {
    pub(crate) error: io::Error,
    pub(crate) in_doubt: bool,
}

pub(crate) fn write_staged(path: &Path, bytes: &[u8], mode: u32) -> Result<(), Failure> {
    let (directory, temporary) = neighbours(path).map_err(before)?;
    let written = write_new(&temporary, bytes, mode).and_then(|file| {
        file.sync_all().map_err(in_doubt)?;
        fs::rename(&temporary, path).map_err(before)
    });
    if let Err(failure) = written {
        // The error that counts is the first one; a leftover is removed at the next start at the latest.
        let _ = fs::remove_file(&temporary);
        return Err(failure);
    }
    sync_dir(directory).map_err(in_doubt)
}

pub(crate) fn remove_staged(path: &Path) -> Result<bool, Failure> {
    let (directory, _) = neighbours(path).map_err(before)?;
    let was_there = match fs::remove_file(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(before(error)),
    };
    // Also when it was gone already: the removal may have been ours, cut short before its fsync.
    sync_dir(directory).map_err(in_doubt)?;
    Ok(was_there)
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> Result<File, Failure> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        Ok(file)
    };
    write().map_err(before)
}

/// The directory of `path`, and a name in it for its next version that nobody else uses.
fn neighbours(path: &Path) -> io::Result<(&Path, PathBuf)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let no_name = || io::Error::new(io::ErrorKind::InvalidInput, "not the path of a file");
    let directory = path.parent().ok_or_else(no_name)?;
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    let mut name = OsString::from(".");
    name.push(path.file_name().ok_or_else(no_name)?);
    name.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    Ok((directory, directory.join(name)))
}

fn is_temporary(name: &std::ffi::OsStr) -> bool {
    let name = name.as_encoded_bytes();
    name.starts_with(b".") && name.ends_with(b".tmp")
}

fn before(error: io::Error) -> Failure {
    Failure { error, in_doubt: false }
}

fn in_doubt(error: io::Error) -> Failure {
    Failure { error, in_doubt: true }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_nothing_else_remains() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");

        write_atomic(&path, b"one", 0o644).unwrap();
        write_atomic(&path, b"two", 0o640).unwrap();

        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_leaves_the_old_content_and_no_leftover() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::create_dir(&path).unwrap();

        assert!(write_atomic(&path, b"two", 0o640).is_err(), "a directory cannot be replaced by a file");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn removing_answers_whether_it_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, b"x").unwrap();

        assert!(remove_durably(&path).unwrap());
        assert!(!remove_durably(&path).unwrap());
        assert!(remove_durably(&dir.path().join("absent/a")).is_err(), "the directory itself is missing");
    }

    #[test]
    fn reading_is_bounded_and_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, b"four").unwrap();
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();

        assert_eq!(read_limited(&path, 4).unwrap().as_deref(), Some(&b"four"[..]));
        assert_eq!(read_limited(&path, 3).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(read_limited(&dir.path().join("absent"), 3).unwrap(), None);
        assert!(read_limited(&dir.path().join("link"), 9).is_err());
        assert!(read_limited(dir.path(), 9).is_err());
    }

    #[test]
    fn leftovers_of_a_crash_are_removed_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for name in [".a.json.7-0.tmp", "a.json", ".index", "b.tmp"] {
            fs::write(dir.path().join(name), b"x").unwrap();
        }

        assert_eq!(remove_leftovers(dir.path()).unwrap(), 1);
        assert!(!dir.path().join(".a.json.7-0.tmp").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
