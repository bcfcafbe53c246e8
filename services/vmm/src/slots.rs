//! Prepared slots: an id with a directory, a network and a Firecracker process, empty or dressed for a template.
//!
//! Owns: when they are made. Refuses to know: how many of which kind there shall be (`wardrobe`), what becomes of them.

use std::{sync::Arc, time::Duration};

use pandastack_bus::{
    Result, SandboxId,
    storage::{TemplateInfo, TemplateState},
};
use tokio::time::{sleep, timeout};

use crate::{
    agent,
    machine::Event,
    manager::Manager,
    ports::World,
    record::{Purpose, Record, Shape},
    sandbox::{Happening, Sandbox},
    wardrobe::{self, Step},
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
    /// A slot: one that waits (dressed for `shape`, if one is given and there is such a slot), or one made on the spot.
    ///
    /// # Errors
    /// It cannot be made; nothing of it is left.
    pub async fn slot(self: &Arc<Self>, shape: Option<&Shape>) -> Result<Arc<Sandbox>> {
        let waiting = self.pop_slot(shape);
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
            if self.check_open().is_err() || self.next_step().1 == Step::Rest {
                let _ = timeout(RECOUNT, self.refill.notified()).await;
                continue;
            }
            // A create that finds no slot waits for one anyway.
            if self.ready_slots().len() * 2 >= self.config.slots {
                self.wait_for_quiet().await;
            }
            let (ready, step) = self.next_step();
            let done = match step {
                Step::Rest => continue,
                Step::Make => self.make_slot().await.map(|slot| self.push_slot(slot)),
                Step::Dress(at, template) => self.dress(&ready[at], &template).await,
                Step::Discard(at) => self.undress(&ready[at]).await,
            };
            if let Err(error) = done {
                tracing::warn!("a slot could not be made ready: {}", error.message());
                sleep(PAUSE).await;
            }
        }
    }

    /// What to do about the slots, and the slots that it speaks of.
    fn next_step(&self) -> (Vec<Arc<Sandbox>>, Step) {
        let ready = self.ready_slots();
        let dressed: Vec<_> =
            ready.iter().map(|slot| slot.record().shape().map(|shape| shape.template.clone())).collect();
        let all = self.catalogue.all();
        // One of a workspace's own only once it was asked for: there may be many.
        let worthy = |template: &&TemplateInfo| {
            let known = template.workspace.is_empty() || self.asked.has(&template.name);
            template.state == TemplateState::Baked && !template.hidden && known
        };
        let baked = all.iter().filter(worthy);
        let votes = self.asked.votes(baked.map(|template| template.name.as_str()));
        let step = wardrobe::next_step(&dressed, &votes, self.config.slots);
        (ready, step)
    }

    /// Restores the snapshot of a template in an empty slot, makes the guest unique and stops it.
    async fn dress(self: &Arc<Self>, slot: &Arc<Sandbox>, template: &str) -> Result<()> {
        let Some(template) = self.catalogue.get(template).filter(|_| self.claim_slot(&slot.id)) else {
            return Ok(());
        };
        let (shape, machine_id) = (Shape::of(&template, 0), agent::machine_id());
        let change = move |record: &mut Record| record.purpose = Purpose::Dressed { shape, machine_id };
        let with = Happening { change: Some(Box::new(change)), ..Happening::default() };
        self.happen(slot, Event::Dress, with).await?;
        self.push_slot(Arc::clone(slot));
        Ok(())
    }

    /// Takes a slot down that is dressed for what nobody asks for.
    async fn undress(self: &Arc<Self>, slot: &Arc<Sandbox>) -> Result<()> {
        if self.claim_slot(&slot.id) {
            self.happen(slot, Event::Delete, Happening::because("dressed for nobody")).await?;
        }
        Ok(())
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
