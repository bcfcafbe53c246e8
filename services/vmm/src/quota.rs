//! How many sandboxes a workspace may have.
//!
//! Owns: the count, also of those that are just being made, so that many creates at once stay within it. Refuses to know:
//! how a sandbox is made.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use pandastack_bus::{Error, Result, SandboxId};

use crate::{machine::State, manager::Manager, ports::World, record::Record};

/// Claims of creates under way, by number.
#[derive(Debug, Default)]
pub struct Claims(Mutex<Held>);

#[derive(Debug, Default)]
struct Held {
    last: u64,
    claims: HashMap<u64, (String, Option<SandboxId>)>,
}

/// The right of one create to one more sandbox; returned when dropped. The sandbox counts by itself then.
#[derive(Debug)]
pub struct Claim<'a> {
    claims: &'a Claims,
    number: u64,
}

impl Claims {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims one more for a workspace. `there` answers with those that exist, while no claim comes or goes.
    fn claim(
        &self,
        workspace: &str,
        there: impl FnOnce() -> Vec<SandboxId>,
        most: usize,
    ) -> Result<Claim<'_>> {
        let mut held = self.held();
        let there = there();
        let made = |id: &Option<SandboxId>| id.as_ref().is_some_and(|id| there.contains(id));
        let owed = held.claims.values().filter(|(whose, id)| whose == workspace && !made(id)).count();
        if there.len() + owed >= most {
            return Err(Error::Quota(format!("max sandboxes reached: a workspace may have {most}")));
        }
        held.last += 1;
        let number = held.last;
        held.claims.insert(number, (workspace.to_owned(), None));
        Ok(Claim { claims: self, number })
    }
}

impl Claim<'_> {
    /// This is the sandbox that it is for: the two count once.
    pub fn is_for(&mut self, sandbox: &SandboxId) {
        if let Some((_, id)) = self.claims.held().claims.get_mut(&self.number) {
            *id = Some(sandbox.clone());
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.held().claims.remove(&self.number);
    }
}

impl<W: World> Manager<W> {
    /// Claims one more sandbox for a workspace. Every state counts: each holds a disk.
    ///
    /// # Errors
    /// [`Error::Quota`].
    pub fn claim(&self, workspace: &str) -> Result<Claim<'_>> {
        let counts = |record: &Record| {
            record.state != State::Gone
                && record.sandbox().is_some_and(|inner| inner.spec.workspace == workspace)
        };
        let there = || {
            let all = self.all().into_iter();
            all.filter(|one| counts(&one.record())).map(|one| one.id.clone()).collect()
        };
        self.claims.claim(workspace, there, self.config.workspace_sandboxes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_exists_and_what_is_being_made_count_once_each() {
        let claims = Claims::default();
        let (old, new) = (SandboxId::random(), SandboxId::random());
        let mut claim = claims.claim("w", || vec![old.clone()], 3).unwrap();
        claim.is_for(&new);
        let there = || vec![old.clone(), new.clone()];

        let second = claims.claim("w", there, 3);

        assert!(second.is_ok());
        assert!(matches!(claims.claim("w", there, 3), Err(Error::Quota(_))));
        assert!(claims.claim("other", Vec::new, 1).is_ok());
        drop(second);
        assert!(claims.claim("w", there, 3).is_ok(), "a claim is returned");
    }
}
