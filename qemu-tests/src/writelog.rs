//! A log of a disk's writes, and its replay up to a flush: what a power cut may leave.
//!
//! QEMU's `blklogwrites` driver writes the log in the format of Linux' dm-log-writes: a superblock, then entries of one
//! sector (`sector`, `nr_sectors`, `flags`, `data_len`, each 64-bit little endian), each followed by its data. Killing
//! QEMU alone proves little about flushes, because the host's page cache keeps what was written; here everything after the
//! chosen flush is lost, as on a disk with a volatile cache.

use std::{
    fs::File,
    io::{BufReader, Read, Seek, SeekFrom, Write},
    os::unix::net::UnixStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const FLUSH: u64 = 1;
const DISCARD: u64 = 4;
const MARK: u64 = 8;

/// One logged request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Offset on the disk, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u64,
    /// Everything before it is on disk once it has completed.
    pub flush: bool,
    /// The range was given up.
    pub discard: bool,
    /// Where its data lies in the log, bytes.
    data: u64,
    /// Bytes of data in the log.
    stored: u64,
}

impl Entry {
    /// Length of the log up to and with this entry, bytes.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.data + self.stored
    }
}

/// Reads the entries of a log, as far as they are whole.
pub fn read(log: &Path) -> Result<Vec<Entry>> {
    let mut file = BufReader::new(File::open(log)?);
    let mut head = [0; 28];
    file.read_exact(&mut head)?;
    let word =
        |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    ensure!(word(&head, 0) == MAGIC && word(&head, 8) == 1, "not a log of writes");
    let sector = u64::from(u32::from_le_bytes(head[24..28].try_into().expect("four bytes")));
    let size = file.get_ref().metadata()?.len();
    let (mut at, mut entries) = (sector, Vec::new());
    while at + sector <= size {
        file.seek(SeekFrom::Start(at))?;
        let mut raw = [0; 32];
        file.read_exact(&mut raw)?;
        let (start, count, flags) = (word(&raw, 0), word(&raw, 8), word(&raw, 16));
        let data = at + sector;
        let length = count * sector;
        let stored = if flags & (DISCARD | MARK) == 0 { length } else { 0 };
        if data + stored > size || (start == 0 && count == 0 && flags == 0) {
            break;
        }
        if flags & MARK == 0 {
            entries.push(Entry {
                offset: start * sector,
                length,
                flush: flags & FLUSH != 0,
                discard: flags & DISCARD != 0,
                data,
                stored,
            });
        }
        at = data + stored;
    }
    Ok(entries)
}

/// The places at which the disk may be cut: after each of these many entries, everything is on disk.
pub fn flushes(entries: &[Entry]) -> Vec<usize> {
    entries.iter().enumerate().filter(|(_, entry)| entry.flush).map(|(index, _)| index + 1).collect()
}

/// Applies the first `count` entries of a log to a qcow2 image.
pub fn replay(log: &Path, entries: &[Entry], count: usize, image: &Path) -> Result<()> {
    let mut disk = Nbd::open(image)?;
    let mut file = File::open(log)?;
    let mut buffer = Vec::new();
    for entry in entries.iter().take(count) {
        if entry.discard || entry.length == 0 {
            continue;
        }
        file.seek(SeekFrom::Start(entry.data))?;
        let mut left = entry.length;
        let mut offset = entry.offset;
        while left > 0 {
            let now = left.min(1 << 20);
            buffer.resize(now as usize, 0);
            file.read_exact(&mut buffer)?;
            disk.write(offset, &buffer)?;
            offset += now;
            left -= now;
        }
    }
    disk.finish()
}

/// A qcow2 image behind `qemu-nbd` on a unix socket.
struct Nbd {
    server: Child,
    stream: UnixStream,
    handle: u64,
    _dir: tempfile::TempDir,
}

impl Nbd {
    fn open(image: &Path) -> Result<Self> {
        let dir = tempfile::TempDir::new()?;
        let socket = dir.path().join("nbd");
        let server = Command::new("qemu-nbd")
            .args(["--format=qcow2", "--cache=writeback", "--socket"])
            .arg(&socket)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .context("starting qemu-nbd")?;
        let mut nbd = Self { server, stream: connect(&socket)?, handle: 0, _dir: dir };
        nbd.greet()?;
        Ok(nbd)
    }

    fn greet(&mut self) -> Result<()> {
        let mut head = [0; 18];
        self.stream.read_exact(&mut head)?;
        ensure!(&head[..16] == b"NBDMAGICIHAVEOPT", "not an NBD server");
        // Fixed newstyle without padding, then the option EXPORT_NAME with an empty name.
        self.stream.write_all(&3u32.to_be_bytes())?;
        self.stream.write_all(b"IHAVEOPT")?;
        self.stream.write_all(&[0, 0, 0, 1, 0, 0, 0, 0])?;
        let mut export = [0; 10];
        self.stream.read_exact(&mut export)?;
        Ok(())
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.request(1, offset, bytes.len() as u32, bytes)
    }

    fn request(&mut self, command: u16, offset: u64, length: u32, payload: &[u8]) -> Result<()> {
        self.handle += 1;
        let mut head = Vec::with_capacity(28 + payload.len());
        head.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        head.extend_from_slice(&0u16.to_be_bytes());
        head.extend_from_slice(&command.to_be_bytes());
        head.extend_from_slice(&self.handle.to_be_bytes());
        head.extend_from_slice(&offset.to_be_bytes());
        head.extend_from_slice(&length.to_be_bytes());
        head.extend_from_slice(payload);
        self.stream.write_all(&head)?;
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        let error = u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"));
        ensure!(error == 0, "qemu-nbd answers error {error}");
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.request(3, 0, 0, &[])?;
        let mut bye = Vec::with_capacity(28);
        bye.extend_from_slice(&0x2560_9513u32.to_be_bytes());
        bye.extend_from_slice(&[0, 0, 0, 2]);
        bye.extend_from_slice(&[0; 20]);
        self.stream.write_all(&bye)?;
        let status = self.server.wait()?;
        ensure!(status.success(), "qemu-nbd ended with {status}");
        Ok(())
    }
}

impl Drop for Nbd {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Err(error) => bail!("qemu-nbd does not listen: {error}"),
        }
    }
}
