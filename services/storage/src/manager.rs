//! The storage daemon without its bus: which templates there are and how far each is, and every verb of
//! [`StorageBackend`] as blocking work in a task of its own, one at a time for each sandbox.
//!
//! It refuses to know why anybody wants a sandbox. How far a template is follows from what is on disk; only the
//! reason of a failure is held in memory, so that a restart tries again.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc, time::Duration};

use nix::unistd::Gid;
use pandastack_bus::{self as bus, SandboxId, storage::*};
use pandastack_daemon::chain;
use tokio::sync::broadcast;

use crate::{
    artefact::Artefacts,
    bake::{self, Key},
    error::{At, Result, StorageError},
    gc,
    identity::{self, Digest},
    import,
    keyed::Keyed,
    layout::{self, Sources},
    place::{Place, children},
    progress::{Entry, Progress, state_name},
    sandbox::{self, Content, DISK_LIMIT_MIB},
    template::{self, Template, TemplateName},
};

/// Seconds after which a failed import is tried again.
const RETRY: Duration = Duration::from_secs(60);
/// Longest reason of a failure that is kept, characters.
const REASON_LIMIT: usize = 1000;

/// Where everything is and whose.
#[derive(Debug, Clone)]
pub struct Config {
    /// State directory on XFS.
    pub state: PathBuf,
    /// What the image brings.
    pub sources: Sources,
    /// Group of what Firecracker and vmm may touch; `None` leaves our own.
    pub group: Option<Gid>,
}

/// The backend. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Manager {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    place: Place,
    sources: Sources,
    artefacts: Artefacts,
    processor: Digest,
    catalogue: BTreeMap<TemplateName, Entry>,
    changes: broadcast::Sender<(TemplateName, TemplateState)>,
    busy: Keyed<SandboxId>,
}

impl Manager {
    /// Opens the state directory: imports the artefacts, finds out how far each template is, removes what nobody
    /// needs. Blocking. Root disks are brought in later, by [`Manager::import_all`].
    ///
    /// # Errors
    /// The file system cannot share blocks, the image lacks Firecracker or a kernel, or the directory is not ours.
    pub fn open(config: Config) -> Result<Self> {
        let place = Place::open(&config.state, config.group)?;
        let artefacts = Artefacts::import(&place, &config.sources)?;
        let catalogue = template::read_catalogue(&config.sources.templates).unwrap_or_else(|error| {
            tracing::error!("{}: no templates: {error}", config.sources.templates.display());
            BTreeMap::new()
        });
        let catalogue =
            catalogue.into_iter().map(|(name, described)| (name, Entry::new(described))).collect();
        let inner = Inner {
            place,
            sources: config.sources,
            artefacts,
            processor: identity::processor(),
            catalogue,
            changes: broadcast::channel(64).0,
            busy: Keyed::default(),
        };
        for (name, entry) in &inner.catalogue {
            match import::identity(&inner.sources, name) {
                Ok(wanted) => inner.look(name, entry, &wanted),
                Err(error) => entry.write().failure = Some(chain(&error)),
            }
        }
        inner.collect_garbage()?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Brings in every root disk that is not there, one after the other; a failed one is tried again after a minute,
    /// for as long as it takes.
    pub async fn import_all(&self) {
        loop {
            let inner = Arc::clone(&self.inner);
            match blocking(move || Ok(inner.import_missing())).await {
                Ok(0) => return,
                Ok(failed) => tracing::warn!("{failed} templates could not be imported; tried again soon"),
                Err(error) => tracing::error!("import: {}", chain(&error)),
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Every change of a template's state from now on.
    pub fn changes(&self) -> broadcast::Receiver<(TemplateName, TemplateState)> {
        self.inner.changes.subscribe()
    }

    /// One line for `systemctl status`.
    pub fn summary(&self) -> String {
        let states = self.inner.catalogue.values().map(|entry| entry.read().state());
        let baked = states.filter(|state| *state == TemplateState::Baked).count();
        format!("{} templates, {baked} of them baked", self.inner.catalogue.len())
    }

    /// Blocking work that concerns one sandbox, alone with it, to its end even if nobody waits any more.
    async fn with<T: Send + 'static>(
        &self,
        id: &str,
        verb: &'static str,
        work: impl FnOnce(&Inner, &SandboxId) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let id: SandboxId =
            id.parse().map_err(|error: bus::BadId| bus::Error::InvalidArgument(error.to_string()))?;
        let turn = self.inner.busy.turn(&id).await;
        let inner = Arc::clone(&self.inner);
        let job = id.clone();
        let outcome = blocking(move || {
            let _turn = turn;
            work(&inner, &job)
        });
        outcome.await.map_err(|error| {
            let text = chain(&error);
            match bus::Error::from(error) {
                fault @ bus::Error::Internal(_) => {
                    tracing::error!(sandbox = %id, "{verb}: {text}");
                    fault
                }
                refusal => {
                    tracing::info!(sandbox = %id, "{verb} refused: {text}");
                    refusal
                }
            }
        })
    }

    /// Blocking work that concerns no sandbox.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let inner = Arc::clone(&self.inner);
        blocking(move || work(&inner)).await.map_err(|error| {
            tracing::error!("{}", chain(&error));
            error.into()
        })
    }
}

impl StorageBackend for Manager {
    async fn templates(&self) -> bus::Result<Vec<TemplateInfo>> {
        Ok(self.inner.catalogue.values().map(Entry::info).collect())
    }

    async fn template(&self, name: String) -> bus::Result<TemplateInfo> {
        Ok(self.inner.find(&name)?.info())
    }

    async fn prepare(&self, id: String) -> bus::Result<bool> {
        self.with(&id, "prepare", |inner, id| sandbox::prepare(&inner.place, id, &inner.artefacts)).await
    }

    async fn fill(&self, id: String, template: String, fill: Fill, disk_mib: u64) -> bus::Result<()> {
        self.with(&id, "fill", move |inner, id| inner.fill(id, &template, fill, disk_mib)).await
    }

    async fn ensure_kernel(&self, id: String) -> bus::Result<()> {
        self.with(&id, "ensure_kernel", |inner, id| {
            sandbox::ensure_kernel(&inner.place, id, &inner.artefacts)
        })
        .await
    }

    async fn prepare_capture(&self, id: String) -> bus::Result<()> {
        self.with(&id, "prepare_capture", |inner, id| sandbox::prepare_capture(&inner.place, id)).await
    }

    async fn seal_template(&self, id: String, template: String) -> bus::Result<()> {
        self.with(&id, "seal_template", move |inner, id| inner.seal(id, &template)).await
    }

    async fn fail_template(&self, template: String, reason: String) -> bus::Result<()> {
        let entry = self.inner.find(&template)?;
        let reason: String = reason.chars().take(REASON_LIMIT).collect();
        tracing::error!(template = %entry.name(), "could not be baked: {reason}");
        self.inner.change(entry, |progress| progress.failure = Some(reason));
        Ok(())
    }

    async fn release(&self, id: String) -> bus::Result<bool> {
        self.with(&id, "release", |inner, id| inner.place.remove(&inner.place.layout.sandbox(id))).await
    }

    async fn owners(&self) -> bus::Result<Vec<Owner>> {
        self.run(|inner| sandbox::owners(&inner.place.layout)).await
    }

    async fn usage(&self) -> bus::Result<Usage> {
        self.run(|inner| inner.place.usage()).await
    }
}

impl Inner {
    fn find(&self, name: &str) -> Result<&Entry> {
        let by_alias = |entry: &&Entry| entry.template().aliases.iter().any(|alias| alias.as_str() == name);
        let by_name = name.parse().ok().and_then(|name: TemplateName| self.catalogue.get(&name));
        by_name.or_else(|| self.catalogue.values().find(by_alias)).ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            StorageError::NotFound(format!("template {shown:?} not found"))
        })
    }

