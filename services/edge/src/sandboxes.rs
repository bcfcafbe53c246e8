//! Sandboxes as vmm knows them, a moment old at most.
//!
//! Anybody can name a sandbox here, so what is asked of vmm is bounded: few questions at one time, and none twice within a moment,
//! also about those that are not there.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use pandastack_bus::{
    Error, SandboxId,
    vmm::{SandboxInfo, VmmProxy},
};
use pandastack_daemon::retry::again;
use pandastack_proxy::Refusal;
use tokio::{sync::Semaphore, time::Instant};

/// How old an answer may be.
pub const GOOD_FOR: Duration = Duration::from_secs(2);
const KEPT: usize = 4096;
const QUESTIONS: usize = 32;

/// What vmm said lately.
#[derive(Debug)]
pub struct Sandboxes {
    vmm: VmmProxy<'static>,
    known: Mutex<HashMap<SandboxId, (Instant, Option<SandboxInfo>)>>,
    questions: Semaphore,
}

impl Sandboxes {
    /// Over vmm.
    pub fn new(vmm: VmmProxy<'static>) -> Self {
        Self { vmm, known: Mutex::default(), questions: Semaphore::new(QUESTIONS) }
    }

    /// A sandbox, if it is there.
    pub async fn get(&self, id: &SandboxId) -> Result<SandboxInfo, Refusal> {
        let missing = || Refusal::no_sandbox(id.as_str());
        if let Some(known) = self.known(id) {
            return known.ok_or_else(missing);
        }
        let Ok(_turn) = self.questions.acquire().await else { return Err(missing()) };
        // Whoever had the turn before may have asked the same.
        if let Some(known) = self.known(id) {
            return known.ok_or_else(missing);
        }
        let found = match again(|| self.vmm.get(id.to_string())).await {
            Ok(info) => Some(info),
            Err(Error::NotFound(_)) => None,
            Err(error) => {
                tracing::warn!(sandbox = %id, error = %error.message(), "vmm does not say what a sandbox is");
                return Err(Refusal::unavailable(
                    "not_ready",
                    "the appliance is not ready for this request; try again soon",
                ));
            }
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= KEPT {
            known.clear();
        }
        known.insert(id.clone(), (Instant::now(), found.clone()));
        found.ok_or_else(missing)
    }

    fn known(&self, id: &SandboxId) -> Option<Option<SandboxInfo>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(id).filter(|(since, _)| since.elapsed() < GOOD_FOR).map(|(_, info)| info.clone())
    }
}
