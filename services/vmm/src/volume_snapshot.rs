//! Snapshots of volumes, of which storage makes all but one thing: that a guest which may write to the volume has nothing held
//! back then.
//!
//! Owns: whose guest is asked, and that nothing else happens to its sandbox meanwhile. Refuses to know: files.

use std::{sync::Arc, time::Duration};

use pandastack_bus::{
    Error, Result, SandboxId,
    storage::{StorageBackend, VolumeSnapshotInfo, VolumeSnapshotSpec},
};
use tokio::time::{Instant, sleep};

use crate::{
    capture::SYNC,
    machine::State,
    manager::Manager,
    ports::{Guest, World},
    record::Record,
    sandbox::Sandbox,
};

/// A volume of which much is not on the disk yet is flushed first, which may take longer than a reply may.
const FLUSH: Duration = Duration::from_secs(150);
/// Pause before storage is asked again.
const AGAIN: Duration = Duration::from_secs(1);

impl<W: World> Manager<W> {
    /// Takes a snapshot of a volume, or answers with the one of this id.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]; [`Error::NotFound`] when there is no such volume; otherwise as storage answers.
    pub async fn snapshot_volume(self: &Arc<Self>, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        let id: SandboxId = spec
            .id
            .parse()
            .map_err(|_| Error::InvalidArgument("the snapshot's id is not of the form of an id".into()))?;
        let fingerprint = [spec.workspace.as_str(), &spec.volume, &spec.label].join("\0");
        let manager = Arc::clone(self);
        let work = async move { manager.take_volume_snapshot(spec).await };
        // Afterwards storage remembers it.
        self.once(|manager| &manager.volume_snapshots, false, id.to_string(), &fingerprint, work).await
    }

    async fn take_volume_snapshot(&self, mut spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        loop {
            let writer = match self.writer_of(&spec).await {
                Ok(Some(writer)) => writer,
                // Readers hold nothing back. A volume that is gone may have been there when this was asked for the first time.
                Ok(None) | Err(Error::NotFound(_)) => {
                    spec.synced = true;
                    return self.keep_volume(spec).await;
                }
                Err(error) => return Err(error),
            };
            let _turn = writer.turn().await;
            let record = writer.record();
            // While its turn was waited for, another one may have become the writer.
            if writes(&record, &spec) {
                spec.synced = self.has_synced(&record).await;
                return self.keep_volume(spec).await;
            }
        }
    }

    /// The sandbox that may write to the volume.
    async fn writer_of(&self, spec: &VolumeSnapshotSpec) -> Result<Option<Arc<Sandbox>>> {
        let info = self.world.storage().volume(spec.workspace.clone(), spec.volume.clone()).await?;
        let known = info.holders.iter().filter_map(|holder| self.find(&holder.parse().ok()?));
        Ok(known.into_iter().find(|sandbox| writes(&sandbox.record(), spec)))
    }

    /// Whether its guest holds nothing back (any more). Only in its turn.
    async fn has_synced(&self, record: &Record) -> bool {
        match record.state {
            State::Running => match self.world.guest().sync(record.machine(), SYNC).await {
                Ok(()) => true,
                Err(error) => {
                    let text = error.message();
                    tracing::warn!(sandbox = %record.id, "a volume of it is kept without a sync: {text}");
                    false
                }
            },
            // Its processors stand still, and with them what it would write.
            State::Paused => false,
            _ => true,
        }
    }

    /// The same again has the same outcome, so one whose reply got lost is repeated.
    async fn keep_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        let deadline = Instant::now() + FLUSH;
        loop {
            match self.world.storage().snapshot_volume(spec.clone()).await {
                Err(Error::Bus(_) | Error::Timeout(_)) if Instant::now() < deadline => sleep(AGAIN).await,
                other => return other,
            }
        }
    }
}

/// Whether a sandbox has the volume itself, and may write to it.
fn writes(record: &Record, spec: &VolumeSnapshotSpec) -> bool {
    let gone = matches!(record.state, State::Stopping | State::Gone);
    !gone
        && record.sandbox().is_some_and(|inner| {
            inner.spec.workspace == spec.workspace
                && inner.spec.volumes.iter().any(|volume| volume.name == spec.volume && !volume.read_only)
        })
}
