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
    copy::data,
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
    let to = File::options().write(true).open(memory).at(memory)?;
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

/// Every byte that is no hole, also where it is zero: the base is not.
fn copy(from: &File, to: &File, length: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER.min(length) as usize];
    let mut at = 0;
    while let Some(run) = data(from, at..length)? {
        for start in (run.start..run.end).step_by(BUFFER as usize) {
            let bytes = &mut buffer[..(run.end - start).min(BUFFER) as usize];
            from.read_exact_at(bytes, start)?;
            to.write_all_at(bytes, start)?;
        }
        at = run.end;
    }
    Ok(())
}
