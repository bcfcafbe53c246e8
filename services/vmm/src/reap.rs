//! What happens by the clock: idle sandboxes end or are hibernated, unfinished teardowns are repeated, old requests are forgotten.
//!
//! Owns: the intervals. Refuses to know: what ending means.

use std::{
    collections::HashSet,
    sync::{Arc, PoisonError},
    time::Duration,
};

use pandastack_bus::{Error, storage::StorageBackend};
use tokio::time::{MissedTickBehavior, interval};

use crate::{
    hibernate::is_sleepy,
    machine::{Event, State},
    manager::Manager,
    meter::{self, Sample},
    ports::{Units, World},
    record::Record,
    sandbox::{Happening, Sandbox},
};

const TICK: Duration = Duration::from_secs(5);
/// Ticks between two purges of requests: an hour.
const PURGE_EVERY: u64 = 720;

/// Whether a sandbox has been idle for too long.
pub fn is_due(record: &Record, idle_seconds: u64) -> bool {
    matches!(record.state, State::Running | State::Paused | State::Hibernated | State::Failed)
        && record
            .sandbox()
            .is_some_and(|inner| !inner.spec.persistent && idle_seconds >= inner.spec.ttl_seconds)
}

impl<W: World> Manager<W> {
    /// Keeps house, for ever.
    pub async fn keep_house(self: Arc<Self>, status: impl Fn(&str) + Send) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut round: u64 = 0;
        loop {
            ticks.tick().await;
            self.reap();
            self.sweep().await;
            self.look_at_space().await;
            if round.is_multiple_of(PURGE_EVERY) {
                self.purge();
            }
            if let Ok(now) = self.capacity() {
                status(&format!(
                    "{} sandboxes, {} running, {} slots ready",
                    now.sandboxes, now.running, now.slots
                ));
            }
            round += 1;
        }
    }

    /// Measures what sandboxes take, for ever.
    pub async fn keep_metered(self: Arc<Self>) {
        let mut ticks = interval(Duration::from_secs(u64::from(meter::TICK)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.measure().await;
        }
    }

    /// Measures once.
    pub async fn measure(&self) {
        let (mut samples, mut known) = (Vec::new(), HashSet::new());
        for sandbox in self.all() {
            let record = sandbox.record();
            let Some(inner) = record.sandbox().filter(|inner| inner.born) else { continue };
            known.insert(record.id.to_string());
            if !matches!(record.state, State::Running | State::Paused) {
                continue;
            }
            let Some(usage) = self.world.units().usage(record.machine()).await else { continue };
            samples.push(Sample {
                sandbox: record.id.to_string(),
                workspace: inner.spec.workspace.clone(),
                machine: record.machine().to_string(),
                usage,
            });
        }
        let now = u32::try_from(self.unix_ms() / 1000).unwrap_or(u32::MAX);
        self.meter.tick(now, samples, &known);
    }

    /// Ends what is due and goes on with teardowns that failed; each in a task of its own.
    pub fn reap(self: &Arc<Self>) {
        for sandbox in self.all() {
            let record = sandbox.record();
            let idle = sandbox.idle_seconds(self.now_ms());
            let manager = Arc::clone(self);
            if is_sleepy(&record, idle, self.config.idle_hibernate_seconds) && !sandbox.is_busy() {
                tokio::spawn(async move { manager.hibernate_idle(&sandbox).await });
                continue;
            }
            if record.state == State::Hibernated
                && sandbox.sleep.is_untidy()
                && !sandbox.is_busy()
                && !self.leaves_machine(&record)
            {
                tokio::spawn(async move { manager.tidy(&sandbox).await });
                continue;
            }
            let with = if is_due(&record, idle) {
                self.ending(&sandbox)
            } else if record.state == State::Stopping && !sandbox.is_busy() {
                Happening::because("the last attempt to take it down failed")
            } else {
                continue;
            };
            tokio::spawn(async move {
                match manager.happen(&sandbox, Event::Delete, with).await {
                    // Somebody was faster.
                    Ok(_) | Err(Error::WrongState(_)) => {}
                    Err(error) => {
                        tracing::error!(sandbox = %sandbox.id, "is not gone yet: {}", error.message());
                    }
                }
            });
        }
    }

    /// The end of an idle sandbox, unless it is used or its limit is changed before that takes effect.
    pub fn ending(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Happening {
        let (manager, target) = (Arc::clone(self), Arc::clone(sandbox));
        Happening {
            guard: Some(Box::new(move |record| is_due(record, target.idle_seconds(manager.now_ms())))),
            ..Happening::because("idle for longer than its limit")
        }
    }

    async fn look_at_space(&self) {
        match self.world.storage().usage().await {
            Ok(usage) => {
                *self.space.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((usage.free_bytes, usage.reserve_bytes));
            }
            Err(error) => tracing::warn!("storage does not tell its space: {}", error.message()),
        }
    }

    fn purge(self: &Arc<Self>) {
        let now = self.unix_ms();
        let is_there = |id: &str| id.parse().is_ok_and(|id| self.find(&id).is_some());
        self.requests.purge(now, |id| is_there(id.as_str()));
        self.forks.purge(now, |fork| fork.children.iter().any(|birth| is_there(&birth.id)));
        let tombstones = Arc::clone(&self.tombstones);
        tokio::task::spawn_blocking(move || {
            let old = tombstones.iter().map(|all| {
                all.into_iter()
                    .filter(|(_, left)| left.until_unix_ms <= now)
                    .map(|(key, _)| key)
                    .collect::<Vec<_>>()
            });
            for key in old.unwrap_or_default() {
                if let Err(error) = tombstones.remove(&key) {
                    tracing::error!("an old request stays: {}", pandastack_daemon::chain(&error));
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use pandastack_bus::{SandboxId, vmm::SandboxSpec};

    use super::*;
    use crate::record::{Purpose, Sandbox, Shape};

    fn sandbox(state: State, persistent: bool) -> Record {
        let spec = SandboxSpec {
            workspace: "w".into(),
            template: "base".into(),
            metadata: Default::default(),
            ttl_seconds: 60,
            persistent,
            disk_mib: 0,
            snapshot: String::new(),
            volumes: Vec::new(),
        };
        let shape = Shape {
            template: "base".into(),
            vcpus: 1,
            memory_mib: 128,
            disk_mib: 1,
            disk_grown: false,
            env: Default::default(),
            workdir: String::new(),
            warmup: String::new(),
        };
        let mut record = Record::slot(SandboxId::random(), 0);
        record.state = state;
        record.purpose = Purpose::Sandbox(Box::new(Sandbox::new("", String::new(), spec, shape, "snapshot")));
        record
    }

    #[test]
    fn only_what_is_idle_for_its_whole_limit_and_not_persistent_ends() {
        assert!(!is_due(&sandbox(State::Running, false), 59));
        assert!(is_due(&sandbox(State::Running, false), 60));
        assert!(is_due(&sandbox(State::Failed, false), 60));
        assert!(!is_due(&sandbox(State::Running, true), 1_000_000));
        assert!(!is_due(&sandbox(State::Creating, false), 60));
        assert!(is_due(&sandbox(State::Paused, false), 60) && is_due(&sandbox(State::Hibernated, false), 60));
        assert!(!is_due(&Record::slot(SandboxId::random(), 0), 1_000_000));
    }

    #[test]
    fn only_what_runs_idle_and_is_persistent_is_put_to_sleep() {
        assert!(is_sleepy(&sandbox(State::Running, true), 300, 300));
        assert!(!is_sleepy(&sandbox(State::Running, true), 299, 300));
        assert!(!is_sleepy(&sandbox(State::Running, true), 1_000_000, 0), "never");
        assert!(!is_sleepy(&sandbox(State::Running, false), 300, 300));
        assert!(!is_sleepy(&sandbox(State::Paused, true), 300, 300), "somebody paused it");
        assert!(!is_sleepy(&sandbox(State::Hibernated, true), 300, 300));
    }
}
