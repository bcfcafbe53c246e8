//! Captures: memory and disks of a machine at one point in time.
//!
//! Owns: the order of their steps, what is undone when one fails, and the one snapshot per id. Refuses to know: files
//! (storage), what becomes of a capture (`fork`, `wake`).
//!
//! ```text
//!   guest syncs ─► begin ─► pause ─► write memory ─► reflink disks ─► go on ─► commit
//!                            └───────── what the sandbox notices ───────┘
//! ```
//!
//! A capture happens in the turn of its sandbox, so two of one sandbox never overlap. Its writes stay within the unit's
//! limit: they are page cache, which is written back and given up again, or a difference in memory that fits into what
//! the unit and the host have left ([`held_fits`]).

use std::{sync::Arc, time::Duration};

use pandastack_bus::{
    Error, Result, SandboxId,
    storage::{CaptureKind, Purpose, SnapshotInfo, SnapshotSpec, StorageBackend},
    vmm::unknown_sandbox,
};
use tokio::time::{Instant, sleep};

use crate::{
    admission::{Host, reserve_mib},
    effects::{limits, shape},
    machine::State,
    manager::Manager,
    ports::{Guest, Hypervisor, Memory, Units as _, World},
    record::{Record, Shape},
    sandbox::Sandbox,
};

/// The guest writes what is dirty within this; what is still dirty then is in its memory, which is captured, too.
pub const SYNC: Duration = Duration::from_secs(5);
/// A commit flushes a whole memory, which may take longer than a reply may.
const COMMIT: Duration = Duration::from_secs(240);
/// What a unit may take beside its guest's memory and a difference of it, bytes: Firecracker itself, page tables, sockets.
const HELD_MARGIN: u64 = 64 << 20;
/// Pause before storage is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// A capture that is on storage.
#[derive(Debug, Clone)]
pub struct Captured {
    /// What storage says of it.
    pub info: SnapshotInfo,
    /// When it was taken, Unix milliseconds.
    pub unix_ms: u64,
    /// How long the processors stood still for it; nothing if they did anyway.
    pub paused: Duration,
}

/// What a capture of this sandbox becomes.
///
/// # Errors
/// It is no sandbox.
pub fn spec(record: &Record, id: &SandboxId, purpose: Purpose) -> Result<SnapshotSpec> {
    let inner = record.sandbox().ok_or_else(|| unknown_sandbox(record.id.as_str()))?;
    let shape = &inner.shape;
    Ok(SnapshotSpec {
        id: id.to_string(),
        workspace: inner.spec.workspace.clone(),
        sandbox: record.id.to_string(),
        purpose,
        template: inner.spec.template.clone(),
        vcpus: shape.vcpus,
        memory_mib: shape.memory_mib,
        disk_mib: shape.disk_mib,
        env: shape.env.clone(),
        workdir: shape.workdir.clone(),
        volumes: inner.mounts().map(|mounted| mounted.volume.clone()).collect(),
    })
}

/// Whether a difference can be written to memory, by a unit with this much memory of its own, which all that its guest changed is
/// among, and this limit. What is beyond the limit would be the end of its process.
fn held_fits(host: &Host, anonymous_bytes: u64, limit_bytes: u64) -> bool {
    let inside = anonymous_bytes.saturating_mul(2).saturating_add(HELD_MARGIN) <= limit_bytes;
    let wanted = reserve_mib(host.memory_total_mib)
        .saturating_add(host.memory_pending_mib)
        // Once more where it is laid over the base: page cache, but not yet written back.
        .saturating_add(anonymous_bytes.saturating_mul(2) >> 20);
    inside && wanted <= host.memory_available_mib
}

