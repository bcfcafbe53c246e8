//! All builds: their records on disk, a copy in memory, who waits for a change of them.
//!
//! Owns: `records/`, `spool/` and `logs/` below the daemon's `builds/`; how many builds a workspace may have. Records change
//! on disk first, then in memory.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pandastack_daemon::records::{Records, RecordsError};
use tokio::sync::{Notify, watch};

use super::{
    Workshop,
    record::{Build, Event, Stage},
    registry::Registry,
    spool::{self, Spool},
};
use crate::tenancy::now_ms;

/// Builds of a workspace that wait or run.
pub const OPEN_PER_WORKSPACE: usize = 4;
/// Those of all workspaces.
pub const OPEN: usize = 64;
/// Builds of a workspace that are over and still told of.
pub const KEPT: usize = 20;

/// Why a build was not taken.
#[derive(Debug, thiserror::Error)]
pub enum BuildsError {
    /// Ask again when one of them is over.
    #[error("max builds reached: {OPEN_PER_WORKSPACE} of this workspace wait or run already")]
    TooMany,
    /// Ask again later.
    #[error("too many builds wait already")]
    Full,
    /// The disk did not take it.
    #[error("the records of builds cannot be changed")]
    Records(#[from] RecordsError),
}

/// All builds.
#[derive(Debug)]
pub struct Builds {
    records: Arc<Records<Build>>,
    memory: Mutex<Memory>,
    changes: tokio::sync::Mutex<()>,
    changed: watch::Sender<u64>,
    /// There is something to do.
    pub work: Notify,
    /// What was uploaded.
    pub spool: Spool,
    logs: PathBuf,
    /// Where images may come from.
    pub registries: Vec<Registry>,
    /// Where builds happen.
    pub workshop: Workshop,
}

#[derive(Debug, Default)]
struct Memory {
    builds: BTreeMap<String, Build>,
    /// Uploads under way, by workspace.
    incoming: HashMap<String, usize>,
}

/// A place for a build whose upload is under way.
#[derive(Debug)]
pub struct Place {
    builds: Arc<Builds>,
    workspace: String,
}

impl Builds {
    /// Opens the records below `directory`; what no build needs is removed. Those that a restart interrupted wait again, or
    /// are given up. Blocking.
    ///
    /// # Errors
    /// They cannot be opened.
    pub fn open(
        directory: &Path,
        registries: Vec<Registry>,
        workshop: Workshop,
    ) -> Result<Arc<Self>, RecordsError> {
        let records: Records<Build> = Records::open(&directory.join("records"))?;
        let (uploads, logs) = (directory.join("spool"), directory.join("logs"));
        let mut builds: BTreeMap<String, Build> = records.iter()?.into_iter().collect();
        for build in builds.values_mut() {
            let Some(next) = build.stage.on(Event::Restart(build.attempts)) else { continue };
            build.stage = next;
            if next == Stage::Failing {
                build.error = "interrupted by a restart of the appliance's API, more than once".into();
                build.ended_unix_ms = now_ms();
            }
            records.put(&build.id, build)?;
        }
        let spool = Spool::new(&uploads);
        let prepare = || -> io::Result<()> {
            for folder in [&uploads, &logs] {
                std::fs::create_dir_all(folder)?;
            }
            spool.sweep(|id| builds.get(id).is_some_and(|build| build.stage.needs_upload()))?;
            spool::sweep(&logs, |id| builds.contains_key(id))
        };
        prepare().map_err(|source| RecordsError::Io { path: directory.to_owned(), source })?;
        Ok(Arc::new(Self {
            records: Arc::new(records),
            memory: Mutex::new(Memory { builds, incoming: HashMap::new() }),
            changes: tokio::sync::Mutex::new(()),
            changed: watch::Sender::new(0),
            work: Notify::new(),
            spool,
            logs,
            registries,
            workshop,
        }))
    }

