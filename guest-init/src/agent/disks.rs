//! Writing everything dirty to the disks, as before a capture.
//!
//! A file system that a user froze, or that is served by a process, can hold a sync up for ever. So it never runs on the
//! agent's own thread, one at a time takes one helper and no more, and whoever asked is told in time.

use std::{sync::Arc, time::Duration};

use pandastack_protocol::{Code, Failure};
use tokio::{sync::Mutex, time::timeout};

use super::connection::blocking;

/// How long a sync may take; hosts wait a minute.
const LIMIT: Duration = Duration::from_secs(50);

/// All disks of the guest.
#[derive(Debug, Default)]
pub struct Disks {
    /// Held while a sync runs, also when nobody waits for it any longer.
    running: Arc<Mutex<()>>,
}

impl Disks {
    /// Writes what was dirty when this was called; [`Code::Busy`] if that takes too long.
    pub async fn sync(&self) -> Result<(), Failure> {
        self.run(LIMIT, nix::unistd::sync).await
    }

    async fn run(&self, limit: Duration, sync: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
        let running = self.running.clone();
        let work = async {
            // One that runs already may have passed by what is dirty now: it is waited for, not joined.
            let turn = running.lock_owned().await;
            blocking(move || {
                sync();
                drop(turn);
                Ok(())
            })
            .await
        };
        timeout(limit, work).await.unwrap_or_else(|_| {
            let message = format!("the disks were not written within {} seconds", limit.as_secs());
            Err(Failure { code: Code::Busy, message })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    };

    use super::*;

    #[tokio::test]
    async fn a_sync_that_hangs_takes_one_helper_and_nobody_waits_for_ever() {
        let disks = Disks::default();
        let syncs = Arc::new(AtomicU32::new(0));
        let count = |syncs: &Arc<AtomicU32>| {
            let syncs = syncs.clone();
            move || {
                syncs.fetch_add(1, Ordering::SeqCst);
            }
        };
        let (thaw, frozen) = mpsc::channel::<()>();
        let hanging = disks.run(Duration::from_millis(20), move || frozen.recv().unwrap_or_default());
        assert_eq!(hanging.await.expect_err("it hangs").code, Code::Busy);
        for _ in 0..100 {
            let waiting = disks.run(Duration::from_millis(1), count(&syncs));
            assert_eq!(waiting.await.expect_err("the other hangs").code, Code::Busy);
        }
        assert_eq!(syncs.load(Ordering::SeqCst), 0);
        drop(thaw);
        assert_eq!(disks.run(LIMIT, count(&syncs)).await, Ok(()));
        assert_eq!(syncs.load(Ordering::SeqCst), 1);
        assert_eq!(disks.sync().await, Ok(()));
    }
}
