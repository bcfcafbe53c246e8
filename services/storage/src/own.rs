//! Templates of workspaces: made of a volume, hidden until they are published, found by owner and title.
//!
//! Owns: `own.json` of each of them, and which template a workspace means by a name. Refuses to know how a volume got its
//! contents: the host never looks into its file system. On disk such a template has its id for a name, so everything
//! else (fills, bakes, garbage) treats it as one that the image brought.
//!
//! ```text
//!   volume ──adopt──► hidden ──(baked by vmm)──publish──► seen by its workspace ──delete, or replaced──► gone
//!                        └──────────────────────delete──────────────────────────────────────────────────►
//! ```

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use pandastack_bus::{
    self as bus, SandboxId,
    storage::{TemplateInfo, TemplateSpec, TemplateState},
};
use pandastack_daemon::{chain, files};
use serde::{Deserialize, Serialize};

use crate::{
    bake::now_unix_ms,
    error::{At, Result, StorageError},
    identity::Digest,
    import,
    layout::{self, Layout},
    manager::Inner,
    place::{children, clone_file, exists, make_folder, remove_tree},
    progress::Entry,
    template::{self, Described, Template, TemplateName},
};

/// Templates that a workspace may have.
pub const LIMIT: usize = 32;
const VERSION: u32 = 1;
const RECORD_LIMIT: u64 = 1 << 20;

/// What is on disk about one of them, beside its disk and bakes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    version: u32,
    spec: TemplateSpec,
    disk_mib: u64,
    created_unix_ms: u64,
    /// 0 until its workspace sees it.
    published_unix_ms: u64,
}

/// Whose a template is, and whether its owner sees it.
#[derive(Debug)]
pub struct Owned {
    record: Record,
    /// Unix milliseconds; 0 until then. Of two that are published under one title, the later one is meant.
    published: AtomicU64,
}

impl Owned {
    /// Owner.
    pub fn workspace(&self) -> &str {
        &self.record.spec.workspace
    }

    /// What its owner calls it.
    pub fn title(&self) -> &str {
        &self.record.spec.title
    }

    /// When it was made, Unix milliseconds.
    pub fn created_unix_ms(&self) -> u64 {
        self.record.created_unix_ms
    }

    /// When its workspace saw it first, Unix milliseconds; 0: not yet.
    pub fn published(&self) -> u64 {
        self.published.load(Ordering::SeqCst)
    }

    fn is(&self, workspace: &str, title: &str) -> bool {
        self.workspace() == workspace && self.title() == title
    }
}

/// Identity of the disk of a template that a workspace made: an id is never used twice.
pub fn identity(name: &TemplateName) -> Digest {
    Digest::of_parts(&[b"own", name.as_str().as_bytes()])
}

/// Whether the directory of a template is that of a workspace's own.
pub fn is_own(folder: &Path) -> bool {
    exists(&folder.join(layout::OWN))
}

/// Reads all of them. One that cannot be read stays on disk and is logged.
///
/// # Errors
/// The directory of templates cannot be read.
pub fn read_all(layout: &Layout) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for folder in children(&layout.templates())? {
        let name = folder.file_name().and_then(|name| name.to_str()?.parse::<TemplateName>().ok());
        let Some(name) = name.filter(|_| is_own(&folder)) else { continue };
        match read(&folder, &name) {
            Ok(entry) => entries.push(entry),
            Err(error) => tracing::error!(template = %name, "left out of the catalogue: {}", chain(&error)),
        }
    }
    Ok(entries)
}

fn read(folder: &Path, name: &TemplateName) -> Result<Entry> {
    files::remove_leftovers(folder).at(folder)?;
    let path = folder.join(layout::OWN);
    let missing = || io::Error::from(io::ErrorKind::NotFound);
    let bytes =
        files::read_limited(&path, RECORD_LIMIT).and_then(|bytes| bytes.ok_or_else(missing)).at(&path)?;
    let record: Record = serde_json::from_slice(&bytes).map_err(io::Error::from).at(&path)?;
    if record.version != VERSION || record.spec.id != name.as_str() {
        return Err(StorageError::Invalid(format!("{} is not its description", path.display())));
    }
    entry(record)
}

