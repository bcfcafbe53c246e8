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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Its state on disk.
    pub state: State,
    /// Brought back after a power cut.
    pub persistent: bool,
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
    /// Nobody knows this id: whatever is there goes.
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

/// One action for every id that needs one.
pub fn plan(found: &Found) -> Vec<Action> {
    let known = found.records.iter().map(|(id, record)| {
        let alive = found.units.get(id).copied().unwrap_or(false);
        let has_disk = found.directories.contains(id);
        let (event, reason) = match record.state {
            State::Running if alive => (Event::Adopt, ""),
            State::Running | State::Recovering if record.persistent && has_disk => {
                (Event::Lost { recover: true }, LOST)
            }
            State::Running | State::Recovering if !has_disk => {
                (Event::Lost { recover: false }, "its disk is not there")
            }
            State::Running | State::Recovering => (Event::Lost { recover: false }, LOST),
            State::Failed => (Event::Adopt, ""),
            _ => (Event::Lost { recover: false }, "the daemon was restarted before it was made"),
        };
        Action::Happen(id.clone(), event, reason)
    });
    let strangers: BTreeSet<_> = found
        .units
        .keys()
        .chain(&found.directories)
        .chain(&found.attachments)
        .filter(|id| !found.records.contains_key(id))
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
        ), 0..12)) -> Found {
            let mut found = Found::default();
            for (record, unit, directory, attachment) in rows {
                let id = SandboxId::random();
                if let Some((state, persistent)) = record {
                    found.records.insert(id.clone(), Known { state, persistent });
                }
                if let Some(alive) = unit { found.units.insert(id.clone(), alive); }
                if directory { found.directories.insert(id.clone()); }
                if attachment { found.attachments.insert(id); }
            }
            found
        }
    }

    proptest! {
        #[test]
        fn every_id_has_one_action_and_the_machine_knows_it(found in found()) {
            let plan = plan(&found);
            let mut seen = BTreeSet::new();
            for action in &plan {
                match action {
                    Action::Happen(id, event, _) => {
                        prop_assert!(seen.insert(id.clone()));
                        let record = found.records[id];
                        prop_assert!(record.state.on(*event).is_some(), "{:?} {:?}", record, event);
                    }
                    Action::Sweep { id, unit, attachment, directory } => {
                        prop_assert!(seen.insert(id.clone()));
                        prop_assert!(!found.records.contains_key(id));
                        prop_assert!(unit | attachment | directory);
                        prop_assert_eq!(*unit, found.units.contains_key(id));
                        prop_assert_eq!(*directory, found.directories.contains(id));
                        prop_assert_eq!(*attachment, found.attachments.contains(id));
                    }
                }
            }
            let all: BTreeSet<_> = found.records.keys().chain(found.units.keys())
                .chain(&found.directories).chain(&found.attachments).cloned().collect();
            prop_assert_eq!(seen, all);
        }

        #[test]
        fn what_was_acknowledged_is_never_taken_down(found in found()) {
            for action in plan(&found) {
                if let Action::Happen(id, event, _) = action {
                    let record = found.records[&id];
                    let (next, _) = record.state.on(event).unwrap();
                    let acknowledged = matches!(record.state, State::Running | State::Recovering | State::Failed);
                    prop_assert_eq!(next == State::Stopping, !acknowledged);
                }
            }
        }
    }

    #[test]
    fn a_persistent_sandbox_comes_back_and_another_tells_why_not() {
        let (kept, lost, live) = (SandboxId::random(), SandboxId::random(), SandboxId::random());
        let mut found = Found::default();
        for (id, persistent) in [(&kept, true), (&lost, false), (&live, false)] {
            found.records.insert(id.clone(), Known { state: State::Running, persistent });
            found.directories.insert(id.clone());
        }
        found.units.insert(live.clone(), true);

        let plan = plan(&found);

        assert!(plan.contains(&Action::Happen(kept, Event::Lost { recover: true }, LOST)));
        assert!(plan.contains(&Action::Happen(lost, Event::Lost { recover: false }, LOST)));
        assert!(plan.contains(&Action::Happen(live, Event::Adopt, "")));
    }
}
