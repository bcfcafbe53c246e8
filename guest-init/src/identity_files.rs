//! The files that say which guest this is: on a small tmpfs, bound over their places in the root file system.
//!
//! Owns mounting and rewriting them; works with a root that is full or read-only. Refuses to know who decides the contents.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{FallocateFlags, fallocate},
    mount::{MsFlags, mount},
};

use crate::layout::IDENTITY;

/// A file below [`IDENTITY`] and the path that it is bound over.
struct Bound {
    name: &'static str,
    target: &'static str,
}

const BOUND: [Bound; 4] = [
    Bound { name: "machine-id", target: "/etc/machine-id" },
    Bound { name: "hostname", target: "/etc/hostname" },
    Bound { name: "hosts", target: HOSTS },
    Bound { name: "boot_id", target: "/proc/sys/kernel/random/boot_id" },
];
const HOSTS: &str = "/etc/hosts";

/// What of a file is looked at: what a user put there must not fill our memory.
const LONGEST: usize = 64 << 10;

/// What of each file is allocated beforehand, bytes.
const ALLOCATED: i64 = 4 << 10;

/// Mounts a fresh tmpfs, fills it with what the targets say now, and binds it over them. Also mends: a later mount covers
/// an earlier one. A target that does not exist and cannot be made is an error.
pub fn install() -> io::Result<()> {
    let contents = BOUND.each_ref().map(|bound| read_bounded(Path::new(bound.target)).unwrap_or_default());
    let defaults = read_bounded(&defaults());
    fs::create_dir_all(IDENTITY)?;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("panda"), IDENTITY, Some("tmpfs"), flags, Some("size=1m,mode=755"))?;
    for (bound, content) in BOUND.iter().zip(contents) {
        write_in_place(&source(bound), &content)?;
        if !Path::new(bound.target).exists() {
            File::create(bound.target)?;
        }
        mount(Some(&source(bound)), bound.target, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    defaults.map_or(Ok(()), |text| remember_defaults(&text))
}

fn source(bound: &Bound) -> PathBuf {
    Path::new(IDENTITY).join(bound.name)
}

/// What a guest has of its own.
#[derive(Debug, Clone, Copy)]
pub struct Names<'a> {
    /// 32 hexadecimal digits.
    pub machine_id: &'a str,
    /// A UUID.
    pub boot_id: &'a str,
    /// A DNS label.
    pub hostname: &'a str,
}

/// The bound files, open since before the snapshot. The first thing a restored guest does is to write them, and there
/// every call and every page touched for the first time is time that somebody waits.
#[derive(Debug)]
pub struct Copies {
    files: [Opened; BOUND.len()],
    hosts: Box<[u8]>,
}

#[derive(Debug)]
struct Opened {
    file: File,
    target: &'static str,
    /// Device and inode.
    node: (u64, u64),
}

impl Copies {
    /// Opens what [`install`] has made.
    pub fn open() -> io::Result<Self> {
        let [machine_id, hostname, hosts, boot_id] = BOUND.each_ref().map(Opened::open);
        let files = [machine_id?, hostname?, hosts?, boot_id?];
        Ok(Self { files, hosts: vec![0; LONGEST].into_boxed_slice() })
    }

    /// Writes them all; an error means that programs may not see what was written.
    pub fn write(&mut self, names: Names<'_>) -> io::Result<()> {
        let [machine_id, hostname, hosts, boot_id] = &self.files;
        let length = hosts.file.read_at(&mut self.hosts, 0)?;
        let old = String::from_utf8_lossy(&self.hosts[..length]);
        hosts.write(&with_host(&old, names.hostname))?;
        let mut line = String::with_capacity(64);
        for (opened, text) in
            [(machine_id, names.machine_id), (hostname, names.hostname), (boot_id, names.boot_id)]
        {
            line.clear();
            line.push_str(text);
            line.push('\n');
            opened.write(&line)?;
        }
        Ok(())
    }
}

impl Opened {
    fn open(bound: &Bound) -> io::Result<Self> {
        let file = fs::OpenOptions::new().read(true).write(true).open(source(bound))?;
        // Its memory is there from now on, in every snapshot, and whatever else fills the tmpfs.
        fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, ALLOCATED)?;
        let metadata = file.metadata()?;
        Ok(Self { file, target: bound.target, node: (metadata.dev(), metadata.ino()) })
    }

    /// Writes the file and makes sure that its target leads to it: then whoever reads the target reads what was written.
    fn write(&self, content: &str) -> io::Result<()> {
        self.file.write_all_at(content.as_bytes(), 0)?;
        let seen = fs::metadata(self.target)?;
        if (seen.dev(), seen.ino()) != self.node {
            return Err(io::Error::other(format!("{} is not ours", self.target)));
        }
        if seen.len() != content.len() as u64 {
            self.file.set_len(content.len() as u64)?;
        }
        Ok(())
    }
}

fn defaults() -> PathBuf {
    Path::new(IDENTITY).join("defaults")
}

/// Keeps what an agent that is started again must know.
pub fn remember_defaults(text: &[u8]) -> io::Result<()> {
    write_in_place(&defaults(), text)
}

/// What was kept last.
pub fn remembered_defaults() -> io::Result<Vec<u8>> {
    read_bounded(&defaults())
}

/// Writes a file without changing its inode, because mounts point at the inode.
fn write_in_place(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path)?;
    file.write_all(content)
}

/// The beginning of a file.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    use std::io::Read;
    let file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut content = Vec::new();
    file.take(LONGEST as u64).read_to_end(&mut content)?;
    Ok(content)
}

/// `/etc/hosts` with this host's name: every line that is not ours stays.
fn with_host(old: &str, hostname: &str) -> String {
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
#[path = "identity_files_tests.rs"]
mod tests;