/// The template that a record describes.
///
/// # Errors
/// [`StorageError::Invalid`].
fn entry(record: Record) -> Result<Entry> {
    let TemplateSpec { id, vcpus, memory_mib, env, workdir, .. } = record.spec.clone();
    let invalid = |error: &dyn std::fmt::Display| StorageError::Invalid(error.to_string());
    id.parse::<SandboxId>().map_err(|error| invalid(&error))?;
    record.spec.title.parse::<TemplateName>().map_err(|error| invalid(&error))?;
    if record.spec.workspace.is_empty() {
        return Err(StorageError::Invalid("a template of this kind belongs to a workspace".into()));
    }
    let template = Template {
        name: id.parse().map_err(|error| invalid(&error))?,
        aliases: Vec::new(),
        description: String::new(),
        category: "custom".into(),
        tools: Vec::new(),
        hidden: false,
        vcpus,
        memory_mib,
        disk_mib: record.disk_mib,
        env,
        workdir,
        warmup: String::new(),
    };
    template::check(&template).map_err(StorageError::Invalid)?;
    let text = serde_json::to_string(&(&record.spec, record.disk_mib)).map_err(|error| invalid(&error))?;
    let published = AtomicU64::new(record.published_unix_ms);
    Ok(Entry::owned(Described { template, text }, Owned { record, published }))
}

/// Of those that are published under one title only the latest stays: a replacement was cut short.
pub fn superseded(catalogue: &BTreeMap<TemplateName, Arc<Entry>>) -> Vec<TemplateName> {
    let mut latest: BTreeMap<(&str, &str), &Arc<Entry>> = BTreeMap::new();
    let mut older = Vec::new();
    for entry in catalogue.values() {
        let Some(owned) = entry.owner().filter(|owned| owned.published() > 0) else { continue };
        let key = (owned.workspace(), owned.title());
        let Some(other) = latest.insert(key, entry) else { continue };
        if other.owner().is_some_and(|other| other.published() > owned.published()) {
            latest.insert(key, other);
            older.push(entry.name().clone());
        } else {
            older.push(other.name().clone());
        }
    }
    older
}

