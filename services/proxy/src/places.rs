//! How many requests are carried at one time, into one guest and in all.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::refusal::Refusal;

/// Into one guest. Its agent serves 512 connections, of which two daemons with a proxy leave some for everything else.
pub const PER_SANDBOX: usize = 224;
/// In all.
pub const TOTAL: usize = 4096;
/// How long a request waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);

/// All places.
#[derive(Debug)]
pub struct Places {
    all: Arc<Semaphore>,
    each: Mutex<HashMap<String, Arc<Semaphore>>>,
}

/// A place, until it is dropped.
#[derive(Debug)]
pub struct Place {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Default for Places {
    fn default() -> Self {
        Self { all: Arc::new(Semaphore::new(TOTAL)), each: Mutex::default() }
    }
}

impl Places {
    /// Waits for a place, for a bounded time.
    pub async fn enter(&self, sandbox: &str) -> Result<Place, Refusal> {
        let own = {
            let mut each = self.each.lock().unwrap_or_else(PoisonError::into_inner);
            if each.len() >= TOTAL {
                // Who has nobody inside or in front need not be remembered.
                each.retain(|_, own| Arc::strong_count(own) > 1);
            }
            let fresh = || Arc::new(Semaphore::new(PER_SANDBOX));
            Arc::clone(each.entry(sandbox.to_owned()).or_insert_with(fresh))
        };
        let both = async {
            // The own one first: who waits for it takes nobody else's.
            let own = own.acquire_owned().await.ok()?;
            let all = Arc::clone(&self.all).acquire_owned().await.ok()?;
            Some(Place { _own: own, _all: all })
        };
        match tokio::time::timeout(PATIENCE, both).await {
            Ok(Some(place)) => Ok(place),
            _ => Err(Refusal::unavailable("busy", "too many connections into this sandbox, or into all")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_full_sandbox_waits_for_itself_only() {
        let places = Places::default();
        let mut inside = Vec::new();
        for _ in 0..PER_SANDBOX {
            inside.push(places.enter("a").await.unwrap());
        }
        assert_eq!(places.enter("a").await.unwrap_err().status.as_u16(), 503);
        assert!(places.enter("b").await.is_ok());
        let leave = async {
            tokio::time::sleep(PATIENCE / 2).await;
            inside.pop();
        };
        let (next, ()) = tokio::join!(places.enter("a"), leave);
        assert!(next.is_ok());
    }
}
