//! The storage daemon without its bus: what there is, found out at the start, and verbs as blocking work in a task of
//! its own, one at a time for each sandbox and for each snapshot.
//!
//! It refuses to know why anybody wants a sandbox. How far a template is follows from what is on disk; only the
//! reason of a failure is held in memory, so that a restart tries again.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use nix::unistd::Gid;
use pandastack_bus::{
    self as bus, SandboxId,
    storage::{TemplateState, Verification},
};
use pandastack_daemon::chain;
use tokio::sync::broadcast;

use crate::{
    artefact::Artefacts,
    difference, drive,
    error::{At, Result, StorageError},
    gc,
    identity::{self, Digest},
    import,
    keyed::{Keyed, Turn},
    layout::{Layout, Sources},
    mac::Signer,
    own,
    place::{Place, children},
    progress::Entry,
    snapshot::Snapshots,
    template::{self, TemplateName},
    volume::Volumes,
};

/// Seconds after which a failed import is tried again.
const RETRY: Duration = Duration::from_secs(60);

/// How long the work that nobody waits for rests, in multiples of its own time: the unit may not lower its priority.
const REST: u32 = 3;

/// Where everything is and whose.
#[derive(Debug, Clone)]
pub struct Config {
    /// State directory on XFS.
    pub state: PathBuf,
    /// Directory on a tmpfs for the differences of captures.
    pub differences: PathBuf,
    /// What the image brings.
    pub sources: Sources,
    /// Group of what Firecracker and vmm may touch; `None` leaves our own.
    pub group: Option<Gid>,
}

/// The backend. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Manager {
    pub(crate) inner: Arc<Inner>,
}

/// What all verbs share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) place: Place,
    pub(crate) sources: Sources,
    pub(crate) artefacts: Artefacts,
    pub(crate) processor: Digest,
    pub(crate) catalogue: RwLock<BTreeMap<TemplateName, Arc<Entry>>>,
    /// Held while a template of a workspace's own appears, is published or goes.
    pub(crate) changing: Mutex<()>,
    pub(crate) changes: broadcast::Sender<(TemplateName, TemplateState)>,
    pub(crate) snapshots: Snapshots,
    pub(crate) volumes: Volumes,
    /// Who works on a sandbox directory. Taken before `making`.
    busy: Keyed<SandboxId>,
    /// Who makes or deletes a snapshot.
    making: Keyed<SandboxId>,
    /// Held while a snapshot is compared with its hash tree.
    checking: tokio::sync::Mutex<()>,
}