    /// See [`Records::is_poisoned`].
    pub fn is_poisoned(&self) -> bool {
        self.records.is_poisoned()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log of a build.
    pub fn log(&self, id: &str) -> PathBuf {
        self.logs.join(format!("{id}.log"))
    }

    /// Counts changes of builds and their logs.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// A log grew.
    pub fn grew(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    /// A build of this workspace.
    pub fn get(&self, workspace: &str, id: &str) -> Option<Build> {
        self.memory().builds.get(id).filter(|build| build.workspace == workspace).cloned()
    }

    /// Whether the owner of a build does not want it any more, or it is gone.
    pub fn is_cancelled(&self, id: &str) -> bool {
        self.memory().builds.get(id).is_none_or(|build| build.cancelled)
    }

    /// The builds of a workspace, the newest first; of all for the empty name.
    pub fn list(&self, workspace: &str) -> Vec<Build> {
        let mut found: Vec<Build> = self
            .memory()
            .builds
            .values()
            .filter(|build| workspace.is_empty() || build.workspace == workspace)
            .cloned()
            .collect();
        found.sort_by(|one, two| (two.created_unix_ms, &two.id).cmp(&(one.created_unix_ms, &one.id)));
        found
    }

    /// The build whose turn it is: one that was begun, otherwise the one that waits for the longest time.
    pub fn next(&self) -> Option<Build> {
        let open = self.list("").into_iter().filter(|build| !build.stage.is_over());
        open.min_by_key(|build| (build.stage == Stage::Queued, build.created_unix_ms, build.id.clone()))
    }

    /// Takes a place for a build, before its upload is read.
    ///
    /// # Errors
    /// [`BuildsError::TooMany`], [`BuildsError::Full`].
    pub fn enter(self: &Arc<Self>, workspace: &str) -> Result<Place, BuildsError> {
        let mut memory = self.memory();
        let open = |theirs: bool| {
            let counts = |build: &&Build| !build.stage.is_over() && (!theirs || build.workspace == workspace);
            memory.builds.values().filter(counts).count()
        };
        let incoming = memory.incoming.get(workspace).copied().unwrap_or(0);
        if open(true) + incoming >= OPEN_PER_WORKSPACE {
            return Err(BuildsError::TooMany);
        }
        if open(false) + memory.incoming.values().sum::<usize>() >= OPEN {
            return Err(BuildsError::Full);
        }
        *memory.incoming.entry(workspace.to_owned()).or_default() += 1;
        Ok(Place { builds: Arc::clone(self), workspace: workspace.to_owned() })
    }

    /// Takes a build, durably; old ones of its workspace that are over go.
    ///
    /// # Errors
    /// [`BuildsError::Records`]: it was not taken.
    pub async fn add(&self, build: Build) -> Result<(), BuildsError> {
        let _turn = self.changes.lock().await;
        self.put(build.clone()).await?;
        let over = self.list(&build.workspace).into_iter().filter(|other| other.stage.is_over());
        for old in over.skip(KEPT) {
            self.drop_one(&old.id).await?;
        }
        self.work.notify_one();
        Ok(())
    }

    /// Changes a build, durably. `None` when it is gone, or `change` does not want to.
    ///
    /// # Errors
    /// [`BuildsError::Records`]: nothing changed.
    pub async fn change(
        &self,
        id: &str,
        change: impl FnOnce(&mut Build) -> Option<()>,
    ) -> Result<Option<Build>, BuildsError> {
        let _turn = self.changes.lock().await;
        let found = self.memory().builds.get(id).cloned();
        let Some(mut build) = found else { return Ok(None) };
        if change(&mut build).is_none() {
            return Ok(None);
        }
        if build.stage.is_decided() && build.ended_unix_ms == 0 {
            build.ended_unix_ms = now_ms();
        }
        self.put(build.clone()).await?;
        Ok(Some(build))
    }

    /// Lets an event happen to a build, durably. `None` when it has no business there.
    ///
    /// # Errors
    /// As [`Builds::change`].
    pub async fn happen(&self, id: &str, event: Event, error: &str) -> Result<Option<Build>, BuildsError> {
        self.change(id, |build| {
            build.stage = build.stage.on(event)?;
            build.attempts += u32::from(build.stage == Stage::Making);
            if build.stage == Stage::Failing && build.error.is_empty() {
                build.error = error.chars().take(500).collect();
            }
            Some(())
        })
        .await
    }

    /// Forgets the builds of a workspace that is gone; none of them is open.
    ///
    /// # Errors
    /// As [`Builds::change`].
    pub async fn forget(&self, workspace: &str) -> Result<(), BuildsError> {
        let _turn = self.changes.lock().await;
        for build in self.list(workspace) {
            self.drop_one(&build.id).await?;
        }
        Ok(())
    }

    async fn put(&self, build: Build) -> Result<(), BuildsError> {
        let (records, kept) = (Arc::clone(&self.records), build.clone());
        blocking(move || records.put(&kept.id, &kept)).await?;
        self.memory().builds.insert(build.id.clone(), build);
        self.grew();
        Ok(())
    }

    async fn drop_one(&self, id: &str) -> Result<(), BuildsError> {
        let (records, key) = (Arc::clone(&self.records), id.to_owned());
        blocking(move || records.remove(&key).map(drop)).await?;
        self.memory().builds.remove(id);
        self.spool.remove(id);
        // What stays goes at the next start.
        let _ = std::fs::remove_file(self.log(id));
        self.grew();
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut memory = self.builds.memory();
        if let Some(count) = memory.incoming.get_mut(&self.workspace) {
            *count -= 1;
            if *count == 0 {
                memory.incoming.remove(&self.workspace);
            }
        }
    }
}

async fn blocking(
    work: impl FnOnce() -> Result<(), RecordsError> + Send + 'static,
) -> Result<(), BuildsError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(BuildsError::from),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;
