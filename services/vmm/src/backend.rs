//! The bus interface `ai.pandastack.vmm1` over the manager: each method as its sentence in `pandastack_bus::vmm` says.
//!
//! Owns: nothing. Refuses to know: how.

use std::{os::fd::OwnedFd, sync::Arc, time::Duration};

use pandastack_bus::{
    Error, Result, SandboxId,
    quota::{Quota, Resource},
    storage::{SnapshotInfo, VolumeSnapshotInfo, VolumeSnapshotSpec},
    vmm::{
        Capacity, Child, Event as Happened, Fork, HistoryPage, HistoryQuery, SandboxInfo, SandboxSpec,
        Series, State as Public, VmmBackend, unknown_sandbox,
    },
};
use tokio::time::timeout;

use crate::{
    console::{self, Wanted},
    machine::{Event, State},
    manager::Manager,
    ports::{Guest, Units, World},
    sandbox::{Happening, Sandbox},
};

/// Longest idle limit, seconds: a hundred years.
const TTL_LIMIT: u64 = 100 * 366 * 86400;

/// Labels of a sandbox, those it was made with included, and bytes of one that is set later.
const LABELS: usize = 128;
const LABEL_KEY: usize = 64;
const LABEL_VALUE: usize = 256;

/// How long a request waits for a sandbox that is booted again. Below the time that the bus waits for a reply.
const RECOVERY: Duration = Duration::from_secs(20);

/// The manager, as the bus sees it.
#[derive(Debug)]
pub struct Backend<W>(pub Arc<Manager<W>>);

impl<W: World> VmmBackend for Backend<W> {
    async fn create(&self, request: String, mut spec: SandboxSpec) -> Result<SandboxInfo> {
        spec.ttl_seconds = spec.ttl_seconds.min(TTL_LIMIT);
        self.0.create(request, spec).await
    }

    async fn get(&self, id: String) -> Result<SandboxInfo> {
        self.0.info(&id)
    }

    async fn list(&self, workspace: String) -> Result<Vec<SandboxInfo>> {
        let now = self.0.now_ms();
        let all = self.0.all();
        let infos = all.iter().filter_map(|sandbox| sandbox.record().info(sandbox.idle_seconds(now)));
        let mut infos: Vec<_> =
            infos.filter(|info| workspace.is_empty() || info.workspace == workspace).collect();
        infos.sort_by(|one, two| (one.created_unix_ms, &one.id).cmp(&(two.created_unix_ms, &two.id)));
        Ok(infos)
    }

    async fn delete(&self, id: String) -> Result<bool> {
        let Ok(sandbox) = self.0.sandbox(&id) else { return Ok(false) };
        if sandbox.record().state != State::Running {
            sandbox.abort("it is being deleted");
        }
        match self.0.happen(&sandbox, Event::Delete, Happening::because("deleted")).await? {
            State::Gone => Ok(true),
            other => Err(Error::Internal(format!("it is still {other:?}"))),
        }
    }

    async fn set_ttl(&self, id: String, ttl_seconds: u64) -> Result<SandboxInfo> {
        if ttl_seconds == 0 {
            return Err(Error::InvalidArgument("the idle limit is at least one second".into()));
        }
        let sandbox = self.0.sandbox(&id)?;
        let ttl = ttl_seconds.min(TTL_LIMIT);
        let change = move |inner: &mut crate::record::Sandbox| {
            inner.spec.ttl_seconds = ttl;
            Ok(())
        };
        self.0.amend(&sandbox, change).await?;
        self.0.info(&id)
    }

    async fn set_persistent(&self, id: String, persistent: bool) -> Result<SandboxInfo> {
        let sandbox = self.0.sandbox(&id)?;
        let change = move |inner: &mut crate::record::Sandbox| {
            inner.spec.persistent = persistent;
            Ok(())
        };
        self.0.amend(&sandbox, change).await?;
        self.0.info(&id)
    }

    async fn set_label(&self, id: String, key: String, value: String) -> Result<SandboxInfo> {
        if !(1..=LABEL_KEY).contains(&key.len()) || value.len() > LABEL_VALUE {
            return Err(Error::InvalidArgument(format!(
                "a label has 1 to {LABEL_KEY} bytes and a value of at most {LABEL_VALUE}"
            )));
        }
        let sandbox = self.0.sandbox(&id)?;
        let change = move |inner: &mut crate::record::Sandbox| {
            let labels = &mut inner.spec.metadata;
            if value.is_empty() {
                labels.remove(&key);
            } else if labels.len() >= LABELS && !labels.contains_key(&key) {
                return Err(Error::Quota(format!("a sandbox has at most {LABELS} labels")));
            } else {
                labels.insert(key, value);
            }
            Ok(())
        };
        self.0.amend(&sandbox, change).await?;
        self.0.info(&id)
    }

    async fn touch(&self, ids: Vec<String>) -> Result<()> {
        let now = self.0.now_ms();
        for id in ids.iter().filter_map(|id| id.parse::<SandboxId>().ok()) {
            if let Some(sandbox) = self.0.find(&id) {
                sandbox.touch(now);
            }
        }
        Ok(())
    }

    async fn open_agent(&self, id: String, wake: bool) -> Result<OwnedFd> {
        self.0.world.guest().open(&self.reachable(&id, wake).await?).await
    }

    async fn open_port(&self, id: String, port: u16, wake: bool) -> Result<(OwnedFd, Vec<u8>)> {
        if port == 0 {
            return Err(Error::InvalidArgument("a port is 1 to 65535".into()));
        }
        self.0.world.guest().forward(&self.reachable(&id, wake).await?, port).await
    }

