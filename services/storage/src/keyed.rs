//! One at a time for each key, any number for different keys.

use std::{
    collections::HashMap,
    hash::Hash,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::OwnedMutexGuard;

/// Locks by key; a key that nobody uses takes no memory.
#[derive(Debug)]
pub struct Keyed<K> {
    locks: Locks<K>,
}

type Locks<K> = Arc<Mutex<HashMap<K, Arc<tokio::sync::Mutex<()>>>>>;

/// The right to be alone with a key, until dropped.
#[derive(Debug)]
pub struct Turn<K: Eq + Hash> {
    guard: Option<OwnedMutexGuard<()>>,
    key: K,
    locks: Locks<K>,
}

impl<K> Default for Keyed<K> {
    fn default() -> Self {
        Self { locks: Arc::default() }
    }
}

impl<K: Eq + Hash + Clone> Keyed<K> {
    /// Waits until nobody else has the key. First come, first served.
    pub async fn turn(&self, key: &K) -> Turn<K> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(locks.entry(key.clone()).or_default())
        };
        Turn { guard: Some(lock.lock_owned().await), key: key.clone(), locks: Arc::clone(&self.locks) }
    }
}

impl<K: Eq + Hash> Drop for Turn<K> {
    fn drop(&mut self) {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.guard.take());
        // Those who wait hold a share of the lock; without one the table has the only one.
        if locks.get(&self.key).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn one_at_a_time_and_nothing_remains() {
        let keyed = Arc::new(Keyed::default());
        let inside: Arc<[AtomicU32; 3]> = Arc::default();
        let tasks: Vec<_> = (0..60)
            .map(|number: usize| {
                let (keyed, inside) = (Arc::clone(&keyed), Arc::clone(&inside));
                tokio::spawn(async move {
                    let _turn = keyed.turn(&(number % 3)).await;
                    assert_eq!(inside[number % 3].fetch_add(1, Ordering::SeqCst), 0);
                    tokio::task::yield_now().await;
                    inside[number % 3].fetch_sub(1, Ordering::SeqCst);
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        assert!(keyed.locks.lock().unwrap().is_empty());
    }
}
