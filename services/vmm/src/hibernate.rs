//! Standing still and being put onto storage: pause, resume, hibernate, and all of it for a shutdown.
//!
//! Owns: who is hibernated when. Refuses to know: what the steps are (`machine`), how a capture is taken (`capture`), how a
//! sandbox comes back (`wake`).

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use pandastack_bus::{Error, Result, SandboxId};
use tokio::time::{sleep, timeout};

use crate::{
    machine::{Event, State},
    manager::Manager,
    ports::{Hypervisor, World},
    record::Record,
    sandbox::{Happening, Sandbox},
};

/// Pauses between attempts to let processors go on: nothing is worse than a sandbox that stands still unasked.
const LET_RUN: [Duration; 3] = [Duration::ZERO, Duration::from_millis(100), Duration::from_secs(1)];
/// Creates under way may take so long before a shutdown goes on without them.
const LAST_CREATES: Duration = Duration::from_secs(30);

/// Whether a persistent sandbox has been idle for so long that it costs less on storage.
pub fn is_sleepy(record: &Record, idle_seconds: u64, limit_seconds: u64) -> bool {
    limit_seconds > 0
        && record.state == State::Running
        && idle_seconds >= limit_seconds
        && record.sandbox().is_some_and(|inner| inner.spec.persistent)
}

impl<W: World> Manager<W> {
    /// Stops the processors, unless they stand still.
    ///
    /// # Errors
    /// Firecracker does not do it.
    pub async fn halt(&self, machine: &SandboxId) -> Result<()> {
        let hypervisor = self.world.hypervisor();
        if hypervisor.is_paused(machine).await? { Ok(()) } else { hypervisor.pause(machine).await }
    }

    /// Lets the processors go on, unless they do; tried more than once.
    ///
    /// # Errors
    /// Firecracker does not do it.
    pub async fn let_run(&self, machine: &SandboxId) -> Result<()> {
        let hypervisor = self.world.hypervisor();
        let mut last = None;
        for pause in LET_RUN {
            sleep(pause).await;
            let attempt = async {
                if hypervisor.is_paused(machine).await? { hypervisor.resume(machine).await } else { Ok(()) }
            };
            match attempt.await {
                Ok(()) => return Ok(()),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Internal("it was never tried".into())))
    }

    /// Whether the last machine of a sandbox is left to the end of the appliance, and to its next start.
    pub fn leaves_machine(&self, record: &Record) -> bool {
        record.state == State::Hibernated && self.closing.load(Ordering::SeqCst)
    }

    /// Puts a sandbox onto storage.
    ///
    /// # Errors
    /// It is as before.
    pub async fn hibernate(self: &Arc<Self>, sandbox: &Arc<Sandbox>, with: Happening) -> Result<()> {
        match self.happen(sandbox, Event::Hibernate, with).await {
            Err(error) if sandbox.record().state == State::Hibernated => {
                tracing::error!(sandbox = %sandbox.id, "is hibernated, its machine is still there: {}", error.message());
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Hibernates one that is idle, unless it is used before that takes effect.
    pub async fn hibernate_idle(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let _turn = self.hibernations.acquire().await;
        let (manager, target) = (Arc::clone(self), Arc::clone(sandbox));
        let limit = self.config.idle_hibernate_seconds;
        let with = Happening {
            guard: Some(Box::new(move |record| {
                is_sleepy(record, target.idle_seconds(manager.now_ms()), limit)
            })),
            ..Happening::because("idle")
        };
        match self.hibernate(sandbox, with).await {
            Ok(()) | Err(Error::WrongState(_)) => {}
            Err(error) => {
                tracing::error!(sandbox = %sandbox.id, "is idle and was not hibernated: {}", error.message());
                // Not again with every tick: a capture that fails costs as much as one that does not.
                sandbox.touch(self.now_ms());
            }
        }
    }

    /// For a shutdown: nothing new is made any more, what is persistent and runs is hibernated. Machines stand still from then
    /// on, and the next start takes away what is left of them, and the slots: PID 1 ends no unit now before we are done. What
    /// is just booted from its disk is booted again. Answers a sentence for each that could not be hibernated.
    pub async fn hibernate_all(self: &Arc<Self>) -> Vec<String> {
        self.closing.store(true, Ordering::SeqCst);
        let mut under_way = self.creating.subscribe();
        if timeout(LAST_CREATES, under_way.wait_for(|count| *count == 0)).await.is_err() {
            tracing::warn!("goes on without creates that do not end");
        }
        let all = self.all().into_iter().filter(|sandbox| {
            let record = sandbox.record();
            matches!(record.state, State::Running | State::Paused)
                && record.sandbox().is_some_and(|inner| inner.spec.persistent)
        });
        let outcomes = stream::iter(all).map(|sandbox| async move {
            let _turn = self.hibernations.acquire().await;
            let outcome = self.hibernate(&sandbox, Happening::because("the appliance goes down")).await;
            outcome.err().map(|error| format!("{}: {}", sandbox.id, error.message()))
        });
        // The semaphore bounds them.
        let failures: Vec<_> =
            outcomes.buffer_unordered(usize::MAX).filter_map(std::future::ready).collect().await;
        for failure in &failures {
            tracing::error!("not hibernated: {failure}");
        }
        failures
    }
}
