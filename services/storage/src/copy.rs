//! Copying disk images: only what is in them, and zeros become holes.

use std::{fs::File, io, ops::Range, os::unix::fs::FileExt};

use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};

use crate::ext4;

/// Bytes that become a hole together when they are all zero. Larger than a block, so that a disk has few extents: what
/// a reflink costs is in proportion to their number.
const GRAIN: u64 = 64 * 1024;
const BUFFER: u64 = 1024 * 1024;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Copies `from` into the empty file `to`, which becomes sparse. Answers the bytes written. Not synced.
///
/// Of an ext4 image only what is allocated is read; of anything else, what is not a hole.
///
/// # Errors
/// A read or write failed; `to` is then incomplete.
pub fn sparse(from: &File, to: &File) -> io::Result<u64> {
    let length = from.metadata()?.len();
    to.set_len(length)?;
    let allocated = ext4::allocated(length, |at, bytes| from.read_exact_at(bytes, at))?;
    let parts = allocated.unwrap_or_else(|| std::iter::once(0..length).collect());
    let mut written = 0;
    let mut buffer = vec![0; BUFFER as usize];
    for part in grains(&parts, length) {
        let mut at = part.start;
        while let Some(data) = next_data(from, at..part.end)? {
            for start in (data.start..data.end).step_by(BUFFER as usize) {
                let bytes = &mut buffer[..(data.end - start).min(BUFFER) as usize];
                from.read_exact_at(bytes, start)?;
                written += write_data(to, bytes, start)?;
            }
            at = data.end;
        }
    }
    Ok(written)
}

/// The ranges, widened to whole grains and joined.
pub(crate) fn grains(ranges: &[Range<u64>], length: u64) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        let start = range.start / GRAIN * GRAIN;
        let end = range.end.next_multiple_of(GRAIN).min(length);
        match joined.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => joined.push(start..end),
        }
    }
    joined
}

/// The first part of `range` that is not a hole, widened to whole grains; `None` when the rest is one. All of it where the file
/// system does not tell.
pub(crate) fn next_data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    let Ok(found) = data(file, range.clone()) else { return Ok(Some(range)) };
    Ok(found.map(|found| {
        let start = (found.start / GRAIN * GRAIN).max(range.start);
        start..found.end.next_multiple_of(GRAIN).min(range.end)
    }))
}

/// The first part of `range` that is not a hole, exactly; `None` when the rest is one.
///
/// # Errors
/// The file system does not tell holes from data.
pub(crate) fn data(file: &File, range: Range<u64>) -> io::Result<Option<Range<u64>>> {
    if range.is_empty() {
        return Ok(None);
    }
    let signed = |value: u64| i64::try_from(value).map_err(io::Error::other);
    let start = match lseek(file, signed(range.start)?, Whence::SeekData) {
        Ok(start) => start.unsigned_abs(),
        Err(Errno::ENXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if start >= range.end {
        return Ok(None);
    }
    let end = lseek(file, signed(start)?, Whence::SeekHole)?.unsigned_abs();
    Ok(Some(start..end.min(range.end)))
}

/// Writes the grains of `bytes` that are not all zero, neighbours in one call. Answers the bytes written.
fn write_data(to: &File, bytes: &[u8], at: u64) -> io::Result<u64> {
    let mut written = 0;
    let mut pending = 0..0;
    let mut flush = |run: Range<usize>| {
        written += run.len() as u64;
        to.write_all_at(&bytes[run.clone()], at + run.start as u64)
    };
    for (index, grain) in bytes.chunks(GRAIN as usize).enumerate() {
        let start = index * GRAIN as usize;
        if grain == &ZEROS[..grain.len()] {
            continue;
        }
        if pending.end != start {
            flush(std::mem::replace(&mut pending, start..start))?;
        }
        pending.end = start + grain.len();
    }
    flush(pending)?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::MetadataExt};

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn a_copy_is_the_same_and_not_larger_than_it_has_to_be(
            length in 0..6_000_000_u64,
            parts in prop::collection::vec((0..6_000_000_u64, 1..200_000_usize, any::<u8>()), 0..6),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (from, to) = (dir.path().join("from"), dir.path().join("to"));
            let source = File::options().read(true).write(true).create_new(true).open(&from).unwrap();
            source.set_len(length).unwrap();
            for (at, size, byte) in parts {
                let at = at.min(length);
                let size = size.min((length - at) as usize);
                source.write_all_at(&vec![byte; size], at).unwrap();
            }
            let target = File::options().write(true).create_new(true).open(&to).unwrap();

            let written = sparse(&source, &target).unwrap();

            prop_assert!(fs::read(&from).unwrap() == fs::read(&to).unwrap());
            prop_assert!(target.metadata().unwrap().blocks() * 512 <= written.next_multiple_of(4096) + 65536);
        }
    }

    #[test]
    fn zeros_become_a_hole() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        let mut bytes = vec![0; 3_000_000];
        bytes[1_500_000] = 1;
        fs::write(&from, &bytes).unwrap();
        let target = File::create(dir.path().join("to")).unwrap();

        assert_eq!(sparse(&File::open(&from).unwrap(), &target).unwrap(), GRAIN);
        assert_eq!(target.metadata().unwrap().len(), 3_000_000);
    }
}
