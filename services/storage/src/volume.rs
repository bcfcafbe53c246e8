//! Volumes: disks of a workspace that outlive sandboxes, and who has them.
//!
//! Owns `volumes/` and `holds/`, and the lock over the index ([`crate::volume_index`]), which is read at the start. Refuses to
//! know what is in a volume: its file system is made before any guest has it and is the guest's from then on.
//!
//! A hold is one file per sandbox, so that a sandbox has all of its volumes or none. Its writer opens the file by its
//! group; a reader opens the same file, and there it is Firecracker that refuses writes: the drive was made read-only
//! with the machine (`is_read_only`), the file is opened for reading only, and a guest can change neither.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use nix::fcntl::OFlag;
use pandastack_bus::{
    SandboxId,
    quota::{Quota, Resource},
    storage::{VolumeInfo, VolumeUse},
};
use pandastack_daemon::{
    chain, files,
    quotas::{self, Quotas},
};

use crate::{
    bake::now_unix_ms,
    drive,
    error::{At, Result, StorageError},
    hold::{Answer, Hold},
    import::write_manifest,
    layout::{self, Layout},
    mkfs,
    place::{Place, children, clone_grown, create, open_regular, remove_tree, same_file},
    sandbox,
    volume_index::{Assigned, Index, Manifest, VERSION, Volume, check, check_name, key, read},
    volume_snapshot,
};

/// Largest volume, MiB.
pub const SIZE_LIMIT_MIB: u64 = 65536;

/// All volumes. Changes are short but for the making of a file system, so one lock is enough.
#[derive(Debug)]
pub struct Volumes {
    index: Mutex<Index>,
    pub(crate) quotas: Quotas,
}

impl Volumes {
    /// Reads all of them.
    ///
    /// # Errors
    /// A folder cannot be read. A volume whose manifest cannot be read stays and is logged.
    pub fn open(layout: &Layout) -> Result<Self> {
        let mut index = Index::default();
        for folder in children(&layout.volumes())? {
            let Some(id) = folder.file_name().and_then(|name| name.to_str()?.parse::<SandboxId>().ok())
            else {
                continue;
            };
            files::remove_leftovers(&folder).at(&folder)?;
            match read::<Manifest>(&folder.join(layout::MANIFEST)) {
                Ok(manifest) if manifest.version == VERSION => {
                    let key = (manifest.workspace.clone(), manifest.name.clone());
                    index.volumes.insert(key, Volume { id, manifest });
                }
                Ok(manifest) => tracing::error!(volume = %id, "unknown format {}", manifest.version),
                Err(error) => tracing::error!(volume = %id, "{}", chain(&error)),
            }
        }
        index.snapshots = volume_snapshot::read_all(layout)?;
        files::remove_leftovers(&layout.holds()).at(&layout.holds())?;
        for path in children(&layout.holds())? {
            let Some(sandbox) = path.file_stem().and_then(|name| name.to_str()?.parse::<SandboxId>().ok())
            else {
                continue;
            };
            match read::<Hold>(&path) {
                Ok(hold) => index.holds.insert(sandbox, hold),
                Err(error) => tracing::error!(%sandbox, "its volumes are not known: {}", chain(&error)),
            }
        }
        let quotas = Quotas::open(&layout.quotas()).at(&layout.quotas())?;
        Ok(Self { index: Mutex::new(index), quotas })
    }

    /// Makes one with an empty file system, durably.
    ///
    /// # Errors
    /// [`StorageError::Invalid`], [`StorageError::Exists`], [`StorageError::Refused`], [`StorageError::NoSpace`].
    pub fn create(&self, place: &Place, workspace: &str, name: &str, size_mib: u64) -> Result<VolumeInfo> {
        check(workspace, name, size_mib)?;
        self.make(place, workspace, name, size_mib, |path| {
            let file = create(path, 0o600)?;
            file.set_len(size_mib << 20).at(path)?;
            mkfs::ext4(path, name)?;
            Ok(file)
        })
    }

    /// Makes one that shares its blocks with `disk` and has at least its size, durably. What is in it is the guest's to grow.
    ///
    /// # Errors
    /// As [`Volumes::create`].
    pub fn clone_of(
        &self,
        place: &Place,
        disk: &Path,
        workspace: &str,
        name: &str,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        check_name(workspace, name)?;
        self.make(place, workspace, name, size_mib, |path| {
            clone_grown(&open_regular(disk)?, path, 0o600, size_mib << 20)
        })
    }

