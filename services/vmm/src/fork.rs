//! A fork: one capture, and children of it side by side.
//!
//! Owns: that room for all children is there before anything is made, their order, and the one answer per request. Refuses
//! to know: how a capture is taken (`capture`), how a slot becomes a sandbox (`create`).

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use pandastack_bus::{
    Error, Result, SandboxId,
    storage::Purpose,
    vmm::{Birth, Child, Fork, SandboxSpec},
};
use tokio::time::Instant;

use crate::{
    admission::{self, Host},
    capture::{self, Captured},
    create::{Pending, REQUEST_LIMIT, Requests, UnderWay},
    manager::Manager,
    ports::World,
    quota::Claim,
    record::{
        Forked, REQUEST_KEPT_MS, Record, Sandbox as Inner, Shape, Tombstone, fingerprint, is_anonymous,
        request_key,
    },
    sandbox::Sandbox,
};

/// Most children of one fork.
const CHILDREN: usize = 16;
/// From the capture on all children are made within this; its callers ask again until then.
const BIRTHS: Duration = Duration::from_secs(120);
/// Disk that each child needs to start to differ, MiB.
const CHILD_DISK_MIB: u64 = 64;

impl<W: World> Manager<W> {
    /// Forks a sandbox, or answers with what this request made before.
    ///
    /// # Errors
    /// No child was made, and nothing is left.
    pub async fn fork(self: &Arc<Self>, request: String, id: String, children: Vec<Child>) -> Result<Fork> {
        validate(&request, &children)?;
        self.check_open()?;
        let accepted = Instant::now();
        let asked = fingerprint(&(&id, &children));
        let (manager, name, fingerprint) = (Arc::clone(self), request.clone(), asked.clone());
        let work = async move { manager.fork_whole(accepted, name, fingerprint, id, children).await };
        self.once(|manager| &manager.forks, true, request, &asked, work).await
    }

    async fn fork_whole(
        self: &Arc<Self>,
        accepted: Instant,
        request: String,
        asked: String,
        id: String,
        children: Vec<Child>,
    ) -> Result<Fork> {
        let count = children.len();
        let forked = self.fork_counted(accepted, &request, &asked, &id, children).await;
        let made = match &forked {
            Ok(fork) => fork.children.iter().filter(|birth| birth.error.is_empty()).count(),
            Err(error) => {
                tracing::warn!(sandbox = id, "a fork was refused or failed: {}", error.message());
                0
            }
        };
        self.created.fetch_add(made as u64, Ordering::Relaxed);
        self.refused.fetch_add((count - made) as u64, Ordering::Relaxed);
        if let Ok(fork) = &forked {
            self.remember_fork(request, asked, fork).await;
        }
        forked
    }

    async fn fork_counted(
        self: &Arc<Self>,
        accepted: Instant,
        request: &str,
        asked: &str,
        id: &str,
        children: Vec<Child>,
    ) -> Result<Fork> {
        let parent = self.sandbox(id)?;
        parent.touch(self.now_ms());
        let record = parent.record();
        let inner = record.sandbox().cloned().ok_or_else(|| pandastack_bus::vmm::unknown_sandbox(id))?;
        let count = children.len() as u64;
        let claims = self.claim(&inner.spec.workspace, &inner.shape, count)?;
        let need = admission::need_mib(inner.shape.memory_mib);
        let host = self.host()?;
        let others = host.memory_pending_mib + need * (count - 1);
        let host = Host { memory_pending_mib: others, ..host };
        admission::admit(&host, inner.shape.memory_mib, CHILD_DISK_MIB * count)?;
        let _pending = Pending::new(&self.pending_mib, need * count);
        let _under_way = UnderWay::new(&self.creating);
        let snapshot = SandboxId::random();
        let captured = self.capture_parent(&parent, &snapshot).await;
        let fork = match captured {
            Ok(captured) => {
                let template = Template { request, asked, inner: &inner, captured: &captured };
                Ok(self.bear_all(accepted, &parent, &template, children, claims).await)
            }
            Err(error) => Err(error),
        };
        // Also when it failed: nobody knows whether a call whose reply got lost had an effect.
        self.discard(snapshot.to_string());
        fork?
    }

    async fn capture_parent(&self, parent: &Arc<Sandbox>, snapshot: &SandboxId) -> Result<Captured> {
        let _turn = parent.turn().await;
        let record = parent.record();
        let spec = capture::spec(&record, snapshot, Purpose::Fork)?;
        self.capture_somehow(&record, spec).await
    }

    /// Makes the children; at least one, or it fails.
    async fn bear_all(
        self: &Arc<Self>,
        accepted: Instant,
        parent: &Arc<Sandbox>,
        template: &Template<'_>,
        children: Vec<Child>,
        claims: Vec<Claim<'_>>,
    ) -> Result<Fork> {
        let count = children.len();
        let deadline = Instant::now() + BIRTHS;
        let children = children.into_iter().enumerate();
        let children = children.map(|(index, child)| template.child(parent.id.as_str(), child, index, count));
        let mut births = Vec::with_capacity(count);
        for (child, mut claim) in children.zip(claims) {
            // How many at the same time is bounded there.
            births.push(async move { self.place(accepted, deadline, &mut claim, &child).await });
        }
        let births = join_all(births).await;
        if births.iter().all(Result::is_err) {
            let first = births.into_iter().find_map(Result::err);
            return Err(first.unwrap_or_else(|| Error::Internal("no child was asked for".into())));
        }
        let made = births.iter().filter(|birth| birth.is_ok()).count();
        self.tell_fork(template, parent, &births);
        let (manager, parent) = (Arc::clone(self), Arc::clone(parent));
        tokio::spawn(async move {
            let _turn = parent.turn().await;
            manager.noted(&parent, "sandbox.forked", &format!("{made} of {count} children")).await;
        });
        let birth = |made: Result<SandboxId>| match made {
            Ok(id) => Birth { id: id.to_string(), error: String::new() },
            Err(error) => Birth { id: String::new(), error: error.message() },
        };
        Ok(template.answer(births.into_iter().map(birth).collect()))
    }

