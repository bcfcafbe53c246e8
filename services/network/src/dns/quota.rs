//! How much one source, and all of them, may have in hand.
//!
//! Owns: the counts. Refuses to know: of what.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A bound per source and one for all.
#[derive(Debug)]
pub(super) struct Quota {
    per_source: usize,
    overall: usize,
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    all: usize,
    sources: HashMap<IpAddr, usize>,
}

/// One of what is counted; given back when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    source: IpAddr,
    counts: Arc<Mutex<Counts>>,
}

impl Quota {
    pub(super) fn new(per_source: usize, overall: usize) -> Self {
        Self { per_source, overall, counts: Arc::default() }
    }

    /// One more for `source`; `None` when a bound is reached.
    pub(super) fn take(&self, source: IpAddr) -> Option<Slot> {
        let mut counts = locked(&self.counts);
        let own = counts.sources.get(&source).copied().unwrap_or_default();
        if counts.all >= self.overall || own >= self.per_source {
            return None;
        }
        counts.all += 1;
        counts.sources.insert(source, own + 1);
        Some(Slot { source, counts: Arc::clone(&self.counts) })
    }
}

impl Slot {
    /// Whose it is.
    pub(super) fn source(&self) -> IpAddr {
        self.source
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = locked(&self.counts);
        counts.all -= 1;
        if let Some(own) = counts.sources.get_mut(&self.source) {
            *own -= 1;
            if *own == 0 {
                counts.sources.remove(&self.source);
            }
        }
    }
}

fn locked(counts: &Mutex<Counts>) -> MutexGuard<'_, Counts> {
    // No change of the counts can panic half way.
    counts.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bounds_hold_and_slots_come_back() {
        let quota = Quota::new(2, 3);
        let (one, two) = (IpAddr::from([10, 200, 0, 2]), IpAddr::from([10, 200, 0, 3]));

        let first = quota.take(one).expect("the first");
        let _second = quota.take(one).expect("the second");
        assert!(quota.take(one).is_none(), "a third of one source");
        let third = quota.take(two).expect("the third of all");
        assert!(quota.take(two).is_none(), "a fourth of all");

        drop(first);
        drop(third);
        assert!(quota.take(one).is_some());
        assert!(!locked(&quota.counts).sources.contains_key(&two), "nothing is kept of who has nothing");
    }
}