impl<W: World> Manager<W> {
    /// Captures a machine. Only for whoever has its sandbox's turn. With `resume` the processors go on as before; without,
    /// they stand still afterwards, also when it fails.
    ///
    /// # Errors
    /// There is no capture, and nothing is left of it.
    pub async fn capture(&self, record: &Record, spec: SnapshotSpec, resume: bool) -> Result<Captured> {
        let machine = record.machine();
        let runs = matches!(record.state, State::Running | State::Hibernating { paused: false });
        let start = Instant::now();
        if runs && let Err(error) = self.world.guest().sync(machine, SYNC).await {
            tracing::warn!(sandbox = %record.id, "is captured without a sync: {}", error.message());
        }
        // Volumes of the workspace stay with a hibernated sandbox; clones are nowhere else.
        let clones = record.sandbox().is_some_and(|inner| !inner.clones.is_empty());
        let volumes = clones || (!spec.volumes.is_empty() && spec.purpose != Purpose::Hibernation);
        let captured = async {
            let synced = start.elapsed();
            let shape = shape(record)?;
            let (unix_ms, paused) = self.take(record, shape, volumes, runs, resume).await?;
            let taken = start.elapsed();
            let info = self.commit_capture(machine, spec).await?;
            let ms = |time: Duration| time.as_millis() as u64;
            tracing::debug!(
                sandbox = %record.id, sync_ms = ms(synced), take_ms = ms(taken - synced), paused_ms = ms(paused),
                commit_ms = ms(start.elapsed() - taken), "captured",
            );
            Ok(Captured { info, unix_ms, paused })
        };
        let outcome = captured.await;
        if outcome.is_err()
            && let Err(error) = self.world.storage().abort_capture(machine.to_string()).await
        {
            tracing::error!(sandbox = %record.id, "its unfinished capture stays for now: {}", error.message());
        }
        outcome
    }

    /// The part that the sandbox notices. Answers when it was, and how long it took.
    async fn take(
        &self,
        record: &Record,
        shape: &Shape,
        volumes: bool,
        runs: bool,
        resume: bool,
    ) -> Result<(u64, Duration)> {
        let (storage, hypervisor, machine) =
            (self.world.storage(), self.world.hypervisor(), record.machine());
        let kind = storage.begin_capture(machine.to_string()).await?;
        let start = Instant::now();
        let written = async {
            if runs {
                hypervisor.pause(machine).await?;
            }
            let unix_ms = self.unix_ms();
            // Nobody waits for one that does not go on, and its memory is not there twice.
            let memory = match (kind, runs && resume) {
                (CaptureKind::Diff, true) => self.held_or_stored(machine, shape).await,
                _ => Memory::Stored,
            };
            let written = hypervisor.write_capture(machine, kind, memory).await;
            // Also when it failed half-way. Before the guest goes on, so that no good stream is among them.
            let _ = self.cuts.send(record.id.clone());
            written?;
            let write_ms = start.elapsed().as_millis() as u64;
            tracing::debug!(machine = %machine, ?kind, ?memory, write_ms, "memory written");
            storage.capture_disks(machine.to_string(), volumes).await?;
            Ok::<_, Error>(unix_ms)
        };
        let written = written.await;
        // Also when the pause failed: it may have had an effect all the same.
        let resumed = match runs && resume {
            true if written.is_ok() && hypervisor.resume(machine).await.is_ok() => Ok(()),
            true => self.let_run(machine).await,
            false => Ok(()),
        };
        let paused = if runs { start.elapsed() } else { Duration::ZERO };
        if let Err(error) = &resumed {
            tracing::error!(machine = %machine, "stands still after a capture: {}", error.message());
        }
        let unix_ms = written?;
        resumed.map(|()| (unix_ms, paused))
    }

    /// Where the difference goes, now that the guest does not write any more.
    async fn held_or_stored(&self, machine: &SandboxId, shape: &Shape) -> Memory {
        let Some(anonymous) = self.world.units().anonymous(machine).await else { return Memory::Stored };
        match self.host() {
            Ok(host) if held_fits(&host, anonymous, limits(shape).memory_bytes) => Memory::Held,
            _ => Memory::Stored,
        }
    }

    /// The same commit again has the same outcome, so one whose reply got lost is repeated.
    async fn commit_capture(&self, machine: &SandboxId, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        let deadline = Instant::now() + COMMIT;
        loop {
            match self.world.storage().commit_capture(machine.to_string(), spec.clone()).await {
                Err(Error::Bus(_) | Error::Timeout(_)) if Instant::now() < deadline => sleep(AGAIN).await,
                other => return other,
            }
        }
    }

    /// Another capture with the contents of this one. A copy whose reply got lost is looked for.
    ///
    /// # Errors
    /// There is none.
    pub async fn copy_capture(&self, from: &str, spec: SnapshotSpec) -> Result<SnapshotInfo> {
        let storage = self.world.storage();
        let id = spec.id.clone();
        let failure = match storage.copy_snapshot(from.to_owned(), spec).await {
            Err(error @ (Error::Bus(_) | Error::Timeout(_))) => error,
            other => return other,
        };
        let deadline = Instant::now() + COMMIT;
        while Instant::now() < deadline {
            sleep(AGAIN).await;
            if let Ok(info) = storage.snapshot(id.clone()).await {
                return Ok(info);
            }
        }
        Err(failure)
    }