    fn key(&self, entry: &Entry, disk: &Digest) -> Key {
        Key::new(&self.artefacts, disk, &entry.described.text, &self.processor)
    }

    /// Finds out what is on disk for a template whose disk has the identity `wanted`.
    fn look(&self, name: &TemplateName, entry: &Entry, wanted: &Digest) {
        let layout = &self.place.layout;
        let disk = import::imported(layout, name).filter(|found| found == wanted);
        let key = self.key(entry, wanted);
        let baked = disk.is_some() && bake::present(layout, name, &key);
        let bake = if baked { import::blocks(&layout.bake(name, &key.id())) } else { 0 };
        let size_bytes = import::blocks(&layout.disk(name)) + bake;
        self.change(entry, |progress| *progress = Progress { disk, baked, failure: None, size_bytes });
    }

    fn change(&self, entry: &Entry, change: impl FnOnce(&mut Progress)) {
        let mut progress = entry.write();
        let before = progress.state();
        change(&mut progress);
        let after = progress.state();
        drop(progress);
        if before != after {
            tracing::info!(template = %entry.name(), "{}", state_name(after));
            // Without a listener nobody wants to know.
            let _ = self.changes.send((entry.name().clone(), after));
        }
    }

    /// Answers how many failed.
    fn import_missing(&self) -> usize {
        let missing = self.catalogue.values().filter(|entry| entry.read().disk.is_none());
        let import = |entry: &&Entry| {
            let name = entry.name();
            let outcome = import::identity(&self.sources, name).and_then(|wanted| {
                import::import(&self.place, &self.sources, entry.template(), &wanted)?;
                self.look(name, entry, &wanted);
                Ok(())
            });
            if let Err(error) = &outcome {
                let reason = chain(error);
                tracing::error!(template = %name, "could not be imported: {reason}");
                self.change(entry, |progress| progress.failure = Some(reason));
            }
            outcome.is_err()
        };
        missing.filter(import).count()
    }

