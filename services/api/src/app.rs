//! What the handlers share.
//!
//! Owns: the proxies to vmm, storage and edge, the ownership cache. A sandbox's workspace never changes and an id is never
//! used twice, so a stale entry can only lead to vmm's own "not found".

use std::{
    collections::HashMap,
    future::ready,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::StreamExt;
use pandastack_bus::{
    SandboxId,
    edge::EdgeProxy,
    storage::{StorageProxy, Usage},
    vmm::{Capacity, SandboxInfo, VmmProxy},
    zbus,
};

use pandastack_proxy::{Proxy, touch::Touch};

use crate::{
    audit::Audit,
    auth::Caller,
    builds::{Builds, runner},
    bus::again,
    catalogue::Catalogue,
    fresh::Fresh,
    guest::Guests,
    happenings::Happenings,
    limit::Limiter,
    metrics::Metrics,
    output::Budget,
    problem::{Effect, Problem},
    routes::kernels::Kernels,
    tenancy::Tenancy,
};

const OWNERS_KEPT: usize = 16_384;

/// The last answers of the daemons to health checks and metrics; `None` when one did not answer.
#[derive(Debug, Default)]
pub struct Public {
    /// vmm's capacity.
    pub capacity: Fresh<Option<Capacity>>,
    /// Space on the data partition.
    pub storage: Fresh<Option<Usage>>,
    /// Sandboxes by state.
    pub states: Fresh<Option<crate::metrics::States>>,
}

/// Shared by every request.
#[derive(Debug)]
pub struct App {
    /// Workspaces and tokens.
    pub tenancy: Tenancy,
    /// Who changed what.
    pub audit: Arc<Audit>,
    /// The conductor.
    pub vmm: VmmProxy<'static>,
    /// The catalogue of templates.
    pub storage: StorageProxy<'static>,
    /// What it said lately.
    pub catalogue: Catalogue,
    /// Who has the tokens of signed previews.
    pub edge: EdgeProxy<'static>,
    /// The way to programs in guests.
    pub proxy: Arc<Proxy>,
    /// Conversations with guests.
    pub guests: Arc<Guests>,
    /// How the kernels in a guest are asked.
    pub kernels: Kernels,
    /// Builds of templates.
    pub builds: Arc<Builds>,
    /// Hints at events.
    pub happenings: Happenings,
    /// Activity.
    pub touch: Arc<Touch>,
    /// Requests per workspace.
    pub limiter: Limiter,
    /// Counters.
    pub metrics: Metrics,
    /// Memory for collected output.
    pub budget: Budget,
    /// What anybody may ask without a token, so that it costs the daemons one call per second at most.
    pub public: Public,
    owners: Mutex<HashMap<String, String>>,
}

impl App {
    /// Over a bus connection on which vmm and storage are, or will be.
    pub async fn new(
        bus: &zbus::Connection,
        tenancy: Tenancy,
        audit: Arc<Audit>,
        builds: Arc<Builds>,
    ) -> zbus::Result<Arc<Self>> {
        Self::with_kernels(bus, tenancy, audit, builds, Kernels::default()).await
    }

    /// The same for guests whose kernels are asked in another way.
    pub async fn with_kernels(
        bus: &zbus::Connection,
        tenancy: Tenancy,
        audit: Arc<Audit>,
        builds: Arc<Builds>,
        kernels: Kernels,
    ) -> zbus::Result<Arc<Self>> {
        // No property caches: nothing of ours has properties, and a daemon that is away must not fail this.
        let vmm = VmmProxy::builder(bus).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
        let storage =
            StorageProxy::builder(bus).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
        let edge = EdgeProxy::builder(bus).cache_properties(zbus::proxy::CacheProperties::No).build().await?;
        let touch = Arc::<Touch>::default();
        Ok(Arc::new(Self {
            tenancy,
            audit,
            edge,
            proxy: Proxy::new(vmm.clone(), Arc::clone(&touch)),
            guests: Guests::new(vmm.clone()),
            vmm,
            storage,
            catalogue: Catalogue::default(),
            kernels,
            builds,
            happenings: Happenings::default(),
            touch,
            limiter: Limiter::default(),
            metrics: Metrics::default(),
            budget: Budget::default(),
            public: Public::default(),
            owners: Mutex::default(),
        }))
    }

    /// Starts what runs beside the requests, until the runtime ends; signals are followed as long as the bus is there,
    /// which is as long as the daemon.
    pub async fn start(self: &Arc<Self>) -> zbus::Result<()> {
        let this = Arc::clone(self);
        tokio::spawn(self.vmm.receive_changed().await?.for_each(move |change| {
            match change.args() {
                Ok(gone) if matches!(*gone.state(), "" | "failed") => this.forget(gone.id()),
                Ok(change) => this.guests.changed(change.id(), change.state()),
                Err(_) => {}
            }
            ready(())
        }));
        let guests = Arc::clone(&self.guests);
        tokio::spawn(self.vmm.receive_captured().await?.for_each(move |captured| {
            if let Ok(captured) = captured.args() {
                guests.cut(captured.id());
            }
            ready(())
        }));
        let happenings = self.happenings.clone();
        tokio::spawn(self.vmm.receive_happened().await?.for_each(move |hint| {
            if let Ok(hint) = hint.args() {
                happenings.hint(hint.workspace(), hint.id());
            }
            ready(())
        }));
        let this = Arc::clone(self);
        tokio::spawn(self.storage.receive_template_changed().await?.for_each(move |_| {
            this.catalogue.changed();
            ready(())
        }));
        self.proxy.follow(&self.vmm).await?;
        tokio::spawn(runner::run(Arc::clone(self)));
        tokio::spawn(Arc::clone(&self.touch).run(self.vmm.clone()));
        let guests = Arc::clone(&self.guests);
        tokio::spawn(async move {
            let mut every = tokio::time::interval(std::time::Duration::from_secs(20));
            loop {
                every.tick().await;
                guests.sweep();
            }
        });
        Ok(())
    }

    /// Makes sure that a sandbox is the caller's. Usually without asking anybody.
    pub async fn own(&self, caller: &Caller, id: &str) -> Result<(), Problem> {
        let known = self.owners.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        match known {
            Some(workspace) if workspace == caller.workspace => Ok(()),
            Some(_) => Err(Problem::no_sandbox(id)),
            None => self.get_own(caller, id).await.map(drop),
        }
    }

    /// A sandbox of the caller's, fresh from vmm.
    pub async fn get_own(&self, caller: &Caller, id: &str) -> Result<SandboxInfo, Problem> {
        let Ok(id) = id.parse::<SandboxId>() else { return Err(Problem::no_sandbox(id)) };
        let info = again(|| self.vmm.get(id.to_string())).await.map_err(|error| match error {
            pandastack_bus::Error::NotFound(_) => {
                self.forget(id.as_str());
                Problem::no_sandbox(id.as_str())
            }
            other => Problem::about(id.as_str(), &other, Effect::None),
        })?;
        self.remember(&info);
        if info.workspace == caller.workspace { Ok(info) } else { Err(Problem::no_sandbox(id.as_str())) }
    }

    /// Remembers whose a sandbox is.
    pub fn remember(&self, info: &SandboxInfo) {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        if owners.len() >= OWNERS_KEPT {
            owners.clear();
        }
        if !owners.contains_key(&info.id) {
            owners.insert(info.id.clone(), info.workspace.clone());
        }
    }

    /// Forgets a sandbox that is gone.
    pub fn forget(&self, id: &str) {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        self.guests.forget(id);
    }
}