    /// Takes a snapshot for a tenant, or answers with the one of this id.
    ///
    /// # Errors
    /// See [`Error`]: no snapshot of this id was made.
    pub async fn snapshot(self: &Arc<Self>, id: String, snapshot: String) -> Result<SnapshotInfo> {
        let wanted: SandboxId = snapshot
            .parse()
            .map_err(|_| Error::InvalidArgument("the snapshot's id is not of the form of an id".into()))?;
        let sandbox = match self.sandbox(&id) {
            Ok(sandbox) => sandbox,
            // Its snapshots outlive it.
            Err(gone) => return self.taken_before(&id, &wanted).await?.ok_or(gone),
        };
        sandbox.touch(self.now_ms());
        let manager = Arc::clone(self);
        let work = async move { manager.take_snapshot(&sandbox, wanted).await };
        // Afterwards storage remembers it.
        self.once(|manager| &manager.snapshots, false, snapshot, &id, work).await
    }

    async fn take_snapshot(&self, sandbox: &Arc<Sandbox>, wanted: SandboxId) -> Result<SnapshotInfo> {
        if let Some(info) = self.taken_before(sandbox.id.as_str(), &wanted).await? {
            return Ok(info);
        }
        let workspace = sandbox.record().sandbox().map(|inner| inner.spec.workspace.clone());
        let workspace = workspace.ok_or_else(|| unknown_sandbox(sandbox.id.as_str()))?;
        // Until storage counts it itself.
        let _claim = self.claim_snapshot(&workspace, &wanted).await?;
        let _turn = sandbox.turn().await;
        let record = sandbox.record();
        let spec = spec(&record, &wanted, Purpose::Snapshot)?;
        let info = self.capture_somehow(&record, spec).await?.info;
        self.noted(sandbox, "snapshot.created", wanted.as_str()).await;
        Ok(info)
    }

    /// Captures a sandbox that runs or is paused, or copies what a hibernated one consists of. Only in its turn.
    ///
    /// # Errors
    /// [`Error::WrongState`] in every other state; otherwise as [`Manager::capture`].
    pub async fn capture_somehow(&self, record: &Record, spec: SnapshotSpec) -> Result<Captured> {
        match (record.state, record.sandbox()) {
            (State::Running | State::Paused, _) => self.capture(record, spec, true).await,
            (State::Hibernated, Some(inner)) => {
                let unix_ms = self.unix_ms();
                let info = self.copy_capture(&inner.image, spec).await?;
                Ok(Captured { info, unix_ms, paused: Duration::ZERO })
            }
            _ => match record.public_state() {
                Some(state) => Err(Error::WrongState(format!("the sandbox is {}", state.as_str()))),
                None => Err(unknown_sandbox(record.id.as_str())),
            },
        }
    }

    async fn taken_before(&self, sandbox: &str, wanted: &SandboxId) -> Result<Option<SnapshotInfo>> {
        match self.world.storage().snapshot(wanted.to_string()).await {
            Ok(info) if info.spec.sandbox == sandbox && info.spec.purpose == Purpose::Snapshot => {
                Ok(Some(info))
            }
            Ok(_) => Err(Error::Exists("there is another snapshot of this id".into())),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_difference_in_memory_leaves_the_unit_and_the_host_what_they_need(
            total in 0u64..1 << 20,
            available in 0u64..1 << 20,
            pending in 0u64..1 << 16,
            anonymous in 0u64..1 << 36,
            limit in 0u64..1 << 36,
        ) {
            let host = Host {
                memory_total_mib: total,
                memory_available_mib: available,
                memory_pending_mib: pending,
                disk_free_bytes: None,
                disk_reserve_bytes: 0,
            };
            if held_fits(&host, anonymous, limit) {
                prop_assert!(2 * anonymous < limit);
                prop_assert!(((2 * anonymous) >> 20) + pending + reserve_mib(total) <= available);
                prop_assert!(held_fits(&host, anonymous / 2, limit));
            }
        }
    }

    #[test]
    fn a_nearly_idle_guest_is_captured_in_memory_and_a_full_one_is_not() {
        let host = Host {
            memory_total_mib: 8192,
            memory_available_mib: 4096,
            memory_pending_mib: 0,
            disk_free_bytes: None,
            disk_reserve_bytes: 0,
        };

        assert!(held_fits(&host, 60 << 20, 768 << 20));
        assert!(!held_fits(&host, 400 << 20, 768 << 20));
        assert!(!held_fits(&host, 1900 << 20, 4 << 30));
    }
}
