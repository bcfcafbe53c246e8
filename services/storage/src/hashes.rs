//! The hash tree of a tenant's snapshot: what memory and disks must be when they come from somewhere else. Computed long
//! after the answer, slowly, and kept beside the manifest with a MAC of its own.
//!
//! Leaves are the SHA-256 of each MiB that is not all zero, so that a hole is as good as zeros; a file is the digest of its
//! length and its leaves with their numbers; the root is that of the files with their names.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{copy::next_data, error::StorageError, identity::Digest, place::open_regular};

/// What a MAC says that it is.
pub const KIND: &str = "snapshot hashes";
const VERSION: u32 = 1;
const CHUNK: u64 = 1 << 20;

/// Largest document, bytes: eleven files at most.
pub const LIMIT: u64 = 64 * 1024;

/// As it is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hashes {
    version: u32,
    /// The snapshot.
    pub snapshot: String,
    /// Its memory and its disks.
    pub files: BTreeMap<String, Digest>,
    /// Over all of them.
    pub root: Digest,
}

impl Hashes {
    /// Whether it is of this snapshot and of a form that is known here.
    pub fn is_of(&self, snapshot: &str) -> bool {
        self.version == VERSION && self.snapshot == snapshot
    }
}

/// Computes it of these files in `folder`. After each chunk `rest` is called with what that took; answering `false` it
/// ends all of it.
///
/// # Errors
/// A file cannot be read; `Interrupted` when `rest` ended it.
pub fn compute<'a>(
    snapshot: &str,
    folder: &Path,
    names: impl IntoIterator<Item = &'a str>,
    mut rest: impl FnMut(Duration) -> bool,
) -> io::Result<Hashes> {
    let mut files = BTreeMap::new();
    for name in names {
        files.insert(name.to_owned(), of_path(&folder.join(name), &mut rest)?);
    }
    let parts: Vec<_> =
        files.iter().flat_map(|(name, digest)| [name.as_bytes(), digest.as_str().as_bytes()]).collect();
    let root = Digest::of_parts(&parts);
    Ok(Hashes { version: VERSION, snapshot: snapshot.to_owned(), files, root })
}

/// The digest of one file; see [`compute`].
///
/// # Errors
/// As [`compute`].
pub fn of_path(path: &Path, mut rest: impl FnMut(Duration) -> bool) -> io::Result<Digest> {
    let file = open_regular(path).map_err(|error| match error {
        StorageError::Io { source, .. } => source,
        other => io::Error::other(other),
    })?;
    of_file(&file, &mut rest)
}

fn of_file(file: &File, rest: &mut impl FnMut(Duration) -> bool) -> io::Result<Digest> {
    let length = file.metadata()?.len();
    let mut sum = Sha256::new_with_prefix(length.to_le_bytes());
    let mut buffer = vec![0; CHUNK as usize];
    let mut at = 0;
    while let Some(data) = next_data(file, at..length)? {
        let start = Instant::now();
        let number = data.start / CHUNK;
        let first = number * CHUNK;
        let bytes = &mut buffer[..(length - first).min(CHUNK) as usize];
        file.read_exact_at(bytes, first)?;
        if bytes.iter().any(|byte| *byte != 0) {
            sum.update(number.to_le_bytes());
            sum.update(Sha256::digest(&*bytes));
        }
        at = (first + CHUNK).min(length);
        if !rest(start.elapsed()) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
    Ok(Digest::finish(sum))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH: u64 = 5 * CHUNK + 7;

    fn hash(parts: &[(u64, u8)], holes: bool) -> Hashes {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("mem")).unwrap();
        file.set_len(LENGTH).unwrap();
        if !holes {
            file.write_all_at(&vec![0; LENGTH as usize], 0).unwrap();
        }
        for (at, byte) in parts {
            file.write_all_at(&[*byte], *at).unwrap();
        }
        compute("s", dir.path(), ["mem"], |_| true).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4))]

        #[test]
        fn it_says_what_is_in_it_and_not_how_it_is_stored(
            parts in prop::collection::vec((0..LENGTH, any::<u8>()), 0..4),
            at in 0..LENGTH,
        ) {
            let found = hash(&parts, true);
            prop_assert_eq!(&found, &hash(&parts, false));
            let now = parts.iter().rev().find(|part| part.0 == at).map_or(0, |part| part.1);
            let changed: Vec<_> = parts.iter().copied().chain([(at, now ^ 1)]).collect();
            prop_assert_ne!(found.root, hash(&changed, true).root);
        }
    }

    #[test]
    fn it_can_be_ended_and_names_count() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            std::fs::write(dir.path().join(name), "x").unwrap();
        }
        let root = |name| compute("s", dir.path(), [name], |_| true).unwrap().root;
        assert_ne!(root("a"), root("b"));
        let ended = compute("s", dir.path(), ["a"], |_| false).unwrap_err();
        assert_eq!(ended.kind(), io::ErrorKind::Interrupted);
    }
}
