//! What a snapshot says of itself, and whether it can be restored here.
//!
//! Owns the form on disk, under a MAC. Refuses to know how a snapshot comes or goes.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt, path::Path};

use nix::unistd::geteuid;
use pandastack_bus::{SandboxId, storage::SnapshotSpec};
use pandastack_daemon::files;
use pandastack_protocol::{PROTOCOL, PROTOCOL_OLDEST};
use serde::{Deserialize, Serialize};

use crate::{
    bake::now_unix_ms,
    drive,
    error::{At, Result, StorageError},
    identity::Digest,
    layout::{self, Layout},
    mac::Signer,
};

/// What a snapshot holds, and what it needs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    version: u32,
    /// What its maker said.
    pub spec: SnapshotSpec,
    /// When, Unix milliseconds.
    pub created_unix_ms: u64,
    /// The processor that it was made on.
    pub processor: Digest,
    /// The program that made it and has to load it.
    pub firecracker: Digest,
    /// Newest version of the guest's protocol at that time; the agent in it speaks none that is newer.
    protocol: u16,
    /// Digest of the machine's state.
    pub state: Digest,
    /// Its files, each with its length in bytes.
    pub files: BTreeMap<String, u64>,
}

const VERSION: u32 = 1;
const KIND: &str = "snapshot manifest";
const LIMIT: u64 = 1 << 20;
const NEEDED: [&str; 3] = [layout::MEM, layout::STATE, layout::ROOT];

impl Manifest {
    /// That of a snapshot that is made now.
    pub fn new(
        spec: SnapshotSpec,
        processor: Digest,
        firecracker: Digest,
        state: Digest,
        files: BTreeMap<String, u64>,
    ) -> Self {
        let created_unix_ms = now_unix_ms();
        Self {
            version: VERSION,
            spec,
            created_unix_ms,
            processor,
            firecracker,
            protocol: PROTOCOL,
            state,
            files,
        }
    }

    /// Writes it into a directory, durably.
    ///
    /// # Errors
    /// [`StorageError::Invalid`] when it is too long.
    pub fn write(&self, folder: &Path, signer: &Signer) -> Result<()> {
        let path = folder.join(layout::MANIFEST);
        let document = signer.sign(KIND, self).at(&path)?;
        if document.len() as u64 > LIMIT {
            return Err(StorageError::Invalid("the description of the snapshot is too long".into()));
        }
        files::write_atomic(&path, &document, 0o600).at(&path)
    }

    /// Reads that of a directory, and whether it was signed here.
    ///
    /// # Errors
    /// It is missing or no manifest.
    pub fn read(folder: &Path, signer: &Signer) -> Result<(Self, bool)> {
        let path = folder.join(layout::MANIFEST);
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let bytes =
            files::read_limited(&path, LIMIT).and_then(|bytes| bytes.ok_or_else(missing)).at(&path)?;
        signer.read(KIND, &bytes).at(&path)
    }

    /// Why the snapshot `id` cannot be restored on this machine, as the end of a sentence; `None` when it can.
    pub fn why_unusable(
        &self,
        layout: &Layout,
        id: &SandboxId,
        processor: &Digest,
        authentic: bool,
    ) -> Option<&'static str> {
        let why = if !authentic {
            "its manifest was not written on this machine or was changed"
        } else if self.version != VERSION {
            "it has a format that is not known here"
        } else if self.spec.id != id.as_str() {
            "its manifest is that of another snapshot"
        } else if self.processor != *processor {
            "it was made on another kind of processor"
        } else if !is_file(&layout.artefact(&self.firecracker)) {
            "the Firecracker that it was made with is not there any more"
        } else if !(PROTOCOL_OLDEST..=PROTOCOL).contains(&self.protocol) {
            "the agent in it speaks a version of the protocol that is not known here"
        } else if !self.is_whole(&layout.snapshot(id)) {
            "some of its files are missing or damaged"
        } else {
            return None;
        };
        Some(why)
    }

    /// Whether its files are there as they were sealed, as far as their lengths say.
    pub(crate) fn is_whole(&self, folder: &Path) -> bool {
        let ours = geteuid().as_raw();
        let known = |name: &str| NEEDED.contains(&name) || layout::drives().any(|drive| drive == name);
        NEEDED.iter().all(|name| self.files.contains_key(*name))
            && self.files.iter().all(|(name, length)| {
                known(name)
                    && fs::symlink_metadata(folder.join(name))
                        .is_ok_and(|found| found.is_file() && found.len() == *length && found.uid() == ours)
            })
    }
}

/// Checks what the maker of a snapshot says; answers its id and that of the sandbox.
///
/// # Errors
/// [`StorageError::Invalid`].
pub fn check(spec: &SnapshotSpec) -> Result<(SandboxId, SandboxId)> {
    let id = |text: &str| text.parse::<SandboxId>().map_err(|error| StorageError::Invalid(error.to_string()));
    if spec.workspace.is_empty() {
        return Err(StorageError::Invalid("a snapshot belongs to a workspace".into()));
    }
    drive::assign(&spec.volumes)?;
    Ok((id(&spec.id)?, id(&spec.sandbox)?))
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_file())
}
