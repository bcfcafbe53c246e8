//! The one durable write at the end of a create, a wake, a hibernation, a pause and a resume.
//!
//! Owns: what each of them changes in the record. Refuses to know: what led there, and what follows a write that fails (`machine`).

use std::sync::Arc;

use pandastack_bus::{Error, Result};

use crate::{
    machine::{Event, State},
    manager::Manager,
    ports::World,
    record::Record,
    sandbox::Sandbox,
    wake::lost,
};

impl<W: World> Manager<W> {
    /// Makes durable what the sandbox is once its present step is done: the point from which on it is acknowledged.
    ///
    /// # Errors
    /// The disk does not take it; nothing changed.
    pub async fn commit(self: &Arc<Self>, sandbox: &Arc<Sandbox>, record: &mut Record) -> Result<()> {
        let (next, _) = record
            .state
            .on(Event::Done)
            .ok_or_else(|| Error::Internal(format!("nothing follows {:?}", record.state)))?;
        let mut after = record.clone();
        let mut image = String::new();
        let slot = sandbox.sleep.slot().filter(|_| record.state == State::Waking);
        let kind = match (record.state, next) {
            (State::Waking, _) => {
                let slot = slot.as_ref().ok_or_else(lost)?;
                after.machine = Some(slot.id.clone());
                after.address.clone_from(&slot.record().address);
                if let Some(inner) = after.sandbox_mut() {
                    inner.boot_mode = "wake".into();
                    image = std::mem::take(&mut inner.image);
                }
                "sandbox.woken"
            }
            (_, State::Hibernated) => {
                after.address.clear();
                "sandbox.hibernated"
            }
            (_, State::Paused) => "sandbox.paused",
            (State::Creating, _) => {
                if let Some(inner) = after.sandbox_mut() {
                    inner.born = true;
                }
                "sandbox.running"
            }
            _ => "sandbox.resumed",
        };
        after.state = next;
        after.generation += 1;
        after.note(self.unix_ms(), kind, "");
        self.save(&after).await?;
        after.state = record.state;
        *record = after;
        tracing::info!(sandbox = %record.id, "{} {kind}", record.id);
        if slot.is_some() {
            self.move_in(sandbox);
            self.discard(image);
        }
        Ok(())
    }
}