    /// What became of each child; nothing of it is in the parent's record.
    fn tell_fork(&self, template: &Template<'_>, parent: &Sandbox, births: &[Result<SandboxId>]) {
        let (now, workspace) = (self.unix_ms(), &template.inner.spec.workspace);
        let mut children = Vec::new();
        for (index, birth) in births.iter().enumerate() {
            match birth {
                Ok(id) => children.push(id.as_str()),
                Err(error) => {
                    let why =
                        [("index".to_owned(), index.to_string()), ("error".to_owned(), error.message())];
                    self.history.append(now, workspace, &parent.id, "fork.child_failed", why.into());
                }
            }
        }
        let what = [
            ("children".to_owned(), children.join(",")),
            ("snapshot".to_owned(), template.captured.info.spec.id.clone()),
            ("failed".to_owned(), (births.len() - children.len()).to_string()),
        ];
        self.history.append(now, workspace, &parent.id, "fork.completed", what.into());
    }

    /// The answer survives the daemon, unless its request has no name.
    async fn remember_fork(&self, request: String, asked: String, fork: &Fork) {
        let first = fork.children.iter().find_map(|birth| birth.id.parse::<SandboxId>().ok());
        let Some(id) = first.filter(|_| !is_anonymous(&request)) else { return };
        let until_unix_ms = self.unix_ms().saturating_add(REQUEST_KEPT_MS);
        let key = request_key(&request);
        let tombstone =
            Tombstone { request, fingerprint: asked, id, until_unix_ms, fork: Some(fork.clone()) };
        let tombstones = Arc::clone(&self.tombstones);
        // The children say most of it, too: not worth a failure.
        match tokio::task::spawn_blocking(move || tombstones.put(&key, &tombstone)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!("a fork is not remembered: {}", pandastack_daemon::chain(&error));
            }
            Err(error) => tracing::error!("a fork is not remembered: {error}"),
        }
    }
}

fn validate(request: &str, children: &[Child]) -> Result<()> {
    let refuse = |text: &str| Err(Error::InvalidArgument(text.into()));
    if request.len() > REQUEST_LIMIT {
        return refuse("the request's name is too long");
    }
    if children.is_empty() || children.len() > CHILDREN {
        return refuse("a fork makes 1 to 16 children");
    }
    if children.iter().any(|child| child.ttl_seconds == 0) {
        return refuse("the idle limit is at least one second");
    }
    Ok(())
}

/// What the children have in common.
struct Template<'a> {
    request: &'a str,
    asked: &'a str,
    inner: &'a Inner,
    captured: &'a Captured,
}

impl Template<'_> {
    fn child(&self, parent: &str, child: Child, index: usize, count: usize) -> Inner {
        let captured = &self.captured.info.spec;
        let spec = SandboxSpec {
            metadata: child.metadata,
            ttl_seconds: child.ttl_seconds,
            persistent: child.persistent,
            snapshot: String::new(),
            volumes: Vec::new(),
            ..self.inner.spec.clone()
        };
        let shape = Shape { disk_grown: false, ..self.inner.shape.clone() };
        let forked = Forked {
            parent: parent.to_owned(),
            snapshot: captured.id.clone(),
            unix_ms: self.captured.unix_ms,
            paused_us: micros(self.captured.paused),
            index,
            count,
        };
        Inner {
            source: captured.id.clone(),
            clones: captured.volumes.clone(),
            forked: Some(forked),
            ..Inner::new(self.request, self.asked.to_owned(), spec, shape, "fork")
        }
    }

    fn answer(&self, children: Vec<Birth>) -> Fork {
        Fork {
            snapshot: self.captured.info.spec.id.clone(),
            unix_ms: self.captured.unix_ms,
            paused_us: micros(self.captured.paused),
            children,
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Requests<Fork> {
    /// Takes over what is on record: answers, and for a fork that a crash cut short, the children that were made.
    pub fn load(&self, sandboxes: &[Arc<Sandbox>], tombstones: &[(String, Tombstone)], now_unix_ms: u64) {
        for record in sandboxes.iter().map(|sandbox| sandbox.record()) {
            let Some((inner, forked)) = child(&record) else { continue };
            let mut fork = self.remembered(&inner.request).unwrap_or_else(|| Fork {
                snapshot: forked.snapshot.clone(),
                unix_ms: forked.unix_ms,
                paused_us: forked.paused_us,
                children: vec![
                    Birth {
                        id: String::new(),
                        error: "the daemon was restarted before it was made".into()
                    };
                    forked.count.min(CHILDREN)
                ],
            });
            if let Some(birth) = fork.children.get_mut(forked.index) {
                *birth = Birth { id: record.id.to_string(), error: String::new() };
            }
            let until = record.created_unix_ms.saturating_add(REQUEST_KEPT_MS);
            self.remember(&inner.request, inner.asked(), until, fork);
        }
        // What was answered counts more than what is left of it.
        for (_, left) in tombstones.iter().filter(|(_, left)| left.until_unix_ms > now_unix_ms) {
            if let Some(fork) = &left.fork {
                self.remember(&left.request, left.fingerprint.clone(), left.until_unix_ms, fork.clone());
            }
        }
    }
}

fn child(record: &Record) -> Option<(&Inner, &Forked)> {
    let inner = record.sandbox().filter(|inner| inner.born && !inner.request.is_empty())?;
    Some((inner, inner.forked.as_ref()?))
}
