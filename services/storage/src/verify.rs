//! Whether a snapshot is still what was captured: its contents against the hash tree that was made of them, and what follows
//! when they differ.
//!
//! Owns the mark on one that was found damaged: a file with a sentence, so that it is refused after a restart, too. The next
//! check decides anew. Refuses to know when to check; nothing is ever repaired.

use std::{io, path::Path, sync::PoisonError, time::Duration};

use nix::errno::Errno;
use pandastack_bus::storage::{Verdict, Verification};
use pandastack_daemon::files;

use crate::{
    error::{At, Result, StorageError},
    hashes::{self, Hashes},
    identity::Digest,
    layout::{self, Layout},
    manifest::Manifest,
    place::exists,
    snapshot::{Snapshot, Snapshots},
};

/// Longest sentence of a mark, bytes.
const SENTENCE: u64 = 4096;
const FOREIGN_TREE: &str = "its hash tree was not written on this machine or was changed";
const NO_TREE: &str = "there is no hash tree to compare it with";

/// What a check before this start of the daemon found.
pub(crate) fn known_damage(folder: &Path) -> Option<String> {
    let path = folder.join(layout::DAMAGE);
    exists(&path).then(|| {
        // That it is there counts, whatever became of its text.
        let text = files::read_limited(&path, SENTENCE).ok().flatten();
        let text = text.and_then(|bytes| String::from_utf8(bytes).ok()).filter(|text| !text.is_empty());
        text.unwrap_or_else(|| "a check found it damaged".into())
    })
}

impl Snapshots {
    /// Compares one with its hash tree and its manifest, and marks it durably, or takes the mark away. See
    /// [`hashes::compute`] for `rest`.
    ///
    /// # Errors
    /// [`StorageError::NotFound`] when it goes meanwhile; [`StorageError::WrongState`] when `rest` ended it; or the machine has
    /// a fault of its own. What was known before stays then.
    pub fn verify(
        &self,
        layout: &Layout,
        found: &Snapshot,
        mut rest: impl FnMut(Duration) -> bool,
    ) -> Result<Verification> {
        let answer = |verdict, files, reason| Verification { verdict, files, reason };
        let Some(manifest) = &found.manifest else {
            return Ok(answer(Verdict::Damaged, vec![layout::MANIFEST.into()], found.why()));
        };
        let folder = layout.snapshot(&found.id);
        let mut goes_on = |took| rest(took) && found.stay().is_ok();
        let tree = self.tree(&folder, found)?;
        let mut wrong = Vec::new();
        if let Tree::Ours(tree) = &tree {
            let disks = manifest.files.keys().filter(|name| *name != layout::STATE);
            // Both are under a MAC: where they differ, one of them is that of another time.
            if !disks.eq(tree.files.keys()) {
                wrong.push(layout::HASHES.to_owned());
            }
            for (name, expected) in &tree.files {
                let is =
                    is_so(&folder.join(name), expected, &mut goes_on).map_err(|error| match error.kind() {
                        io::ErrorKind::Interrupted => {
                            StorageError::WrongState("the check was ended early".into())
                        }
                        _ => StorageError::Io { path: folder.join(name), source: error },
                    });
                // Gone meanwhile, all of its files are missing.
                drop(found.stay()?);
                if !is? {
                    wrong.push(name.clone());
                }
            }
        }
        if matches!(tree, Tree::Foreign) {
            wrong.push(layout::HASHES.to_owned());
        }
        let _stays = found.stay()?;
        let state_whole = found.is_state_whole(&folder, manifest);
        if !state_whole {
            wrong.push(layout::STATE.to_owned());
        }
        if wrong.is_empty() && !manifest.is_whole(&folder) {
            wrong = missing(&folder, manifest);
        }
        if !wrong.is_empty() {
            let reason = sentence(&wrong);
            tracing::error!(snapshot = %found.id, "damaged: {reason}");
            mark(&folder, found, Some(reason.clone()))?;
            return Ok(answer(Verdict::Damaged, wrong, reason));
        }
        if matches!(tree, Tree::Missing) {
            return Ok(answer(Verdict::Unhashed, wrong, NO_TREE.into()));
        }
        mark(&folder, found, None)?;
        *found.state_whole.lock().unwrap_or_else(PoisonError::into_inner) = Some(true);
        // It may be whole and of no use here all the same.
        Ok(answer(Verdict::Whole, wrong, found.why()))
    }

