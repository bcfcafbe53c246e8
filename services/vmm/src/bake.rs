//! Bakes: cold boot, warm-up, capture, for every template that has no snapshot.
//!
//! Owns: which template is next, repetition after a failure. Refuses to know: what a bake consists of (`machine`).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use pandastack_bus::{
    Result,
    storage::{StorageBackend, TemplateInfo, TemplateState},
};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    admission,
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
    /// Bakes what is not baked, some side by side, for ever.
    pub async fn keep_baked(self: Arc<Self>) {
        let mut attempts: HashMap<String, Attempts> = HashMap::new();
        let mut baking: HashSet<String> = HashSet::new();
        let mut bakes = JoinSet::new();
        let mut seen = 0;
        self.look_at_templates().await;
        loop {
            if let Some(template) = self.next_bake(&attempts, &baking) {
                baking.insert(template.name.clone());
                let manager = Arc::clone(&self);
                bakes.spawn(async move {
                    let start = Instant::now();
                    tracing::info!(template = template.name, "template {}: baking", template.name);
                    let outcome = manager.bake(&template).await;
                    (template.name, start.elapsed(), outcome)
                });
                continue;
            }
            tokio::select! {
                Some(ended) = bakes.join_next() => match ended {
                    Ok((name, took, outcome)) => {
                        baking.remove(&name);
                        self.bake_ended(&mut attempts, &name, took, outcome).await;
                    }
                    // Which one it was is not known: those that did not come to their end are looked at again.
                    Err(error) => {
                        tracing::error!("a bake ended early: {error}");
                        bakes.abort_all();
                        while bakes.join_next().await.is_some() {}
                        baking.clear();
                    }
                },
                renewed = timeout(LOOK, self.catalogue.renewal_after(seen)) => match renewed {
                    Ok(count) => seen = count,
                    Err(_) => self.look_at_templates().await,
                },
            }
        }
    }

    /// A template that can be baked now: one at any time, more of them only as far as there are processors and memory.
    fn next_bake(
        &self,
        attempts: &HashMap<String, Attempts>,
        baking: &HashSet<String>,
    ) -> Option<TemplateInfo> {
        let now = Instant::now();
        let due = |template: &TemplateInfo| {
            template.state == TemplateState::Unbaked
                && self.catalogue.is_wanted(template)
                && !baking.contains(&template.name)
                && attempts.get(&template.name).is_none_or(|so_far| so_far.next <= now)
        };
        let next = self.catalogue.all().into_iter().find(due)?;
        let memory: u64 = self
            .catalogue
            .all()
            .iter()
            .filter(|one| baking.contains(&one.name))
            .map(|one| one.memory_mib)
            .sum();
        let room = || {
            // A bake touches most of its memory, and those under way may not have done so yet.
            self.host().is_ok_and(|host| {
                let reserve = admission::reserve_mib(host.memory_total_mib);
                host.memory_available_mib > reserve + host.memory_pending_mib + memory + next.memory_mib
            })
        };
        (baking.is_empty() || (baking.len() < self.config.parallel && room())).then_some(next)
    }

    async fn bake_ended(
        &self,
        attempts: &mut HashMap<String, Attempts>,
        name: &str,
        took: Duration,
        outcome: Result<()>,
    ) {
        match outcome {
            Ok(()) => {
                attempts.remove(name);
                self.look_at_templates().await;
                tracing::info!(template = name, seconds = took.as_secs(), "template {name}: baked");
            }
            Err(error) => self.bake_failed(attempts, name, &error.message()).await,
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
        // What a workspace made is as it is: one more attempt for what may pass.
        let owned = self.catalogue.get(template).is_some_and(|info| !info.workspace.is_empty());
        let pauses = if owned { &BACK_OFF[..1] } else { &BACK_OFF[..] };
        let Some(pause) = pauses.get(failed - 1) else {
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