    /// Makes one of a file with these contents, durably.
    ///
    /// # Errors
    /// As [`Volumes::create`].
    pub(crate) fn make(
        &self,
        place: &Place,
        workspace: &str,
        name: &str,
        size_mib: u64,
        contents: impl FnOnce(&Path) -> Result<File>,
    ) -> Result<VolumeInfo> {
        let free = |index: &Index| {
            if index.volumes.contains_key(&key(workspace, name)) {
                Err(StorageError::Exists(format!("volume {name:?} is there already")))
            } else {
                index.admit(&self.quotas, workspace, 1, size_mib)
            }
        };
        free(&self.lock())?;
        place.admit_bytes(size_mib << 20)?;
        let staged = place.stage("volume")?;
        let path = staged.path().join(layout::DISK);
        let file = contents(&path)?;
        place.share(&path, drive::WRITABLE)?;
        file.sync_all().at(&path)?;
        let manifest = Manifest {
            version: VERSION,
            workspace: workspace.to_owned(),
            name: name.to_owned(),
            size_mib,
            created_unix_ms: now_unix_ms(),
        };
        write_manifest(staged.path(), &manifest)?;
        let id = SandboxId::random();
        let mut index = self.lock();
        // Somebody may have been faster.
        free(&index)?;
        staged.commit(&place.layout.volume(&id))?;
        index.volumes.insert(key(workspace, name), Volume { id, manifest });
        index.info(&place.layout, workspace, name)
    }

    /// The volumes of a workspace by name; of all workspaces for the empty name.
    pub fn list(&self, layout: &Layout, workspace: &str) -> Vec<VolumeInfo> {
        let index = self.lock();
        let wanted = index
            .volumes
            .values()
            .filter(|volume| workspace.is_empty() || volume.manifest.workspace == workspace);
        wanted.map(|volume| index.describe(layout, volume)).collect()
    }

    /// One of them.
    ///
    /// # Errors
    /// [`StorageError::NotFound`].
    pub fn info(&self, layout: &Layout, workspace: &str, name: &str) -> Result<VolumeInfo> {
        self.lock().info(layout, workspace, name)
    }

    /// Does something with the disk of a volume that no sandbox has, and gets none meanwhile; the second value is its size in
    /// MiB.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]; [`StorageError::WrongState`] while a sandbox has it; what the work answers.
    pub fn unused<T>(
        &self,
        place: &Place,
        workspace: &str,
        name: &str,
        work: impl FnOnce(&Path, u64) -> Result<T>,
    ) -> Result<T> {
        let index = self.lock();
        let volume = index.find(workspace, name)?;
        index.unused(volume)?;
        work(&place.layout.volume(&volume.id).join(layout::DISK), volume.manifest.size_mib)
    }

    /// Makes one vanish, durably, then makes room. Answers whether it was there.
    ///
    /// # Errors
    /// [`StorageError::WrongState`] while a sandbox has it; [`StorageError::Incomplete`]: it has vanished, but some of it
    /// still takes up space.
    pub fn delete(&self, place: &Place, workspace: &str, name: &str) -> Result<bool> {
        let trashed = {
            let mut index = self.lock();
            let Some(volume) = index.volumes.get(&key(workspace, name)) else { return Ok(false) };
            index.unused(volume)?;
            let trashed = place.discard(&place.layout.volume(&volume.id))?;
            index.volumes.remove(&key(workspace, name));
            trashed
        };
        let failures = trashed.map(|path| remove_tree(&path)).unwrap_or_default();
        if failures.is_empty() { Ok(true) } else { Err(StorageError::Incomplete(failures)) }
    }

    /// Makes one larger, durably; the file system in it is left to the guest.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]; [`StorageError::WrongState`] while a sandbox has it; [`StorageError::Invalid`] when it
    /// would shrink or be too large; [`StorageError::Refused`]; [`StorageError::NoSpace`].
    pub fn grow(&self, place: &Place, workspace: &str, name: &str, size_mib: u64) -> Result<VolumeInfo> {
        check(workspace, name, size_mib)?;
        let mut index = self.lock();
        let volume = index.find(workspace, name)?;
        index.unused(volume)?;
        let now = volume.manifest.size_mib;
        if size_mib < now {
            return Err(StorageError::Invalid(format!("volume {name:?} has {now} MiB and never shrinks")));
        }
        if size_mib > now {
            index.admit(&self.quotas, workspace, 0, size_mib - now)?;
            place.admit_bytes((size_mib - now) << 20)?;
            let folder = place.layout.volume(&volume.id);
            let path = folder.join(layout::DISK);
            let flags = OFlag::O_NOFOLLOW.bits();
            let file = OpenOptions::new().write(true).custom_flags(flags).open(&path).at(&path)?;
            file.set_len(size_mib << 20).at(&path)?;
            file.sync_all().at(&path)?;
            // Cut short here, the file is larger than it says, which is no harm.
            let manifest = Manifest { size_mib, ..volume.manifest.clone() };
            write_manifest(&folder, &manifest)?;
            if let Some(volume) = index.volumes.get_mut(&key(workspace, name)) {
                volume.manifest = manifest;
            }
        }
        index.info(&place.layout, workspace, name)
    }

