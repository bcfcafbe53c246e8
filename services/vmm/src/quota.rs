//! What a workspace may have of what is made here: sandboxes with their processors, memory and disks; snapshots.
//!
//! Owns: the sums, also of what is just being made, so that many requests at once stay within the limits. Every state counts,
//! also of a hibernated sandbox: it may wake at any time. Refuses to know: how anything is made.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use pandastack_bus::{
    Error, Result, SandboxId,
    quota::{Quota, Resource},
    storage::{Purpose, StorageBackend},
};
use pandastack_daemon::quotas::{Limits, admit, lines};

use crate::{
    machine::State,
    manager::Manager,
    ports::World,
    record::{Record, Shape},
};

/// So much of everything that a sandbox has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amount {
    sandboxes: u64,
    vcpus: u64,
    memory_mib: u64,
    disk_mib: u64,
}

impl Amount {
    /// Of one sandbox.
    pub fn of(shape: &Shape) -> Self {
        Self {
            sandboxes: 1,
            vcpus: shape.vcpus.into(),
            memory_mib: shape.memory_mib,
            disk_mib: shape.disk_mib,
        }
    }

    fn times(self, count: u64) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_mul(count),
            vcpus: self.vcpus.saturating_mul(count),
            memory_mib: self.memory_mib.saturating_mul(count),
            disk_mib: self.disk_mib.saturating_mul(count),
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            sandboxes: self.sandboxes.saturating_add(other.sandboxes),
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_mib: self.disk_mib.saturating_add(other.disk_mib),
        }
    }

    fn each(self) -> [(Resource, u64); 4] {
        [
            (Resource::Sandboxes, self.sandboxes),
            (Resource::Vcpus, self.vcpus),
            (Resource::MemoryMib, self.memory_mib),
            (Resource::DiskMib, self.disk_mib),
        ]
    }

    /// Whether a workspace that has `self` may get `more`.
    fn admit(self, limits: &Limits, more: Self) -> Result<()> {
        let pairs = self.each().into_iter().zip(more.each());
        let check = |((resource, used), (_, more))| admit(limits, resource, used, more);
        // What never fits is told first: it is of no use to wait for the rest.
        let refused: Vec<Error> = pairs.filter_map(|pair| check(pair).err()).collect();
        let never = refused.iter().find(|error| matches!(error, Error::BeyondQuota(_)));
        never.or(refused.first()).cloned().map_or(Ok(()), Err)
    }
}

/// Claims of what is being made, by number.
#[derive(Debug, Default)]
pub struct Claims {
    held: Mutex<Held>,
    /// Whoever asks storage what snapshots there are and adds to them.
    counting: tokio::sync::Mutex<()>,
    /// Snapshots that are being taken, with their workspaces.
    snapshots: Mutex<HashMap<SandboxId, String>>,
}

#[derive(Debug, Default)]
struct Held {
    last: u64,
    claims: HashMap<u64, (String, Option<SandboxId>, Amount)>,
}

/// The right to one more sandbox; returned when dropped. The sandbox counts by itself then.
#[derive(Debug)]
pub struct Claim<'a> {
    claims: &'a Claims,
    number: u64,
}

/// The right to one more snapshot; returned when dropped.
#[derive(Debug)]
pub struct SnapshotClaim<'a>(&'a Claims, SandboxId);

impl Claims {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn taken(&self) -> MutexGuard<'_, HashMap<SandboxId, String>> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims `count` times `each` for a workspace, all or nothing. `there` answers with what exists, while no claim comes or
    /// goes.
    fn claim(
        &self,
        workspace: &str,
        limits: &Limits,
        each: Amount,
        count: u64,
        there: impl FnOnce() -> Vec<(SandboxId, Amount)>,
    ) -> Result<Vec<Claim<'_>>> {
        let mut held = self.held();
        let there = there();
        let made =
            |id: &Option<SandboxId>| id.as_ref().is_some_and(|id| there.iter().any(|(one, _)| one == id));
        let owed = held.claims.values().filter(|(whose, id, _)| whose == workspace && !made(id));
        let all = there.iter().map(|(_, amount)| amount).chain(owed.map(|(_, _, amount)| amount));
        let used = all.fold(Amount::default(), |sum, amount| sum.plus(*amount));
        used.admit(limits, each.times(count))?;
        let claim = |_| {
            held.last += 1;
            let number = held.last;
            held.claims.insert(number, (workspace.to_owned(), None, each));
            Claim { claims: self, number }
        };
        Ok((0..count).map(claim).collect())
    }
}