impl Inner {
    /// The template that a workspace means by a name.
    ///
    /// # Errors
    /// [`StorageError::NotFound`].
    pub(crate) fn meant(&self, workspace: &str, name: &str) -> Result<TemplateInfo> {
        let own = self.published(workspace, name).into_iter().max_by_key(|(published, _)| *published);
        let found = own.map(|(_, entry)| entry).or_else(|| self.for_all(name));
        found.map(|entry| entry.info()).ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            StorageError::NotFound(format!("template {shown:?} not found"))
        })
    }

    /// The one for all of this name or alias that is not hidden.
    fn for_all(&self, name: &str) -> Option<Arc<Entry>> {
        self.find(name).ok().filter(|entry| entry.owner().is_none() && !entry.template().hidden)
    }

    /// Those that a workspace sees under a title: one, or two while the second takes the place of the first.
    fn published(&self, workspace: &str, title: &str) -> Vec<(u64, Arc<Entry>)> {
        let published = |entry: Arc<Entry>| {
            let owned = entry.owner().filter(|owned| owned.is(workspace, title))?;
            let when = owned.published();
            (when > 0).then_some((when, entry))
        };
        self.entries().into_iter().filter_map(published).collect()
    }

    /// Makes a template of a volume.
    ///
    /// # Errors
    /// See [`bus::storage::Storage`].
    pub(crate) fn adopt(&self, workspace: &str, volume: &str, spec: TemplateSpec) -> Result<TemplateInfo> {
        let _turn = self.changing();
        if let Some(there) = self.entries().into_iter().find(|entry| entry.name().as_str() == spec.id) {
            return match there.owner().is_some_and(|owned| owned.record.spec == spec) {
                true => Ok(there.info()),
                false => Err(StorageError::Exists("a template has this id".into())),
            };
        }
        self.room(&spec)?;
        // Its bake has all of its memory.
        self.place.admit_bytes(spec.memory_mib << 20)?;
        let (staged, record) = self.volumes.unused(&self.place, workspace, volume, |disk, size_mib| {
            let record = Record {
                version: VERSION,
                disk_mib: size_mib,
                spec,
                created_unix_ms: now_unix_ms(),
                published_unix_ms: 0,
            };
            let name = entry(record.clone())?.name().clone();
            let staged = self.place.stage("own")?;
            let folder = staged.path().join(layout::PRISTINE);
            make_folder(&folder, 0o700)?;
            let path = folder.join(layout::ROOT);
            clone_file(disk, &path, 0o400)?.sync_all().at(&path)?;
            import::write_identity(&folder, &identity(&name))?;
            write(staged.path(), &record)?;
            Ok((staged, record))
        })?;
        let entry = Arc::new(entry(record)?);
        let name = entry.name().clone();
        staged.commit(&self.place.layout.template(&name))?;
        self.insert(Arc::clone(&entry));
        self.look(&name, &entry, &identity(&name));
        tracing::info!(template = %name, "made of a volume");
        Ok(entry.info())
    }

    /// Whether a workspace may have one more template, of this title.
    fn room(&self, spec: &TemplateSpec) -> Result<()> {
        self.free_of_shipped(&spec.title)?;
        let others = |entry: &Arc<Entry>| {
            let owned = entry.owner().filter(|owned| owned.workspace() == spec.workspace)?;
            (owned.title() != spec.title).then(|| owned.title().to_owned())
        };
        let titles: std::collections::BTreeSet<_> = self.entries().iter().filter_map(others).collect();
        if titles.len() < LIMIT {
            return Ok(());
        }
        let sentence = format!("max templates reached: a workspace has at most {LIMIT}");
        Err(StorageError::Refused(bus::Error::Quota(sentence)))
    }

    fn free_of_shipped(&self, title: &str) -> Result<()> {
        match self.for_all(title) {
            Some(_) => Err(StorageError::Exists(format!("template {title:?} is one for all"))),
            None => Ok(()),
        }
    }

    /// Makes a template one that its workspace sees.
    ///
    /// # Errors
    /// See [`bus::storage::Storage`].
    pub(crate) fn publish(&self, id: &str, replace: bool) -> Result<()> {
        let _turn = self.changing();
        let entry = self.find(id)?;
        let owned =
            entry.owner().ok_or_else(|| StorageError::Invalid(format!("template {id} is for all")))?;
        let others = self.published(owned.workspace(), owned.title());
        let mut others: Vec<_> =
            others.into_iter().filter(|(_, other)| other.name() != entry.name()).collect();
        if owned.published() == 0 {
            if entry.read().state() != TemplateState::Baked {
                return Err(StorageError::WrongState(format!("template {id} is not baked")));
            }
            self.free_of_shipped(owned.title())?;
            if !others.is_empty() && !replace {
                return Err(StorageError::Exists("template already exists".into()));
            }
            // Later than all others, whatever the clock says.
            let last = others.iter().map(|(published, _)| *published).max().unwrap_or(0);
            let published_unix_ms = now_unix_ms().max(last + 1);
            let record = Record { published_unix_ms, ..owned.record.clone() };
            write(&self.place.layout.template(entry.name()), &record)?;
            owned.published.store(published_unix_ms, Ordering::SeqCst);
            self.tell(&entry);
        } else {
            others.retain(|(published, _)| *published < owned.published());
        }
        for (_, other) in others {
            if let Err(error) = self.drop_template(&other) {
                tracing::error!(template = %other.name(), "replaced, but not removed yet: {}", chain(&error));
            }
        }
        Ok(())
    }

    /// Deletes a template of this workspace's own. Answers whether it was there.
    ///
    /// # Errors
    /// It could not be removed, or not all of it.
    pub(crate) fn delete_own(&self, workspace: &str, id: &str) -> Result<bool> {
        let _turn = self.changing();
        let Ok(entry) = self.find(id) else { return Ok(false) };
        if entry.owner().is_none_or(|owned| owned.workspace() != workspace) {
            return Ok(false);
        }
        self.drop_template(&entry).map(|()| true)
    }

    fn drop_template(&self, entry: &Entry) -> Result<()> {
        let trashed = {
            // No fill links from it while it goes.
            let mut progress = entry.write();
            let trashed = self.place.discard(&self.place.layout.template(entry.name()))?;
            progress.disk = None;
            progress.baked = false;
            progress.failure = Some("it was deleted".into());
            trashed
        };
        self.forget(entry.name());
        self.tell(entry);
        tracing::info!(template = %entry.name(), "deleted");
        let failures = trashed.map(|path| remove_tree(&path)).unwrap_or_default();
        if failures.is_empty() { Ok(()) } else { Err(StorageError::Incomplete(failures)) }
    }
}

