//! The drives beside the root disk: eight that every snapshot has, because a restored machine cannot be given others.
//!
//! Owns what stands in their place while there is no volume: four writable files of a sandbox's own and one read-only
//! file for all. Made with the directory, so they cost a create nothing. Refuses to know whose a volume is.

use std::{
    fs::{self, Metadata},
    os::unix::fs::MetadataExt,
    path::Path,
};

use pandastack_bus::storage::VolumeUse;

use crate::{
    error::{At, Result, StorageError},
    layout,
    place::{Place, SEALED, clone_file, create, exists, unlink},
};

/// Size of a placeholder, bytes.
const PLACEHOLDER: u64 = 1 << 20;
/// Firecracker opens it by its group.
pub const WRITABLE: u32 = 0o660;

/// The drive that each of these volumes gets: the n-th of its kind.
///
/// # Errors
/// [`StorageError::Invalid`] when there are more than four of a kind.
pub fn assign<'a>(volumes: &'a [VolumeUse]) -> Result<Vec<(&'a VolumeUse, &'static str)>> {
    let (mut writable, mut read_only) = (layout::WRITABLE.into_iter(), layout::READ_ONLY.into_iter());
    let next = |volume: &'a VolumeUse| {
        let name = if volume.read_only { read_only.next() } else { writable.next() };
        let name = name.ok_or_else(|| {
            StorageError::Invalid("a sandbox has at most 4 writable and 4 read-only volumes".into())
        })?;
        Ok((volume, name))
    };
    volumes.iter().map(next).collect()
}

/// Makes the file that read-only placeholders are links to, if it is not there.
///
/// # Errors
/// It cannot be made.
pub fn make_zero(place: &Place) -> Result<()> {
    let target = place.layout.zero();
    if fs::symlink_metadata(&target).is_ok_and(|found| is_placeholder(&found)) {
        return place.share(&target, SEALED);
    }
    let staged = place.stage("zero")?;
    let path = staged.path().join("content");
    create(&path, SEALED)?.set_len(PLACEHOLDER).at(&path)?;
    place.share(&path, SEALED)?;
    fs::rename(&path, &target).at(&target)
}

/// Makes the placeholders that are missing in a directory.
///
/// # Errors
/// One cannot be made.
pub fn place_all(place: &Place, folder: &Path) -> Result<()> {
    for name in layout::WRITABLE {
        let path = folder.join(name);
        if !exists(&path) {
            create(&path, WRITABLE)?.set_len(PLACEHOLDER).at(&path)?;
            place.share(&path, WRITABLE)?;
        }
    }
    for name in layout::READ_ONLY {
        let path = folder.join(name);
        if !exists(&path) {
            fs::hard_link(place.layout.zero(), &path).at(&path)?;
        }
    }
    Ok(())
}

/// Puts placeholders where something else is.
///
/// # Errors
/// One cannot be replaced.
pub fn reset(place: &Place, folder: &Path) -> Result<()> {
    let mut fresh = true;
    for name in layout::drives() {
        let path = folder.join(name);
        if !fs::symlink_metadata(&path).is_ok_and(|found| is_placeholder(&found)) {
            unlink(&path)?;
            fresh = false;
        }
    }
    // As a rule: this is on the path of every create.
    if fresh { Ok(()) } else { place_all(place, folder) }
}

/// Whether this is as good as a fresh placeholder: of its size and without a block. One that a guest scribbled on is
/// not, and no volume is, because it holds a file system.
pub fn is_placeholder(found: &Metadata) -> bool {
    found.is_file() && found.len() == PLACEHOLDER && found.blocks() == 0
}

/// Puts a private clone of `from` in the place of a drive.
///
/// # Errors
/// [`StorageError::NoSpace`], or it cannot be made.
pub fn clone_in(place: &Place, from: &Path, to: &Path) -> Result<()> {
    let name = to.file_name().unwrap_or_default();
    let mode = if layout::READ_ONLY.iter().any(|drive| name == *drive) { SEALED } else { WRITABLE };
    unlink(to)?;
    clone_file(from, to, mode)?;
    place.share(to, mode)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_volume_gets_the_next_drive_of_its_kind(kinds in prop::collection::vec(any::<bool>(), 0..10)) {
            let volumes: Vec<_> = kinds
                .iter()
                .map(|read_only| VolumeUse { name: "x".into(), read_only: *read_only })
                .collect();
            let closed = kinds.iter().filter(|read_only| **read_only).count();
            match assign(&volumes) {
                Ok(drives) => {
                    let of = |read_only: bool| -> Vec<_> {
                        drives.iter().filter(|(volume, _)| volume.read_only == read_only).map(|found| found.1).collect()
                    };
                    prop_assert_eq!(of(false), &layout::WRITABLE[..kinds.len() - closed]);
                    prop_assert_eq!(of(true), &layout::READ_ONLY[..closed]);
                }
                Err(_) => prop_assert!(closed > 4 || kinds.len() - closed > 4),
            }
        }
    }
}
