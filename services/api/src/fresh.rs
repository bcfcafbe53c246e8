//! An answer that is good for a moment.
//!
//! Owns: its age, and that only one asks at a time. Refuses to know: what it is.

use std::time::Duration;

use tokio::{sync::Mutex, time::Instant};

/// How old an answer may be.
pub const GOOD_FOR: Duration = Duration::from_secs(1);

/// The last answer.
#[derive(Debug)]
pub struct Fresh<T>(Mutex<Option<(Instant, T)>>);

impl<T> Default for Fresh<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Fresh<T> {
    /// The last answer, or a new one; whoever comes meanwhile waits for it.
    pub async fn get(&self, ask: impl Future<Output = T>) -> T {
        let mut last = self.0.lock().await;
        if let Some((since, answer)) = &*last
            && since.elapsed() < GOOD_FOR
        {
            return answer.clone();
        }
        let answer = ask.await;
        *last = Some((Instant::now(), answer.clone()));
        answer
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_asks_for_all_and_again_after_a_moment() {
        let (fresh, asked) = (Fresh::default(), AtomicUsize::new(0));
        let get = || {
            fresh.get(async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                asked.fetch_add(1, Ordering::Relaxed)
            })
        };
        assert_eq!(tokio::join!(get(), get(), get()), (0, 0, 0));
        tokio::time::sleep(GOOD_FOR).await;
        assert_eq!(get().await, 1);
    }
}
