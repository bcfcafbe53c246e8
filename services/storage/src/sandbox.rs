//! Sandbox directories: what a unit sees as `/vm`.
//!
//! ```text
//!   absent ──prepare──► prepared ──fill──► filled ──prepare_capture──► (Firecracker writes) ──seal──► bake
//!      ▲                    │                 │ └───begin, disks, commit (see `capture`)──► snapshot
//!      └──────release───────┴────────release──┘
//! ```
//!
//! The directory is ours and closed to writing (0750), so Firecracker cannot replace anything in it; `s/` is writable
//! for the group, and nothing in there is ever opened or followed by us. No set-group-id bit is needed: Firecracker's
//! own group is the shared one. What filled a directory is the text of the symbolic link `.filled`, made last: text,
//! link and all names before it are in one journal, so one fsync of the directory makes a fill durable.

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
};

use pandastack_bus::{SandboxId, storage::Owner};
use pandastack_daemon::files;

use crate::{
    artefact::Artefacts,
    capture, difference, drive,
    error::{At, Result, StorageError},
    identity::Digest,
    layout::{self, Layout},
    place::{Place, children, clone_file, create, exists, same_file, unlink},
};

/// Largest root disk, MiB: 1 TiB, of a template as well as of a sandbox. vmm refuses the same.
pub const DISK_LIMIT_MIB: u64 = 1 << 20;

