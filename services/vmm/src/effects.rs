//! How each effect of the state machine is done: one call to a port each.
//!
//! Owns: the arguments of those calls. Refuses to know: their order and what follows from a failure (`machine`, `sandbox`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pandastack_bus::{
    Error, Result, SandboxId,
    network::NetworkBackend,
    storage::{Fill, Purpose, StorageBackend, TemplateState},
};
use pandastack_daemon::records::RecordsError;
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep},
};

use crate::{
    capture,
    firecracker::ROOT,
    machine::{Effect, Event, State},
    manager::Manager,
    ports::{Guest, Hypervisor, Identification, Limits, Machine, Process, Units, World},
    record::{REQUEST_KEPT_MS, Record, Shape, Tombstone, is_anonymous, request_key},
    sandbox::{Happening, Sandbox},
};

/// A restored guest answers within this, or another slot is tried.
pub const RESTORE_ANSWER: Duration = Duration::from_secs(10);
/// A booted guest answers within this, also under emulation.
const BOOT_ANSWER: Duration = Duration::from_secs(150);
/// What Firecracker itself may take beside the guest's memory, MiB.
const OVERHEAD_MIB: u64 = 128;

impl<W: World> Manager<W> {
    /// Does one effect for the sandbox of this record, which is as it shall become.
    ///
    /// # Errors
    /// As the port answers.
    pub async fn perform(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        record: &mut Record,
        effect: Effect,
    ) -> Result<()> {
        let id = &machine(sandbox, record);
        let world = &self.world;
        match effect {
            Effect::Save => self.save(record).await,
            Effect::Announce => {
                self.announce(record);
                Ok(())
            }
            Effect::Prepare => world.storage().prepare(id.to_string()).await.map(drop),
            Effect::EnsureKernel => world.storage().ensure_kernel(id.to_string()).await,
            Effect::LimitExpected => match self.expected_limits() {
                Some(limits) => self.limit(sandbox, id, limits).await,
                None => Ok(()),
            },
            Effect::StartUnit => {
                let _turn = self.starts.acquire().await;
                let process = world.units().start(id).await?;
                self.watch(sandbox, id, process)
            }
            Effect::Watch => match world.units().process(id).await? {
                Some(process) => self.watch(sandbox, id, process),
                None => Err(Error::WrongState("its process is gone".into())),
            },
            Effect::Attach => {
                let process =
                    sandbox.process().ok_or_else(|| Error::WrongState("its process is gone".into()))?;
                let handle = process.try_clone().map_err(|error| Error::Internal(error.to_string()))?;
                let attachment = world.network().attach(id.to_string(), handle).await?;
                record.address = attachment.address;
                Ok(())
            }
            Effect::AwaitApi => world.hypervisor().await_api(id).await,
            Effect::Furnish => self.furnish(sandbox, record, Fill::Baked).await,
            Effect::FurnishPristine => self.furnish(sandbox, record, Fill::Pristine).await,
            Effect::Limit => self.limit(sandbox, id, limits(shape(record)?)).await,
            Effect::Load => world.hypervisor().load(id).await,
            Effect::Unpause => world.hypervisor().resume(id).await,
            Effect::Boot => {
                let shape = shape(record)?;
                let machine = Machine { vcpus: shape.vcpus, memory_mib: shape.memory_mib };
                world.hypervisor().boot(id, machine).await
            }
            Effect::Identify => self.identify(sandbox, record, record.machine_id().map(str::to_owned)).await,
            Effect::Freshen => self.identify(sandbox, record, None).await,
            Effect::GrowDisk => {
                if shape(record)?.disk_grown {
                    world.hypervisor().renew_drive(id, ROOT).await?;
                    world.guest().grow_root(id).await?;
                }
                Ok(())
            }
            Effect::Mount => self.mount_volumes(id, record).await,
            Effect::Halt => self.halt(id).await,
            Effect::Resume => self.let_run(id).await,
            Effect::AbortCapture => world.storage().abort_capture(id.to_string()).await,
            Effect::CaptureImage => {
                let spec = capture::spec(record, &SandboxId::random(), Purpose::Hibernation)?;
                if let Some(inner) = record.sandbox_mut() {
                    inner.image.clone_from(&spec.id);
                }
                self.capture(record, spec, false).await.map(drop)
            }
            Effect::Commit => self.commit(sandbox, record).await,
            Effect::Borrow => self.borrow(sandbox, record).await,
            Effect::FurnishImage => self.furnish_image(sandbox, record).await,
            Effect::GiveBack => {
                self.give_back(sandbox).await;
                Ok(())
            }
            Effect::WarmUp => world.guest().warm_up(id, &shape(record)?.warmup).await,
            Effect::Capture => {
                world.storage().prepare_capture(id.to_string()).await?;
                world.hypervisor().capture(id).await
            }
            Effect::Seal => self.seal(sandbox, &shape(record)?.template).await,
            // PID 1 stops every unit anyway, and only when we are gone: it would keep us waiting.
            Effect::StopUnit | Effect::Detach | Effect::Release if self.leaves_machine(record) => {
                sandbox.set_process(None);
                sandbox.sleep.set_untidy(true);
                Ok(())
            }
            Effect::StopUnit => {
                sandbox.set_process(None);
                world.units().stop(id).await.map(drop)
            }
            Effect::Detach => {
                world.network().detach(id.to_string()).await?;
                Ok(())
            }
            Effect::Release => world.storage().release(id.to_string()).await.map(drop),
            Effect::DropVolumes => self.drop_volumes(record).await,
            Effect::DropImage => self.drop_image(record).await,
            Effect::Forget => self.forget(record).await,
        }
    }

