//! The difference of a capture while it is only in memory.
//!
//! Firecracker syncs what it writes while the processors stand still, and each range of a reflinked file that it writes to costs
//! XFS a transaction of its own. So it may write to a file on a tmpfs, where a sync is nothing, and what it wrote is laid
//! over the copy of the base when the processors run again.
//!
//! Owns `differences/`, a directory for each sandbox, which its unit sees as `/vm/d`. Refuses to know: when a difference fits
//! into memory (vmm). A file that is empty is one that nobody wrote to. A power cut takes all of it, and whatever it is about.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use pandastack_bus::SandboxId;

use crate::{
    copy::{data, grains},
    drive,
    error::{At, Result, StorageError},
    layout,
    place::{Place, children, create, exists, make_folder, open_regular, remove_tree, unlink},
};

const BUFFER: u64 = 1 << 20;

/// Makes the directory of a sandbox, and the point in its own directory where its unit has it. Idempotent.
///
/// # Errors
/// One cannot be made.
pub fn prepare(place: &Place, id: &SandboxId, folder: &Path) -> Result<()> {
    let directory = place.layout.difference(id);
    if !exists(&directory) {
        make_folder(&directory, 0o750)?;
    }
    place.share(&directory, 0o750)?;
    make_folder(&folder.join(layout::DIFFERENCE), 0o750)
}

/// A fresh, empty file for Firecracker to write to, if the directory is there: without it the capture's own file does.
///
/// # Errors
/// It cannot be made.
pub fn make(place: &Place, id: &SandboxId) -> Result<()> {
    let path = place.layout.difference(id).join(layout::MEM);
    unlink(&path)?;
    if exists(&place.layout.difference(id)) {
        create(&path, 0o600)?;
        place.share(&path, drive::WRITABLE)?;
    }
    Ok(())
}

/// Lays what was written over `memory`, both `bytes` long. Doing it twice is as good. Answers whether there was anything.
///
/// # Errors
/// [`StorageError::WrongState`] when it is not complete; [`StorageError::NoSpace`]. `memory` is then of no use.
pub fn lay_over(place: &Place, id: &SandboxId, memory: &Path, bytes: u64) -> Result<bool> {
    let path = place.layout.difference(id).join(layout::MEM);
    if !exists(&path) {
        return Ok(false);
    }
    let from = open_regular(&path)?;
    match from.metadata().at(&path)?.len() {
        0 => return Ok(false),
        length if length == bytes => {}
        _ => return Err(StorageError::WrongState("the capture is not complete: its difference".into())),
    }
    let to = File::options().read(true).write(true).open(memory).at(memory)?;
    copy(&from, &to, bytes).at(memory)?;
    Ok(true)
}

/// Forgets what was written.
///
/// # Errors
/// It cannot be removed.
pub fn clear(place: &Place, id: &SandboxId) -> Result<()> {
    unlink(&place.layout.difference(id).join(layout::MEM))
}

/// Removes the directory of a sandbox. Goes on to the end and reports everything.
///
/// # Errors
/// [`StorageError::Incomplete`].
pub fn remove(place: &Place, id: &SandboxId) -> Result<()> {
    let failures = remove_tree(&place.layout.difference(id));
    if failures.is_empty() { Ok(()) } else { Err(StorageError::Incomplete(failures)) }
}

/// Removes the directories of sandboxes that are gone.
///
/// # Errors
/// They cannot be listed. What cannot be removed is logged.
pub fn collect(place: &Place) -> Result<()> {
    for path in children(&place.layout.differences())? {
        let id = path.file_name().and_then(|name| name.to_str()?.parse::<SandboxId>().ok());
        if id.is_none_or(|id| !exists(&place.layout.sandbox(&id))) {
            for failure in remove_tree(&path) {
                tracing::error!("{failure}");
            }
        }
    }
    Ok(())
}

/// Every byte that is no hole, also where it is zero: the base is not. Written in whole grains, with the base around it, so
/// that `to` has few extents: each costs XFS a transaction when it is written back, and the next capture a share of its
/// reflink.
fn copy(from: &File, to: &File, length: u64) -> io::Result<()> {
    let mut changed = Vec::new();
    let mut at = 0;
    while let Some(run) = data(from, at..length)? {
        at = run.end;
        changed.push(run);
    }
    let mut buffer = vec![0; BUFFER.min(length) as usize];
    let mut rest = &changed[..];
    for part in grains(&changed, length) {
        for start in (part.start..part.end).step_by(BUFFER as usize) {
            let end = part.end.min(start + BUFFER);
            let bytes = &mut buffer[..(end - start) as usize];
            rest = &rest[rest.partition_point(|run| run.end <= start)..];
            if rest.first().is_none_or(|run| run.start > start || run.end < end) {
                to.read_exact_at(bytes, start)?;
            }
            for run in rest.iter().take_while(|run| run.start < end) {
                let (first, last) = (run.start.max(start), run.end.min(end));
                from.read_exact_at(&mut bytes[(first - start) as usize..(last - start) as usize], first)?;
            }
            to.write_all_at(bytes, start)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::{collection::btree_set, prelude::*};

    use super::*;

    const PAGE: usize = 4096;
    const PAGES: usize = 1100;

    fn file(size: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size as u64).unwrap();
        file
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Where the base has something in odd pages, and the difference zeros or something else in these.
        #[test]
        fn what_changed_is_as_in_the_difference_and_all_else_as_in_the_base(
            single in btree_set(0..PAGES, 0..40),
            whole in 0..PAGES,
        ) {
            let (from, to) = (file(PAGES * PAGE), file(PAGES * PAGE));
            let mut wanted = vec![0u8; PAGES * PAGE];
            for page in (1..PAGES).step_by(2) {
                wanted[page * PAGE..][..PAGE].fill(1);
                to.write_all_at(&[1; PAGE], (page * PAGE) as u64).unwrap();
            }
            let long = whole..PAGES.min(whole + 600);
            for page in single.into_iter().chain(long) {
                let byte = (page % 3) as u8 * 2;
                wanted[page * PAGE..][..PAGE].fill(byte);
                from.write_all_at(&[byte; PAGE], (page * PAGE) as u64).unwrap();
            }

            copy(&from, &to, (PAGES * PAGE) as u64).unwrap();

            let mut got = vec![0; PAGES * PAGE];
            to.read_exact_at(&mut got, 0).unwrap();
            prop_assert!(got == wanted);
        }
    }
}
