//! Disks for the appliance: a throw-away overlay for a test, and the kept disk of `make run`, onto which a new image is
//! flashed in place.
//!
//! The kept disk is what a real one is: one GPT disk with the image's partitions in front and the data partition, which the
//! appliance made, behind them. The image's partitions have fixed sizes with room to grow, so a new image fits over an old
//! one partition by partition, and neither the partition table nor the data partition is touched. That is also what an
//! updater on real hardware does. An overlay over a changing image would not survive: it holds clusters of the old one.
//! When an image has another layout, nothing is written and the caller is told.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, lseek};

use crate::image::{Description, Image, Partition};

/// A disk and the format QEMU reads it in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The file.
    pub path: PathBuf,
    /// QEMU's name of the format: `raw` or `qcow2`.
    pub format: &'static str,
}

const GIB: u64 = 1 << 30;

/// A fresh copy-on-write disk of `gib` GiB over the image. Takes no time and no space; can hold QEMU snapshots.
///
/// # Errors
/// When qemu-img fails.
pub fn overlay(image: &Image, path: PathBuf, gib: u64) -> Result<Disk> {
    let base = fs::canonicalize(image.disk())?;
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&base)
        .arg(&path)
        .arg(format!("{gib}G"))
        .output()
        .context("cannot run qemu-img; run `make tools`")?;
    if !output.status.success() {
        bail!("qemu-img: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(Disk { path, format: "qcow2" })
}

/// What [`kept`] did, for the progress line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// A new disk: no state before.
    New,
    /// The disk has this image already.
    Unchanged,
    /// These partitions were replaced; the data partition was not.
    Flashed(Vec<String>),
}

/// The kept disk `disk.raw` in `directory`, with the image on it.
///
/// # Errors
/// When the image has another layout than the disk, or on I/O errors. An interrupted flash is repeated the next time.
pub fn kept(image: &Image, directory: &Path, gib: u64) -> Result<(Disk, Kept)> {
    let path = directory.join("disk.raw");
    let record = directory.join("disk.json");
    let disk = Disk { path: path.clone(), format: "raw" };
    let new = &image.description;
    if !path.exists() {
        let fresh = directory.join("disk.raw.new");
        let source = File::open(image.disk())?;
        let target = OpenOptions::new().create(true).truncate(true).write(true).open(&fresh)?;
        copy_sparse(&source, &target, 0, source.metadata()?.len())?;
        target.set_len((gib * GIB).max(source.metadata()?.len()))?;
        fs::rename(&fresh, &path)?;
        remember(&record, new)?;
        return Ok((disk, Kept::New));
    }
    let old = Description::read(&record)
        .context("the disk in .run has no description; remove .run to start afresh")?;
    if !new.same_layout(&old) {
        bail!(
            "this image has other partitions than {}; flashing it would overwrite the data. \
             Check out the older version, or give up the state with `rm -r {}`",
            path.display(),
            directory.display()
        );
    }
    let changed: Vec<Partition> = new.changed_from(&old).into_iter().cloned().collect();
    if changed.is_empty() {
        return Ok((disk, Kept::Unchanged));
    }
    flash(image, &path, &record, &old, &changed)?;
    Ok((disk, Kept::Flashed(changed.into_iter().map(|p| p.name).collect())))
}

fn flash(image: &Image, path: &Path, record: &Path, old: &Description, changed: &[Partition]) -> Result<()> {
    // First on record: what is about to change has no known content until all of it is written.
    let mut unknown = old.clone();
    for partition in &mut unknown.partitions {
        if changed.iter().any(|c| c.name == partition.name) {
            partition.content = "being written".to_owned();
        }
    }
    remember(record, &unknown)?;
    let source = File::open(image.disk())?;
    let target = OpenOptions::new().write(true).open(path)?;
    for partition in changed {
        let (start, size) = (i64::try_from(partition.start)?, i64::try_from(partition.size)?);
        fallocate(
            &target,
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
            start,
            size,
        )
        .with_context(|| format!("cannot clear {} on {}", partition.name, path.display()))?;
        copy_sparse(&source, &target, partition.start, partition.size)?;
    }
    target.sync_all()?;
    remember(record, &image.description)
}

fn remember(record: &Path, description: &Description) -> Result<()> {
    let new = record.with_extension("json.new");
    fs::write(&new, serde_json::to_vec_pretty(description)?)?;
    File::open(&new)?.sync_all()?;
    fs::rename(&new, record)?;
    Ok(())
}

