//! How the memory for replay buffers is shared: whoever is alone may have much, in a crowd everybody has a little.

use std::sync::atomic::{AtomicUsize, Ordering};

use pandastack_protocol::REPLAY_BYTES;

/// Memory for the unacknowledged output of all sessions; a session over its guaranteed part gets no more beyond it.
const REPLAY_BUDGET: usize = 24 << 20;
/// What a session may always keep.
const REPLAY_LEAST: usize = 32 << 10;

/// Memory that all replay buffers use together.
#[derive(Debug, Default)]
pub struct Budget(AtomicUsize);

impl Budget {
    /// What a buffer that holds `own` bytes now may grow to.
    pub fn capacity(&self, own: usize) -> usize {
        let others = self.0.load(Ordering::Relaxed).saturating_sub(own);
        REPLAY_BUDGET.saturating_sub(others).clamp(REPLAY_LEAST, REPLAY_BYTES)
    }

    /// A buffer's size has changed.
    pub fn change(&self, before: usize, after: usize) {
        self.0.fetch_add(after, Ordering::Relaxed);
        self.0.fetch_sub(before, Ordering::Relaxed);
    }
}
