//! Which sandboxes stand still (paused, hibernated), and for how long they did: a command's time is its guest's.
//!
//! Owns: what was seen of it. Refuses to know: where it is heard from. What was missed costs a look at vmm, never more.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

/// Sandboxes that stood still once and may be remembered.
const REMEMBERED: usize = 16_384;

/// Everything seen.
#[derive(Debug, Default)]
pub struct Still(Mutex<HashMap<String, Seen>>);

#[derive(Debug, Default)]
struct Seen {
    since: Option<Instant>,
    before: Duration,
    moved: Arc<Notify>,
}

impl Still {
    /// It stands still, or runs, from now on.
    pub fn seen(&self, sandbox: &str, still: bool) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !all.contains_key(sandbox) {
            if !still {
                return;
            }
            if all.len() >= REMEMBERED {
                all.retain(|_, seen| seen.since.is_some());
            }
        }
        let seen = all.entry(sandbox.to_owned()).or_default();
        match (seen.since, still) {
            (None, true) => seen.since = Some(Instant::now()),
            (Some(since), false) => {
                seen.before += since.elapsed();
                seen.since = None;
                seen.moved.notify_waiters();
            }
            _ => {}
        }
    }

    /// It is gone.
    pub fn forget(&self, sandbox: &str) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(seen) = all.remove(sandbox) {
            seen.moved.notify_waiters();
        }
    }

    /// Whether it stands still, as far as is known.
    pub fn is(&self, sandbox: &str) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(sandbox).is_some_and(|seen| seen.since.is_some())
    }

    /// For how long it stood still in all; of use only as a difference.
    pub fn total(&self, sandbox: &str) -> Duration {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(sandbox)
            .map_or(Duration::ZERO, |seen| seen.before + seen.since.map_or(Duration::ZERO, |at| at.elapsed()))
    }

    /// Waits until it is seen to run, or for so long.
    pub async fn moved(&self, sandbox: &str, at_most: Duration) {
        let moved = {
            let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            all.get(sandbox).filter(|seen| seen.since.is_some()).map(|seen| Arc::clone(&seen.moved))
        };
        match moved {
            Some(moved) => drop(tokio::time::timeout(at_most, moved.notified()).await),
            None => tokio::time::sleep(at_most).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn standing_still_adds_up_however_often_it_is_told() {
        let still = Still::default();
        for state in [false, true, true, false, false, true] {
            still.seen("a", state);
            tokio::time::advance(STEP).await;
        }
        assert_eq!((still.total("a"), still.is("a")), (3 * STEP, true));
        assert_eq!((still.total("b"), still.is("b")), (Duration::ZERO, false));
        still.forget("a");
        assert!(!still.is("a"));
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_told_at_once_and_never_waits_longer_than_it_said() {
        let still = Still::default();
        still.seen("a", true);
        let start = Instant::now();
        let wake = async {
            tokio::time::sleep(STEP / 10).await;
            still.seen("a", false);
        };
        tokio::join!(still.moved("a", STEP), wake);
        assert_eq!(start.elapsed(), STEP / 10);
        still.moved("a", STEP).await;
        assert_eq!(start.elapsed(), STEP + STEP / 10);
    }
}
