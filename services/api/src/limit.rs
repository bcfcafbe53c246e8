//! The limits per workspace: a token bucket for the rate, how many requests are under way, and how many tools were called in
//! the last minute. Pure but for the lock; time is given.
//!
//! The clients repeat a GET or DELETE that was answered 404 once; that repetition is free.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Requests of a workspace under way at one time, their answers' streams included.
pub const AT_ONCE: usize = 512;
const MINUTE: Duration = Duration::from_secs(60);
const FREE_FOR: Duration = Duration::from_secs(2);
const REMEMBERED: usize = 64;

/// How much a workspace may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Requests per second it earns.
    pub per_second: u32,
    /// Requests it may have saved up.
    pub burst: u32,
    /// Calls of tools (MCP) in a minute.
    pub tool_calls: u32,
}

/// What holds unless an operator says otherwise.
pub const RATE: Rate = Rate { per_second: 100, burst: 200, tool_calls: 60 };
/// The most that an operator may say: what is remembered of a workspace is bounded by it.
pub const MOST: u32 = 100_000;

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
        // All that it may have saved up, whatever that is.
        Self { tokens: f64::INFINITY, at: now, missing: VecDeque::new(), places, tools: VecDeque::new() }
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
    pub fn count(&self, workspace: &str, key: u64, now: Instant, rate: Rate) -> Verdict {
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
        let earned = now.saturating_duration_since(bucket.at).as_secs_f64() * f64::from(rate.per_second);
        bucket.tokens = (bucket.tokens + earned).min(f64::from(rate.burst));
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
    pub fn tool(&self, workspace: &str, now: Instant, rate: Rate) -> bool {
        let mut buckets = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let bucket = buckets.entry(workspace.to_owned()).or_insert_with(|| Bucket::new(now));
        bucket.tools.retain(|at| now.saturating_duration_since(*at) < MINUTE);
        let fits = bucket.tools.len() < rate.tool_calls as usize;
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
        let passed =
            |at| (0..300).filter(|key| limiter.count("one", *key, at, RATE) == Verdict::Counted).count();
        assert_eq!(passed(start), RATE.burst as usize);
        assert_eq!(limiter.count("two", 0, start, RATE), Verdict::Counted);
        assert_eq!(passed(start + Duration::from_secs(1)), RATE.per_second as usize);
    }

    #[test]
    fn a_rate_that_is_set_holds_at_once() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        let slow = Rate { per_second: 1, burst: 3, tool_calls: 2 };
        let passed = |at, rate| {
            (0..300).filter(|key| limiter.count("one", *key, at, rate) == Verdict::Counted).count()
        };
        assert_eq!((passed(start, slow), passed(start, RATE)), (3, 0));
        assert_eq!(passed(start + Duration::from_secs(2), slow), 2);
        assert_eq!((0..9).filter(|_| limiter.tool("one", start, slow)).count(), 2);
        assert!(limiter.tool("one", start, RATE));
    }

    #[test]
    fn tools_are_counted_over_the_last_minute() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!((0..u64::from(RATE.tool_calls)).all(|call| limiter.tool("one", at(call / 2), RATE)));
        assert!(!limiter.tool("one", at(59), RATE));
        assert!(limiter.tool("two", at(59), RATE));
        assert!(limiter.tool("one", at(60), RATE) && limiter.tool("one", at(60), RATE));
        assert!(
            !limiter.tool("one", at(60), RATE),
            "only the calls of the first second are over a minute old"
        );
    }

    #[test]
    fn the_repetition_of_a_miss_is_free_once_and_soon() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        for key in 0..u64::from(RATE.burst) {
            assert_eq!(limiter.count("one", key, start, RATE), Verdict::Counted);
        }
        limiter.missed("one", 7, start);
        assert_eq!(limiter.count("one", 8, start, RATE), Verdict::Refused);
        assert_eq!(limiter.count("one", 7, start, RATE), Verdict::Free);
        assert_eq!(limiter.count("one", 7, start, RATE), Verdict::Refused);

        limiter.missed("one", 9, start);
        let late = start + FREE_FOR;
        assert_eq!(limiter.count("one", 9, late, RATE), Verdict::Counted);
    }
}
