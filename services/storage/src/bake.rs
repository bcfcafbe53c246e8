//! Bakes: memory, machine state and disk of a template's guest at one moment, sealed. Once sealed, none of these
//! inodes is ever written again, because guests map them.
//!
//! A bake is named by everything that it depends on, so the one that fits this machine and image is found by name.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use pandastack_bus::storage::MACHINE_FORM;
use pandastack_daemon::files;
use serde::{Deserialize, Serialize};

use crate::{
    artefact::Artefacts,
    error::{At, Result},
    identity::Digest,
    import::write_manifest,
    layout::{self, Layout},
    place::{Place, Staged, link_sealed, open_regular},
    template::TemplateName,
};

/// Everything that has to be the same for a bake to be restored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Key {
    /// Firecracker.
    pub firecracker: Digest,
    /// Guest kernel.
    pub vmlinux: Digest,
    /// Guest initramfs.
    pub initrd: Digest,
    /// The template: its disk and its description.
    pub template: Digest,
    /// This machine's processor.
    pub processor: Digest,
    /// Configuration of the machine, [`MACHINE_FORM`].
    pub machine: String,
}

/// Name of a bake: 32 hexadecimal digits, the same for the same [`Key`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BakeId(String);

#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    key: Key,
    created_unix_ms: u64,
}

const VERSION: u32 = 1;
const LIMIT: u64 = 64 * 1024;
const FILES: [&str; 3] = [layout::ROOT, layout::MEM, layout::STATE];

impl Key {
    /// The key that a bake needs now.
    pub fn new(artefacts: &Artefacts, disk: &Digest, description: &str, processor: &Digest) -> Self {
        Self {
            firecracker: artefacts.firecracker.clone(),
            vmlinux: artefacts.vmlinux.clone(),
            initrd: artefacts.initrd.clone(),
            template: Digest::of_parts(&[disk.as_str().as_bytes(), description.as_bytes()]),
            processor: processor.clone(),
            machine: MACHINE_FORM.to_owned(),
        }
    }

    /// The name of its bake.
    pub fn id(&self) -> BakeId {
        let digests = [&self.firecracker, &self.vmlinux, &self.initrd, &self.template, &self.processor];
        let mut parts = digests.map(|digest| digest.as_str().as_bytes()).to_vec();
        parts.push(self.machine.as_bytes());
        BakeId::from(&Digest::of_parts(&parts))
    }
}

impl BakeId {
    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&Digest> for BakeId {
    fn from(digest: &Digest) -> Self {
        Self(digest.as_str()[..32].to_owned())
    }
}

/// Whether the bake of `key` is there and whole.
pub fn present(layout: &Layout, name: &TemplateName, key: &Key) -> bool {
    let folder = layout.bake(name, &key.id());
    let read = || -> Option<Manifest> {
        serde_json::from_slice(&files::read_limited(&folder.join(layout::MANIFEST), LIMIT).ok()??).ok()
    };
    read().is_some_and(|manifest| manifest.version == VERSION && manifest.key == *key)
        && FILES.iter().all(|file| open_regular(&folder.join(file)).is_ok())
}

/// Seals `mem`, `state` and `root.img` of a sandbox directory and collects them, durably, in a directory that
/// [`publish`] then only has to rename. The sandbox keeps its links but can no longer write to them.
///
/// # Errors
/// [`crate::StorageError::WrongState`] when the capture is not complete.
pub fn collect(place: &Place, sandbox: &Path, key: &Key) -> Result<Staged> {
    let staged = place.stage("bake")?;
    for name in FILES {
        link_sealed(&sandbox.join(name), &staged.path().join(name), true)?;
    }
    let manifest = Manifest { version: VERSION, key: key.clone(), created_unix_ms: now_unix_ms() };
    write_manifest(staged.path(), &manifest)?;
    Ok(staged)
}

/// The time, Unix milliseconds.
pub(crate) fn now_unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// Makes a collected bake the one of its key. Answers `false` when that is what it is already.
///
/// # Errors
/// It cannot be renamed.
pub fn publish(place: &Place, name: &TemplateName, key: &Key, staged: Staged) -> Result<bool> {
    let target = place.layout.bake(name, &key.id());
    let inode = |folder: &Path| fs::symlink_metadata(folder.join(layout::MEM)).map(|found| found.ino()).ok();
    if present(&place.layout, name, key) && inode(&target) == inode(staged.path()) {
        return Ok(false);
    }
    let folder = place.layout.bakes(name);
    crate::place::make_folder(&folder, 0o700)?;
    files::sync_dir(&place.layout.template(name)).at(&folder)?;
    place.remove(&target)?;
    staged.commit(&target)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn artefacts() -> Artefacts {
        Artefacts { firecracker: Digest::of(b"f"), vmlinux: Digest::of(b"k"), initrd: Digest::of(b"i") }
    }

    #[test]
    fn a_bake_fits_only_what_it_was_made_with() {
        let key = Key::new(&artefacts(), &Digest::of(b"disk"), "text", &Digest::of(b"cpu"));
        let others = [
            Key::new(
                &Artefacts { firecracker: Digest::of(b"x"), ..artefacts() },
                &Digest::of(b"disk"),
                "text",
                &Digest::of(b"cpu"),
            ),
            Key::new(
                &Artefacts { vmlinux: Digest::of(b"x"), ..artefacts() },
                &Digest::of(b"disk"),
                "text",
                &Digest::of(b"cpu"),
            ),
            Key::new(
                &Artefacts { initrd: Digest::of(b"x"), ..artefacts() },
                &Digest::of(b"disk"),
                "text",
                &Digest::of(b"cpu"),
            ),
            Key::new(&artefacts(), &Digest::of(b"x"), "text", &Digest::of(b"cpu")),
            Key::new(&artefacts(), &Digest::of(b"disk"), "x", &Digest::of(b"cpu")),
            Key::new(&artefacts(), &Digest::of(b"disk"), "text", &Digest::of(b"x")),
        ];

        assert_eq!(key.id(), key.clone().id());
        for other in others {
            assert_ne!(key.id(), other.id());
        }
    }
}
