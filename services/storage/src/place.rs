//! The state directory as a whole: its folders and who may enter them, things that appear or vanish at once.
//!
//! Whatever is made is made in `staging/` and renamed into place when it is complete; whatever is removed is renamed to
//! `trash/` first. So after a crash everything is either there or not, and the rest lies in those two folders, which
//! are emptied at the start.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use nix::{
    fcntl::OFlag,
    sys::statvfs::statvfs,
    unistd::{Gid, geteuid},
};
use pandastack_bus::storage::Usage;
use pandastack_daemon::files;

use crate::{
    error::{At, Result, StorageError},
    layout::Layout,
    reflink,
};

/// Mode of what is never written again.
pub const SEALED: u32 = 0o440;

/// The state directory, opened.
#[derive(Debug)]
pub struct Place {
    /// Its paths.
    pub layout: Layout,
    /// Group of everything that Firecracker or vmm may touch; `None` leaves our own.
    group: Option<Gid>,
    count: AtomicU64,
}

/// Something unfinished: removed when dropped, unless it was committed.
#[derive(Debug)]
pub struct Staged {
    path: PathBuf,
}

impl Place {
    /// Makes what is missing of the layout, empties staging and trash, and tries a reflink.
    ///
    /// # Errors
    /// [`StorageError::NoReflink`], or the folders cannot be made. What cannot be emptied is only logged.
    pub fn open(layout: Layout, group: Option<Gid>) -> Result<Self> {
        let place = Self { layout, group, count: AtomicU64::new(0) };
        let layout = &place.layout;
        let state = layout.state();
        for folder in [
            layout.artefacts(),
            layout.templates(),
            layout.snapshots(),
            layout.volumes(),
            layout.volume_snapshots(),
            layout.holds(),
            layout.staging(),
            layout.trash(),
        ] {
            make_folder(&folder, 0o700)?;
        }
        // vmm passes through to the sockets; nobody but us lists it or changes it.
        for folder in [layout.sandboxes(), layout.differences()] {
            make_folder(&folder, 0o710)?;
            place.share(&folder, 0o710)?;
        }
        for folder in [layout.staging(), layout.trash()] {
            for path in children(&folder)? {
                tracing::info!("{}: left over, removed", path.display());
                for failure in remove_tree(&path) {
                    tracing::error!("{failure}");
                }
            }
        }
        files::sync_dir(state).at(state)?;
        place.probe()?;
        Ok(place)
    }

    /// Gives a file or directory of ours its mode and lets the group of the sandboxes use it accordingly.
    ///
    /// # Errors
    /// It is gone, or not ours.
    pub fn share(&self, path: &Path, mode: u32) -> Result<()> {
        if let Some(group) = self.group {
            chown(path, None, Some(group.as_raw())).at(path)?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).at(path)
    }

