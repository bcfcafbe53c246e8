//! The bus interface `ai.pandastack.vmm1` over the manager: each method as its sentence in `pandastack_bus::vmm` says.
//!
//! Owns: nothing. Refuses to know: how.

use std::{os::fd::OwnedFd, sync::Arc};

use pandastack_bus::{
    Error, Result, SandboxId,
    vmm::{Capacity, Event as Happened, SandboxInfo, SandboxSpec, VmmBackend},
};

use crate::{
    machine::{Event, State},
    manager::Manager,
    ports::{Guest, World},
    sandbox::Happening,
};

/// Longest idle limit, seconds: a hundred years.
const TTL_LIMIT: u64 = 100 * 366 * 86400;

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
        self.0.amend(&sandbox, move |inner| inner.spec.ttl_seconds = ttl).await?;
        self.0.info(&id)
    }

    async fn set_persistent(&self, id: String, persistent: bool) -> Result<SandboxInfo> {
        let sandbox = self.0.sandbox(&id)?;
        self.0.amend(&sandbox, move |inner| inner.spec.persistent = persistent).await?;
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

    async fn open_agent(&self, id: String) -> Result<OwnedFd> {
        let sandbox = self.0.sandbox(&id)?;
        sandbox.touch(self.0.now_ms());
        match sandbox.record().state {
            State::Running => self.0.world.guest().open(&sandbox.id).await,
            _ => {
                let state =
                    sandbox.record().public_state().map_or("gone", pandastack_bus::vmm::State::as_str);
                Err(Error::WrongState(format!("the sandbox is {state}, not running")))
            }
        }
    }

    async fn events(&self, id: String) -> Result<Vec<Happened>> {
        Ok(self.0.sandbox(&id)?.record().events.clone())
    }

    async fn capacity(&self) -> Result<Capacity> {
        self.0.capacity()
    }

    async fn create_timings(&self, id: String) -> Result<Vec<(String, u64)>> {
        Ok(self.0.sandbox(&id)?.timings())
    }
}
