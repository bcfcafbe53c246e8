//! Who waits for events of sandboxes is woken when there may be some.
//!
//! Owns: the hints that vmm gives. Refuses to know: the events themselves; a hint that is missed costs a look at vmm, never an
//! event.

use std::sync::Arc;

use tokio::sync::broadcast::{self, error::RecvError};

/// Hints that wait for a slow listener; more make it look.
const WAITING: usize = 64;

/// All hints.
#[derive(Debug, Clone)]
pub struct Happenings(broadcast::Sender<Arc<(String, String)>>);

/// Hints from some moment on, about one workspace or one sandbox of it.
#[derive(Debug)]
pub struct Hints {
    from: broadcast::Receiver<Arc<(String, String)>>,
    workspace: String,
    sandbox: String,
}

impl Default for Happenings {
    fn default() -> Self {
        Self(broadcast::channel(WAITING).0)
    }
}

impl Happenings {
    /// Something happened to a sandbox of a workspace.
    pub fn hint(&self, workspace: &str, sandbox: &str) {
        // Nobody listens: then nobody needs it.
        let _ = self.0.send(Arc::new((workspace.to_owned(), sandbox.to_owned())));
    }

    /// Hints from now on; of all sandboxes of the workspace for the empty name.
    pub fn listen(&self, workspace: &str, sandbox: &str) -> Hints {
        Hints { from: self.0.subscribe(), workspace: workspace.to_owned(), sandbox: sandbox.to_owned() }
    }
}

impl Hints {
    /// Completes when there may be something new. Cancel-safe.
    pub async fn next(&mut self) {
        loop {
            match self.from.recv().await {
                Ok(hint) if hint.0 != self.workspace => {}
                Ok(hint) if !self.sandbox.is_empty() && hint.1 != self.sandbox => {}
                Ok(_) | Err(RecvError::Lagged(_)) => return,
                Err(RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    async fn is_told(hints: &mut Hints) -> bool {
        tokio::time::timeout(Duration::from_millis(50), hints.next()).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn everybody_hears_of_what_is_theirs() {
        let all = Happenings::default();
        let (mut one, mut every, mut other) =
            (all.listen("a", "x"), all.listen("a", ""), all.listen("b", "x"));
        all.hint("a", "y");
        assert!(!is_told(&mut one).await && is_told(&mut every).await && !is_told(&mut other).await);
        all.hint("a", "x");
        assert!(is_told(&mut one).await && is_told(&mut every).await && !is_told(&mut other).await);
        for _ in 0..WAITING + 1 {
            all.hint("c", "z");
        }
        assert!(is_told(&mut other).await, "who has missed some looks");
    }
}