    /// A fresh directory for something unfinished, for us alone.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn stage(&self, tag: &str) -> Result<Staged> {
        let path = self.layout.staged(tag, self.number());
        DirBuilder::new().mode(0o700).create(&path).at(&path)?;
        Ok(Staged { path })
    }

    /// Makes `path` vanish at once and durably; [`remove_tree`] of what this answers makes room. `None` when it was
    /// not there.
    ///
    /// # Errors
    /// It cannot be renamed, or its directory cannot be synced.
    pub fn discard(&self, path: &Path) -> Result<Option<PathBuf>> {
        let tag = path.file_name().and_then(|name| name.to_str()).unwrap_or("unnamed");
        let trashed = self.layout.trashed(tag, self.number());
        match fs::rename(path, &trashed) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).at(path),
        }
        sync_parent(path)?;
        Ok(Some(trashed))
    }

    /// [`Place::discard`], then makes room. Goes on to the end and reports everything. Answers whether it was there.
    ///
    /// # Errors
    /// [`StorageError::Incomplete`]: it has vanished, but some of it still takes up space.
    pub fn remove(&self, path: &Path) -> Result<bool> {
        let Some(trashed) = self.discard(path)? else { return Ok(false) };
        let failures = remove_tree(&trashed);
        if failures.is_empty() { Ok(true) } else { Err(StorageError::Incomplete(failures)) }
    }

    /// Space on the data partition.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn usage(&self) -> Result<Usage> {
        let state = self.layout.state();
        let found = statvfs(state).at(state)?;
        let total_bytes = found.blocks() * found.fragment_size();
        let free_bytes = found.blocks_available() * found.fragment_size();
        Ok(Usage { total_bytes, free_bytes, reserve_bytes: reserve(total_bytes) })
    }

    /// Refuses when less than the reserve is free.
    ///
    /// Root disks are sparse and promised in full, and no quota stops one from growing: XFS project limits need
    /// `CAP_SYS_ADMIN` (`Q_XSETQLIM`), which this daemon does not get. So nothing new is made below the reserve, which
    /// leaves room for those that run.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`].
    pub fn admit(&self) -> Result<()> {
        self.admit_bytes(0)
    }

    /// Refuses when less than the reserve would be free after `wanted` more bytes.
    ///
    /// # Errors
    /// [`StorageError::NoSpace`].
    pub fn admit_bytes(&self, wanted: u64) -> Result<()> {
        let Usage { free_bytes, reserve_bytes, .. } = self.usage()?;
        if free_bytes >= reserve_bytes.saturating_add(wanted) {
            return Ok(());
        }
        let (free, reserve) = (free_bytes >> 20, reserve_bytes >> 20);
        Err(StorageError::NoSpace(format!("{free} MiB are free, but {reserve} MiB are kept back")))
    }

    fn number(&self) -> u64 {
        self.count.fetch_add(1, Ordering::Relaxed)
    }

    fn probe(&self) -> Result<()> {
        let staged = self.stage("probe")?;
        let (from, to) = (staged.path().join("from"), staged.path().join("to"));
        let mut one = create(&from, 0o600)?;
        let two = create(&to, 0o600)?;
        reflink::probe(&mut one, &two)
            .map_err(|source| StorageError::NoReflink { path: self.layout.state().to_owned(), source })
    }
}

impl Staged {
    /// Where it is being made.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Renames it to `target`, which must not exist (or be an empty directory), durably.
    ///
    /// # Errors
    /// It cannot be renamed, or the directory cannot be synced.
    pub fn commit(self, target: &Path) -> Result<()> {
        files::sync_dir(&self.path).at(&self.path)?;
        self.commit_quickly(target)?;
        sync_parent(target)
    }

    /// The same, but after a power cut it may be gone.
    ///
    /// # Errors
    /// It cannot be renamed.
    pub fn commit_quickly(self, target: &Path) -> Result<()> {
        fs::rename(&self.path, target).at(target)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        // After a commit there is nothing here any more.
        if fs::symlink_metadata(&self.path).is_ok() {
            for failure in remove_tree(&self.path) {
                tracing::error!("{failure}");
            }
        }
    }
}

/// What is kept back of a partition of `total` bytes: 5 %, but at least 2 GiB.
pub fn reserve(total: u64) -> u64 {
    (total / 20).max(2 << 30)
}

/// A fresh file that did not exist, with exactly this mode.
///
/// # Errors
/// There is one already, or it cannot be made.
pub fn create(path: &Path, mode: u32) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(mode).open(path).at(path)?;
    file.set_permissions(Permissions::from_mode(mode)).at(path)?;
    Ok(file)
}

/// Opens a file of ours for reading, never through a symbolic link.
///
/// # Errors
/// It is not a regular file, or cannot be opened.
pub fn open_regular(path: &Path) -> Result<File> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).at(path)?;
    if file.metadata().at(path)?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, "not a regular file")).at(path)
    }
}

/// Opens a file of a capture. Its directory is ours alone, but what is in it was handed to a process that runs hostile
/// guests.
///
/// # Errors
/// [`StorageError::WrongState`]: it is missing, empty, no regular file or somebody else's.
pub fn open_written(path: &Path) -> Result<File> {
    let whole = |file: &File| {
        let ours = |found: fs::Metadata| found.uid() == geteuid().as_raw() && found.len() > 0;
        file.metadata().is_ok_and(ours)
    };
    open_regular(path).ok().filter(whole).ok_or_else(|| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        StorageError::WrongState(format!("the capture is not complete: {name}"))
    })
}

