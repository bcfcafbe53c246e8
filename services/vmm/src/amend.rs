//! Changes of a sandbox that are no step of its life: its settings, and events that are only worth telling.
//!
//! Owns: when they may be made. Refuses to know: what they mean.

use std::sync::Arc;

use pandastack_bus::{Error, Result, vmm::unknown_sandbox};

use crate::{machine::State, manager::Manager, ports::World, record::Record, sandbox::Sandbox};

impl<W: World> Manager<W> {
    /// Changes the settings of a sandbox that is there: durable, then told.
    ///
    /// # Errors
    /// [`Error::WrongState`] at once while it is being made or booted again; [`Error::NotFound`] when it is being taken down;
    /// what `change` refuses. Nothing changed then.
    pub async fn amend(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        change: impl FnOnce(&mut crate::record::Sandbox) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        // Not waited for: a boot takes long, and the caller can see by itself when it is over.
        changeable(&sandbox.record())?;
        sandbox.touch(self.now_ms());
        let (manager, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        let task = tokio::spawn(async move {
            let _turn = sandbox.turn().await;
            let mut record = Record::clone(&sandbox.record());
            changeable(&record)?;
            let Some(inner) = record.sandbox_mut() else {
                return Err(unknown_sandbox(sandbox.id.as_str()));
            };
            change(inner)?;
            record.generation += 1;
            manager.save(&record).await?;
            sandbox.publish(&record);
            manager.announce(&record);
            Ok(())
        });
        task.await.unwrap_or_else(|error| Err(Error::Internal(format!("a task ended early: {error}"))))
    }

    /// Adds an event to a sandbox whose state stays. Only in its turn. It is not worth a failure.
    pub async fn noted(&self, sandbox: &Sandbox, kind: &str, detail: &str) {
        let mut record = Record::clone(&sandbox.record());
        if !matches!(record.state, State::Running | State::Paused | State::Hibernated) {
            return;
        }
        record.generation += 1;
        record.note(self.unix_ms(), kind, detail);
        sandbox.publish(&record);
        self.announce(&record);
        tracing::info!(sandbox = %record.id, "{} {kind}: {detail}", record.id);
        if let Err(error) = self.save(&record).await {
            tracing::warn!(sandbox = %record.id, "an event is not on record: {}", error.message());
        }
    }
}

/// Whether its settings may be changed now.
fn changeable(record: &Record) -> Result<()> {
    match record.state {
        State::New | State::Preparing | State::Ready | State::Baking | State::Stopping | State::Gone => {
            Err(unknown_sandbox(record.id.as_str()))
        }
        State::Creating | State::Recovering => {
            Err(Error::WrongState("the sandbox is still being made ready".into()))
        }
        // Those on their way are at rest by the time of its turn.
        _ => Ok(()),
    }
}
