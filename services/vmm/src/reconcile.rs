//! What start-up does about the differences between what is on record and what is there: a pure function.
//!
//! Owns: that decision. Refuses to know: how it is carried out; the events it answers with go through the same state
//! machine as everything else.

use std::collections::{BTreeMap, BTreeSet};

use pandastack_bus::SandboxId;

use crate::machine::{Event, State};

/// Reason of a sandbox whose machine did not survive.
pub const LOST: &str = "its machine was lost (power cut or crash)";

/// A record, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Its state on disk.
    pub state: State,
    /// Brought back after a power cut.
    pub persistent: bool,
    /// Unit, directory and attachment that are its.
    pub machine: SandboxId,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// Records.
    pub records: BTreeMap<SandboxId, Known>,
    /// Units and whether their process may be there.
    pub units: BTreeMap<SandboxId, bool>,
    /// Directories.
    pub directories: BTreeSet<SandboxId>,
    /// Attachments.
    pub attachments: BTreeSet<SandboxId>,
}

/// What to do about one id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Something happened to a sandbox that is on record.
    Happen(SandboxId, Event, &'static str),
    /// A slot that has become the machine of a sandbox: only its record goes.
    Forget(SandboxId),
    /// No record names this machine: whatever is there goes.
    Sweep {
        /// Whose it is.
        id: SandboxId,
        /// It has a unit.
        unit: bool,
        /// It has an attachment.
        attachment: bool,
        /// It has a directory.
        directory: bool,
    },
}

impl Action {
    /// Whether the daemon is ready only after it. Booting a guest takes long and is waited for by nobody.
    pub fn is_quick(&self) -> bool {
        !matches!(self, Self::Happen(_, Event::Lost { recover: true }, _))
    }
}

