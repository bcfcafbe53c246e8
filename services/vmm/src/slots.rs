//! Prepared slots: an id with a directory, a network and an empty Firecracker process.
//!
//! Owns: how many there are and when they are made. Refuses to know: what becomes of them.

use std::{sync::Arc, time::Duration};

use pandastack_bus::{Result, SandboxId};
use tokio::time::{sleep, timeout};

use crate::{
    machine::Event,
    manager::Manager,
    ports::World,
    record::Record,
    sandbox::{Happening, Sandbox},
};

/// After a create it stays quiet for this long before a slot is made: creates tend to come in rows.
const QUIET: Duration = Duration::from_millis(50);
/// Under an endless row of creates a slot is made nevertheless after this long.
const PATIENCE: Duration = Duration::from_secs(20);
/// After a failure.
const PAUSE: Duration = Duration::from_secs(3);
/// Slots are counted again at least this often: one may have died.
const RECOUNT: Duration = Duration::from_secs(10);

impl<W: World> Manager<W> {
    /// A slot: one that waits, or one made on the spot.
    ///
    /// # Errors
    /// It cannot be made; nothing of it is left.
    pub async fn slot(self: &Arc<Self>) -> Result<Arc<Sandbox>> {
        let waiting = self.pop_slot();
        self.refill.notify_one();
        match waiting {
            Some(slot) => Ok(slot),
            None => self.make_slot().await,
        }
    }

    /// Makes a slot. A caller that stops to wait leaves it to the pool.
    ///
    /// # Errors
    /// It cannot be made; nothing of it is left.
    pub async fn make_slot(self: &Arc<Self>) -> Result<Arc<Sandbox>> {
        self.check_open()?;
        let record = Record::slot(SandboxId::random(), self.unix_ms());
        let slot = self.insert(Sandbox::new(record, self.now_ms()));
        let mut unclaimed = Unclaimed { manager: self, slot: Some(Arc::clone(&slot)) };
        let made = self.happen(&slot, Event::Begin, Happening::default()).await;
        unclaimed.slot = None;
        made?;
        Ok(slot)
    }

    /// Keeps the configured number of slots, for ever, and gives way to creates.
    pub async fn keep_slots(self: Arc<Self>) {
        loop {
            if self.slots_ready() >= self.config.slots {
                let _ = timeout(RECOUNT, self.refill.notified()).await;
                continue;
            }
            // A create that finds no slot waits for one anyway.
            if self.slots_ready() * 2 >= self.config.slots {
                self.wait_for_quiet().await;
            }
            if self.slots_ready() >= self.config.slots {
                continue;
            }
            match self.make_slot().await {
                Ok(slot) => {
                    tracing::debug!(sandbox = %slot.id, "a slot is ready");
                    self.push_slot(slot);
                }
                Err(error) => {
                    tracing::warn!("a slot could not be made: {}", error.message());
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Completes when no create is under way, or after a while.
    pub async fn wait_for_quiet(&self) {
        let quiet = async {
            let mut creating = self.creating.subscribe();
            loop {
                // The sender lives in `self`.
                let _ = creating.wait_for(|count| *count == 0).await;
                sleep(QUIET).await;
                if *creating.borrow() == 0 {
                    return;
                }
            }
        };
        let _ = timeout(PATIENCE, quiet).await;
    }
}

/// A slot under way whose maker may stop to wait: it is made all the same, and kept for the next one.
struct Unclaimed<'a, W: World> {
    manager: &'a Arc<Manager<W>>,
    slot: Option<Arc<Sandbox>>,
}

impl<W: World> Drop for Unclaimed<'_, W> {
    fn drop(&mut self) {
        let Some(slot) = self.slot.take() else { return };
        let manager = Arc::clone(self.manager);
        tokio::spawn(async move {
            slot.settled().await;
            manager.push_slot(slot);
        });
    }
}
