//! Files of the guest: reading, listing and looking. Everything here blocks.
//!
//! Paths are the guest's own and resolve as any program's do; what must hold is that the agent never hangs on a node that
//! is not a file, and never holds more than a bounded part of anything.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::{Path, PathBuf},
};

use nix::libc;
use pandastack_protocol::{Code, Entry, Failure};

/// Bytes of names that one listing may hold.
const NAMES: usize = 32 << 20;
/// Entries in one frame of a listing: with names of 255 bytes, six each in JSON, still far below its limit.
const PAGE: usize = 256;

/// A path that may be used: absolute, no NUL, not too long.
pub fn checked(path: &str) -> Result<PathBuf, Failure> {
    let reason = if !path.starts_with('/') {
        "a path must be absolute"
    } else if path.contains('\0') {
        "a path must not contain NUL"
    } else if path.len() >= libc::PATH_MAX as usize {
        "the path is too long"
    } else {
        return Ok(PathBuf::from(path));
    };
    Err(Failure { code: Code::Invalid, message: reason.to_owned() })
}

/// What an error means to the caller.
pub fn failure(path: &Path, error: &io::Error) -> Failure {
    let code = match error.raw_os_error() {
        Some(libc::ENOENT) => Code::NotFound,
        Some(libc::ENOTDIR) => Code::NotADirectory,
        Some(libc::EISDIR) => Code::IsADirectory,
        Some(libc::EACCES | libc::EPERM | libc::EROFS | libc::EBUSY | libc::ETXTBSY) => Code::Denied,
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => Code::NoSpace,
        Some(libc::ELOOP | libc::ENAMETOOLONG | libc::EINVAL) => Code::Invalid,
        _ => Code::Internal,
    };
    Failure { code, message: format!("{}: {error}", shown(path)) }
}

/// A failure that no error number stands for.
pub fn refuse(code: Code, path: &Path, reason: &str) -> Failure {
    Failure { code, message: format!("{}: {reason}", shown(path)) }
}

/// A path for a message, which is bounded.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    if text.chars().count() <= 200 {
        text.into_owned()
    } else {
        text.chars().take(200).chain("…".chars()).collect()
    }
}

/// Opens a regular file; anything else is refused without ever waiting for it.
pub fn open(path: &Path) -> Result<(File, Entry), Failure> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let file = match file {
        // A socket.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            return Err(refuse(Code::Invalid, path, "not a regular file"));
        }
        other => other.map_err(|error| failure(path, &error))?,
    };
    let metadata = file.metadata().map_err(|error| failure(path, &error))?;
    if metadata.is_dir() {
        return Err(refuse(Code::IsADirectory, path, "is a directory"));
    }
    if !metadata.is_file() {
        return Err(refuse(Code::Invalid, path, "not a regular file"));
    }
    let name = path.file_name().unwrap_or_default();
    let entry = entry(name.as_bytes(), &metadata);
    Ok((file, entry))
}

/// At most `limit` bytes; fewer only at the end.
pub fn read(file: &mut File, limit: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(limit);
    file.take(limit as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Looks at a path; the last component is not followed.
pub fn stat(path: &Path) -> Result<Entry, Failure> {
    let metadata = path.symlink_metadata().map_err(|error| failure(path, &error))?;
    let name = path.file_name().map_or(b"/".as_slice(), |name| name.as_bytes());
    Ok(entry(name, &metadata))
}

/// The names in a directory, sorted, in one piece of memory.
#[derive(Debug)]
pub struct Listing {
    directory: PathBuf,
    names: Vec<u8>,
    /// Start and end of each name, sorted by name.
    order: Vec<(u32, u32)>,
    next: usize,
}

impl Listing {
    /// Reads all names.
    pub fn open(directory: &Path) -> Result<Self, Failure> {
        let fail = |error: io::Error| failure(directory, &error);
        let mut names = Vec::new();
        let mut order = Vec::new();
        for item in fs::read_dir(directory).map_err(fail)? {
            let name = item.map_err(fail)?.file_name();
            let start = names.len();
            names.extend_from_slice(name.as_bytes());
            if names.len() > NAMES {
                return Err(refuse(Code::Invalid, directory, "there are too many names in the directory"));
            }
            order.push((start as u32, names.len() as u32));
        }
        order.sort_unstable_by(|a, b| {
            names[a.0 as usize..a.1 as usize].cmp(&names[b.0 as usize..b.1 as usize])
        });
        Ok(Self { directory: directory.to_owned(), names, order, next: 0 })
    }

    /// The next entries; empty at the end. What was deleted meanwhile is left out.
    pub fn page(&mut self) -> Vec<Entry> {
        let mut page = Vec::with_capacity(PAGE);
        while page.len() < PAGE && self.next < self.order.len() {
            let (start, end) = self.order[self.next];
            self.next += 1;
            let name = &self.names[start as usize..end as usize];
            let path = self.directory.join(std::ffi::OsStr::from_bytes(name));
            if let Ok(metadata) = path.symlink_metadata() {
                page.push(entry(name, &metadata));
            }
        }
        page
    }
}

fn entry(name: &[u8], metadata: &Metadata) -> Entry {
    let kind = metadata.file_type();
    let kind = if kind.is_file() {
        'f'
    } else if kind.is_dir() {
        'd'
    } else if kind.is_symlink() {
        'l'
    } else if kind.is_fifo() {
        'p'
    } else if kind.is_socket() {
        's'
    } else if kind.is_char_device() {
        'c'
    } else {
        'b'
    };
    Entry {
        name: String::from_utf8_lossy(name).into_owned(),
        kind,
        size: metadata.len(),
        mode: metadata.permissions().mode() & 0o7777,
        mtime: metadata.mtime(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_the_worst_names_fits_a_frame() {
        let worst =
            Entry { name: "\u{1}".repeat(255), kind: 'f', size: u64::MAX, mode: 0o7777, mtime: i64::MIN };
        let page = serde_json::to_vec(&vec![worst; PAGE]).expect("JSON");
        assert!(page.len() < 512 << 10, "{}", page.len());
    }

    #[test]
    fn paths_are_checked() {
        assert!(checked("/a/../b").is_ok());
        for bad in ["", "a", "/a\0b", &"/a".repeat(3000)] {
            assert_eq!(checked(bad).expect_err("refused").code, Code::Invalid);
        }
    }
}
