//! Which outside address belongs to whom.
//!
//! Owns: the pool 10.200.0.2 … 10.200.255.254 and the rule by which the next address is chosen.
//! Refuses to know: records, links, rules. Pure: values in, values out.

use std::{collections::BTreeMap, net::Ipv4Addr};

use pandastack_bus::SandboxId;

/// First address that is given to a sandbox; the one before it is the host's.
pub const FIRST: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 2);
/// Last address that is given to a sandbox.
pub const LAST: Ipv4Addr = Ipv4Addr::new(10, 200, 255, 254);

/// Every address is taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("all {} outside addresses are taken", u32::from(LAST) - u32::from(FIRST) + 1)]
pub struct Exhausted;

/// A recorded address that cannot be taken back into the pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// It is none of ours.
    #[error("{0} is not an address of the pool")]
    Foreign(Ipv4Addr),
    /// Another owner has it already.
    #[error("{0} already belongs to {1}")]
    Taken(Ipv4Addr, SandboxId),
    /// The owner already has another one.
    #[error("{1} already has {0}")]
    Second(Ipv4Addr, SandboxId),
}

/// The address plan of this appliance.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    owners: BTreeMap<SandboxId, Ipv4Addr>,
    taken: BTreeMap<Ipv4Addr, SandboxId>,
    last: Option<Ipv4Addr>,
}

impl Pool {
    /// The address of `owner`, chosen now if it has none: the lowest free one above the one chosen last, so that an
    /// address given back rests for as long as the pool allows.
    ///
    /// # Errors
    /// Every address is taken.
    pub fn ensure(&mut self, owner: &SandboxId) -> Result<Ipv4Addr, Exhausted> {
        if let Some(address) = self.owners.get(owner) {
            return Ok(*address);
        }
        let start =
            self.last.filter(|last| *last < LAST).map_or(u32::from(FIRST), |last| u32::from(last) + 1);
        let address = self
            .lowest_free(start, u32::from(LAST))
            .or_else(|| self.lowest_free(u32::from(FIRST), start.saturating_sub(1)))
            .ok_or(Exhausted)?;
        self.insert(owner, address);
        Ok(address)
    }

    /// Takes a recorded address back into the plan.
    ///
    /// # Errors
    /// The address is not of this pool or has another owner, or the owner has another address. Nothing changed.
    pub fn restore(&mut self, owner: &SandboxId, address: Ipv4Addr) -> Result<(), Conflict> {
        if !(FIRST..=LAST).contains(&address) {
            return Err(Conflict::Foreign(address));
        }
        match (self.taken.get(&address), self.owners.get(owner)) {
            (Some(other), _) if other != owner => Err(Conflict::Taken(address, other.clone())),
            (_, Some(other)) if *other != address => Err(Conflict::Second(*other, owner.clone())),
            _ => {
                let last = self.last.map_or(address, |last| last.max(address));
                self.insert(owner, address);
                self.last = Some(last);
                Ok(())
            }
        }
    }

    /// Gives the address of `owner` back; answers which one it was.
    pub fn release(&mut self, owner: &SandboxId) -> Option<Ipv4Addr> {
        let address = self.owners.remove(owner)?;
        self.taken.remove(&address);
        Some(address)
    }

    /// The address of `owner`, if it has one.
    pub fn get(&self, owner: &SandboxId) -> Option<Ipv4Addr> {
        self.owners.get(owner).copied()
    }

    /// Every owner with its address, by id.
    pub fn iter(&self) -> impl Iterator<Item = (&SandboxId, Ipv4Addr)> {
        self.owners.iter().map(|(owner, address)| (owner, *address))
    }

    fn insert(&mut self, owner: &SandboxId, address: Ipv4Addr) {
        self.owners.insert(owner.clone(), address);
        self.taken.insert(address, owner.clone());
        self.last = Some(address);
    }

