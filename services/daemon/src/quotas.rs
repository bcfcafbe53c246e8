//! Quotas of workspaces that survive a power cut: one JSON file per workspace, read at the start.
//!
//! Owns: `<dir>/<workspace>.json`, and whether more of something fits. Refuses to know: how anything is made or counted.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError, RwLock},
};

use pandastack_bus::{
    Error, Result,
    quota::{Quota, Resource},
};

use crate::{chain, files};

const FILE_LIMIT: u64 = 64 * 1024;
const MODE: u32 = 0o600;
/// Longest name of a workspace, bytes.
const NAME_LIMIT: usize = 64;

/// What a workspace may have; what is not named has no limit.
pub type Limits = BTreeMap<Resource, u64>;

/// The limits of all workspaces. Calls may come from many threads.
#[derive(Debug)]
pub struct Quotas {
    directory: PathBuf,
    limits: RwLock<HashMap<String, Limits>>,
    /// Held while a file changes.
    turn: Mutex<()>,
}

impl Quotas {
    /// Reads all of them, and makes the directory if need be. A file that is none is logged and left alone.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        if let Some(parent) = directory.parent() {
            files::sync_dir(parent)?;
        }
        files::remove_leftovers(directory)?;
        let mut limits = HashMap::new();
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let Some(workspace) = path.file_name().and_then(|name| name.to_str()?.strip_suffix(".json"))
            else {
                continue;
            };
            match read(&path) {
                Ok(found) => drop(limits.insert(workspace.to_owned(), found)),
                Err(error) => {
                    tracing::error!("{}: the workspace has no limits: {}", path.display(), chain(&error));
                }
            }
        }
        Ok(Self { directory: directory.to_owned(), limits: RwLock::new(limits), turn: Mutex::default() })
    }

    /// What a workspace may have.
    pub fn of(&self, workspace: &str) -> Limits {
        let limits = self.limits.read().unwrap_or_else(PoisonError::into_inner);
        limits.get(workspace).cloned().unwrap_or_default()
    }

    /// Sets one limit, or takes it away, durably. What is there already stays. Blocking.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for what cannot be the name of a workspace; [`Error::NoSpace`]; [`Error::Internal`]:
    /// nothing changed, or it is not known whether the change survives a power cut.
    pub fn set(&self, workspace: &str, resource: Resource, limit: Option<u64>) -> Result<()> {
        if !is_name(workspace) {
            return Err(Error::InvalidArgument("this is not the name of a workspace".into()));
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut limits = self.of(workspace);
        match limit {
            Some(limit) => limits.insert(resource, limit),
            None => limits.remove(&resource),
        };
        let path = self.directory.join(format!("{workspace}.json"));
        let written = match limits.is_empty() {
            true => files::remove_durably(&path).map(drop),
            false => serde_json::to_vec(&limits)
                .map_err(io::Error::from)
                .and_then(|bytes| files::write_atomic(&path, &bytes, MODE)),
        };
        written.map_err(|error| match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Error::NoSpace("no space is left for the quota".into())
            }
            _ => Error::Internal(format!("{}: {error}", path.display())),
        })?;
        self.limits.write().unwrap_or_else(PoisonError::into_inner).insert(workspace.to_owned(), limits);
        Ok(())
    }
}

/// Whether a workspace that has `used` may get `more`.
///
/// # Errors
/// [`Error::Quota`] when it may once something is deleted; [`Error::BeyondQuota`] when it never may.
pub fn admit(limits: &Limits, resource: Resource, used: u64, more: u64) -> Result<()> {
    let most = match limits.get(&resource) {
        Some(most) if more > 0 && used.saturating_add(more) > *most => *most,
        _ => return Ok(()),
    };
    let what = match resource {
        Resource::Sandboxes => "sandboxes",
        Resource::Vcpus => "vCPUs",
        Resource::MemoryMib => "MiB of memory",
        Resource::DiskMib => "MiB of disk",
        Resource::Snapshots => "snapshots",
        Resource::Volumes => "volumes",
        Resource::VolumeMib => "MiB of volumes",
    };
    Err(match more > most {
        true => {
            Error::BeyondQuota(format!("quota: the workspace may have {most} {what}, and this takes {more}"))
        }
        false => Error::Quota(format!("max {what} reached: the workspace may have {most}, and has {used}")),
    })
}

/// The lines of a workspace: limit and use of each of these.
pub fn lines(limits: &Limits, used: impl IntoIterator<Item = (Resource, u64)>) -> Vec<Quota> {
    let line = |(resource, used)| Quota::new(resource, limits.get(&resource).copied(), used);
    used.into_iter().map(line).collect()
}

fn is_name(text: &str) -> bool {
    (1..=NAME_LIMIT).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
}

fn read(path: &Path) -> io::Result<Limits> {
    let bytes = files::read_limited(path, FILE_LIMIT)?.ok_or(io::ErrorKind::NotFound)?;
    Ok(serde_json::from_slice(&bytes)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_limit_survives_and_goes() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path().join("quotas");
        let quotas = Quotas::open(&at).unwrap();
        quotas.set("acme", Resource::Sandboxes, Some(3)).unwrap();
        quotas.set("acme", Resource::MemoryMib, Some(1024)).unwrap();
        for workspace in ["", "../x", "A", "a/b", ".", &"a".repeat(65)] {
            assert!(matches!(
                quotas.set(workspace, Resource::Vcpus, Some(1)),
                Err(Error::InvalidArgument(_))
            ));
        }
        fs::write(at.join("bad.json"), "{").unwrap();

        let again = Quotas::open(&at).unwrap();

        assert_eq!(again.of("acme"), [(Resource::Sandboxes, 3), (Resource::MemoryMib, 1024)].into());
        assert_eq!((again.of("bad"), again.of("other")), (Limits::new(), Limits::new()));
        again.set("acme", Resource::Sandboxes, None).unwrap();
        again.set("acme", Resource::MemoryMib, None).unwrap();
        again.set("acme", Resource::Vcpus, None).unwrap();
        assert!(!at.join("acme.json").exists());
        assert_eq!(Quotas::open(&at).unwrap().of("acme"), Limits::new());
    }

    #[test]
    fn a_sentence_says_what_is_full() {
        let limits: Limits = [(Resource::Sandboxes, 3)].into();
        let refused = |used, more| admit(&limits, Resource::Sandboxes, used, more).unwrap_err();
        assert_eq!(
            refused(3, 1),
            Error::Quota("max sandboxes reached: the workspace may have 3, and has 3".into())
        );
        let never = "quota: the workspace may have 3 sandboxes, and this takes 4";
        assert_eq!(refused(0, 4), Error::BeyondQuota(never.into()));
    }

    proptest! {
        #[test]
        fn what_is_admitted_fits_and_what_never_fits_is_told_apart(most in any::<u64>(), used in any::<u64>(), more in 1..u64::MAX) {
            let limits: Limits = [(Resource::Vcpus, most)].into();
            prop_assert_eq!(admit(&limits, Resource::Snapshots, used, more), Ok(()));
            match admit(&limits, Resource::Vcpus, used, more) {
                Ok(()) => prop_assert!(used.checked_add(more).is_some_and(|sum| sum <= most) || most == u64::MAX),
                Err(Error::Quota(_)) => prop_assert_eq!(admit(&limits, Resource::Vcpus, 0, more), Ok(())),
                Err(error) => prop_assert!(matches!(error, Error::BeyondQuota(_)) && more > most),
            }
        }
    }
}
