//! What a tenant may expect of sandboxes, as values: which request is done, which refused, and what every sandbox holds
//! afterwards.
//!
//! Owns: the states, the contents of memory and disk, who came from whom, and the choice of the next request. Refuses to
//! know: HTTP, ids, time. Only what the contract promises without a doubt is in it.
//!
//! ```text
//!          pause            hibernate
//!   paused ◄───── running ───────────► hibernated      pause, resume, hibernate and wake may be repeated;
//!      │  ─────►    ▲   ◄───────────       ▲           what needs the guest wakes a hibernated one and is
//!      │  resume    │      wake, use       │           refused by a paused one
//!      └────────────┼──────────────────────┘
//!                   │        hibernate
//!         create, fork, from a snapshot
//! ```

use std::collections::BTreeMap;

/// Sandboxes at one time.
pub const MAX_SANDBOXES: usize = 5;
/// Snapshots at one time.
pub const MAX_SNAPSHOTS: usize = 3;
const KEYS: u64 = 4;

/// Names a sandbox or a snapshot; never used again.
pub type Handle = u32;

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The guest answers.
    Running,
    /// Its processors stand still.
    Paused,
    /// No machine.
    Hibernated,
}

impl State {
    /// The API's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Hibernated => "hibernated",
        }
    }
}

/// What a guest has: files by key, on its disk and in its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// On the root disk.
    pub disk: BTreeMap<u64, u64>,
    /// On a tmpfs.
    pub memory: BTreeMap<u64, u64>,
}

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    /// Where it is in its life.
    pub state: State,
    /// What is in it.
    pub contents: Contents,
    /// The fork tree it is a child of, until one of them is promoted.
    pub tree: Option<Handle>,
}

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Action {
    Create,
    Write { at: Handle, key: u64, value: u64, synced: bool },
    Read { at: Handle },
    Pause { at: Handle },
    Resume { at: Handle },
    Hibernate { at: Handle },
    Wake { at: Handle },
    Snapshot { at: Handle },
    FromSnapshot { snapshot: Handle },
    DeleteSnapshot { snapshot: Handle },
    Fork { at: Handle },
    ForkTree { at: Handle, count: usize },
    Promote { at: Handle },
    Delete { at: Handle },
}

/// What has to become of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The sandbox's state does not permit it: 409, and nothing has changed.
    Refused,
    /// It was done: these came into being, in order, and these sandboxes are gone besides what was asked to go.
    Done {
        /// Sandboxes, or one snapshot.
        made: Vec<Handle>,
        /// Siblings of the promoted.
        gone: Vec<Handle>,
    },
}

impl Outcome {
    fn done() -> Self {
        Self::Done { made: Vec::new(), gone: Vec::new() }
    }

    fn made(made: Vec<Handle>) -> Self {
        Self::Done { made, gone: Vec::new() }
    }
}

/// Everything a workspace has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct World {
    sandboxes: BTreeMap<Handle, Sandbox>,
    snapshots: BTreeMap<Handle, Contents>,
    next: Handle,
}

impl World {
    /// The sandboxes.
    #[must_use]
    pub fn sandboxes(&self) -> &BTreeMap<Handle, Sandbox> {
        &self.sandboxes
    }

    /// The snapshots.
    #[must_use]
    pub fn snapshots(&self) -> &BTreeMap<Handle, Contents> {
        &self.snapshots
    }

    /// The next request: one that keeps the bounds; now and then one that has to be refused.
    pub fn choose(&self, random: &mut Random) -> Action {
        loop {
            if let Some(action) = self.suggest(random) {
                return action;
            }
        }
    }

    fn suggest(&self, random: &mut Random) -> Option<Action> {
        let room = MAX_SANDBOXES - self.sandboxes.len();
        let sandboxes: Vec<Handle> = self.sandboxes.keys().copied().collect();
        let kind = random.below(100);
        if kind < 8 || sandboxes.is_empty() && self.snapshots.is_empty() {
            return (room > 0).then_some(Action::Create);
        }
        if kind < 18 {
            let snapshots: Vec<Handle> = self.snapshots.keys().copied().collect();
            let snapshot = random.of(&snapshots)?;
            let restore = kind < 14;
            return match restore {
                true if room == 0 => None,
                true => Some(Action::FromSnapshot { snapshot }),
                false => Some(Action::DeleteSnapshot { snapshot }),
            };
        }
        let at = random.of(&sandboxes)?;
        let runs = self.sandboxes[&at].state == State::Running;
        Some(match kind {
            18..=37 => Action::Write {
                at,
                key: random.below(KEYS),
                value: random.below(1_000_000),
                synced: random.below(2) == 0,
            },
            38..=45 => Action::Read { at },
            46..=51 => Action::Pause { at },
            52..=58 => Action::Resume { at },
            59..=68 => Action::Hibernate { at },
            69..=74 => Action::Wake { at },
            75..=80 if self.snapshots.len() < MAX_SNAPSHOTS => Action::Snapshot { at },
            81..=86 if room > 0 && runs => Action::Fork { at },
            87..=91 if room > 1 && runs => Action::ForkTree { at, count: 2 },
            92..=95 if self.sandboxes[&at].tree.is_some() && runs => Action::Promote { at },
            96..=99 => Action::Delete { at },
            _ => return None,
        })
    }