impl Manager {
    /// Opens the state directory: imports the artefacts, finds out how far each template is, removes what nobody
    /// needs. Blocking. Root disks are brought in later, by [`Manager::import_all`].
    ///
    /// # Errors
    /// The file system cannot share blocks, the image lacks Firecracker or a kernel, or the directory is not ours.
    pub fn open(config: Config) -> Result<Self> {
        let place = Place::open(Layout::new(&config.state, &config.differences), config.group)?;
        let artefacts = Artefacts::import(&place, &config.sources)?;
        let catalogue = template::read_catalogue(&config.sources.templates).unwrap_or_else(|error| {
            tracing::error!("{}: no templates: {error}", config.sources.templates.display());
            BTreeMap::new()
        });
        let mut catalogue: BTreeMap<_, _> =
            catalogue.into_iter().map(|(name, described)| (name, Arc::new(Entry::new(described)))).collect();
        let own =
            own::read_all(&place.layout)?.into_iter().map(|entry| (entry.name().clone(), Arc::new(entry)));
        catalogue.extend(own);
        for older in own::superseded(&catalogue) {
            tracing::info!(template = %older, "replaced, removed");
            catalogue.remove(&older);
            if let Err(error) = place.remove(&place.layout.template(&older)) {
                tracing::error!(template = %older, "{}", chain(&error));
            }
        }
        drive::make_zero(&place)?;
        let processor = identity::processor();
        let signer = Signer::open(&place.layout.manifest_key())?;
        let snapshots = Snapshots::open(&place.layout, signer, processor.clone())?;
        let volumes = Volumes::open(&place.layout)?;
        let inner = Inner {
            place,
            sources: config.sources,
            artefacts,
            processor,
            catalogue: RwLock::new(catalogue),
            changing: Mutex::default(),
            changes: broadcast::channel(64).0,
            snapshots,
            volumes,
            busy: Keyed::default(),
            making: Keyed::default(),
            checking: tokio::sync::Mutex::default(),
        };
        for entry in inner.entries() {
            let name = entry.name();
            let wanted = match entry.owner() {
                Some(_) => Ok(own::identity(name)),
                None => import::identity(&inner.sources, name),
            };
            match wanted {
                Ok(wanted) => inner.look(name, &entry, &wanted),
                Err(error) => entry.write().failure = Some(chain(&error)),
            }
        }
        inner.collect_garbage()?;
        difference::collect(&inner.place)?;
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

    /// Computes the hash trees that are missing, one after the other, for ever.
    pub async fn keep_hashed(&self) {
        loop {
            self.hash_missing().await;
            self.inner.snapshots.news().await;
        }
    }

    /// Computes the hash trees that are missing. One that fails is tried again after the next snapshot. Dropped, it ends
    /// soon.
    pub async fn hash_missing(&self) {
        for snapshot in self.inner.snapshots.unhashed(&self.inner.place.layout) {
            let id = snapshot.id().clone();
            let outcome =
                self.unhurried(move |inner, rest| inner.snapshots.hash(&inner.place.layout, &snapshot, rest));
            if let Err(error) = outcome.await {
                tracing::error!(snapshot = %id, "hash tree: {}", chain(&error));
            }
        }
    }

    /// Compares a snapshot with its hash tree; one after the other. Takes minutes. Dropped, it ends soon.
    ///
    /// # Errors
    /// See [`bus::storage::Storage`].
    pub(crate) async fn verify(&self, snapshot: &str) -> bus::Result<Verification> {
        let id = id_of(snapshot)?;
        let _turn = self.inner.checking.lock().await;
        let found = self.inner.snapshots.find(&id)?;
        let outcome =
            self.unhurried(move |inner, rest| inner.snapshots.verify(&inner.place.layout, &found, rest));
        outcome.await.map_err(|error| told(id.as_str(), "verify_snapshot", error))
    }

    /// Work in the background: whenever it calls what it is given, with what it took since then, it is made to rest. Answered
    /// `false`, it ends: nobody waits for it any more.
    async fn unhurried<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner, &mut dyn FnMut(Duration) -> bool) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        /// Says so to the thread that works.
        struct Ended(Arc<AtomicBool>);
        impl Drop for Ended {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let ended = Ended(Arc::default());
        let (inner, flag) = (Arc::clone(&self.inner), Arc::clone(&ended.0));
        blocking(move || {
            work(&inner, &mut |took| {
                std::thread::sleep(took * REST);
                !flag.load(Ordering::Relaxed)
            })
        })
        .await
    }

    /// Every change of a template's state from now on.
    pub fn changes(&self) -> broadcast::Receiver<(TemplateName, TemplateState)> {
        self.inner.changes.subscribe()
    }

    /// One line for `systemctl status`.
    pub fn summary(&self) -> String {
        let entries = self.inner.entries();
        let states = entries.iter().map(|entry| entry.read().state());
        let baked = states.filter(|state| *state == TemplateState::Baked).count();
        format!("{} templates, {baked} of them baked", entries.len())
    }