    /// Limits and files, both before the guest runs; they do not wait for each other.
    async fn furnish(&self, sandbox: &Sandbox, record: &Record, fill: Fill) -> Result<()> {
        let (id, shape) = (record.machine(), shape(record)?);
        let start = Instant::now();
        let (filled, limited) = tokio::join!(
            async {
                let filled = self.fill(id, record, shape, fill).await;
                sandbox.timed("storage_fill_us", start);
                filled
            },
            async {
                let limited = self.limit(sandbox, id, limits(shape)).await;
                sandbox.timed("limits_us", start);
                limited
            },
        );
        filled.and(limited)
    }

    async fn fill(&self, id: &SandboxId, record: &Record, shape: &Shape, fill: Fill) -> Result<()> {
        let storage = self.world.storage();
        match record.sandbox().map(|inner| &inner.source).filter(|source| !source.is_empty()) {
            Some(source) => storage.fill_snapshot(id.to_string(), source.clone()).await?,
            None => {
                let disk = if shape.disk_grown { shape.disk_mib } else { 0 };
                storage.fill(id.to_string(), shape.template.clone(), fill, disk).await?;
            }
        }
        self.insert_volumes(id, record).await
    }

    /// Sets limits, unless they are set already: that is what makes a slot cheap to take. `sandbox` is whose unit it is.
    pub async fn limit(&self, sandbox: &Sandbox, id: &SandboxId, limits: Limits) -> Result<()> {
        if sandbox.limits() == Some(limits) {
            return Ok(());
        }
        sandbox.set_limits(None);
        self.world.units().limit(id, limits).await?;
        sandbox.set_limits(Some(limits));
        Ok(())
    }

    /// Limits of the template that was asked for last; before that, of the first one that can be asked for.
    fn expected_limits(&self) -> Option<Limits> {
        let last = self.asked.last();
        let all = self.catalogue.all();
        let baked =
            || all.iter().filter(|template| template.state == TemplateState::Baked && !template.hidden);
        let template =
            baked().find(|template| Some(&template.name) == last.as_ref()).or_else(|| baked().next())?;
        Some(limits(&Shape::of(template, 0)))
    }