fn write(folder: &Path, record: &Record) -> Result<()> {
    let path = folder.join(layout::OWN);
    let bytes = serde_json::to_vec(record).map_err(io::Error::from).at(&path)?;
    files::write_atomic(&path, &bytes, 0o600).at(&path)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record(number: usize, workspace: &str, title: &str, published_unix_ms: u64) -> Record {
        let spec = TemplateSpec {
            id: format!("{number:020}"),
            workspace: workspace.into(),
            title: title.into(),
            vcpus: 1,
            memory_mib: 128,
            env: BTreeMap::new(),
            workdir: "/".into(),
        };
        Record { version: VERSION, spec, disk_mib: 64, created_unix_ms: 1, published_unix_ms }
    }

    #[test]
    fn what_cannot_be_a_template_is_refused() {
        assert!(entry(record(1, "w", "mine", 0)).is_ok());
        for wrong in [
            record(1, "", "mine", 0),
            record(1, "w", "..", 0),
            record(1, "w", "a/b", 0),
            Record { disk_mib: 0, ..record(1, "w", "mine", 0) },
            Record {
                spec: TemplateSpec { id: "..".into(), ..record(1, "w", "m", 0).spec },
                ..record(1, "w", "m", 0)
            },
            Record {
                spec: TemplateSpec { workdir: "x".into(), ..record(1, "w", "m", 0).spec },
                ..record(1, "w", "m", 0)
            },
            Record {
                spec: TemplateSpec { vcpus: 33, ..record(1, "w", "m", 0).spec },
                ..record(1, "w", "m", 0)
            },
        ] {
            assert!(entry(wrong.clone()).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn of_each_title_the_latest_stays(all in prop::collection::vec((0..2_usize, 0..2_usize, 0..4_u64), 0..10)) {
            let entries: BTreeMap<_, _> = all
                .iter()
                .enumerate()
                .map(|(number, (workspace, title, published))| {
                    let made = record(number, ["v", "w"][*workspace], ["a", "b"][*title], *published);
                    let made = entry(made).unwrap();
                    (made.name().clone(), Arc::new(made))
                })
                .collect();
            let older = superseded(&entries);
            for (workspace, title) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let same: Vec<_> = all
                    .iter()
                    .enumerate()
                    .filter(|(_, one)| (one.0, one.1) == (workspace, title) && one.2 > 0)
                    .map(|(number, one)| (one.2, format!("{number:020}").parse::<TemplateName>().unwrap()))
                    .collect();
                let stays: Vec<_> = same.iter().filter(|(_, name)| !older.contains(name)).collect();
                prop_assert_eq!(stays.len(), usize::from(!same.is_empty()));
                prop_assert_eq!(stays.first().map(|one| one.0), same.iter().map(|one| one.0).max());
            }
            prop_assert!(older.iter().all(|name| entries[name].owner().is_some_and(|owned| owned.published() > 0)));
        }
    }
}