impl Claim<'_> {
    /// This is the sandbox that it is for: the two count once.
    pub fn is_for(&mut self, sandbox: &SandboxId) {
        if let Some((_, id, _)) = self.claims.held().claims.get_mut(&self.number) {
            *id = Some(sandbox.clone());
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.claims.held().claims.remove(&self.number);
    }
}

impl Drop for SnapshotClaim<'_> {
    fn drop(&mut self) {
        self.0.taken().remove(&self.1);
    }
}

impl<W: World> Manager<W> {
    /// Claims `count` more sandboxes of this shape for a workspace, all or nothing.
    ///
    /// # Errors
    /// [`Error::Quota`], [`Error::BeyondQuota`].
    pub fn claim(&self, workspace: &str, shape: &Shape, count: u64) -> Result<Vec<Claim<'_>>> {
        let limits = self.limits(workspace);
        self.claims.claim(workspace, &limits, Amount::of(shape), count, || self.amounts(workspace))
    }

    /// Claims one more snapshot for a workspace.
    ///
    /// # Errors
    /// [`Error::Quota`], [`Error::BeyondQuota`]; or storage does not answer.
    pub async fn claim_snapshot(&self, workspace: &str, snapshot: &SandboxId) -> Result<SnapshotClaim<'_>> {
        let _turn = self.claims.counting.lock().await;
        let limits = self.limits(workspace);
        if limits.contains_key(&Resource::Snapshots) {
            admit(&limits, Resource::Snapshots, self.snapshot_count(workspace).await?, 1)?;
        }
        self.claims.taken().insert(snapshot.clone(), workspace.to_owned());
        Ok(SnapshotClaim(&self.claims, snapshot.clone()))
    }

    /// Snapshots of a workspace, those that are being taken included.
    async fn snapshot_count(&self, workspace: &str) -> Result<u64> {
        // First: what is done in between is counted there, and once.
        let taken = self.claims.taken().clone();
        let there = self.world.storage().snapshots(workspace.to_owned()).await?;
        let tenants = there.into_iter().filter(|info| info.spec.purpose == Purpose::Snapshot);
        let mut ids: BTreeSet<String> = tenants.map(|info| info.spec.id).collect();
        ids.extend(taken.into_iter().filter(|(_, whose)| whose == workspace).map(|(id, _)| id.to_string()));
        Ok(ids.len() as u64)
    }

    fn limits(&self, workspace: &str) -> Limits {
        let mut limits = self.quotas.of(workspace);
        limits.entry(Resource::Sandboxes).or_insert(self.config.workspace_sandboxes as u64);
        limits
    }

    fn amounts(&self, workspace: &str) -> Vec<(SandboxId, Amount)> {
        let counts = |record: &Record| {
            let inner = record.sandbox().filter(|inner| inner.spec.workspace == workspace)?;
            (record.state != State::Gone).then(|| (record.id.clone(), Amount::of(&inner.shape)))
        };
        self.all().iter().filter_map(|one| counts(&one.record())).collect()
    }

    /// Sets a limit, or takes it away (below 0), durably.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`]; [`Error::NoSpace`].
    pub async fn set_quota(&self, workspace: String, resource: Resource, limit: i64) -> Result<()> {
        if !Resource::OF_VMM.contains(&resource) {
            return Err(Error::InvalidArgument(format!("vmm does not make {}", resource.as_str())));
        }
        let quotas = Arc::clone(&self.quotas);
        let set =
            tokio::task::spawn_blocking(move || quotas.set(&workspace, resource, u64::try_from(limit).ok()));
        set.await.map_err(|error| Error::Internal(error.to_string()))?
    }

    /// Limits and use of a workspace.
    ///
    /// # Errors
    /// Storage does not answer.
    pub async fn quota_lines(&self, workspace: &str) -> Result<Vec<Quota>> {
        let snapshots = self.snapshot_count(workspace).await?;
        let sum =
            self.amounts(workspace).iter().fold(Amount::default(), |sum, (_, amount)| sum.plus(*amount));
        let used = sum.each().into_iter().chain([(Resource::Snapshots, snapshots)]);
        Ok(lines(&self.limits(workspace), used))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: Amount = Amount { sandboxes: 1, vcpus: 2, memory_mib: 512, disk_mib: 4096 };

    fn at_most(limits: &[(Resource, u64)]) -> Limits {
        limits.iter().copied().collect()
    }

    #[test]
    fn what_exists_and_what_is_being_made_count_once_each() {
        let claims = Claims::default();
        let limits = at_most(&[(Resource::Sandboxes, 3)]);
        let (old, new) = (SandboxId::random(), SandboxId::random());
        let mut claim = claims.claim("w", &limits, ONE, 1, || vec![(old.clone(), ONE)]).unwrap();
        claim[0].is_for(&new);
        let there = || vec![(old.clone(), ONE), (new.clone(), ONE)];

        let second = claims.claim("w", &limits, ONE, 1, there);

        assert!(second.is_ok());
        assert!(matches!(claims.claim("w", &limits, ONE, 1, there), Err(Error::Quota(_))));
        assert!(claims.claim("other", &limits, ONE, 1, Vec::new).is_ok());
        drop(second);
        assert!(claims.claim("w", &limits, ONE, 1, there).is_ok(), "a claim is returned");
    }

    #[test]
    fn each_of_the_four_bounds_and_what_never_fits_is_told_apart() {
        let there = || vec![(SandboxId::random(), ONE)];
        for (resource, one) in ONE.each() {
            let claim = |most, count| {
                let claims = Claims::default();
                claims.claim("w", &at_most(&[(resource, most)]), ONE, count, there).map(|held| held.len())
            };
            assert_eq!(claim(2 * one, 1), Ok(1), "{resource:?}");
            assert!(matches!(claim(2 * one, 2), Err(Error::Quota(_))), "{resource:?}");
            assert!(matches!(claim(2 * one, 3), Err(Error::BeyondQuota(_))), "{resource:?}");
        }
        let limits = at_most(&[(Resource::Sandboxes, 1), (Resource::DiskMib, 1)]);
        let both = Claims::default().claim("w", &limits, ONE, 1, there).map(|held| held.len());
        assert!(matches!(both, Err(Error::BeyondQuota(_))), "{both:?}");
    }

    proptest! {
        #[test]
        fn claims_side_by_side_never_pass_a_limit(
            wishes in proptest::collection::vec((1u64..5, 1u64..4, any::<bool>()), 1..20), most in 0u64..30
        ) {
            let claims = Claims::default();
            let limits = at_most(&[(Resource::Vcpus, most)]);
            let mut held: Vec<(u64, Vec<Claim<'_>>)> = Vec::new();
            for (vcpus, count, ends) in wishes {
                if ends {
                    held.pop();
                }
                let each = Amount { vcpus, ..Amount::default() };
                let used: u64 = held.iter().map(|(vcpus, claims)| vcpus * claims.len() as u64).sum();
                let claim = claims.claim("w", &limits, each, count, Vec::new);
                prop_assert_eq!(claim.is_ok(), used + vcpus * count <= most);
                held.extend(claim.ok().map(|claim| (vcpus, claim)));
            }
        }
    }
}
