//! Captures and holds that nobody needs any more.
//!
//! Owns: that they go in the end, also those of a run of the daemon that was killed. Refuses to know: files.

use std::{
    collections::BTreeSet,
    sync::{Arc, PoisonError},
};

use pandastack_bus::{
    Result,
    storage::{Purpose, StorageBackend},
};

use crate::{machine::State, manager::Manager, ports::World, record::Record};

impl<W: World> Manager<W> {
    /// A capture is of no more use; it goes as soon as storage can be asked. Nobody waits for it.
    pub fn discard(self: &Arc<Self>, snapshot: String) {
        if snapshot.is_empty() {
            return;
        }
        self.garbage.lock().unwrap_or_else(PoisonError::into_inner).push(snapshot);
        let manager = Arc::clone(self);
        tokio::spawn(async move { manager.sweep().await });
    }

    /// Deletes what was discarded; what cannot be deleted is tried again with the next call.
    pub async fn sweep(&self) {
        let all = std::mem::take(&mut *self.garbage.lock().unwrap_or_else(PoisonError::into_inner));
        for snapshot in all {
            if let Err(error) = self.world.storage().delete_snapshot(snapshot.clone()).await {
                tracing::warn!(snapshot, "a capture stays for now: {}", error.message());
                self.garbage.lock().unwrap_or_else(PoisonError::into_inner).push(snapshot);
            }
        }
    }

    /// The capture that a sandbox consisted of goes: at once and surely when the sandbox is being deleted.
    ///
    /// # Errors
    /// As storage answers.
    pub async fn drop_image(self: &Arc<Self>, record: &mut Record) -> Result<()> {
        let deleted = record.state == State::Stopping;
        let Some(inner) = record.sandbox_mut().filter(|inner| !inner.image.is_empty()) else { return Ok(()) };
        if deleted {
            self.world.storage().delete_snapshot(inner.image.clone()).await?;
            inner.image.clear();
        } else {
            self.discard(std::mem::take(&mut inner.image));
        }
        Ok(())
    }

    /// Finds what an earlier run of the daemon left: captures of forks, hibernations that no record names, volumes held for
    /// nobody.
    ///
    /// # Errors
    /// Storage does not tell, or does not do it.
    pub async fn collect_garbage(&self) -> Result<()> {
        let storage = self.world.storage();
        let records: Vec<_> = self.all().iter().map(|sandbox| sandbox.record()).collect();
        let inner = || records.iter().filter_map(|record| Some((record, record.sandbox()?)));
        // Also of one that is being deleted: its teardown does it.
        let images: BTreeSet<&str> = inner()
            .filter(|(record, _)| matches!(record.state, State::Hibernated | State::Stopping))
            .map(|(_, inner)| inner.image.as_str())
            .collect();
        for snapshot in storage.snapshots(String::new()).await? {
            let wanted = match snapshot.spec.purpose {
                Purpose::Snapshot => true,
                Purpose::Fork => false,
                Purpose::Hibernation => images.contains(snapshot.spec.id.as_str()),
            };
            if !wanted {
                tracing::warn!(
                    snapshot = snapshot.spec.id,
                    sandbox = snapshot.spec.sandbox,
                    "nobody's capture goes"
                );
                storage.delete_snapshot(snapshot.spec.id).await?;
            }
        }
        let holders: BTreeSet<&str> = inner()
            .filter(|(_, inner)| !inner.spec.volumes.is_empty())
            .map(|(record, _)| record.id.as_str())
            .collect();
        let held = storage.volumes(String::new()).await?.into_iter().flat_map(|volume| volume.holders);
        let strangers: BTreeSet<String> = held.filter(|holder| !holders.contains(holder.as_str())).collect();
        for holder in strangers {
            tracing::warn!(sandbox = holder, "volumes are held for nobody: they are free");
            storage.drop_volumes(holder).await?;
        }
        Ok(())
    }
}