    /// What has to become of a request; if it is done, the world is what it has to be afterwards.
    ///
    /// # Panics
    /// When the request names something that is not there.
    pub fn step(&mut self, action: &Action) -> Outcome {
        match *action {
            Action::Create => Outcome::made(vec![self.add(Contents::default(), None)]),
            Action::Write { at, key, value, .. } => {
                let Some(sandbox) = self.usable(at) else { return Outcome::Refused };
                sandbox.contents.disk.insert(key, value);
                sandbox.contents.memory.insert(key, value);
                Outcome::done()
            }
            Action::Read { at } => self.usable(at).map_or(Outcome::Refused, |_| Outcome::done()),
            Action::Pause { at } => self.turn(at, &[State::Running, State::Paused], State::Paused),
            Action::Resume { at } => self.turn(at, &[State::Running, State::Paused], State::Running),
            Action::Wake { at } => self.turn(at, &[State::Running, State::Hibernated], State::Running),
            Action::Hibernate { at } => {
                self.turn(at, &[State::Running, State::Paused, State::Hibernated], State::Hibernated)
            }
            Action::Snapshot { at } => {
                let contents = self.at(at).contents.clone();
                let handle = self.handle();
                self.snapshots.insert(handle, contents);
                Outcome::made(vec![handle])
            }
            Action::FromSnapshot { snapshot } => {
                let contents = self.snapshots[&snapshot].clone();
                Outcome::made(vec![self.add(contents, None)])
            }
            Action::DeleteSnapshot { snapshot } => {
                self.snapshots.remove(&snapshot);
                Outcome::done()
            }
            Action::Fork { at } => self.fork(at, 1, None),
            Action::ForkTree { at, count } => {
                let tree = self.handle();
                self.fork(at, count, Some(tree))
            }
            Action::Promote { at } => self.promote(at),
            Action::Delete { at } => {
                self.sandboxes.remove(&at);
                Outcome::done()
            }
        }
    }

    fn at(&mut self, at: Handle) -> &mut Sandbox {
        self.sandboxes.get_mut(&at).expect("requests name what is there")
    }

    /// The sandbox awake, unless it is paused.
    fn usable(&mut self, at: Handle) -> Option<&mut Sandbox> {
        let sandbox = self.at(at);
        if sandbox.state == State::Paused {
            return None;
        }
        sandbox.state = State::Running;
        Some(sandbox)
    }

    fn turn(&mut self, at: Handle, from: &[State], to: State) -> Outcome {
        let sandbox = self.at(at);
        if !from.contains(&sandbox.state) {
            return Outcome::Refused;
        }
        sandbox.state = to;
        Outcome::done()
    }

    fn fork(&mut self, at: Handle, count: usize, tree: Option<Handle>) -> Outcome {
        let Some(parent) = self.usable(at) else { return Outcome::Refused };
        let contents = parent.contents.clone();
        Outcome::made((0..count).map(|_| self.add(contents.clone(), tree)).collect())
    }

    fn promote(&mut self, at: Handle) -> Outcome {
        let tree = self.at(at).tree.take();
        let siblings = |sandbox: &Sandbox| tree.is_some() && sandbox.tree == tree;
        let gone: Vec<Handle> =
            self.sandboxes.iter().filter(|(_, sandbox)| siblings(sandbox)).map(|(at, _)| *at).collect();
        self.sandboxes.retain(|_, sandbox| !siblings(sandbox));
        Outcome::Done { made: Vec::new(), gone }
    }

    fn add(&mut self, contents: Contents, tree: Option<Handle>) -> Handle {
        let handle = self.handle();
        self.sandboxes.insert(handle, Sandbox { state: State::Running, contents, tree });
        handle
    }

    fn handle(&mut self) -> Handle {
        self.next += 1;
        self.next
    }
}