/// Seals a file of ours and links it to `to`, with `durable` when its content is on the disk. Whoever has it open for writing
/// keeps that.
///
/// # Errors
/// As [`open_written`]; or `to` is there already.
pub fn link_sealed(from: &Path, to: &Path, durable: bool) -> Result<()> {
    let file = open_written(from)?;
    file.set_permissions(Permissions::from_mode(SEALED)).at(from)?;
    if durable {
        file.sync_all().at(from)?;
    }
    fs::hard_link(from, to).at(to)?;
    if inode(to)?.1 == file.metadata().at(from)?.ino() {
        Ok(())
    } else {
        Err(io::Error::other("changed while it was sealed")).at(from)
    }
}

/// Makes a file that shares its blocks with `from`, of the same length.
///
/// # Errors
/// [`StorageError::NoSpace`]; there is one already, or `from` is no regular file.
pub fn clone_file(from: &Path, to: &Path, mode: u32) -> Result<File> {
    clone_open(&open_regular(from)?, to, mode)
}

/// [`clone_file`] of a file that is open: it may have no name any more.
///
/// # Errors
/// [`StorageError::NoSpace`]; there is one already.
pub fn clone_open(from: &File, to: &Path, mode: u32) -> Result<File> {
    let file = create(to, mode)?;
    reflink::clone(from, &file).at(to)?;
    Ok(file)
}

/// [`clone_open`], made larger where it has fewer bytes than `least`.
///
/// # Errors
/// As [`clone_open`].
pub fn clone_grown(from: &File, to: &Path, mode: u32, least: u64) -> Result<File> {
    let file = clone_open(from, to, mode)?;
    if file.metadata().at(to)?.len() < least {
        file.set_len(least).at(to)?;
    }
    Ok(file)
}

/// Removes a name of a file; that it is not there is as good.
///
/// # Errors
/// It cannot be removed.
pub fn unlink(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).at(path),
        _ => Ok(()),
    }
}

/// Whether there is anything of that name.
pub fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// What two names of one file have in common: device and inode.
///
/// # Errors
/// There is no such name.
pub fn inode(path: &Path) -> Result<(u64, u64)> {
    let found = fs::symlink_metadata(path).at(path)?;
    Ok((found.dev(), found.ino()))
}

/// Whether both names are there and are of one file.
pub fn same_file(one: &Path, two: &Path) -> bool {
    matches!((inode(one), inode(two)), (Ok(one), Ok(two)) if one == two)
}

/// The paths in a directory, sorted.
///
/// # Errors
/// It cannot be read.
pub fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = || fs::read_dir(directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
    let mut paths = read().at(directory)?;
    paths.sort();
    Ok(paths)
}

/// Makes a directory if it is not there; its mode is set in any case.
///
/// # Errors
/// It cannot be made.
pub fn make_folder(path: &Path, mode: u32) -> Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path).at(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode)).at(path)
}

/// Removes a file or a whole directory, follows no link, goes on after errors and answers them all.
pub fn remove_tree(path: &Path) -> Vec<String> {
    let mut failures = Vec::new();
    let mut open = vec![path.to_owned()];
    let mut emptied = Vec::new();
    let mut fail = |path: &Path, error: io::Error| {
        if error.kind() != io::ErrorKind::NotFound {
            failures.push(format!("{}: {error}", path.display()));
        }
    };
    while let Some(path) = open.pop() {
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_dir() => {
                match fs::read_dir(&path) {
                    Ok(entries) => entries.for_each(|entry| match entry {
                        Ok(entry) => open.push(entry.path()),
                        Err(error) => fail(&path, error),
                    }),
                    // Somebody else's directory cannot be listed; if it is empty, it can still be removed.
                    Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                    Err(error) => fail(&path, error),
                }
                emptied.push(path);
            }
            Ok(_) => fs::remove_file(&path).unwrap_or_else(|error| fail(&path, error)),
            Err(error) => fail(&path, error),
        }
    }
    for path in emptied.into_iter().rev() {
        fs::remove_dir(&path).unwrap_or_else(|error| fail(&path, error));
    }
    failures
}

fn sync_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    files::sync_dir(parent).at(parent)
}