    /// Records that a sandbox has these, durably, all or none.
    ///
    /// # Errors
    /// [`StorageError::Invalid`], [`StorageError::NotFound`]; [`StorageError::WrongState`] when somebody else has one of
    /// them, or the sandbox has others.
    pub fn hold(
        &self,
        place: &Place,
        sandbox: &SandboxId,
        workspace: &str,
        volumes: &[VolumeUse],
    ) -> Result<()> {
        drive::assign(volumes)?;
        let names: BTreeSet<_> = volumes.iter().map(|volume| &volume.name).collect();
        if names.len() < volumes.len() {
            return Err(StorageError::Invalid("a sandbox has a volume once".into()));
        }
        let mut index = self.lock();
        let held = volumes.iter().map(|volume| index.held(workspace, volume));
        let hold = Hold { volumes: held.collect::<Result<_>>()? };
        match index.holds.ask(sandbox, &hold) {
            Answer::Free if volumes.is_empty() => return Ok(()),
            Answer::Same => return Ok(()),
            Answer::Free => {}
            Answer::Others => {
                return Err(StorageError::WrongState(format!("sandbox {sandbox} has other volumes")));
            }
            Answer::Taken(taken) => {
                let taken = hold.volumes.iter().position(|held| held.volume == taken);
                let name = taken.map_or("", |at| volumes[at].name.as_str());
                return Err(StorageError::WrongState(format!("volume {name:?} is used by another sandbox")));
            }
        }
        let path = place.layout.hold(sandbox);
        let bytes = serde_json::to_vec(&hold).map_err(std::io::Error::from).at(&path)?;
        files::write_atomic(&path, &bytes, 0o600).at(&path).inspect_err(|_| {
            // It may be there all the same, and nobody was told.
            if let Err(error) = files::remove_durably(&path) {
                tracing::error!(%sandbox, "holds volumes without need: {error}");
            }
        })?;
        index.holds.insert(sandbox.clone(), hold);
        Ok(())
    }

    /// Records that a sandbox has none any more, durably.
    ///
    /// # Errors
    /// The record cannot be removed.
    pub fn drop_of(&self, place: &Place, sandbox: &SandboxId) -> Result<()> {
        let mut index = self.lock();
        let path = place.layout.hold(sandbox);
        files::remove_durably(&path).at(&path)?;
        index.holds.remove(sandbox);
        Ok(())
    }

    /// Puts volumes that `sandbox` has in the place of drives in the directory `id`, durably. The caller is alone with it.
    ///
    /// # Errors
    /// [`StorageError::NotFound`]; [`StorageError::WrongState`] when the sandbox does not have one of them so.
    pub fn insert(
        &self,
        place: &Place,
        id: &SandboxId,
        sandbox: &SandboxId,
        workspace: &str,
        volumes: &[VolumeUse],
    ) -> Result<()> {
        let folder = sandbox::existing(&place.layout, id)?;
        let index = self.lock();
        let disks = index.disks(&place.layout, sandbox, workspace, drive::assign(volumes)?)?;
        let staged = place.stage("volumes")?;
        for (disk, name) in disks {
            let target = folder.join(name);
            if !same_file(&disk, &target) {
                let link = staged.path().join(name);
                fs::hard_link(&disk, &link).at(&disk)?;
                fs::rename(&link, &target).at(&target)?;
            }
        }
        files::sync_dir(&folder).at(&folder)
    }

    /// The disks of volumes that `sandbox` has, each with the drive that it is.
    ///
    /// # Errors
    /// As [`Volumes::insert`].
    pub(crate) fn disks<'a>(
        &self,
        layout: &Layout,
        sandbox: &SandboxId,
        workspace: &str,
        volumes: impl IntoIterator<Item = Assigned<'a>>,
    ) -> Result<Vec<(PathBuf, &'static str)>> {
        self.lock().disks(layout, sandbox, workspace, volumes)
    }

    /// Sets how much a workspace may have, or takes the limit away (below 0), durably.
    ///
    /// # Errors
    /// [`StorageError::Refused`] has what is wrong.
    pub fn set_quota(&self, workspace: &str, resource: Resource, limit: i64) -> Result<()> {
        if !Resource::OF_STORAGE.contains(&resource) {
            return Err(StorageError::Invalid(format!("storage does not make {}", resource.as_str())));
        }
        self.quotas.set(workspace, resource, u64::try_from(limit).ok()).map_err(StorageError::Refused)
    }

    /// Limits and use of a workspace.
    pub fn quotas(&self, workspace: &str) -> Vec<Quota> {
        quotas::lines(&self.quotas.of(workspace), self.lock().used(workspace))
    }

    /// What there is. Taken for short times only.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