/// Numbers that follow from a seed (splitmix64), so that a run can be repeated.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The numbers of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A number below a bound that is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn of(&mut self, all: &[Handle]) -> Option<Handle> {
        if all.is_empty() {
            return None;
        }
        usize::try_from(self.below(all.len() as u64)).ok().and_then(|at| all.get(at)).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn run(seed: u64, steps: usize, mut see: impl FnMut(&World, &Action, &Outcome, &World)) {
        let (mut world, mut random) = (World::default(), Random::new(seed));
        for _ in 0..steps {
            let before = world.clone();
            let action = world.choose(&mut random);
            let outcome = world.step(&action);
            see(&before, &action, &outcome, &world);
        }
    }

    proptest! {
        #[test]
        fn the_bounds_hold_and_names_are_never_used_again(seed: u64) {
            let mut names = BTreeSet::new();
            run(seed, 300, |_, action, outcome, after| {
                assert!(after.sandboxes.len() <= MAX_SANDBOXES && after.snapshots.len() <= MAX_SNAPSHOTS);
                if let Outcome::Done { made, .. } = outcome {
                    assert!(made.iter().all(|handle| names.insert(*handle)), "{action:?}");
                }
            });
        }

        #[test]
        fn a_refusal_changes_nothing(seed: u64) {
            run(seed, 300, |before, action, outcome, after| {
                assert!(*outcome != Outcome::Refused || before == after, "{action:?}");
            });
        }

        #[test]
        fn a_request_concerns_the_contents_of_nobody_else(seed: u64) {
            run(seed, 300, |before, action, outcome, after| {
                let written = match action { Action::Write { at, .. } => Some(*at), _ => None };
                let gone = match (outcome, action) {
                    (_, Action::Delete { at }) => vec![*at],
                    (Outcome::Done { gone, .. }, _) => gone.clone(),
                    (Outcome::Refused, _) => Vec::new(),
                };
                for (at, sandbox) in before.sandboxes.iter().filter(|(at, _)| !gone.contains(at)) {
                    let now = &after.sandboxes[at];
                    assert!(Some(*at) == written || now.contents == sandbox.contents, "{action:?} and {at}");
                }
            });
        }

        #[test]
        fn a_copy_begins_as_its_source_and_then_goes_its_own_way(seed: u64) {
            run(seed, 300, |before, action, outcome, after| {
                let source = match action {
                    Action::Fork { at } | Action::ForkTree { at, .. } => &before.sandboxes[at].contents,
                    Action::FromSnapshot { snapshot } => &before.snapshots[snapshot],
                    _ => return,
                };
                let Outcome::Done { made, .. } = outcome else { return };
                for copy in made {
                    assert_eq!(&after.sandboxes[copy].contents, source);
                    let mut later = after.clone();
                    later.step(&Action::Write { at: *copy, key: 99, value: 1, synced: false });
                    for (at, sandbox) in later.sandboxes.iter().filter(|(at, _)| *at != copy) {
                        assert!(!sandbox.contents.disk.contains_key(&99), "{at} has what {copy} wrote");
                    }
                }
            });
        }

        #[test]
        fn promotion_leaves_the_winner_and_strangers(seed: u64) {
            run(seed, 300, |before, action, outcome, after| {
                let (Action::Promote { at }, Outcome::Done { gone, .. }) = (action, outcome) else { return };
                let tree = before.sandboxes[at].tree;
                assert!(after.sandboxes.contains_key(at) && after.sandboxes[at].tree.is_none());
                for (other, sandbox) in &before.sandboxes {
                    assert_eq!(gone.contains(other), other != at && sandbox.tree == tree);
                }
            });
        }
    }

    #[test]
    fn every_kind_of_request_is_made_and_the_refusable_ones_are_refused() {
        let (mut done, mut refused) = (BTreeSet::new(), BTreeSet::new());
        run(1, 5000, |_, action, outcome, _| {
            let kind = format!("{action:?}").split(' ').next().unwrap_or_default().to_owned();
            match outcome {
                Outcome::Refused => refused.insert(kind),
                Outcome::Done { .. } => done.insert(kind),
            };
        });

        assert_eq!(done.len(), 14, "{done:?}");
        assert_eq!(Vec::from_iter(&refused), ["Pause", "Read", "Resume", "Wake", "Write"]);
    }

    #[test]
    fn a_seed_always_means_the_same_run() {
        let actions = |seed| {
            let mut all = Vec::new();
            run(seed, 50, |_, action, _, _| all.push(action.clone()));
            all
        };

        assert_eq!(actions(7), actions(7));
        assert_ne!(actions(7), actions(8));
    }
}