    async fn identify(
        &self,
        sandbox: &Sandbox,
        record: &mut Record,
        machine_id: Option<String>,
    ) -> Result<()> {
        let limit = match record.state {
            State::Dressing | State::Creating | State::Waking => RESTORE_ANSWER,
            _ => BOOT_ANSWER,
        };
        let id = &machine(sandbox, record);
        let shape = shape(record)?;
        let identification =
            Identification { machine_id, env: shape.env.clone(), workdir: shape.workdir.clone() };
        let start = Instant::now();
        let answered = tokio::select! {
            answered = self.world.guest().identify(id, &identification, start + limit) => answered?,
            reason = sandbox.aborted() => return Err(Error::WrongState(reason)),
        };
        if let Some(inner) = record.sandbox_mut().filter(|inner| !inner.born) {
            let boot = answered.saturating_duration_since(sandbox.accepted().unwrap_or(start));
            inner.boot_ms = u64::try_from(boot.as_millis()).unwrap_or(u64::MAX);
        }
        Ok(())
    }

    /// A seal flushes a whole snapshot, which may take longer than a reply may: what counts is the template's state.
    async fn seal(&self, sandbox: &Sandbox, template: &str) -> Result<()> {
        let storage = self.world.storage();
        let failure = match storage.seal_template(sandbox.id.to_string(), template.to_owned()).await {
            Err(error @ (Error::Bus(_) | Error::Timeout(_))) => error,
            other => return other,
        };
        let deadline = Instant::now() + Duration::from_secs(120);
        while Instant::now() < deadline {
            sleep(Duration::from_secs(2)).await;
            if let Ok(info) = storage.template(template.to_owned()).await
                && info.state == TemplateState::Baked
            {
                return Ok(());
            }
        }
        Err(failure)
    }

    /// Removes the record; a request that was answered leaves its name behind for a day.
    async fn forget(&self, record: &Record) -> Result<()> {
        let answered = record.sandbox().filter(|inner| inner.born);
        // A fork's request has its tombstone from the moment it is answered.
        let alone = answered.filter(|inner| inner.forked.is_none());
        let tombstone = alone.filter(|inner| !is_anonymous(&inner.request)).map(|inner| Tombstone {
            request: inner.request.clone(),
            fingerprint: inner.asked(),
            id: record.id.clone(),
            until_unix_ms: record.created_unix_ms.saturating_add(REQUEST_KEPT_MS),
            fork: None,
        });
        let nameless = alone.filter(|inner| is_anonymous(&inner.request)).map(|inner| &inner.request);
        let (records, tombstones) = (Arc::clone(&self.records), Arc::clone(&self.tombstones));
        let (key, now) = (record.id.to_string(), self.unix_ms());
        blocking(move || {
            if let Some(tombstone) = tombstone.filter(|left| left.until_unix_ms > now) {
                match tombstones.put(&request_key(&tombstone.request), &tombstone) {
                    // A sandbox that cannot be removed would keep the disk full: rather a request that may be made again.
                    Err(error @ RecordsError::Full { .. }) => {
                        tracing::error!("a request is not remembered: {}", pandastack_daemon::chain(&error));
                    }
                    other => other?,
                }
            }
            records.remove(&key).map(drop)
        })
        .await?;
        self.history.gone(self.unix_ms(), record);
        if let Some(request) = nameless {
            self.requests.leave(request);
        }
        Ok(())
    }

    /// Makes a record durable.
    ///
    /// # Errors
    /// The disk does not take it.
    pub async fn save(&self, record: &Record) -> Result<()> {
        let (records, kept) = (Arc::clone(&self.records), record.clone());
        blocking(move || records.put(kept.id.as_str(), &kept)).await?;
        self.history.durable(record, &self.more_of(record));
        Ok(())
    }

