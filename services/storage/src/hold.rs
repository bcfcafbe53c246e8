//! Who has which volumes: many readers or one writer. Values only, no files.

use std::collections::{BTreeMap, BTreeSet};

use pandastack_bus::SandboxId;
use serde::{Deserialize, Serialize};

/// The volumes of one sandbox, as its record says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Hold {
    /// Each once, in the order given.
    pub volumes: Vec<Held>,
}

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The volume.
    pub volume: SandboxId,
    /// The sandbox only reads it.
    pub read_only: bool,
}

/// All of them, by sandbox.
#[derive(Debug, Default)]
pub struct Holds(BTreeMap<SandboxId, Hold>);

/// What follows from a sandbox asking for volumes.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It has exactly these.
    Same,
    /// It can have them.
    Free,
    /// It has others.
    Others,
    /// Somebody else has this one.
    Taken(SandboxId),
}

impl Holds {
    /// Whether `sandbox` can have these.
    pub fn ask(&self, sandbox: &SandboxId, wanted: &Hold) -> Answer {
        match self.0.get(sandbox) {
            Some(hold) if hold == wanted => return Answer::Same,
            Some(_) => return Answer::Others,
            None => {}
        }
        let taken = |wanted: &&Held| {
            let same = |held: &&Held| held.volume == wanted.volume;
            let clash = |held: &Held| !(held.read_only && wanted.read_only);
            self.0.values().flat_map(|hold| &hold.volumes).filter(same).any(clash)
        };
        wanted.volumes.iter().find(taken).map_or(Answer::Free, |held| Answer::Taken(held.volume.clone()))
    }

    /// Whether `sandbox` has a volume in just this way.
    pub fn has(&self, sandbox: &SandboxId, wanted: &Held) -> bool {
        self.0.get(sandbox).is_some_and(|hold| hold.volumes.contains(wanted))
    }

    /// The sandboxes that have a volume.
    pub fn of(&self, volume: &SandboxId) -> BTreeSet<&SandboxId> {
        let has = |hold: &Hold| hold.volumes.iter().any(|held| held.volume == *volume);
        self.0.iter().filter(|(_, hold)| has(hold)).map(|(sandbox, _)| sandbox).collect()
    }

    /// Takes note.
    pub fn insert(&mut self, sandbox: SandboxId, hold: Hold) {
        self.0.insert(sandbox, hold);
    }

    /// Forgets.
    pub fn remove(&mut self, sandbox: &SandboxId) {
        self.0.remove(sandbox);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(number: usize) -> SandboxId {
        format!("{number:020}").parse().unwrap()
    }

    proptest! {
        #[test]
        fn there_is_one_writer_or_only_readers_and_nobody_is_refused_without_need(
            steps in prop::collection::vec((0..4_usize, prop::collection::btree_map(0..4_usize, any::<bool>(), 0..3)), 1..40),
        ) {
            let mut holds = Holds::default();
            let mut model: BTreeMap<usize, BTreeMap<usize, bool>> = BTreeMap::new();
            for (sandbox, wanted) in steps {
                if wanted.is_empty() {
                    holds.remove(&id(sandbox));
                    model.remove(&sandbox);
                    continue;
                }
                let volumes =
                    wanted.iter().map(|(volume, read_only)| Held { volume: id(*volume), read_only: *read_only });
                let hold = Hold { volumes: volumes.collect() };
                let clash = wanted.iter().find(|(volume, read_only)| {
                    let others = model.iter().filter(|(other, _)| **other != sandbox);
                    others.filter_map(|(_, has)| has.get(volume)).any(|theirs| !(*theirs && **read_only))
                });
                let expected = match (model.get(&sandbox), clash) {
                    (Some(has), _) if *has == wanted => Answer::Same,
                    (Some(_), _) => Answer::Others,
                    (None, Some((volume, _))) => Answer::Taken(id(*volume)),
                    (None, None) => Answer::Free,
                };
                let answer = holds.ask(&id(sandbox), &hold);
                prop_assert_eq!(&answer, &expected);
                if answer == Answer::Free {
                    holds.insert(id(sandbox), hold);
                    model.insert(sandbox, wanted);
                }
                for volume in 0..4 {
                    let uses: Vec<_> = model.values().filter_map(|has| has.get(&volume)).collect();
                    prop_assert!(uses.len() < 2 || uses.iter().all(|read_only| **read_only));
                    prop_assert_eq!(holds.of(&id(volume)).len(), uses.len());
                }
            }
        }
    }
}
