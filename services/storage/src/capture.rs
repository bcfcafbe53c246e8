//! A capture of a running sandbox, from its begin to what [`crate::snapshot`] publishes.
//!
//! ```text
//!   mem ──begin──► c.mem c.state, no mem ──(pause, Firecracker writes)──disks──► c.root.img c.w0.img …
//!    ▲                                                                                  │
//!    └── settle: the snapshot's memory is what the machine runs on ◄── published ◄── collect
//! ```
//!
//! A capture clears Firecracker's record of what changed, whether or not its files are ever used. So the machine runs on
//! memory that is known exactly while `mem` is there: it goes, durably, before Firecracker is asked, and only a
//! published file becomes `mem` again. While it is gone the next capture is a full one.
//!
//! Nothing of this is held in memory, and `c.*` files stay when the daemon starts: a capture goes on when only this
//! daemon was started again. What nobody goes on with vanishes with the next begin, a cold boot or the release.
//!
//! Firecracker may write to `c.mem`, `c.state` and the disks, or to a difference in memory instead of `c.mem`, and nowhere
//! else: the directories are closed to it.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Instant,
};

use nix::unistd::geteuid;
use pandastack_bus::{SandboxId, storage::CaptureKind};
use pandastack_daemon::files;

use crate::{
    difference, drive,
    error::{At, Result, StorageError},
    identity::Digest,
    layout::{self, captured},
    place::{
        Place, SEALED, Staged, children, clone_file, create, exists, link_sealed, open_regular, open_written,
        same_file, unlink,
    },
    resident, sandbox,
};

/// Largest state of a machine, bytes. It has some hundred thousand.
const STATE_LIMIT: u64 = 16 << 20;

/// What was collected.
#[derive(Debug)]
pub struct Collected {
    /// The files, sealed.
    pub staged: Staged,
    /// Each with its length, bytes.
    pub files: BTreeMap<String, u64>,
    /// Digest of the state.
    pub state: Digest,
}

/// Makes ready for Firecracker, durably. See [`pandastack_bus::storage::Storage`].
///
/// # Errors
/// [`StorageError::NotFound`]; [`StorageError::WrongState`] when the directory is not filled; [`StorageError::NoSpace`]:
/// nothing changed.
pub fn begin(place: &Place, id: &SandboxId) -> Result<CaptureKind> {
    let folder = sandbox::existing(&place.layout, id)?;
    let Ok(root) = open_regular(&folder.join(layout::ROOT)) else {
        return Err(StorageError::WrongState(format!("sandbox {id} has no root disk")));
    };
    let start = Instant::now();
    place.admit()?;
    clear(place, id, &folder)?;
    // What is written here is not written while the processors stand still.
    root.sync_data().at(&folder)?;
    for name in layout::WRITABLE {
        let path = folder.join(name);
        if fs::symlink_metadata(&path).is_ok_and(|found| !drive::is_placeholder(&found)) {
            open_regular(&path)?.sync_data().at(&path)?;
        }
    }
    let synced = start.elapsed();
    let base = folder.join(layout::MEM);
    let begun = prepare(place, id, &folder, &base).and_then(|kind| {
        let shared = start.elapsed() - synced;
        unlink(&base)?;
        files::sync_dir(&folder).at(&folder)?;
        tracing::debug!(
            sandbox = %id, disks_ms = synced.as_millis() as u64, memory_ms = shared.as_millis() as u64,
            whole_ms = start.elapsed().as_millis() as u64, "begun",
        );
        Ok(kind)
    });
    begun.inspect_err(|_| clear_or_log(place, id, &folder))
}

/// Shares the blocks of the root disk and of the drives while the processors stand still.
///
/// A drive that nobody but this sandbox has (a clone that came with a snapshot, or a placeholder that the guest wrote to)
/// is part of it and always captured. `volumes` is about those that it only holds.
///
/// # Errors
/// [`StorageError::WrongState`] when no capture was begun; [`StorageError::NoSpace`].
pub fn disks(place: &Place, id: &SandboxId, volumes: bool) -> Result<()> {
    let folder = sandbox::existing(&place.layout, id)?;
    if !exists(&folder.join(captured(layout::MEM))) {
        return Err(StorageError::WrongState(format!("no capture of sandbox {id} was begun")));
    }
    let share = |name: &str| {
        let to = folder.join(captured(name));
        unlink(&to)?;
        clone_file(&folder.join(name), &to, 0o400).map(drop)
    };
    share(layout::ROOT)?;
    for name in layout::drives() {
        // A directory that is older than the drives has none.
        let Ok(found) = fs::symlink_metadata(folder.join(name)) else { continue };
        if !drive::is_placeholder(&found) && (volumes || found.nlink() == 1) {
            share(name)?;
        }
    }
    Ok(())
}

