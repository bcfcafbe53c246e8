//! The attachments of all sandboxes.
//!
//! Owns: the order record → namespace and rules → answer, and its reverse; one thing at a time per sandbox, different
//! sandboxes side by side. Refuses to know: the bus, and what a sandbox is for.

use std::{
    collections::HashMap,
    future::Future,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pandastack_bus::{
    self as bus, SandboxId,
    network::{Attachment, NetworkBackend},
};
use tokio::sync::OwnedMutexGuard;

use crate::{
    attach,
    error::{Error, Result},
    firewall::Firewall,
    ledger::Ledger,
    link::Netlink,
    netns,
    plan::{self, Owner},
    tap,
};

/// How long the work inside a namespace may take: far more than it does, and less than a caller waits.
const ATTACH_LIMIT: Duration = Duration::from_secs(20);

/// What the daemon is told about its machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of the records.
    pub records: PathBuf,
    /// The `nft` program.
    pub nft: PathBuf,
    /// Group that may open the taps; `None` leaves them to whoever has the right to make one.
    pub tap_group: Option<u32>,
}

/// The network daemon without its bus. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Manager(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    config: Config,
    ledger: Ledger,
    firewall: Firewall,
    host: Netlink,
    busy: Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>>,
}

impl Manager {
    /// Derives the host's side from the records: rules, the host's address, and no link without an owner.
    ///
    /// Rules come first and replace the old ones in one transaction, so that a restart neither opens a gap nor
    /// interrupts a connection.
    ///
    /// # Errors
    /// Records cannot be read, rules cannot be loaded, or the host's interface cannot be made.
    pub async fn start(config: Config) -> Result<Self> {
        let directory = config.records.clone();
        let ledger = tokio::task::spawn_blocking(move || Ledger::open(&directory))
            .await
            .map_err(|_| Error::Stopping)??;
        let firewall = Firewall::start(config.nft.clone(), ledger.owners()).await?;
        let host = Netlink::open()?;
        make_host_device(&host).await?;
        remove_ownerless(&host, &ledger).await?;
        ensure_forwarding(Path::new("/proc/sys/net/ipv4/ip_forward"));
        Ok(Self(Arc::new(Parts { config, ledger, firewall, host, busy: Mutex::default() })))
    }

    /// Attaches the namespace of a process; see [`bus::network::Network`].
    ///
    /// # Errors
    /// See [`Error`]. A sandbox that had no address before has none after a failure.
    pub async fn attach(&self, id: &str, process: OwnedFd) -> Result<Attachment> {
        let id: SandboxId = id.parse()?;
        self.to_the_end(|parts| async move {
            let _turn = parts.turn(&id).await;
            parts.attach(&id, process).await
        })
        .await
    }

    /// Takes an attachment away; answers whether there was one.
    ///
    /// # Errors
    /// [`Error::Teardown`] with every step that failed; the address is given back only if none did.
    pub async fn detach(&self, id: &str) -> Result<bool> {
        let id: SandboxId = id.parse()?;
        self.to_the_end(|parts| async move {
            let _turn = parts.turn(&id).await;
            parts.detach(&id).await
        })
        .await
    }

    /// Every owner on record.
    pub fn owners(&self) -> Vec<Owner> {
        self.0.ledger.owners()
    }

    /// Whether the records do not know any more what the disk holds.
    pub fn is_poisoned(&self) -> bool {
        self.0.ledger.is_poisoned()
    }

    /// Loads the host's rules again, in case somebody else has changed them.
    ///
    /// # Errors
    /// `nft` refuses; the rules that were there still hold.
    pub async fn reload(&self) -> Result<()> {
        self.0.firewall.reload().await
    }

    /// Returns when the part that changes rules has got through what it was asked before, and the kernel has answered
    /// a question about our interface.
    ///
    /// # Errors
    /// One of them does not, or the interface is gone: a restart makes it again.
    pub async fn ping(&self) -> Result<()> {
        self.0.firewall.ping().await?;
        self.0.host.index(plan::HOST_DEVICE).await.map(drop)
    }

    /// Runs in a task of its own: a caller that goes away leaves nothing half done.
    async fn to_the_end<T, F, Fut>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Arc<Parts>) -> Fut,
        Fut: Future<Output = Result<T>> + Send + 'static,
    {
        tokio::spawn(work(Arc::clone(&self.0))).await.map_err(|_| Error::Stopping)?
    }
}

