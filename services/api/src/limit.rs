//! The limits per workspace: a token bucket for the rate, how many requests are under way, and how many tools were called in
//! the last minute. Pure but for the lock; time is given.
//!
//! The clients repeat a GET or DELETE that was answered 404 once; that repetition is free.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests a workspace may have saved up.
pub const BURST: f64 = 200.0;
/// Requests per second it earns.
pub const PER_SECOND: f64 = 100.0;
/// Requests of a workspace under way at one time, their answers' streams included.
pub const AT_ONCE: usize = 512;
/// Calls of tools (MCP) in a minute.
pub const TOOL_CALLS: usize = 60;
const MINUTE: Duration = Duration::from_secs(60);
const FREE_FOR: Duration = Duration::from_secs(2);
const REMEMBERED: usize = 64;

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
    missing: VecDeque<(u64, Instant)>,
    places: Arc<Semaphore>,
    tools: VecDeque<Instant>,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        let places = Arc::new(Semaphore::new(AT_ONCE));
        Self { tokens: BURST, at: now, missing: VecDeque::new(), places, tools: VecDeque::new() }
    }
}

/// What the limit says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on and was counted.
    Counted,
    /// It goes on as the repetition of a miss.
    Free,
    /// Too many.
    Refused,
}

/// All buckets.
#[derive(Debug, Default)]
pub struct Limiter(Mutex<HashMap<String, Bucket>>);

impl Limiter {
    /// Counts a request. `key` names the request, for the free repetition.
    pub fn count(&self, workspace: &str, key: u64, now: Instant) -> Verdict {
        let mut buckets = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !buckets.contains_key(workspace) {
            buckets.insert(workspace.to_owned(), Bucket::new(now));
        }
        let Some(bucket) = buckets.get_mut(workspace) else { return Verdict::Counted };
        if let Some(place) = bucket
            .missing
            .iter()
            .position(|(missing, at)| *missing == key && now.saturating_duration_since(*at) < FREE_FOR)
        {
            bucket.missing.remove(place);
            return Verdict::Free;
        }
        let earned = now.saturating_duration_since(bucket.at).as_secs_f64() * PER_SECOND;
        bucket.tokens = (bucket.tokens + earned).min(BURST);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            return Verdict::Refused;
        }
        bucket.tokens -= 1.0;
        Verdict::Counted
    }

    /// A place for a request, until it is dropped; `None` when too many are under way.
    pub fn enter(&self, workspace: &str, now: Instant) -> Option<OwnedSemaphorePermit> {
        let mut buckets = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let bucket = buckets.entry(workspace.to_owned()).or_insert_with(|| Bucket::new(now));
        Arc::clone(&bucket.places).try_acquire_owned().ok()
    }

    /// Counts the call of a tool; `false`: it is one too many.
    pub fn tool(&self, workspace: &str, now: Instant) -> bool {
        let mut buckets = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let bucket = buckets.entry(workspace.to_owned()).or_insert_with(|| Bucket::new(now));
        bucket.tools.retain(|at| now.saturating_duration_since(*at) < MINUTE);
        let fits = bucket.tools.len() < TOOL_CALLS;
        if fits {
            bucket.tools.push_back(now);
        }
        fits
    }

    /// A counted GET or DELETE was answered 404: its next repetition is free.
    pub fn missed(&self, workspace: &str, key: u64, now: Instant) {
        let mut buckets = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(bucket) = buckets.get_mut(workspace) {
            bucket.missing.push_back((key, now));
            if bucket.missing.len() > REMEMBERED {
                bucket.missing.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_the_rate_holds_and_workspaces_are_apart() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        let passed = |at| (0..300).filter(|key| limiter.count("one", *key, at) == Verdict::Counted).count();
        assert_eq!(passed(start), BURST as usize);
        assert_eq!(limiter.count("two", 0, start), Verdict::Counted);
        assert_eq!(passed(start + Duration::from_secs(1)), PER_SECOND as usize);
    }

    #[test]
    fn tools_are_counted_over_the_last_minute() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..TOOL_CALLS as u64).all(|second| limiter.tool("one", at(second / 2))));
        assert!(!limiter.tool("one", at(59)));
        assert!(limiter.tool("two", at(59)));
        assert!(limiter.tool("one", at(60)) && limiter.tool("one", at(60)));
        assert!(!limiter.tool("one", at(60)), "only the calls of the first second are over a minute old");
    }

    #[test]
    fn the_repetition_of_a_miss_is_free_once_and_soon() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        for key in 0..BURST as u64 {
            assert_eq!(limiter.count("one", key, start), Verdict::Counted);
        }
        limiter.missed("one", 7, start);
        assert_eq!(limiter.count("one", 8, start), Verdict::Refused);
        assert_eq!(limiter.count("one", 7, start), Verdict::Free);
        assert_eq!(limiter.count("one", 7, start), Verdict::Refused);

        limiter.missed("one", 9, start);
        let late = start + FREE_FOR;
        assert_eq!(limiter.count("one", 9, late), Verdict::Counted);
    }
}