/// Seals what was captured of a machine with `memory_mib` and collects it. Its memory stays where it is, too.
///
/// Not `durable`, a power cut may tear it: what it is for is gone then, too.
///
/// # Errors
/// [`StorageError::WrongState`] when the capture is not complete; [`StorageError::NoSpace`].
pub fn collect(
    place: &Place,
    id: &SandboxId,
    folder: &Path,
    memory_mib: u64,
    durable: bool,
) -> Result<Collected> {
    let start = Instant::now();
    let staged = place.stage("snapshot")?;
    let mut files = BTreeMap::new();
    let memory = folder.join(captured(layout::MEM));
    let bytes = memory_mib.saturating_mul(1 << 20);
    difference::lay_over(place, id, &memory, bytes)?;
    if open_written(&memory)?.metadata().at(&memory)?.len() != bytes {
        return Err(StorageError::WrongState(format!(
            "the capture is not complete: its memory does not have {memory_mib} MiB"
        )));
    }
    let laid = start.elapsed();
    let state = collect_state(place, folder, staged.path(), durable)?;
    let others = layout::drives().filter(|name| exists(&folder.join(captured(name))));
    for name in [layout::MEM, layout::ROOT].into_iter().chain(others) {
        let to = staged.path().join(name);
        link_sealed(&folder.join(captured(name)), &to, durable)?;
        files.insert(name.to_owned(), fs::symlink_metadata(&to).at(&to)?.len());
    }
    files.insert(layout::STATE.to_owned(), state.1);
    let sealed = start.elapsed() - laid;
    resident::note(&memory, staged.path());
    tracing::debug!(
        sandbox = %id, difference_ms = laid.as_millis() as u64, seal_ms = sealed.as_millis() as u64,
        whole_ms = start.elapsed().as_millis() as u64, "collected",
    );
    Ok(Collected { staged, files, state: state.0 })
}

/// Makes the memory of a published snapshot what the machine runs on, if it is the one that was captured of it, and
/// removes what is left of the capture.
///
/// # Errors
/// It cannot be renamed or made durable. Then it is not known what the machine runs on, which is always right.
pub fn settle(place: &Place, id: &SandboxId, snapshot: &Path) -> Result<()> {
    let folder = place.layout.sandbox(id);
    let memory = folder.join(captured(layout::MEM));
    if !same_file(&memory, &snapshot.join(layout::MEM)) {
        return Ok(());
    }
    let target = folder.join(layout::MEM);
    fs::rename(&memory, &target).at(&target)?;
    clear(place, id, &folder)?;
    files::sync_dir(&folder).at(&folder)
}

/// Removes what an unfinished capture left; nothing is left where there is no directory.
///
/// # Errors
/// It cannot be removed.
pub fn abort(place: &Place, id: &SandboxId) -> Result<()> {
    let folder = place.layout.sandbox(id);
    if !exists(&folder) {
        return Ok(());
    }
    clear(place, id, &folder)?;
    files::sync_dir(&folder).at(&folder)
}

/// Removes the files of an unfinished capture of a sandbox from its directory and from memory.
///
/// # Errors
/// One cannot be removed.
pub fn clear(place: &Place, id: &SandboxId, folder: &Path) -> Result<()> {
    difference::clear(place, id)?;
    let prefix = captured("");
    for path in children(folder)? {
        if path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes())) {
            unlink(&path)?;
        }
    }
    Ok(())
}

fn clear_or_log(place: &Place, id: &SandboxId, folder: &Path) {
    if let Err(error) = clear(place, id, folder) {
        tracing::error!("a capture leaves files behind: {}", pandastack_daemon::chain(&error));
    }
}

fn prepare(place: &Place, id: &SandboxId, folder: &Path, base: &Path) -> Result<CaptureKind> {
    let memory = folder.join(captured(layout::MEM));
    let kind = if is_base(base) {
        clone_file(base, &memory, 0o600)?;
        resident::follow(base, &memory);
        difference::make(place, id)?;
        CaptureKind::Diff
    } else {
        create(&memory, 0o600)?;
        CaptureKind::Full
    };
    let state = folder.join(captured(layout::STATE));
    create(&state, 0o600)?;
    for path in [memory, state] {
        place.share(&path, drive::WRITABLE)?;
    }
    Ok(kind)
}

/// Whether this is memory that was sealed. Anything else is not known, and that is never wrong.
fn is_base(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| {
        found.is_file()
            && found.permissions().mode() & 0o7777 == SEALED
            && found.uid() == geteuid().as_raw()
            && found.len() > 0
    })
}

/// Copies the state, so that Firecracker, which may still have its own file open, cannot change what was hashed.
fn collect_state(place: &Place, folder: &Path, staged: &Path, durable: bool) -> Result<(Digest, u64)> {
    let (from, to) = (folder.join(captured(layout::STATE)), staged.join(layout::STATE));
    let mut bytes = Vec::new();
    open_written(&from)?.take(STATE_LIMIT + 1).read_to_end(&mut bytes).at(&from)?;
    if bytes.len() as u64 > STATE_LIMIT {
        return Err(StorageError::WrongState("the capture is not complete: its state is too large".into()));
    }
    let mut file = create(&to, 0o600)?;
    file.write_all(&bytes).at(&to)?;
    place.share(&to, SEALED)?;
    if durable {
        file.sync_all().at(&to)?;
    }
    Ok((Digest::of(&bytes), bytes.len() as u64))
}
