//! Activity of sandboxes, told to vmm at most once a second.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pandastack_bus::vmm::VmmProxy;

const STEP: Duration = Duration::from_secs(1);

/// What was used, and what is in use.
#[derive(Debug, Default)]
pub struct Touch(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    used: HashSet<String>,
    in_use: HashMap<String, usize>,
}

/// While it lives its sandbox is in use.
#[derive(Debug)]
pub struct Activity {
    touch: Arc<Touch>,
    sandbox: String,
}

impl Touch {
    /// A request concerned this sandbox.
    pub fn used(&self, sandbox: &str) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !state.used.contains(sandbox) {
            state.used.insert(sandbox.to_owned());
        }
    }

    /// A stream concerns it for a while.
    pub fn in_use(self: &Arc<Self>, sandbox: &str) -> Activity {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state.in_use.entry(sandbox.to_owned()).or_default() += 1;
        Activity { touch: Arc::clone(self), sandbox: sandbox.to_owned() }
    }

    /// What there is to tell; the one-time part only once.
    fn take(&self) -> Vec<String> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut ids = std::mem::take(&mut state.used);
        ids.extend(state.in_use.keys().cloned());
        ids.into_iter().collect()
    }

    /// Tells vmm for ever.
    pub async fn run(self: Arc<Self>, vmm: VmmProxy<'static>) {
        let mut every = tokio::time::interval(STEP);
        every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            every.tick().await;
            let ids = self.take();
            if ids.is_empty() {
                continue;
            }
            if let Err(error) = vmm.touch(ids.clone()).await {
                tracing::debug!(%error, "activity was not told; it is told again");
                ids.iter().for_each(|id| self.used(id));
            }
        }
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        let mut state = self.touch.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = state.in_use.get_mut(&self.sandbox) {
            *count -= 1;
            if *count == 0 {
                state.in_use.remove(&self.sandbox);
                state.used.insert(self.sandbox.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_use_is_told_once_and_a_stream_each_time() {
        let touch = Arc::new(Touch::default());
        touch.used("a");
        touch.used("a");
        assert_eq!(touch.take(), ["a"]);
        assert!(touch.take().is_empty());

        let (one, two) = (touch.in_use("b"), touch.in_use("b"));
        drop(one);
        assert_eq!(touch.take(), ["b"]);
        assert_eq!(touch.take(), ["b"]);
        drop(two);
        assert_eq!(touch.take(), ["b"]);
        assert!(touch.take().is_empty());
    }
}
