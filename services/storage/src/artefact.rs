//! Firecracker, guest kernel and initramfs, brought from the image onto the data partition so that they can be linked
//! into sandbox directories. Each is named by what is in it; a directory keeps what it linked, whatever comes later.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::MetadataExt,
    path::Path,
};

use pandastack_daemon::files;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::{
    error::{At, Result},
    identity::Digest,
    layout::{self, Layout, Sources},
    place::{Place, children, create, open_regular, same_file},
};

/// The artefacts of the running image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Artefacts {
    /// Firecracker.
    pub firecracker: Digest,
    /// Guest kernel.
    pub vmlinux: Digest,
    /// Guest initramfs.
    pub initrd: Digest,
}

const MANIFEST_LIMIT: u64 = 64 * 1024;
const PROGRAM: u32 = 0o550;
const DATA: u32 = 0o440;

impl Artefacts {
    /// Brings in what is not there yet.
    ///
    /// What was current at the last start is compared with the image byte by byte, which is much cheaper than a digest;
    /// time stamps say nothing, because a reproducible image has none.
    ///
    /// # Errors
    /// The image lacks one of them, or the data partition cannot be written.
    pub fn import(place: &Place, sources: &Sources) -> Result<Self> {
        let last = Self::last(&place.layout);
        let last = |pick: fn(&Self) -> &Digest| last.as_ref().map(pick);
        let found = Self {
            firecracker: import(place, &sources.firecracker, PROGRAM, last(|all| &all.firecracker))?,
            vmlinux: import(place, &sources.vmlinux, DATA, last(|all| &all.vmlinux))?,
            initrd: import(place, &sources.initrd, DATA, last(|all| &all.initrd))?,
        };
        let path = place.layout.current_artefacts();
        let text = serde_json::to_vec(&found).map_err(io::Error::from).at(&path)?;
        files::write_atomic(&path, &text, 0o600).at(&path)?;
        Ok(found)
    }

    /// The digests, for garbage collection.
    pub fn digests(&self) -> BTreeSet<Digest> {
        [&self.firecracker, &self.vmlinux, &self.initrd].into_iter().cloned().collect()
    }

    /// Digest and the name it has in a sandbox directory.
    pub fn named(&self) -> [(&Digest, &'static str); 3] {
        [
            (&self.firecracker, layout::FIRECRACKER),
            (&self.vmlinux, layout::KERNEL),
            (&self.initrd, layout::INITRD),
        ]
    }

    fn last(layout: &Layout) -> Option<Self> {
        let bytes = files::read_limited(&layout.current_artefacts(), MANIFEST_LIMIT).ok()??;
        serde_json::from_slice(&bytes).ok()
    }
}

/// The digest of a program in a sandbox directory, which is an artefact from then on: its name may have gone with an
/// earlier image while sandboxes still run it.
///
/// # Errors
/// It cannot be read or linked.
pub fn adopt(place: &Place, program: &Path) -> Result<Digest> {
    for artefact in children(&place.layout.artefacts())? {
        let digest = artefact.file_name().and_then(|name| name.to_str()?.parse::<Digest>().ok());
        if let Some(digest) = digest
            && same_file(&artefact, program)
        {
            return Ok(digest);
        }
    }
    let digest = copy(&mut open_regular(program)?, &mut io::sink()).at(program)?;
    let target = place.layout.artefact(&digest);
    match std::fs::hard_link(program, &target) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error).at(&target),
        _ => files::sync_dir(&place.layout.artefacts()).at(&target)?,
    }
    Ok(digest)
}

fn import(place: &Place, source: &Path, mode: u32, last: Option<&Digest>) -> Result<Digest> {
    if let Some(digest) = last
        && same(source, &place.layout.artefact(digest)).unwrap_or(false)
    {
        return Ok(digest.clone());
    }
    let staged = place.stage("artefact")?;
    let path = staged.path().join("content");
    let digest = {
        let mut from = open_regular(source)?;
        let mut to = create(&path, mode)?;
        let digest = copy(&mut from, &mut to).at(&path)?;
        place.share(&path, mode)?;
        to.sync_all().at(&path)?;
        digest
    };
    let target = place.layout.artefact(&digest);
    // The same content under the same name: whatever was there is as good, and its links stay valid if it is whole.
    if !same(&path, &target).unwrap_or(false) {
        std::fs::rename(&path, &target).at(&target)?;
    }
    files::sync_dir(&place.layout.artefacts()).at(&target)?;
    tracing::info!("{}: imported as {digest}", source.display());
    Ok(digest)
}

fn copy(from: &mut File, to: &mut impl Write) -> io::Result<Digest> {
    let mut sum = Sha256::new();
    let mut buffer = vec![0; 1024 * 1024];
    loop {
        let length = from.read(&mut buffer)?;
        if length == 0 {
            return Ok(Digest::finish(sum));
        }
        sum.update(&buffer[..length]);
        to.write_all(&buffer[..length])?;
    }
}

fn same(one: &Path, two: &Path) -> io::Result<bool> {
    let (mut one, mut two) = (File::open(one)?, File::open(two)?);
    let mut left = one.metadata()?.size();
    if left != two.metadata()?.size() {
        return Ok(false);
    }
    let (mut first, mut second) = (vec![0; 1024 * 1024], vec![0; 1024 * 1024]);
    while left > 0 {
        let length = first.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        one.read_exact(&mut first[..length])?;
        two.read_exact(&mut second[..length])?;
        if first[..length] != second[..length] {
            return Ok(false);
        }
        left -= length as u64;
    }
    Ok(true)
}
