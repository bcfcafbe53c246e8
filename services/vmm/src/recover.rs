//! Sandboxes whose machine was lost are booted again: so many at a time, and more than once if need be.
//!
//! Owns: the queue, the number of attempts, the pauses. Refuses to know: which ones are lost (`reconcile`), what a boot
//! consists of (`machine`).

use std::{sync::Arc, time::Duration};

use pandastack_bus::{Error, Result};
use tokio::time::sleep;

use crate::{
    admission::{self, Host},
    create::Pending,
    machine::{Event, State},
    manager::Manager,
    ports::World,
    sandbox::{Happening, Sandbox, may_pass},
};

/// Pauses after failures that may pass; one more attempt than there are pauses.
const PAUSES: [Duration; 4] =
    [Duration::from_secs(2), Duration::from_secs(10), Duration::from_secs(30), Duration::from_secs(60)];

impl<W: World> Manager<W> {
    /// Its machine is gone: it fails, or waits for its turn and is booted again. Completes when that is decided.
    pub async fn lose(self: &Arc<Self>, sandbox: &Arc<Sandbox>, event: Event, reason: &str) {
        let mut with = Happening::because(reason);
        let recover = event == (Event::Lost { recover: true });
        if recover {
            with.change = Some(Box::new(|record| {
                if let Some(inner) = record.sandbox_mut() {
                    inner.boot_mode = "cold".into();
                }
            }));
        }
        if let Err(error) = self.happen(sandbox, event, with).await {
            tracing::error!(sandbox = %sandbox.id, event = ?event, "{}", error.message());
        }
        if recover {
            self.recover(sandbox, reason).await;
        }
    }

    /// Boots it again as often as it takes, within limits. Somebody may delete it meanwhile.
    async fn recover(self: &Arc<Self>, sandbox: &Arc<Sandbox>, reason: &str) {
        for pause in PAUSES.into_iter().map(Some).chain([None]) {
            let turn = self.recoveries.acquire().await;
            if sandbox.record().state != State::Recovering {
                return;
            }
            let outcome = self.boot_again(sandbox, reason, pause.is_some()).await;
            drop(turn);
            let Err(error) = outcome else { return };
            tracing::warn!(sandbox = %sandbox.id, "was not booted again: {}", error.message());
            match pause {
                Some(pause) if may_pass(&error) => sleep(pause).await,
                _ => {
                    // The machine has decided already, except when there was no room for an attempt.
                    if sandbox.record().state == State::Recovering {
                        let with = Happening::because(error.message());
                        let _ = self.happen(sandbox, Event::Fault, with).await;
                    }
                    return;
                }
            }
        }
    }

    async fn boot_again(
        self: &Arc<Self>,
        sandbox: &Arc<Sandbox>,
        reason: &str,
        patient: bool,
    ) -> Result<State> {
        let memory_mib = sandbox.record().shape().map(|shape| shape.memory_mib);
        let memory_mib = memory_mib.ok_or_else(|| Error::Internal("it has no machine".into()))?;
        // Its disk is there already, however full the partition is.
        admission::admit(&Host { disk_free_bytes: None, ..self.host()? }, memory_mib, 0)?;
        let _pending = Pending::new(&self.pending_mib, admission::need_mib(memory_mib));
        let with = Happening { patient, ..Happening::because(reason) };
        self.happen(sandbox, Event::Boot, with).await
    }
}