    fn tree(&self, folder: &Path, found: &Snapshot) -> Result<Tree> {
        let path = folder.join(layout::HASHES);
        let document = match files::read_limited(&path, hashes::LIMIT) {
            Ok(Some(document)) => document,
            Ok(None) => return Ok(Tree::Missing),
            Err(error) if is_damage(&error) => return Ok(Tree::Foreign),
            Err(error) => return Err(error).at(&path),
        };
        Ok(match self.signer.read::<Hashes>(hashes::KIND, &document) {
            Ok((tree, true)) if tree.is_of(found.id.as_str()) => Tree::Ours(tree),
            _ => Tree::Foreign,
        })
    }
}

/// What there is to compare with.
enum Tree {
    Ours(Hashes),
    /// Not ours, or not that of this snapshot.
    Foreign,
    Missing,
}

fn is_so(path: &Path, expected: &Digest, rest: impl FnMut(Duration) -> bool) -> io::Result<bool> {
    match hashes::of_path(path, rest) {
        Ok(digest) => Ok(digest == *expected),
        Err(error) if is_damage(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether an error is about what is on the disk, and not about this machine's means at the moment.
fn is_damage(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    let disk = [Errno::EIO, Errno::ELOOP, Errno::ENODATA].map(|errno| errno as i32);
    matches!(error.kind(), Kind::NotFound | Kind::InvalidData | Kind::UnexpectedEof)
        || error.raw_os_error().is_some_and(|number| disk.contains(&number))
}

/// Files that are not as long as they were, or are no files of ours.
fn missing(folder: &Path, manifest: &Manifest) -> Vec<String> {
    let as_long = |name: &str, length: u64| {
        std::fs::symlink_metadata(folder.join(name))
            .is_ok_and(|found| found.is_file() && found.len() == length)
    };
    let wrong: Vec<_> = manifest
        .files
        .iter()
        .filter(|(name, length)| !as_long(name, **length))
        .map(|(name, _)| name.clone())
        .collect();
    if wrong.is_empty() { vec![layout::MANIFEST.into()] } else { wrong }
}

/// The end of a sentence for its owner, who does not know our files.
fn sentence(wrong: &[String]) -> String {
    if wrong.iter().all(|name| name == layout::HASHES) {
        return FOREIGN_TREE.into();
    }
    let mut words: Vec<&str> = wrong
        .iter()
        .filter(|name| *name != layout::HASHES)
        .map(|name| match name.as_str() {
            layout::MEM => "its memory",
            layout::STATE => "the state of its machine",
            layout::ROOT => "its root disk",
            layout::MANIFEST => "its description",
            _ => "a disk of its volumes",
        })
        .collect();
    words.sort_unstable();
    words.dedup();
    format!("a check found that it is not what was captured: {}", words.join(", "))
}

/// First on disk, then in memory.
fn mark(folder: &Path, found: &Snapshot, reason: Option<String>) -> Result<()> {
    let path = folder.join(layout::DAMAGE);
    match &reason {
        Some(reason) => files::write_atomic(&path, reason.as_bytes(), 0o600).at(&path)?,
        None => drop(files::remove_durably(&path).at(&path)?),
    }
    *found.damage.lock().unwrap_or_else(PoisonError::into_inner) = reason;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_names_what_its_owner_knows() {
        let of = |names: &[&str]| sentence(&names.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(of(&["hashes.json"]), FOREIGN_TREE);
        let all = of(&["hashes.json", "mem", "root.img", "w0.img", "w1.img", "state"]);
        assert!(
            all.ends_with(": a disk of its volumes, its memory, its root disk, the state of its machine"),
            "{all}"
        );
    }

    #[test]
    fn what_is_short_for_the_moment_is_no_damage() {
        let damage = |errno: Errno| is_damage(&io::Error::from_raw_os_error(errno as i32));
        assert!(damage(Errno::EIO) && damage(Errno::ENOENT) && damage(Errno::ELOOP));
        assert!(
            !damage(Errno::EMFILE)
                && !damage(Errno::ENOMEM)
                && !damage(Errno::EINTR)
                && !damage(Errno::EACCES)
        );
    }
}
