//! Bakes: cold boot, warm-up, capture, for every template that has no snapshot.
//!
//! Owns: which template is next, repetition after a failure. Refuses to know: what a bake consists of (`machine`).

use std::{collections::HashMap, sync::Arc, time::Duration};

use pandastack_bus::{
    Result,
    storage::{StorageBackend, TemplateInfo, TemplateState},
};
use tokio::time::{Instant, timeout};

use crate::{
    machine::Event,
    manager::Manager,
    ports::World,
    record::{Purpose, Record, Shape},
    sandbox::Happening,
};

/// Pauses between attempts; after the last one the template is given up.
const BACK_OFF: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(15), Duration::from_secs(60)];
/// The catalogue is looked at again at least this often.
const LOOK: Duration = Duration::from_secs(10);

/// Attempts of one template.
#[derive(Debug, Clone, Copy)]
struct Attempts {
    failed: usize,
    next: Instant,
}

impl<W: World> Manager<W> {
    /// Bakes what is not baked, one at a time, for ever.
    pub async fn keep_baked(self: Arc<Self>) {
        let mut attempts: HashMap<String, Attempts> = HashMap::new();
        let mut seen = 0;
        self.look_at_templates().await;
        loop {
            let now = Instant::now();
            let next = self.catalogue.all().into_iter().find(|template| {
                let due = attempts.get(&template.name).is_none_or(|so_far| so_far.next <= now);
                template.state == TemplateState::Unbaked && due
            });
            let Some(template) = next else {
                match timeout(LOOK, self.catalogue.renewal_after(seen)).await {
                    Ok(count) => seen = count,
                    Err(_) => self.look_at_templates().await,
                }
                continue;
            };
            let start = Instant::now();
            tracing::info!(template = template.name, "template {}: baking", template.name);
            match self.bake(&template).await {
                Ok(()) => {
                    attempts.remove(&template.name);
                    self.look_at_templates().await;
                    tracing::info!(
                        template = template.name,
                        seconds = start.elapsed().as_secs(),
                        "template {}: baked",
                        template.name
                    );
                }
                Err(error) => self.bake_failed(&mut attempts, &template.name, &error.message()).await,
            }
        }
    }

    async fn look_at_templates(&self) {
        if let Err(error) = self.catalogue.renew(self.world.storage()).await {
            tracing::warn!("storage does not tell its templates: {}", error.message());
        }
    }

    async fn bake_failed(&self, attempts: &mut HashMap<String, Attempts>, template: &str, reason: &str) {
        let failed = attempts.get(template).map_or(0, |so_far| so_far.failed) + 1;
        tracing::error!(template, failed, "template {template}: bake failed: {reason}");
        let Some(pause) = BACK_OFF.get(failed - 1) else {
            let told = self.world.storage().fail_template(template.to_owned(), reason.to_owned()).await;
            match told {
                Ok(()) => drop(attempts.remove(template)),
                Err(error) => {
                    tracing::error!(template, "storage does not take note of it: {}", error.message());
                    attempts.insert(
                        template.to_owned(),
                        Attempts { failed: failed - 1, next: Instant::now() + LOOK },
                    );
                }
            }
            self.look_at_templates().await;
            return;
        };
        attempts.insert(template.to_owned(), Attempts { failed, next: Instant::now() + *pause });
    }

    /// Bakes one template. Whatever was made for it is taken down again, also when it succeeds.
    async fn bake(self: &Arc<Self>, template: &TemplateInfo) -> Result<()> {
        self.wait_for_quiet().await;
        let slot = self.make_slot().await?;
        tracing::info!(sandbox = %slot.id, template = template.name, "template {} bakes in {}", template.name, slot.id);
        let shape = Shape::of(template, 0);
        let change = move |record: &mut Record| record.purpose = Purpose::Bake(shape);
        let with = Happening { change: Some(Box::new(change)), ..Happening::default() };
        self.happen(&slot, Event::Bake, with).await.map(drop)
    }
}