    /// What its last event does not say by itself: how long it took until the guest was there.
    fn more_of(&self, record: &Record) -> BTreeMap<String, String> {
        let (Some(inner), Some(last)) = (record.sandbox(), record.events.last()) else {
            return BTreeMap::new();
        };
        let boot_ms = match &*last.kind {
            // A cold boot keeps the figure of its creation.
            "sandbox.running" if inner.boot_mode != "cold" => inner.boot_ms,
            "sandbox.woken" => {
                let timings = self.find(&record.id).map(|sandbox| sandbox.timings()).unwrap_or_default();
                let steps = ["borrow_us", "limits_and_fill_us", "load_us", "hello_and_freshen_us"];
                let took = |name: &str| steps.iter().any(|step| name.strip_prefix("wake_") == Some(*step));
                timings.iter().filter(|(name, _)| took(name)).map(|(_, micros)| micros).sum::<u64>() / 1000
            }
            _ => return BTreeMap::new(),
        };
        BTreeMap::from([
            ("boot_ms".to_owned(), boot_ms.to_string()),
            ("boot_mode".to_owned(), inner.boot_mode.clone()),
            ("template".to_owned(), inner.spec.template.clone()),
        ])
    }

    /// Reports the end of this process as an event, unless the watch is given up first.
    pub fn watch(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        machine: &SandboxId,
        process: Process,
    ) -> Result<()> {
        // SAFETY: an `Arc<OwnedFd>` keeps its descriptor open and answers with the same one for as long as it lives.
        let handle = unsafe { AsyncFd::register_with_interest(Arc::clone(&process), Interest::READABLE) }
            .map_err(|error| Error::Internal(format!("its process cannot be watched: {error}")))?;
        let (manager, sandbox_kept) = (Arc::downgrade(self), Arc::downgrade(sandbox));
        let (machine, watched) = (machine.clone(), Arc::clone(&process));
        let watcher = tokio::spawn(async move {
            if handle.readable().await.is_err() {
                return;
            }
            let (Some(manager), Some(sandbox)) = (manager.upgrade(), sandbox_kept.upgrade()) else { return };
            let reason = manager.world.units().obituary(&machine).await;
            // From here on in a task of its own: the event stops this watch.
            tokio::spawn(async move {
                if !sandbox.has_process(&watched) {
                    return;
                }
                sandbox.abort(&reason);
                let mut with = Happening::because(reason);
                let target = Arc::clone(&sandbox);
                // By the time of its turn it may be hibernated, and even have another machine.
                with.guard = Some(Box::new(move |_| target.has_process(&watched)));
                let _ = manager.happen(&sandbox, Event::Died, with).await;
            });
        });
        sandbox.set_process(Some((process, watcher.abort_handle())));
        Ok(())
    }
}

/// The machine that an effect is about: while it is woken, the borrowed slot's.
fn machine(sandbox: &Sandbox, record: &Record) -> SandboxId {
    let slot = sandbox.sleep.slot().filter(|_| record.state == State::Waking);
    slot.map_or_else(|| record.machine().clone(), |slot| slot.id.clone())
}

/// What its machine is made of.
///
/// # Errors
/// It is a slot.
pub fn shape(record: &Record) -> Result<&Shape> {
    record.shape().ok_or_else(|| Error::Internal("a slot has no machine yet".into()))
}

/// What a machine of this shape may take of the host.
pub fn limits(shape: &Shape) -> Limits {
    // The guest's memory and Firecracker's own can never be more than the first two. The quarter is room for the page cache of
    // the snapshot's memory file, which is charged to whoever touches it first: without it the first sandbox of a
    // template would reclaim its own pages all the time. A bake, which writes that file, is bounded the same way.
    let memory_mib = shape.memory_mib + OVERHEAD_MIB + shape.memory_mib / 4;
    Limits { memory_bytes: memory_mib << 20, cpu_usec_per_sec: u64::from(shape.vcpus.max(1)) * 1_000_000 }
}

async fn blocking(
    work: impl FnOnce() -> std::result::Result<(), RecordsError> + Send + 'static,
) -> Result<()> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error @ RecordsError::Full { .. })) => Err(Error::NoSpace(pandastack_daemon::chain(&error))),
        Ok(Err(error)) => Err(Error::Internal(pandastack_daemon::chain(&error))),
        Err(error) => Err(Error::Internal(format!("a task ended early: {error}"))),
    }
}