    /// Blocking work on one sandbox directory, alone with it, to its end even if nobody waits any more.
    pub(crate) async fn with<T: Send + 'static>(
        &self,
        id: &str,
        verb: &'static str,
        work: impl FnOnce(&Inner, &SandboxId) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let id = id_of(id)?;
        let turn = self.inner.busy.turn(&id).await;
        self.work(id, verb, [Some(turn), None], work).await
    }

    /// Blocking work on one snapshot, alone with it.
    pub(crate) async fn with_snapshot<T: Send + 'static>(
        &self,
        snapshot: &str,
        verb: &'static str,
        work: impl FnOnce(&Inner, &SandboxId) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let id = id_of(snapshot)?;
        let turn = self.inner.making.turn(&id).await;
        self.work(id, verb, [Some(turn), None], work).await
    }

    /// Blocking work on one sandbox directory that makes a snapshot, alone with both.
    pub(crate) async fn with_both<T: Send + 'static>(
        &self,
        id: &str,
        snapshot: &str,
        verb: &'static str,
        work: impl FnOnce(&Inner, &SandboxId) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let (id, snapshot) = (id_of(id)?, id_of(snapshot)?);
        let turns = [Some(self.inner.busy.turn(&id).await), Some(self.inner.making.turn(&snapshot).await)];
        self.work(id, verb, turns, work).await
    }

    /// Blocking work that has nobody to wait for.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        verb: &'static str,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let inner = Arc::clone(&self.inner);
        blocking(move || work(&inner)).await.map_err(|error| told("", verb, error))
    }

    async fn work<T: Send + 'static>(
        &self,
        id: SandboxId,
        verb: &'static str,
        turns: [Option<Turn<SandboxId>>; 2],
        work: impl FnOnce(&Inner, &SandboxId) -> Result<T> + Send + 'static,
    ) -> bus::Result<T> {
        let inner = Arc::clone(&self.inner);
        let job = id.clone();
        let outcome = blocking(move || {
            let _turns = turns;
            work(&inner, &job)
        });
        outcome.await.map_err(|error| told(id.as_str(), verb, error))
    }
}

/// An id that somebody else says.
///
/// # Errors
/// It has not the form of one.
pub(crate) fn id_of(text: &str) -> bus::Result<SandboxId> {
    text.parse().map_err(|error: bus::BadId| bus::Error::InvalidArgument(error.to_string()))
}

/// Logs a failure and says it in the words of the bus.
fn told(id: &str, verb: &str, error: StorageError) -> bus::Error {
    let text = chain(&error);
    match bus::Error::from(error) {
        fault @ bus::Error::Internal(_) => {
            tracing::error!(id, "{verb}: {text}");
            fault
        }
        refusal => {
            tracing::info!(id, "{verb} refused: {text}");
            refusal
        }
    }
}

impl Inner {
    fn collect_garbage(&self) -> Result<()> {
        let layout = &self.place.layout;
        let bakes = |template: PathBuf| -> Result<(PathBuf, Vec<PathBuf>)> {
            let name = template.file_name().and_then(|name| name.to_str()?.parse::<TemplateName>().ok());
            let bakes = name.map(|name| layout.bakes(&name)).filter(|bakes| bakes.is_dir());
            Ok((template, bakes.map_or_else(|| Ok(Vec::new()), |bakes| children(&bakes))?))
        };
        let entries = self.entries();
        // Without any that the image brings, its partition is missing: what is not ours to judge stays.
        let is_whole = entries.iter().any(|entry| entry.owner().is_none());
        let known = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            entries.iter().any(|entry| Some(entry.name().as_str()) == name)
        };
        // One of a workspace's own that cannot be read is told of, and stays.
        let judged = |path: &PathBuf| known(path) || (is_whole && !own::is_own(path));
        let found = gc::Found {
            templates: children(&layout.templates())?
                .into_iter()
                .filter(judged)
                .map(bakes)
                .collect::<Result<_>>()?,
            artefacts: children(&layout.artefacts())?,
        };
        let kept = |entry: &Arc<Entry>| {
            let name = entry.name();
            let progress = entry.read();
            let bake =
                progress.disk.as_ref().filter(|_| progress.baked).map(|disk| self.key(entry, disk).id());
            (name.clone(), bake)
        };
        let wanted = gc::Wanted {
            templates: entries.iter().map(kept).collect(),
            artefacts: self.artefacts.digests().into_iter().chain(self.snapshots.programs()).collect(),
        };
        let folders = [layout.sandboxes(), layout.snapshots(), layout.volumes(), layout.volume_snapshots()];
        let strays = folders.iter().map(|folder| children(folder)).collect::<Result<Vec<_>>>()?;
        let strays = strays.into_iter().flatten().filter(|path| {
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

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(StorageError::Task)?
}