    /// Walks the taken addresses of the range until there is a gap.
    fn lowest_free(&self, from: u32, to: u32) -> Option<Ipv4Addr> {
        if from > to {
            return None;
        }
        let mut candidate = from;
        for (taken, _) in self.taken.range(Ipv4Addr::from(from)..=Ipv4Addr::from(to)) {
            if u32::from(*taken) != candidate {
                break;
            }
            candidate += 1;
        }
        (candidate <= to).then(|| Ipv4Addr::from(candidate))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn owner(number: u32) -> SandboxId {
        format!("{number:020}").parse().expect("twenty digits are an id")
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ensure(u32),
        Release(u32),
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u32..40).prop_map(Step::Ensure),
            2 => (0u32..40).prop_map(Step::Release),
            1 => Just(Step::Restart),
        ];
        proptest::collection::vec(step, 0..200)
    }

    fn restarted(pool: &Pool) -> Pool {
        let mut fresh = Pool::default();
        for (owner, address) in pool.iter() {
            fresh.restore(owner, address).expect("a plan that was kept is one that can be restored");
        }
        fresh
    }

    proptest! {
        #[test]
        fn nobody_shares_and_nobody_moves(steps in steps()) {
            let mut pool = Pool::default();
            for step in steps {
                let before: BTreeMap<_, _> = pool.iter().map(|(o, a)| (o.clone(), a)).collect();
                let touched = match step {
                    Step::Ensure(number) => { pool.ensure(&owner(number)).expect("there is room"); Some(owner(number)) }
                    Step::Release(number) => {
                        prop_assert_eq!(pool.release(&owner(number)), before.get(&owner(number)).copied());
                        Some(owner(number))
                    }
                    Step::Restart => { pool = restarted(&pool); None }
                };
                let addresses: BTreeSet<_> = pool.iter().map(|(_, address)| address).collect();
                prop_assert_eq!(addresses.len(), pool.iter().count());
                prop_assert!(addresses.iter().all(|address| (FIRST..=LAST).contains(address)));
                for (other, address) in before {
                    if Some(&other) != touched.as_ref() {
                        prop_assert_eq!(pool.get(&other), Some(address));
                    }
                }
            }
        }

        #[test]
        fn release_undoes_ensure(steps in steps(), number in 100u32..200) {
            let mut pool = Pool::default();
            for step in steps {
                if let Step::Ensure(number) = step { pool.ensure(&owner(number)).expect("there is room"); }
            }
            let before: Vec<_> = pool.iter().map(|(o, a)| (o.clone(), a)).collect();
            let address = pool.ensure(&owner(number)).expect("there is room");
            prop_assert_eq!(pool.ensure(&owner(number)), Ok(address));
            prop_assert_eq!(pool.release(&owner(number)), Some(address));
            let after: Vec<_> = pool.iter().map(|(o, a)| (o.clone(), a)).collect();
            prop_assert_eq!(before, after);
        }
    }

    #[test]
    fn an_address_given_back_rests() {
        let mut pool = Pool::default();
        let first = pool.ensure(&owner(1)).expect("room");
        pool.release(&owner(1));

        assert_eq!(first, FIRST);
        assert_eq!(pool.ensure(&owner(2)), Ok(Ipv4Addr::new(10, 200, 0, 3)));
    }

    #[test]
    fn the_pool_ends_and_wraps() {
        let mut pool = Pool::default();
        let size = u32::from(LAST) - u32::from(FIRST) + 1;
        for number in 0..size {
            pool.ensure(&owner(number)).expect("room");
        }
        assert_eq!(pool.ensure(&owner(size)), Err(Exhausted));

        let freed = pool.release(&owner(77)).expect("it had one");
        assert_eq!(pool.ensure(&owner(size)), Ok(freed));
    }

    #[test]
    fn a_record_that_contradicts_is_refused() {
        let mut pool = Pool::default();
        let address = pool.ensure(&owner(1)).expect("room");

        assert_eq!(pool.restore(&owner(2), address), Err(Conflict::Taken(address, owner(1))));
        let other = Ipv4Addr::new(10, 200, 7, 7);
        assert_eq!(pool.restore(&owner(1), other), Err(Conflict::Second(address, owner(1))));
        let host = Ipv4Addr::new(10, 200, 0, 1);
        assert_eq!(pool.restore(&owner(3), host), Err(Conflict::Foreign(host)));
    }
}