    async fn open_console(&self, id: String, lines: u32, since: u64, follow: bool) -> Result<OwnedFd> {
        let record = self.0.sandbox(&id)?.record();
        let workspace = record.sandbox().map_or("", |inner| &inner.spec.workspace);
        let place = self.0.consoles.enter(workspace)?;
        let wanted = Wanted { lines: lines.min(console::LINES), since, follow };
        self.0.world.units().console(record.machine(), wanted, place).await
    }

    async fn pause(&self, id: String) -> Result<SandboxInfo> {
        self.order(&id, Event::Pause).await
    }

    async fn resume(&self, id: String) -> Result<SandboxInfo> {
        self.order(&id, Event::Resume).await
    }

    async fn hibernate(&self, id: String) -> Result<SandboxInfo> {
        let sandbox = self.0.sandbox(&id)?;
        sandbox.touch(self.0.now_ms());
        let done = self.0.hibernate(&sandbox, Happening::default()).await;
        self.told(&sandbox, done)
    }

    async fn wake(&self, id: String) -> Result<SandboxInfo> {
        let sandbox = self.0.sandbox(&id)?;
        let done = self.0.wake(&sandbox).await;
        self.told(&sandbox, done)
    }

    async fn hibernate_all(&self) -> Result<Vec<String>> {
        let manager = Arc::clone(&self.0);
        // To its end, also when its caller's patience ends first.
        let task = tokio::spawn(async move { manager.hibernate_all().await });
        task.await.map_err(|error| Error::Internal(error.to_string()))
    }

    async fn snapshot(&self, id: String, snapshot: String) -> Result<SnapshotInfo> {
        self.0.snapshot(id, snapshot).await
    }

    async fn snapshot_volume(&self, spec: VolumeSnapshotSpec) -> Result<VolumeSnapshotInfo> {
        self.0.snapshot_volume(spec).await
    }

    async fn fork(&self, request: String, id: String, mut children: Vec<Child>) -> Result<Fork> {
        for child in &mut children {
            child.ttl_seconds = child.ttl_seconds.min(TTL_LIMIT);
        }
        self.0.fork(request, id, children).await
    }

    async fn events(&self, id: String) -> Result<Vec<Happened>> {
        Ok(self.0.sandbox(&id)?.record().events.clone())
    }

    async fn history(&self, query: HistoryQuery) -> Result<HistoryPage> {
        Ok(self.0.history.page(&query))
    }

    async fn metrics(
        &self,
        workspace: String,
        id: String,
        from: u64,
        to: u64,
        step: u32,
    ) -> Result<Vec<Series>> {
        if !id.is_empty() {
            self.0.sandbox(&id)?;
        }
        Ok(self.0.meter.series(&workspace, &id, from, to, step))
    }

    async fn capacity(&self) -> Result<Capacity> {
        self.0.capacity()
    }

    async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        self.0.set_quota(workspace, resource, limit).await
    }

    async fn quotas(&self, workspace: String) -> Result<Vec<Quota>> {
        self.0.quota_lines(&workspace).await
    }

    async fn create_timings(&self, id: String) -> Result<Vec<(String, u64)>> {
        Ok(self.0.sandbox(&id)?.timings())
    }
}

impl<W: World> Backend<W> {
    /// The machine of a sandbox whose guest takes requests now: on its way there, it is waited for; asleep, it is woken if
    /// `wake` says so.
    async fn reachable(&self, id: &str, wake: bool) -> Result<SandboxId> {
        let sandbox = self.0.sandbox(id)?;
        sandbox.touch(self.0.now_ms());
        match sandbox.record().state {
            State::Running | State::Creating => {}
            // Also between two attempts, when nothing is being done to it.
            State::Recovering => {
                let back = sandbox.until(|state| state != State::Recovering);
                if timeout(RECOVERY, back).await.is_err() {
                    return Err(Error::NotReady("the sandbox is being booted again; try again soon".into()));
                }
            }
            // On its way to somewhere: what counts is where it gets to.
            _ => sandbox.settled().await,
        }
        if wake && sandbox.record().state == State::Hibernated {
            self.told(&sandbox, self.0.wake(&sandbox).await)?;
        }
        let record = sandbox.record();
        match (record.state, record.public_state()) {
            (State::Running, _) => Ok(record.machine().clone()),
            (_, Some(state)) => {
                Err(Error::WrongState(format!("the sandbox is {}, not running", state.as_str())))
            }
            (_, None) => Err(unknown_sandbox(id)),
        }
    }

    async fn order(&self, id: &str, event: Event) -> Result<SandboxInfo> {
        let sandbox = self.0.sandbox(id)?;
        sandbox.touch(self.0.now_ms());
        let done = self.0.happen(&sandbox, event, Happening::default()).await;
        self.told(&sandbox, done.map(drop))
    }

    /// What the caller of a verb is told: the sandbox as it is now, or in the words of the API why not.
    fn told(&self, sandbox: &Sandbox, done: Result<()>) -> Result<SandboxInfo> {
        match done {
            Ok(()) => self.0.info(sandbox.id.as_str()),
            Err(Error::WrongState(text)) => {
                let state = sandbox.record().public_state();
                Err(state.map_or_else(
                    || unknown_sandbox(sandbox.id.as_str()),
                    |state: Public| Error::WrongState(format!("the sandbox is {}: {text}", state.as_str())),
                ))
            }
            Err(error) => Err(error),
        }
    }
}
