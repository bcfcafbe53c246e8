//! Which pages of a memory file are in page cache, and bringing them there.
//!
//! Page cache belongs to an inode: what is made of a capture would read from the disk, page by page and waiting for each,
//! what its parent already has in memory. So a capture's memory is read ahead where its base was resident, beside the
//! other steps; what is resident at its end is noted beside it, and read ahead again whenever something is made of it.
//!
//! Owns: the note and the limits. Refuses to know: what a page is for. All of it is advice: nothing depends on it, nothing
//! fails because of it.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    libc,
};
use pandastack_daemon::files;

use crate::{copy::next_data, layout, place::open_regular};

const PAGE: u64 = 4096;
/// Holes between resident pages that are read along, bytes.
const GAP: u64 = 64 << 10;
/// As much of one memory is read ahead, bytes.
const MOST: u64 = 192 << 20;
/// Memory that is looked at in one go, bytes.
const WINDOW: u64 = 64 << 20;
/// Longest note, bytes.
const LIMIT: u64 = 1 << 20;

/// Reads the parts of `to` ahead that are resident of `base`, in the background.
pub fn follow(base: &Path, to: &Path) {
    // Opened now: the names may be gone when the thread runs.
    let (Ok(from), Ok(to)) = (open_regular(base), open_regular(to)) else { return };
    in_background(move || read_ahead(&to, &resident(&from)?));
}

/// Notes in the directory of a capture what of its memory is resident.
pub fn note(memory: &Path, directory: &Path) {
    let noted = open_regular(memory).map_err(io::Error::other).and_then(|file| {
        // Not durable: after a power cut nothing of it would be resident.
        fs::write(directory.join(layout::RESIDENT), serde_json::to_vec(&resident(&file)?)?)
    });
    if let Err(error) = noted {
        tracing::warn!("{}: what is resident is not noted: {error}", memory.display());
    }
}

/// Reads ahead, in the background, what was resident when the capture in this directory was taken.
pub fn recall(directory: PathBuf) {
    in_background(move || {
        let Some(text) = files::read_limited(&directory.join(layout::RESIDENT), LIMIT)? else {
            return Ok(());
        };
        let ranges: Vec<Range<u64>> = serde_json::from_slice(&text)?;
        read_ahead(&File::open(directory.join(layout::MEM))?, &ranges)
    });
}

fn in_background(work: impl FnOnce() -> io::Result<()> + Send + 'static) {
    let started = thread::Builder::new().name("read-ahead".into()).spawn(move || {
        if let Err(error) = work() {
            tracing::debug!("not read ahead: {error}");
        }
    });
    if let Err(error) = started {
        tracing::debug!("not read ahead: {error}");
    }
}

fn read_ahead(file: &File, ranges: &[Range<u64>]) -> io::Result<()> {
    let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let mut left = MOST;
    for range in ranges {
        let length = range.end.saturating_sub(range.start).min(left);
        posix_fadvise(file, signed(range.start)?, signed(length)?, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
        left -= length;
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// The parts of a file that are in page cache, near ones joined. Holes are not.
fn resident(file: &File) -> io::Result<Vec<Range<u64>>> {
    let length = file.metadata()?.len();
    let mut ranges = Vec::new();
    let mut at = 0;
    while let Some(data) = next_data(file, at..length)? {
        for start in (data.start..data.end).step_by(WINDOW as usize) {
            let pages = in_core(file, start..data.end.min(start + WINDOW))?;
            let offsets = pages.iter().enumerate().filter(|(_, page)| **page & 1 == 1);
            join(&mut ranges, offsets.map(|(number, _)| start + number as u64 * PAGE));
        }
        at = data.end;
    }
    Ok(ranges)
}

/// Appends pages at these offsets, which rise, to ranges.
fn join(ranges: &mut Vec<Range<u64>>, offsets: impl Iterator<Item = u64>) {
    for offset in offsets {
        match ranges.last_mut() {
            Some(last) if offset <= last.end + GAP => last.end = offset + PAGE,
            _ => ranges.push(offset..offset + PAGE),
        }
    }
}

/// One byte for each page of this part of a file; its lowest bit says whether the page is in page cache.
fn in_core(file: &File, part: Range<u64>) -> io::Result<Vec<u8>> {
    let length = usize::try_from(part.end - part.start).map_err(io::Error::other)?;
    let offset = i64::try_from(part.start).map_err(io::Error::other)?;
    let mut pages = vec![0u8; length.div_ceil(PAGE as usize)];
    // SAFETY: a fresh mapping of an open file, at an address of the kernel's choice; it is never read, only asked about.
    let map = unsafe {
        libc::mmap(std::ptr::null_mut(), length, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), offset)
    };
    if map == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the mapping has `length` bytes, and `pages` a byte for each of its pages.
    let asked = unsafe { libc::mincore(map, length, pages.as_mut_ptr()) };
    let failure = io::Error::last_os_error();
    // SAFETY: the mapping is ours and nobody refers to it.
    unsafe { libc::munmap(map, length) };
    if asked == 0 { Ok(pages) } else { Err(failure) }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::FileExt};

    use super::*;

    #[test]
    fn near_pages_are_joined_and_far_ones_are_not() {
        let mut ranges = Vec::new();

        join(&mut ranges, [0, PAGE, 3 * PAGE, 4 * PAGE + GAP, 100 * GAP].into_iter());

        assert_eq!(ranges, [0..5 * PAGE + GAP, 100 * GAP..100 * GAP + PAGE]);
    }

    #[test]
    fn what_was_written_is_resident_and_a_hole_is_not() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(256 << 20).unwrap();
        file.write_all(&[1; 3 * PAGE as usize]).unwrap();
        file.write_all_at(&[1; PAGE as usize], 128 << 20).unwrap();

        let ranges = resident(&file).unwrap();

        let within = |offset: u64| ranges.iter().any(|range| range.contains(&offset));
        assert!(within(0) && within(2 * PAGE) && within(128 << 20), "{ranges:?}");
        assert!(!within(64 << 20), "{ranges:?}");
        read_ahead(&file, &ranges).unwrap();
    }
}