/// What a directory is filled with.
#[derive(Debug)]
pub struct Content {
    /// The root disk to share blocks with.
    pub disk: PathBuf,
    /// Size that the root disk gets, bytes; not less than it has.
    pub disk_bytes: u64,
    /// Files to link, each with its name in the directory.
    pub links: Vec<(PathBuf, &'static str)>,
    /// Drives to share blocks with, each with its name in the directory.
    pub drives: Vec<(PathBuf, &'static str)>,
    /// What says the same for the same content, and fits in a symbolic link.
    pub record: String,
}

/// Makes the directory with what an empty Firecracker process needs. Answers `false` when it is there.
///
/// # Errors
/// It cannot be made.
pub fn prepare(place: &Place, id: &SandboxId, artefacts: &Artefacts) -> Result<bool> {
    let target = place.layout.sandbox(id);
    if exists(&target) {
        difference::prepare(place, id, &target)?;
        return Ok(false);
    }
    let staged = place.stage(id.as_str())?;
    let sockets = staged.path().join(layout::SOCKETS);
    crate::place::make_folder(&sockets, 0o770)?;
    place.share(&sockets, 0o770)?;
    let program = place.layout.artefact(&artefacts.firecracker);
    fs::hard_link(&program, staged.path().join(layout::FIRECRACKER)).at(&program)?;
    drive::place_all(place, staged.path())?;
    difference::prepare(place, id, staged.path())?;
    place.share(staged.path(), 0o750)?;
    // After a power cut no unit runs, so a directory without contents that is lost then is not missed.
    staged.commit_quickly(&target)?;
    Ok(true)
}

/// Fills a prepared directory, durably. Answers `false` when it is filled with the same already.
///
/// # Errors
/// [`StorageError::NotFound`]; [`StorageError::WrongState`] when it is filled with something else or was prepared for
/// another Firecracker than `firecracker`; [`StorageError::NoSpace`]: what was made is removed again.
pub fn fill(place: &Place, id: &SandboxId, firecracker: &Digest, content: &Content) -> Result<bool> {
    let folder = existing(&place.layout, id)?;
    match filled(&folder)? {
        Some(record) if record == content.record => return Ok(false),
        Some(record) => {
            return Err(StorageError::WrongState(format!("sandbox {id} is filled with {record}")));
        }
        None => {}
    }
    if !same_file(&folder.join(layout::FIRECRACKER), &place.layout.artefact(firecracker)) {
        return Err(StorageError::WrongState(format!("sandbox {id} was prepared for another Firecracker")));
    }
    place.admit()?;
    // What an interrupted fill left behind.
    empty(place, &folder)?;
    pour(place, &folder, content).inspect_err(|_| {
        if let Err(error) = empty(place, &folder) {
            tracing::error!(sandbox = %id, "a failed fill leaves files behind until release: {error}");
        }
    })?;
    Ok(true)
}

/// What filled the directory, if anything did.
///
/// # Errors
/// The directory cannot be read.
pub fn filled(folder: &Path) -> Result<Option<String>> {
    let path = folder.join(layout::FILLED);
    match fs::read_link(&path) {
        Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).at(&path),
    }
}

/// Links the artefacts of the running image, whatever is there, so that a kept disk can be booted cold. Idempotent.
///
/// A cold boot does not run on the memory that filled the directory: that goes, and so does what a capture left that a
/// power cut may have torn. Drives that are missing (the directory is older than them) are made.
///
/// # Errors
/// [`StorageError::NotFound`], or a link cannot be made.
pub fn ensure_kernel(place: &Place, id: &SandboxId, artefacts: &Artefacts) -> Result<()> {
    let folder = existing(&place.layout, id)?;
    for name in [layout::MEM, layout::STATE] {
        unlink(&folder.join(name))?;
    }
    capture::clear(place, id, &folder)?;
    difference::prepare(place, id, &folder)?;
    drive::place_all(place, &folder)?;
    for (digest, name) in artefacts.named() {
        let (artefact, target) = (place.layout.artefact(digest), folder.join(name));
        if same_file(&target, &artefact) {
            continue;
        }
        let staged = place.stage("kernel")?;
        let link = staged.path().join(name);
        fs::hard_link(&artefact, &link).at(&artefact)?;
        fs::rename(&link, &target).at(&target)?;
    }
    files::sync_dir(&folder).at(&folder)
}

/// Makes fresh `mem` and `state` files for a capture. What had these names may be mapped by a guest or belong to a
/// bake: it is never opened, only unlinked.
///
/// # Errors
/// [`StorageError::NotFound`], [`StorageError::NoSpace`].
pub fn prepare_capture(place: &Place, id: &SandboxId) -> Result<()> {
    let folder = existing(&place.layout, id)?;
    place.admit()?;
    for name in [layout::MEM, layout::STATE] {
        let path = folder.join(name);
        unlink(&path)?;
        create(&path, 0o660)?;
        place.share(&path, 0o660)?;
    }
    Ok(())
}

/// Removes the directory, durably, and what is in memory for it. Goes on to the end. Answers whether it was there.
///
/// # Errors
/// [`StorageError::Incomplete`], or it does not vanish.
pub fn release(place: &Place, id: &SandboxId) -> Result<bool> {
    let forgotten = difference::remove(place, id);
    let there = place.remove(&place.layout.sandbox(id))?;
    forgotten.map(|()| there)
}

/// The path of a directory that has to be there.
///
/// # Errors
/// [`StorageError::NotFound`].
pub fn existing(layout: &Layout, id: &SandboxId) -> Result<PathBuf> {
    let folder = layout.sandbox(id);
    if exists(&folder) {
        Ok(folder)
    } else {
        Err(StorageError::NotFound(format!("sandbox {id} has no directory")))
    }
}

/// Every sandbox directory. The size is that of files that nobody shares by a link; what a root disk has of its own is
/// not known.
///
/// # Errors
/// The directory of directories cannot be read.
pub fn owners(layout: &Layout) -> Result<Vec<Owner>> {
    let mut owners = Vec::new();
    for folder in children(&layout.sandboxes())? {
        let Some(id) = folder.file_name().and_then(|name| name.to_str()?.parse::<SandboxId>().ok()) else {
            continue;
        };
        let own = |name: &&str| -> Option<u64> {
            let found = fs::symlink_metadata(folder.join(name)).ok()?;
            (found.nlink() == 1).then(|| found.blocks() * 512)
        };
        let bytes = [layout::MEM, layout::STATE].iter().filter_map(own).sum();
        owners.push(Owner { id: id.to_string(), bytes });
    }
    Ok(owners)
}

fn pour(place: &Place, folder: &Path, content: &Content) -> Result<()> {
    let path = folder.join(layout::ROOT);
    let disk = clone_file(&content.disk, &path, 0o660)?;
    place.share(&path, 0o660)?;
    if disk.metadata().at(&path)?.len() < content.disk_bytes {
        disk.set_len(content.disk_bytes).at(&path)?;
    }
    for (from, name) in &content.links {
        fs::hard_link(from, folder.join(name)).at(from)?;
    }
    for (from, name) in &content.drives {
        drive::clone_in(place, from, &folder.join(name))?;
    }
    symlink(&content.record, folder.join(layout::FILLED)).at(folder)?;
    files::sync_dir(folder).at(folder)
}

fn empty(place: &Place, folder: &Path) -> Result<()> {
    for name in [layout::FILLED, layout::ROOT, layout::MEM, layout::STATE, layout::KERNEL, layout::INITRD] {
        unlink(&folder.join(name))?;
    }
    drive::reset(place, folder)
}
