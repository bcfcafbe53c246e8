//! From records to a daemon that serves: reconciliation, then the tasks that run for ever.
//!
//! Owns: the order of the start. Refuses to know: what is decided (`reconcile`).

use std::{
    path::Path,
    sync::{Arc, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt, stream};
use pandastack_bus::{
    Result, SandboxId,
    network::NetworkBackend,
    storage::{StorageBackend, StorageProxy},
    vmm::{self, Vmm},
    zbus::{self, Connection},
};
use pandastack_daemon::{
    Context,
    records::{RecordsError, until_poisoned},
};
use tokio::{sync::mpsc, time::sleep};

use crate::{
    backend::Backend,
    history::Hint,
    machine::{Event, State},
    manager::{Change, Config, Manager},
    ports::{Guest, Units, World},
    reconcile::{Action, Found, Known, LOST, plan},
    remote::Appliance,
    sandbox::{Happening, Sandbox},
    socket::Sockets,
};

/// Where storage keeps one directory per sandbox.
const SANDBOXES: &str = "/var/lib/pandastack/storage/sandboxes";
/// First and longest pause before a machine that PID 1 could not tell of is looked for again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
const LOOK_LONGEST: Duration = Duration::from_secs(30);
/// Sandboxes that one workspace may have, unless an operator says otherwise.
const WORKSPACE_SANDBOXES: usize = 256;
/// Seconds without use after which a persistent sandbox is hibernated, unless an operator says otherwise.
const IDLE_HIBERNATE_SECONDS: u64 = 300;
/// Actions of reconciliation at the same time.
const SIDE_BY_SIDE: usize = 4;

/// Why the daemon ended.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// The bus cannot be used.
    #[error("the bus cannot be used")]
    Bus(#[from] zbus::Error),
    /// The records cannot be opened.
    #[error("the records cannot be opened")]
    Records(#[from] RecordsError),
    /// What the disk holds is unknown; the next run goes on from what it really holds.
    #[error("a record may not have reached the disk")]
    Poisoned,
}

/// The daemon's body.
///
/// # Errors
/// It cannot start, or a record could not be made durable; other failures are answers to calls, never the end.
pub async fn serve(ctx: Context) -> std::result::Result<(), VmmError> {
    let world = Appliance::connect(&ctx.bus, Sockets::new(Path::new(SANDBOXES))).await?;
    let (changes, told) = mpsc::unbounded_channel();
    let directory = ctx.state_dir().to_owned();
    let manager = Manager::open(world, &directory, config(&ctx), changes)?;
    tokio::spawn(tell(ctx.bus.clone(), told));
    let hints = manager.hints.lock().unwrap_or_else(PoisonError::into_inner).take();
    tokio::spawn(hint(ctx.bus.clone(), hints));
    let cuts = manager.told_cuts.lock().unwrap_or_else(PoisonError::into_inner).take();
    tokio::spawn(tell_cuts(ctx.bus.clone(), cuts));
    tokio::spawn(follow_templates(ctx.bus.clone(), Arc::clone(&manager)));
    ctx.status("comparing records with what is there");
    let slow = reconcile_until_done(&manager).await;
    ctx.bus.object_server().at(vmm::PATH, Vmm(Arc::new(Backend(Arc::clone(&manager))))).await?;
    ctx.bus.request_name(vmm::NAME).await?;
    ctx.ready("serving");
    for action in slow {
        let manager = Arc::clone(&manager);
        tokio::spawn(async move { manager.carry_out(action).await });
    }
    let pinged = Arc::clone(&manager);
    // Through the lock that every call needs.
    ctx.watchdog(move || {
        let manager = Arc::clone(&pinged);
        async move { drop(manager.all()) }
    });
    let status = ctx.clone();
    tokio::spawn(Arc::clone(&manager).keep_house(move |text| status.status(text)));
    tokio::spawn(Arc::clone(&manager).keep_metered());
    tokio::spawn(Arc::clone(&manager).keep_baked());
    tokio::spawn(Arc::clone(&manager).keep_slots());
    tokio::select! {
        // Machines run on; whatever is under way here is found again by the next start.
        () = ctx.stopped() => Ok(()),
        () = until_poisoned(|| manager.is_poisoned()) => Err(VmmError::Poisoned),
    }
}

fn config(ctx: &Context) -> Config {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    let slots = setting(ctx, "pandastack.slots", "PANDASTACK_SLOTS");
    let idle = setting(ctx, "pandastack.idle_hibernate_seconds", "PANDASTACK_IDLE_HIBERNATE_SECONDS");
    let most = setting(ctx, "pandastack.workspace_sandboxes", "PANDASTACK_WORKSPACE_SANDBOXES");
    Config {
        slots: slots.map_or_else(|| default_slots(cores), |number| number.min(256)),
        parallel: cores.max(2),
        workspace_sandboxes: most.unwrap_or(WORKSPACE_SANDBOXES),
        idle_hibernate_seconds: idle.map_or(IDLE_HIBERNATE_SECONDS, |seconds| seconds as u64),
    }
}

/// A number that an operator set, as a credential or in the environment.
fn setting(ctx: &Context, credential: &str, variable: &str) -> Option<usize> {
    let given = ctx.credential(credential).unwrap_or_else(|error| {
        tracing::error!("credential {credential}: {error}");
        None
    });
    let text =
        given.and_then(|bytes| String::from_utf8(bytes).ok()).or_else(|| std::env::var(variable).ok())?;
    text.trim().parse().map_err(|error| tracing::error!("{credential} is no number: {error}")).ok()
}

/// A slot costs a few MiB; what it saves is process start, of which a core does only some per second: creates tend to come
/// in bursts. Half of them are dressed for templates.
fn default_slots(cores: usize) -> usize {
    (cores * 8).clamp(16, 64)
}

/// Tells every change on the bus, in order.
async fn tell(bus: Connection, mut changes: mpsc::UnboundedReceiver<Change>) {
    while let Some(change) = changes.recv().await {
        let emitter = match zbus::object_server::SignalEmitter::new(&bus, vmm::PATH) {
            Ok(emitter) => emitter,
            Err(error) => return tracing::error!("no signals: {error}"),
        };
        let told = Vmm::<Backend<Appliance>>::changed(
            &emitter,
            &change.id,
            &change.workspace,
            change.state,
            change.generation,
        );
        if let Err(error) = told.await {
            tracing::warn!(sandbox = change.id, "a change was not told: {error}");
        }
    }
}

/// Tells whose streams are dead.
async fn tell_cuts(bus: Connection, cuts: Option<mpsc::UnboundedReceiver<SandboxId>>) {
    let Some(mut cuts) = cuts else { return };
    while let Some(id) = cuts.recv().await {
        let Ok(emitter) = zbus::object_server::SignalEmitter::new(&bus, vmm::PATH) else { return };
        // Whoever misses it waits until something else tells.
        if let Err(error) = Vmm::<Backend<Appliance>>::captured(&emitter, id.as_str()).await {
            tracing::warn!(sandbox = %id, "a capture was not told: {error}");
        }
    }
}

/// Tells that there is more in the history.
async fn hint(bus: Connection, hints: Option<mpsc::UnboundedReceiver<Hint>>) {
    let Some(mut hints) = hints else { return };
    while let Some((workspace, id)) = hints.recv().await {
        let Ok(emitter) = zbus::object_server::SignalEmitter::new(&bus, vmm::PATH) else { return };
        // Whoever misses it looks by itself now and then.
        if let Err(error) = Vmm::<Backend<Appliance>>::happened(&emitter, &workspace, &id).await {
            tracing::debug!("a hint was not told: {error}");
        }
    }
}

/// Renews the catalogue whenever storage says that a template changed.
async fn follow_templates<W: World>(bus: Connection, manager: Arc<Manager<W>>) {
    loop {
        let signals = async { StorageProxy::new(&bus).await?.receive_template_changed().await }.await;
        match signals {
            Ok(mut signals) => {
                while signals.next().await.is_some() {
                    if let Err(error) = manager.catalogue.renew(manager.world.storage()).await {
                        tracing::warn!("the catalogue was not renewed: {}", error.message());
                    }
                }
            }
            Err(error) => tracing::warn!("no news of templates: {error}"),
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// Reconciles; storage and network must be there for it, so they are waited for. Answers what may take long.
async fn reconcile_until_done<W: World>(manager: &Arc<Manager<W>>) -> Vec<Action> {
    loop {
        match manager.reconcile().await {
            Ok(slow) => return slow,
            Err(error) => {
                tracing::warn!("cannot compare records with what is there yet: {}", error.message());
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

impl<W: World> Manager<W> {
    /// Compares records with what is there and carries out what follows from it, except what takes long, which it answers.
    ///
    /// # Errors
    /// Somebody does not tell what is there; nothing was done.
    pub async fn reconcile(self: &Arc<Self>) -> Result<Vec<Action>> {
        let (units, directories, attachments) = tokio::try_join!(
            self.world.units().list(),
            self.world.storage().owners(),
            self.world.network().owners(),
        )?;
        let ids = |texts: Vec<String>| -> std::collections::BTreeSet<SandboxId> {
            let parsed = texts.into_iter().filter_map(|text| match text.parse() {
                Ok(id) => Some(id),
                Err(error) => {
                    tracing::error!("{text:?} is in the way: {error}");
                    None
                }
            });
            parsed.collect()
        };
        let known = |record: &crate::record::Record| Known {
            state: record.state,
            persistent: record.sandbox().is_some_and(|inner| inner.spec.persistent),
            machine: record.machine().clone(),
        };
        let found = Found {
            records: self.all().iter().map(|one| (one.id.clone(), known(&one.record()))).collect(),
            units: units.into_iter().map(|unit| (unit.id, unit.alive)).collect(),
            directories: ids(directories.into_iter().map(|owner| owner.id).collect()),
            attachments: ids(attachments.into_iter().map(|attachment| attachment.id).collect()),
        };
        let (quick, slow): (Vec<_>, Vec<_>) = plan(&found).into_iter().partition(Action::is_quick);
        tracing::info!(
            records = found.records.len(),
            units = found.units.len(),
            directories = found.directories.len(),
            attachments = found.attachments.len(),
            actions = quick.len() + slow.len(),
            "compared records with what is there"
        );
        stream::iter(quick).for_each_concurrent(SIDE_BY_SIDE, |action| self.carry_out(action)).await;
        // After captures under way at storage were waited for and undone.
        self.collect_garbage().await?;
        Ok(slow)
    }

    /// Carries out one action; what fails is logged and repeated by housekeeping or the next start.
    pub async fn carry_out(self: &Arc<Self>, action: Action) {
        match action {
            Action::Happen(id, event @ Event::Lost { .. }, reason) => {
                let Some(sandbox) = self.find(&id) else { return };
                self.lose(&sandbox, event, reason).await;
            }
            Action::Forget(id) => {
                self.remove(&id);
                let records = Arc::clone(&self.records);
                let removed = tokio::task::spawn_blocking(move || records.remove(id.as_str())).await;
                if let Ok(Err(error)) = removed {
                    tracing::error!("the record of a slot stays: {}", pandastack_daemon::chain(&error));
                }
            }
            Action::Happen(id, event, reason) => {
                let Some(sandbox) = self.find(&id) else { return };
                if let Err(error) = self.happen(&sandbox, event, Happening::because(reason)).await {
                    tracing::error!(sandbox = %id, event = ?event, "{}", error.message());
                }
                if event == Event::Adopt {
                    self.check_adopted(&sandbox);
                }
            }
            Action::Sweep { id, unit, attachment, directory } => {
                tracing::warn!(sandbox = %id, unit, attachment, directory, "{id} is nobody's: it goes");
                let stopped = if unit { self.world.units().stop(&id).await.map(drop) } else { Ok(()) };
                let detached = match attachment {
                    true => self.world.network().detach(id.to_string()).await.map(drop),
                    false => Ok(()),
                };
                let released = match directory && stopped.is_ok() {
                    true => self.world.storage().release(id.to_string()).await.map(drop),
                    false => Ok(()),
                };
                for error in [stopped, detached, released].into_iter().filter_map(Result::err) {
                    tracing::error!(sandbox = %id, "{}", error.message());
                }
            }
        }
    }

    /// A process that ended between the list and the watch is found here; a guest that is silent is told of.
    fn check_adopted(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let record = sandbox.record();
        if !matches!(record.state, State::Running | State::Paused) {
            return;
        }
        let (manager, sandbox) = (Arc::clone(self), Arc::clone(sandbox));
        if sandbox.process().is_some() {
            // Nobody waits for it: a busy guest may take its time.
            tokio::spawn(async move {
                if record.state == State::Running
                    && let Err(error) = manager.world.guest().open(record.machine()).await
                {
                    tracing::warn!(sandbox = %sandbox.id, "runs, but: {}", error.message());
                }
            });
            return;
        }
        // Not waited for either: it may boot a guest.
        tokio::spawn(async move { manager.adopt_or_lose(&sandbox).await });
    }

    /// Only a process that is known not to be there is lost; as long as nobody can tell, it is looked for.
    pub async fn adopt_or_lose(self: &Arc<Self>, sandbox: &Arc<Sandbox>) {
        let mut pause = LOOK_AGAIN;
        loop {
            let record = sandbox.record();
            let is_there = matches!(record.state, State::Running | State::Paused);
            if !is_there || sandbox.process().is_some() {
                return;
            }
            match self.world.units().process(record.machine()).await {
                Ok(None) => {
                    let recover = sandbox.record().sandbox().is_some_and(|inner| inner.spec.persistent);
                    return self.lose(sandbox, Event::Lost { recover }, LOST).await;
                }
                Ok(Some(_)) => {}
                Err(error) => tracing::warn!(sandbox = %sandbox.id, "not found yet: {}", error.message()),
            }
            sleep(pause).await;
            pause = (pause * 2).min(LOOK_LONGEST);
            if let Err(error) = self.happen(sandbox, Event::Adopt, Happening::default()).await {
                tracing::warn!(sandbox = %sandbox.id, "not adopted yet: {}", error.message());
            }
        }
    }
}
