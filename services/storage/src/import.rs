//! Bringing a template's root disk from its read-only partition onto XFS, where it can be reflinked.

use std::{fs::File, io, os::unix::fs::FileExt};

use pandastack_daemon::files;
use serde::{Deserialize, Serialize};

use crate::{
    copy,
    error::{At, Result, StorageError},
    identity::Digest,
    layout::{self, Layout, Sources},
    place::{Place, create, make_folder, open_regular},
    template::{Template, TemplateName},
};

/// What stands beside an imported disk; its presence says that the disk is whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Manifest {
    version: u32,
    identity: Digest,
}

const VERSION: u32 = 1;
const LIMIT: u64 = 64 * 1024;
/// As much of a disk as is read to tell it from others: an ext4 superblock with its UUID and times is in it.
const HEAD: u64 = 1024 * 1024;

/// The identity of a template's disk on its partition, without reading all of it: the text in `identity` beside it if
/// there is one, otherwise its size and its first MiB (time stamps say nothing: a reproducible image has none).
///
/// # Errors
/// The disk is missing or cannot be read.
pub fn identity(sources: &Sources, name: &TemplateName) -> Result<Digest> {
    let folder = sources.template(name);
    let path = folder.join(layout::IDENTITY);
    if let Some(text) = files::read_limited(&path, LIMIT).at(&path)? {
        return Ok(Digest::of_parts(&[b"text", &text]));
    }
    let path = folder.join(layout::ROOT);
    let disk = open_regular(&path)?;
    let length = disk.metadata().at(&path)?.len();
    let mut head = vec![0; usize::try_from(length.min(HEAD)).unwrap_or(0)];
    disk.read_exact_at(&mut head, 0).at(&path)?;
    Ok(Digest::of_parts(&[b"head", &length.to_le_bytes(), &head]))
}

/// The identity of the disk that was imported; `None` when there is none that is whole.
pub fn imported(layout: &Layout, name: &TemplateName) -> Option<Digest> {
    let folder = layout.disk(name);
    let bytes = files::read_limited(&folder.join(layout::MANIFEST), LIMIT).ok()??;
    let manifest: Manifest = serde_json::from_slice(&bytes).ok()?;
    let whole = manifest.version == VERSION && open_regular(&folder.join(layout::ROOT)).is_ok();
    whole.then_some(manifest.identity)
}

/// Copies the disk, durably and all at once. Idempotent: answers `false` when the disk of that identity is there.
///
/// # Errors
/// [`StorageError::NoSpace`]; [`StorageError::Invalid`] when the disk is not as large as the template says.
pub fn import(place: &Place, sources: &Sources, template: &Template, identity: &Digest) -> Result<bool> {
    let name = &template.name;
    if imported(&place.layout, name).as_ref() == Some(identity) {
        return Ok(false);
    }
    place.admit()?;
    let source = sources.template(name).join(layout::ROOT);
    let from = open_regular(&source)?;
    let (length, expected) = (from.metadata().at(&source)?.len(), template.disk_mib << 20);
    if length != expected {
        return Err(StorageError::Invalid(format!("its disk has {length} bytes instead of {expected}")));
    }
    let staged = place.stage(&format!("disk-{name}"))?;
    let path = staged.path().join(layout::ROOT);
    let written = {
        let to = create(&path, 0o400)?;
        let written = copy::sparse(&from, &to).at(&path)?;
        to.sync_all().at(&path)?;
        written
    };
    write_identity(staged.path(), identity)?;
    make_folder(&place.layout.template(name), 0o700)?;
    files::sync_dir(&place.layout.templates()).at(&place.layout.templates())?;
    // Sandboxes share blocks with the old disk, not its name: it can go at any time.
    let target = place.layout.disk(name);
    place.remove(&target)?;
    staged.commit(&target)?;
    tracing::info!(template = %name, "disk imported, {} MiB", written >> 20);
    Ok(true)
}

/// Writes what says that a directory of ours is whole.
pub(crate) fn write_manifest<T: Serialize>(directory: &std::path::Path, manifest: &T) -> Result<()> {
    let path = directory.join(layout::MANIFEST);
    let bytes = serde_json::to_vec(manifest).map_err(io::Error::from).at(&path)?;
    files::write_atomic(&path, &bytes, 0o600).at(&path)
}

/// Says that the disk in a directory is whole, and which one it is.
pub(crate) fn write_identity(directory: &std::path::Path, identity: &Digest) -> Result<()> {
    write_manifest(directory, &Manifest { version: VERSION, identity: identity.clone() })
}

/// Bytes that files take on the data partition; those that are not there take none.
pub(crate) fn blocks(directory: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt;

    [layout::ROOT, layout::MEM, layout::STATE]
        .iter()
        .filter_map(|name| File::open(directory.join(name)).and_then(|file| file.metadata()).ok())
        .map(|found| found.blocks() * 512)
        .sum()
}
