//! Loads rules, one transaction per change.
//!
//! Owns: the `nft` program, and the one task through which every change of the host's rules goes; changes that wait
//! together are loaded together. Refuses to know: what the rules say, and why.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use pandastack_bus::SandboxId;
use tokio::{
    io::AsyncWriteExt,
    process::Command,
    sync::{mpsc, oneshot},
};

use crate::{
    error::{Error, Result},
    plan::{self, Owner},
};

/// How long one run of `nft` may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Changes that may wait; more wait at the sender.
const MAILBOX: usize = 256;
/// Bytes of what `nft` said that go into an error.
const COMPLAINT: usize = 2000;

/// Loads a script in the namespace of the calling thread, in one transaction.
///
/// # Errors
/// `nft` cannot be run, does not end within ten seconds, or refuses: then nothing changed.
pub async fn load(nft: &Path, script: &str) -> Result<()> {
    let mut command = Command::new(nft);
    command.args(["-f", "-"]).env_clear().kill_on_drop(true);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let run = async {
        let mut child = command.spawn()?;
        if let Some(mut stdin) = child.stdin.take() {
            // If it ends without reading everything, its complaint says why.
            let _ = stdin.write_all(script.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(LIMIT, run)
        .await
        .map_err(|_| Error::Timeout(LIMIT))?
        .map_err(Error::system("running nft"))?;
    if output.status.success() {
        return Ok(());
    }
    let said =
        String::from_utf8_lossy(&output.stderr[..output.stderr.len().min(COMPLAINT)]).trim().to_owned();
    Err(Error::Rules(if said.is_empty() { output.status.to_string() } else { said }))
}

#[derive(Debug)]
enum Change {
    Add(Owner),
    Remove(SandboxId),
    Reload,
    Ping,
}

/// The host's rules. Cheap to clone; the task behind it ends with the last clone.
#[derive(Debug, Clone)]
pub struct Firewall {
    mailbox: mpsc::Sender<(Change, oneshot::Sender<Result<()>>)>,
}

impl Firewall {
    /// Replaces the host's rules by those for `owners`, in one transaction, and takes changes from then on.
    ///
    /// # Errors
    /// `nft` refuses; then the rules that were there still hold.
    pub async fn start(nft: PathBuf, owners: impl IntoIterator<Item = Owner>) -> Result<Self> {
        let owners = owners.into_iter().map(|owner| (owner.id.clone(), owner)).collect();
        let mut rules = Rules { nft, owners };
        rules.reload().await?;
        let (mailbox, changes) = mpsc::channel(MAILBOX);
        tokio::spawn(rules.serve(changes));
        Ok(Self { mailbox })
    }

    /// Lets an owner's packets in. Idempotent.
    pub async fn add(&self, owner: Owner) -> Result<()> {
        self.ask(Change::Add(owner)).await
    }

    /// Lets nothing more of an owner in. Idempotent.
    pub async fn remove(&self, owner: SandboxId) -> Result<()> {
        self.ask(Change::Remove(owner)).await
    }

    /// Loads everything again, whatever the kernel has now.
    pub async fn reload(&self) -> Result<()> {
        self.ask(Change::Reload).await
    }

    /// Answers once everything asked for before has been done.
    pub async fn ping(&self) -> Result<()> {
        self.ask(Change::Ping).await
    }

    async fn ask(&self, change: Change) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        self.mailbox.send((change, reply)).await.map_err(|_| Error::Stopping)?;
        answer.await.map_err(|_| Error::Stopping)?
    }
}

struct Rules {
    nft: PathBuf,
    owners: BTreeMap<SandboxId, Owner>,
}

impl Rules {
    async fn serve(mut self, mut changes: mpsc::Receiver<(Change, oneshot::Sender<Result<()>>)>) {
        let mut batch = Vec::new();
        while changes.recv_many(&mut batch, MAILBOX).await > 0 {
            let (asked, replies): (Vec<_>, Vec<_>) = batch.drain(..).unzip();
            let outcome = self.apply(asked).await;
            let complaint = outcome.err().map(|error| match error {
                Error::Rules(said) => said,
                other => pandastack_daemon::chain(&other),
            });
            for reply in replies {
                // One who no longer waits does not need to know.
                let _ = reply.send(complaint.clone().map_or(Ok(()), |text| Err(Error::Rules(text))));
            }
        }
    }

    async fn apply(&mut self, changes: Vec<Change>) -> Result<()> {
        let before = self.owners.clone();
        let mut whole = false;
        for change in changes {
            match change {
                Change::Add(owner) => drop(self.owners.insert(owner.id.clone(), owner)),
                Change::Remove(id) => drop(self.owners.remove(&id)),
                Change::Reload => whole = true,
                Change::Ping => {}
            }
        }
        let added = difference(&self.owners, &before);
        let removed = difference(&before, &self.owners);
        if !whole {
            let script = plan::host_change(&added, &removed);
            if script.is_empty() {
                return Ok(());
            }
            match load(&self.nft, &script).await {
                Ok(()) => return Ok(()),
                // Somebody took our table away, say. What should be there is known: load all of it.
                Err(error) => {
                    tracing::warn!("a change of the rules was refused, loading all of them: {error}");
                }
            }
        }
        match self.reload().await {
            Ok(()) => Ok(()),
            Err(error) => {
                self.owners = before;
                Err(error)
            }
        }
    }

    async fn reload(&mut self) -> Result<()> {
        let owners: Vec<_> = self.owners.values().cloned().collect();
        load(&self.nft, &plan::host_ruleset(&owners)).await
    }
}

/// What `one` has and `other` has not, or has otherwise.
fn difference(one: &BTreeMap<SandboxId, Owner>, other: &BTreeMap<SandboxId, Owner>) -> Vec<Owner> {
    one.values().filter(|owner| other.get(&owner.id) != Some(owner)).cloned().collect()
}