/// One action for every record, and one for every machine that no record names.
pub fn plan(found: &Found) -> Vec<Action> {
    // A sandbox that is woken moves into a slot, and its record is the first to say so.
    let moved = found.records.iter().filter(|(id, record)| record.machine != **id);
    let taken: BTreeSet<_> = moved.map(|(_, record)| &record.machine).collect();
    let known = found.records.iter().map(|(id, record)| {
        if record.state == State::Preparing && taken.contains(id) {
            return Action::Forget(id.clone());
        }
        let alive = found.units.get(&record.machine).copied().unwrap_or(false);
        let has_disk = found.directories.contains(&record.machine);
        let (event, reason) = match record.state {
            State::Running | State::Paused if alive => (Event::Adopt, ""),
            State::Running | State::Paused | State::Recovering if record.persistent && has_disk => {
                (Event::Lost { recover: true }, LOST)
            }
            State::Running | State::Paused | State::Recovering if !has_disk => {
                (Event::Lost { recover: false }, "its disk is not there")
            }
            State::Running | State::Paused | State::Recovering => (Event::Lost { recover: false }, LOST),
            State::Failed | State::Hibernated => (Event::Adopt, ""),
            _ => (Event::Lost { recover: false }, "the daemon was restarted before it was made"),
        };
        Action::Happen(id.clone(), event, reason)
    });
    let machines: BTreeSet<_> = found.records.values().map(|record| &record.machine).collect();
    let strangers: BTreeSet<_> = found
        .units
        .keys()
        .chain(&found.directories)
        .chain(&found.attachments)
        .filter(|id| !machines.contains(id))
        .collect();
    let sweeps = strangers.into_iter().map(|id| Action::Sweep {
        id: id.clone(),
        unit: found.units.contains_key(id),
        attachment: found.attachments.contains(id),
        directory: found.directories.contains(id),
    });
    known.chain(sweeps).collect()
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*, sample::select};

    use super::*;

    const ON_DISK: &[State] = &[
        State::Preparing,
        State::Dressing,
        State::Creating,
        State::Baking,
        State::Running,
        State::Paused,
        State::Hibernated,
        State::Recovering,
        State::Failed,
        State::Stopping,
    ];

    prop_compose! {
        fn found()(rows in vec((
            proptest::option::of((select(ON_DISK), any::<bool>())),
            proptest::option::of(any::<bool>()),
            any::<bool>(),
            any::<bool>(),
            // Whether it moved, and whether the record of the slot it moved into is still there.
            proptest::option::of(any::<bool>()),
        ), 0..12)) -> Found {
            let mut found = Found::default();
            for (record, unit, directory, attachment, moved) in rows {
                let id = SandboxId::random();
                let mut machine = id.clone();
                if let Some((state, persistent)) = record {
                    let has_machine = !matches!(state, State::Preparing | State::Creating | State::Baking);
                    if let Some(slot_stays) = moved.filter(|_| has_machine) {
                        machine = SandboxId::random();
                        if slot_stays {
                            let slot = Known { state: State::Preparing, persistent: false, machine: machine.clone() };
                            found.records.insert(machine.clone(), slot);
                        }
                    }
                    found.records.insert(id, Known { state, persistent, machine: machine.clone() });
                }
                if let Some(alive) = unit { found.units.insert(machine.clone(), alive); }
                if directory { found.directories.insert(machine.clone()); }
                if attachment { found.attachments.insert(machine); }
            }
            found
        }
    }

    proptest! {
        #[test]
        fn every_record_and_every_machine_has_one_action_and_the_machine_knows_it(found in found()) {
            let plan = plan(&found);
            let (mut records, mut machines) = (BTreeSet::new(), BTreeSet::new());
            for action in &plan {
                match action {
                    Action::Happen(id, event, _) => {
                        prop_assert!(records.insert(id.clone()));
                        let record = &found.records[id];
                        prop_assert!(machines.insert(record.machine.clone()), "two have one machine");
                        prop_assert!(record.state.on(*event).is_some(), "{:?} {:?}", record, event);
                    }
                    Action::Forget(id) => {
                        prop_assert!(records.insert(id.clone()));
                        prop_assert!(found.records.iter().any(|(other, record)| other != id && record.machine == *id));
                    }
                    Action::Sweep { id, unit, attachment, directory } => {
                        prop_assert!(machines.insert(id.clone()));
                        prop_assert!(!found.records.values().any(|record| record.machine == *id));
                        prop_assert!(unit | attachment | directory);
                        prop_assert_eq!(*unit, found.units.contains_key(id));
                        prop_assert_eq!(*directory, found.directories.contains(id));
                        prop_assert_eq!(*attachment, found.attachments.contains(id));
                    }
                }
            }
            prop_assert_eq!(records, found.records.keys().cloned().collect());
            let there = found.units.keys().chain(&found.directories).chain(&found.attachments);
            prop_assert!(there.cloned().collect::<BTreeSet<_>>().is_subset(&machines));
        }

        #[test]
        fn what_was_acknowledged_is_never_taken_down(found in found()) {
            for action in plan(&found) {
                if let Action::Happen(id, event, _) = action {
                    let record = &found.records[&id];
                    let (next, _) = record.state.on(event).unwrap();
                    let acknowledged = matches!(
                        record.state,
                        State::Running | State::Paused | State::Hibernated | State::Recovering | State::Failed
                    );
                    prop_assert_eq!(next == State::Stopping, !acknowledged);
                }
            }
        }
    }

    fn known(id: &SandboxId, state: State, persistent: bool) -> Known {
        Known { state, persistent, machine: id.clone() }
    }

    #[test]
    fn a_persistent_sandbox_comes_back_and_another_tells_why_not() {
        let (kept, lost, live) = (SandboxId::random(), SandboxId::random(), SandboxId::random());
        let mut found = Found::default();
        for (id, persistent) in [(&kept, true), (&lost, false), (&live, false)] {
            found.records.insert(id.clone(), known(id, State::Running, persistent));
            found.directories.insert(id.clone());
        }
        found.units.insert(live.clone(), true);

        let plan = plan(&found);

        assert!(plan.contains(&Action::Happen(kept, Event::Lost { recover: true }, LOST)));
        assert!(plan.contains(&Action::Happen(lost, Event::Lost { recover: false }, LOST)));
        assert!(plan.contains(&Action::Happen(live, Event::Adopt, "")));
    }

    #[test]
    fn a_woken_sandbox_keeps_its_slot_and_loses_what_has_its_own_name() {
        let (sandbox, slot) = (SandboxId::random(), SandboxId::random());
        let mut found = Found::default();
        let moved = Known { machine: slot.clone(), ..known(&sandbox, State::Running, true) };
        found.records.insert(sandbox.clone(), moved);
        found.records.insert(slot.clone(), known(&slot, State::Preparing, false));
        for id in [&sandbox, &slot] {
            found.units.insert(id.clone(), true);
            found.directories.insert(id.clone());
        }

        let plan = plan(&found);

        assert!(plan.contains(&Action::Happen(sandbox.clone(), Event::Adopt, "")));
        assert!(plan.contains(&Action::Forget(slot)));
        let old = Action::Sweep { id: sandbox, unit: true, attachment: false, directory: true };
        assert!(plan.contains(&old));
        assert_eq!(plan.len(), 3);
    }
}