/// Copies a range to the same place in another file, holes staying holes. The target has to be a hole there.
fn copy_sparse(source: &File, target: &File, start: u64, length: u64) -> Result<()> {
    let end = start + length;
    let mut at = start;
    while at < end {
        // ENXIO: nothing but a hole up to the end of the file.
        let data = match lseek(source, i64::try_from(at)?, Whence::SeekData) {
            Ok(data) => u64::try_from(data)?,
            Err(nix::errno::Errno::ENXIO) => break,
            Err(errno) => return Err(io::Error::from(errno)).context("SEEK_DATA"),
        };
        if data >= end {
            break;
        }
        let hole = u64::try_from(lseek(source, i64::try_from(data)?, Whence::SeekHole)?)?.min(end);
        let (mut from, mut to) = (source, target);
        from.seek(SeekFrom::Start(data))?;
        to.seek(SeekFrom::Start(data))?;
        let copied = io::copy(&mut io::Read::take(from, hole - data), &mut to)
            .with_context(|| format!("copying to descriptor {}", target.as_raw_fd()))?;
        if copied != hole - data {
            bail!("the image became shorter while it was copied");
        }
        at = hole;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{FileExt, MetadataExt};

    /// An "image" of two partitions of 1 MiB, the first at 1 MiB.
    fn image(directory: &Path, fill: [u8; 2]) -> Image {
        const MIB: u64 = 1 << 20;
        fs::create_dir_all(directory).expect("directory");
        let disk = File::create(directory.join("pandastack.raw")).expect("disk");
        disk.set_len(4 * MIB).expect("size");
        let mut partitions = Vec::new();
        for (i, byte) in fill.into_iter().enumerate() {
            let start = (i as u64 + 1) * MIB;
            disk.write_all_at(&[byte; 8192], start + 4096).expect("content");
            partitions.push(Partition {
                name: format!("p{i}"),
                start,
                size: MIB,
                content: format!("{byte}"),
            });
        }
        for name in ["vmlinuz", "initrd", "cmdline"] {
            fs::write(directory.join(name), "x").expect("file");
        }
        fs::write(
            directory.join("image.json"),
            serde_json::to_vec(&Description { version: 1, partitions }).expect("json"),
        )
        .expect("description");
        Image::at(directory.to_owned()).expect("image")
    }

    fn byte(path: &Path, at: u64) -> u8 {
        let mut buffer = [0];
        File::open(path).expect("disk").read_exact_at(&mut buffer, at).expect("read");
        buffer[0]
    }

    #[test]
    fn a_new_image_replaces_its_partitions_and_nothing_else() {
        let directory = tempfile::tempdir().expect("directory");
        let run = directory.path().join("run");
        fs::create_dir(&run).expect("run");
        let (first, second) =
            (image(&directory.path().join("a"), [1, 2]), image(&directory.path().join("b"), [1, 3]));
        let (disk, how) = kept(&first, &run, 1).expect("new");
        assert_eq!(how, Kept::New);
        assert!(fs::metadata(&disk.path).expect("disk").blocks() * 512 < 1 << 20, "the copy is sparse");
        // State in the data partition, something stale in the partition that changes, and in the gap before it.
        let file = OpenOptions::new().write(true).open(&disk.path).expect("disk");
        for at in [3 << 20, (2 << 20) + 100_000, 700] {
            file.write_all_at(&[9], at).expect("write");
        }
        assert_eq!(kept(&first, &run, 1).expect("same").1, Kept::Unchanged);
        assert_eq!(kept(&second, &run, 1).expect("flash").1, Kept::Flashed(vec!["p1".to_owned()]));
        assert_eq!(byte(&disk.path, (1 << 20) + 4096), 1);
        assert_eq!(byte(&disk.path, (2 << 20) + 4096), 3);
        assert_eq!(byte(&disk.path, (2 << 20) + 100_000), 0, "nothing of the old partition is left");
        assert_eq!(byte(&disk.path, 3 << 20), 9, "data stays");
        assert_eq!(byte(&disk.path, 700), 9, "the partition table stays");
        assert_eq!(kept(&second, &run, 1).expect("same").1, Kept::Unchanged);
    }

    #[test]
    fn another_layout_is_refused_before_anything_is_written() {
        let directory = tempfile::tempdir().expect("directory");
        let first = image(&directory.path().join("a"), [1, 2]);
        let (disk, _) = kept(&first, directory.path(), 1).expect("new");
        let mut second = image(&directory.path().join("b"), [7, 8]);
        second.description.partitions[1].size /= 2;
        let error = kept(&second, directory.path(), 1).expect_err("refused");
        assert!(error.to_string().contains("other partitions"), "{error}");
        assert_eq!(byte(&disk.path, (1 << 20) + 4096), 1);
    }
}