impl Parts {
    async fn attach(&self, id: &SandboxId, process: OwnedFd) -> Result<Attachment> {
        let (owner, new) = self.ledger.ensure(id).await?;
        let inside = {
            let (owner, nft, group) = (owner.clone(), self.config.nft.clone(), self.config.tap_group);
            netns::within(process, ATTACH_LIMIT, move |spaces| async move {
                attach::attach(&spaces, &owner, group, &nft).await
            })
        };
        // An element without a link lets nothing through, so both can be made at once.
        match tokio::join!(inside, self.firewall.add(owner.clone())) {
            (Ok(made), Ok(())) => {
                if made {
                    tracing::info!(sandbox = %id, address = %owner.address, link = owner.link(), "attached");
                }
                Ok(attachment(&owner))
            }
            (Err(error), _) | (_, Err(error)) => {
                if new && let Err(error) = self.detach(id).await {
                    tracing::error!(sandbox = %id, "an attachment that failed was not taken away: {error}");
                }
                Err(error)
            }
        }
    }

    async fn detach(&self, id: &SandboxId) -> Result<bool> {
        let Some(owner) = self.ledger.get(id) else { return Ok(false) };
        let mut failed = Vec::new();
        if let Err(error) = attach::detach(&self.host, &owner.link()).await {
            failed.push(error);
        }
        if let Err(error) = self.firewall.remove(id.clone()).await {
            failed.push(error);
        }
        // An address that may still be in use is not given to anyone else: the record stays for the next attempt.
        if failed.is_empty() {
            match self.ledger.release(id).await {
                Ok(_) => tracing::info!(sandbox = %id, address = %owner.address, "detached"),
                Err(error) => failed.push(error),
            }
        }
        if failed.is_empty() { Ok(true) } else { Err(Error::Teardown(failed)) }
    }

    /// One at a time per sandbox.
    async fn turn(self: &Arc<Self>, id: &SandboxId) -> Turn {
        let lock = Arc::clone(self.busy().entry(id.clone()).or_default());
        let guard = Some(lock.lock_owned().await);
        Turn { parts: Arc::clone(self), id: id.clone(), guard }
    }

    fn busy(&self) -> std::sync::MutexGuard<'_, HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to change one sandbox; forgets the id when nobody else waits for it.
struct Turn {
    parts: Arc<Parts>,
    id: SandboxId,
    guard: Option<OwnedMutexGuard<()>>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut busy = self.parts.busy();
        self.guard = None;
        // Waiters have a clone, and a clone is only made under this lock.
        if busy.get(&self.id).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            busy.remove(&self.id);
        }
    }
}

impl NetworkBackend for Manager {
    async fn attach(&self, id: String, process: OwnedFd) -> bus::Result<Attachment> {
        self.attach(&id, process).await.map_err(|error| answer(&id, error))
    }

    async fn detach(&self, id: String) -> bus::Result<bool> {
        self.detach(&id).await.map_err(|error| answer(&id, error))
    }

    async fn owners(&self) -> bus::Result<Vec<Attachment>> {
        Ok(self.owners().iter().map(attachment).collect())
    }
}

/// Logs what is our own fault where it happened, and answers the caller.
fn answer(id: &str, error: Error) -> bus::Error {
    let error = bus::Error::from(error);
    if matches!(error, bus::Error::Internal(_) | bus::Error::Timeout(_)) {
        tracing::error!(sandbox = %id, "{}", error.message());
    }
    error
}

fn attachment(owner: &Owner) -> Attachment {
    Attachment { id: owner.id.to_string(), address: owner.address.to_string(), link: owner.link() }
}

/// The interface that the host's address is on. A tun that nobody reads: it needs no module beside the taps' own.
async fn make_host_device(host: &Netlink) -> Result<()> {
    if host.find(plan::HOST_DEVICE).await?.is_none() {
        tap::make(plan::HOST_DEVICE, tap::Kind::Tun, None)?;
    }
    let index = host.index(plan::HOST_DEVICE).await?;
    host.forward_ipv4_only(index).await?;
    host.address(index, plan::HOST, 32).await?;
    host.up(index).await
}

async fn remove_ownerless(host: &Netlink, ledger: &Ledger) -> Result<()> {
    let owned: Vec<_> = ledger.owners().iter().map(Owner::link).collect();
    for link in host.in_group(plan::GROUP).await? {
        if !owned.contains(&link.name) {
            tracing::warn!(link = link.name, "a link without an owner is removed");
            host.remove(link.index).await?;
        }
    }
    Ok(())
}

/// Without forwarding sandboxes reach nothing. The image switches it on at boot; elsewhere this tries to.
fn ensure_forwarding(switch: &Path) {
    let is_on = std::fs::read_to_string(switch).is_ok_and(|text| text.trim() == "1");
    if is_on {
        return;
    }
    if let Err(error) = std::fs::write(switch, "1\n") {
        tracing::error!(
            "{} is off and cannot be switched on, sandboxes reach nothing: {error}",
            switch.display()
        );
    }
}
