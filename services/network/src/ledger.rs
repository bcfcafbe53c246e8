//! The address plan, kept.
//!
//! Owns: one record per owner, and the pool that is read from them. Refuses to know: links and rules.

use std::{
    net::Ipv4Addr,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pandastack_bus::SandboxId;
use pandastack_daemon::records::Records;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    ipam::Pool,
    plan::{Owner, link_name},
};

/// What is written of an owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// Version of this form.
    v: u32,
    address: Ipv4Addr,
}

/// Who has which address, durably. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Ledger {
    records: Arc<Records<Record>>,
    pool: Arc<Mutex<Pool>>,
}

impl Ledger {
    /// Reads every record in `directory`. One that contradicts another is logged and removed: its sandbox gets a new
    /// address when it is attached next.
    ///
    /// # Errors
    /// The directory cannot be read or written.
    pub fn open(directory: &Path) -> Result<Self> {
        let records = Records::<Record>::open(directory)?;
        let mut pool = Pool::default();
        for (key, record) in records.iter()? {
            let restored = key
                .parse::<SandboxId>()
                .map_err(|error| error.to_string())
                .and_then(|id| pool.restore(&id, record.address).map_err(|error| error.to_string()));
            if let Err(error) = restored {
                tracing::error!(sandbox = %key, "the record of an address is dropped: {error}");
                records.remove(&key)?;
            }
        }
        Ok(Self { records: Arc::new(records), pool: Arc::new(Mutex::new(pool)) })
    }

    /// The owner of that id with its address, durably; the second answer says whether it is a new one.
    ///
    /// # Errors
    /// No address is free, or the record cannot be written: then nothing changed.
    pub async fn ensure(&self, id: &SandboxId) -> Result<(Owner, bool)> {
        let address = {
            let mut pool = self.pool();
            if let Some(address) = pool.get(id) {
                return Ok((Owner { id: id.clone(), address }, false));
            }
            let link = link_name(id);
            if pool.iter().any(|(other, _)| link_name(other) == link) {
                return Err(Error::LinkTaken(link));
            }
            pool.ensure(id)?
        };
        let record = Record { v: 1, address };
        let written = self.with_records(id, move |records, key| Ok(records.put(key, &record)?)).await;
        if let Err(error) = written {
            self.pool().release(id);
            return Err(error);
        }
        Ok((Owner { id: id.clone(), address }, true))
    }

    /// Removes the record and gives the address back; answers whether there was one.
    ///
    /// # Errors
    /// The record cannot be removed: then the address is not given back.
    pub async fn release(&self, id: &SandboxId) -> Result<bool> {
        let removed = self.with_records(id, |records, key| Ok(records.remove(key)?)).await?;
        Ok(self.pool().release(id).is_some() || removed)
    }

    /// The owner of that id, if it has an address.
    pub fn get(&self, id: &SandboxId) -> Option<Owner> {
        self.pool().get(id).map(|address| Owner { id: id.clone(), address })
    }

    /// Every owner, by id.
    pub fn owners(&self) -> Vec<Owner> {
        self.pool().iter().map(|(id, address)| Owner { id: id.clone(), address }).collect()
    }

    /// See [`Records::is_poisoned`].
    pub fn is_poisoned(&self) -> bool {
        self.records.is_poisoned()
    }

    /// Records wait for the disk, which the runtime's own threads must not.
    async fn with_records<T: Send + 'static>(
        &self,
        id: &SandboxId,
        work: impl FnOnce(&Records<Record>, &str) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (records, key) = (Arc::clone(&self.records), id.clone());
        tokio::task::spawn_blocking(move || work(&records, key.as_str()))
            .await
            .map_err(|_| Error::Stopping)?
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        // Every change of the pool is one call that does not panic half way.
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn addresses_survive_and_contradictions_do_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let (one, two) = (SandboxId::random(), SandboxId::random());
        let ledger = Ledger::open(directory.path()).expect("opens");
        let (first, new) = ledger.ensure(&one).await.expect("room");
        assert!(new);
        assert_eq!(ledger.ensure(&one).await.expect("room"), (first.clone(), false));
        drop(ledger);

        let copy = directory.path().join(format!("{two}.json"));
        std::fs::copy(directory.path().join(format!("{one}.json")), copy).expect("copied");
        let ledger = Ledger::open(directory.path()).expect("opens");

        let survivors = ledger.owners();
        assert_eq!(survivors.len(), 1);
        assert_eq!(survivors[0].address, first.address);
        let id = survivors[0].id.clone();
        assert!(ledger.release(&id).await.expect("released"));
        assert!(!ledger.release(&id).await.expect("nothing to release"));
        drop(ledger);
        assert_eq!(Ledger::open(directory.path()).expect("opens").owners(), []);
    }

    #[tokio::test]
    async fn two_ids_of_one_link_name_do_not_meet() {
        let directory = tempfile::tempdir().expect("a directory");
        let ledger = Ledger::open(directory.path()).expect("opens");
        ledger.ensure(&"aaaaaaaaaaaabbbbbbbb".parse().expect("an id")).await.expect("room");

        let answer = ledger.ensure(&"aaaaaaaaaaaacccccccc".parse().expect("an id")).await;

        assert!(matches!(answer, Err(Error::LinkTaken(_))), "{answer:?}");
    }
}
