//! The files that say which guest this is: on a small tmpfs, bound over their places in the root file system.
//!
//! Owns mounting and rewriting them; works with a root that is full or read-only. Refuses to know who decides the contents.

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use nix::mount::{MsFlags, mount};

use crate::layout::IDENTITY;

/// A file below [`IDENTITY`] and the path that it is bound over.
pub struct Bound {
    /// Name below [`IDENTITY`].
    pub name: &'static str,
    /// What it covers.
    pub target: &'static str,
}

/// Every bound file.
pub const BOUND: [Bound; 4] = [
    Bound { name: "machine-id", target: "/etc/machine-id" },
    Bound { name: "hostname", target: "/etc/hostname" },
    Bound { name: "hosts", target: "/etc/hosts" },
    Bound { name: "boot_id", target: "/proc/sys/kernel/random/boot_id" },
];

/// Mounts a fresh tmpfs, fills it with what the targets say now, and binds it over them. Also mends: a later mount covers
/// an earlier one. A target that does not exist and cannot be made is an error.
pub fn install() -> io::Result<()> {
    let contents: Vec<Vec<u8>> =
        BOUND.iter().map(|bound| read_bounded(Path::new(bound.target)).unwrap_or_default()).collect();
    fs::create_dir_all(IDENTITY)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("panda"), IDENTITY, Some("tmpfs"), flags, Some("size=1m,mode=755"))?;
    for (bound, content) in BOUND.iter().zip(contents) {
        let source = source(bound);
        write_in_place(&source, &content)?;
        if !Path::new(bound.target).exists() {
            fs::File::create(bound.target)?;
        }
        mount(Some(&source), bound.target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}

/// Path of the tmpfs copy of a bound file.
pub fn source(bound: &Bound) -> PathBuf {
    Path::new(IDENTITY).join(bound.name)
}

/// Writes a file without changing its inode, because mounts point at the inode.
pub fn write_in_place(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    file.write_all(content)
}

/// At most 64 KiB of a file: what a user put there must not fill our memory.
pub fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut content = Vec::new();
    file.take(64 << 10).read_to_end(&mut content)?;
    Ok(content)
}

/// `/etc/hosts` with this host's name: every line that is not ours stays.
pub fn hosts(old: &str, hostname: &str) -> String {
    let mut lines: Vec<&str> = old
        .lines()
        .filter(|line| line.split_whitespace().next() != Some("127.0.1.1") && !line.trim().is_empty())
        .collect();
    if !lines.iter().any(|line| line.split_whitespace().skip(1).any(|name| name == "localhost")) {
        lines.insert(0, "127.0.0.1\tlocalhost");
    }
    let own = format!("127.0.1.1\t{hostname}");
    lines.push(&own);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::hosts;

    #[test]
    fn hosts_keeps_foreign_lines_and_replaces_its_own() {
        let first = hosts("", "sb-one");
        assert_eq!(first, "127.0.0.1\tlocalhost\n127.0.1.1\tsb-one\n");
        let edited = first + "10.0.0.9 db\n";
        assert_eq!(hosts(&edited, "sb-two"), "127.0.0.1\tlocalhost\n10.0.0.9 db\n127.0.1.1\tsb-two\n");
    }
}