    fn fill(&self, id: &SandboxId, template: &str, fill: Fill, disk_mib: u64) -> Result<()> {
        let entry = self.find(template)?;
        let Template { name, disk_mib: least, .. } = entry.template();
        let disk_mib = if disk_mib == 0 { *least } else { disk_mib };
        if !(*least..=DISK_LIMIT_MIB).contains(&disk_mib) {
            let most = DISK_LIMIT_MIB;
            return Err(StorageError::Invalid(format!(
                "a disk of template {name} has {least} to {most} MiB"
            )));
        }
        let progress = entry.read();
        let disk = match (&progress.disk, fill, progress.state()) {
            (Some(disk), Fill::Pristine, _) | (Some(disk), Fill::Baked, TemplateState::Baked) => disk,
            (_, _, TemplateState::Failed) => {
                let reason = progress.failure.as_deref().unwrap_or_default();
                return Err(StorageError::WrongState(format!("template {name} cannot be used: {reason}")));
            }
            (None, ..) => {
                return Err(StorageError::NotReady(format!("template {name} is still being imported")));
            }
            _ => return Err(StorageError::NotReady(format!("template {name} is not baked yet"))),
        };
        let (layout, key) = (&self.place.layout, self.key(entry, disk));
        let (folder, links, kind) = match fill {
            Fill::Baked => {
                let bake = layout.bake(name, &key.id());
                let links = [layout::MEM, layout::STATE].map(|file| (bake.join(file), file)).to_vec();
                (bake, links, "baked")
            }
            Fill::Pristine => {
                let [_, (kernel, kernel_name), (initrd, initrd_name)] = self.artefacts.named();
                let links =
                    vec![(layout.artefact(kernel), kernel_name), (layout.artefact(initrd), initrd_name)];
                (layout.disk(name), links, "pristine")
            }
        };
        let record = record(kind, name, &key, disk_mib);
        let content = Content { disk: folder.join(layout::ROOT), disk_bytes: disk_mib << 20, links, record };
        sandbox::fill(&self.place, id, &self.artefacts, &content)?;
        Ok(())
    }

    fn seal(&self, id: &SandboxId, template: &str) -> Result<()> {
        let entry = self.find(template)?;
        let name = entry.name();
        let folder = sandbox::existing(&self.place.layout, id)?;
        let disk = entry.read().disk.clone();
        let disk =
            disk.ok_or_else(|| StorageError::NotReady(format!("template {name} is still being imported")))?;
        let key = self.key(entry, &disk);
        let expected = record("pristine", name, &key, entry.template().disk_mib);
        if sandbox::filled(&folder)?.as_ref() != Some(&expected) {
            return Err(StorageError::WrongState(format!(
                "sandbox {id} was not booted from template {name} as it is now"
            )));
        }
        let staged = bake::collect(&self.place, &folder, &key)?;
        let changed = {
            // No fill links from the bake while it is replaced.
            let _alone = entry.write();
            bake::publish(&self.place, name, &key, staged)?
        };
        self.look(name, entry, &disk);
        tracing::info!(sandbox = %id, template = %name, changed, "sealed as bake {}", key.id().as_str());
        Ok(())
    }

    fn collect_garbage(&self) -> Result<()> {
        let layout = &self.place.layout;
        let bakes = |template: PathBuf| -> Result<(PathBuf, Vec<PathBuf>)> {
            let name = template.file_name().and_then(|name| name.to_str()?.parse::<TemplateName>().ok());
            let bakes = name.map(|name| layout.bakes(&name)).filter(|bakes| bakes.is_dir());
            Ok((template, bakes.map_or_else(|| Ok(Vec::new()), |bakes| children(&bakes))?))
        };
        let found = gc::Found {
            templates: children(&layout.templates())?.into_iter().map(bakes).collect::<Result<_>>()?,
            artefacts: children(&layout.artefacts())?,
        };
        let kept = |(name, entry): (&TemplateName, &Entry)| {
            let progress = entry.read();
            let bake =
                progress.disk.as_ref().filter(|_| progress.baked).map(|disk| self.key(entry, disk).id());
            (name.clone(), bake)
        };
        let wanted = gc::Wanted {
            templates: self.catalogue.iter().map(kept).collect(),
            artefacts: self.artefacts.digests(),
        };
        let strays = children(&layout.sandboxes())?.into_iter().filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_none_or(|name| name.parse::<SandboxId>().is_err())
        });
        for path in gc::plan(&found, &wanted).into_iter().chain(strays) {
            tracing::info!("{}: no longer needed, removed", path.display());
            // Garbage that stays is no reason not to start.
            if let Err(error) = self.place.remove(&path) {
                tracing::error!("{}", chain(&error));
            }
        }
        pandastack_daemon::files::remove_leftovers(&layout.artefacts()).at(&layout.artefacts())?;
        Ok(())
    }
}

fn record(kind: &str, name: &TemplateName, key: &Key, disk_mib: u64) -> String {
    format!("{kind} {name} {} {disk_mib}", key.id().as_str())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(StorageError::Task)?
}
