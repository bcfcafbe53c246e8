//! Which slots to keep: how many are empty, and for which templates the others are dressed.
//!
//! Owns: that decision, and what was asked for lately. Refuses to know: how a slot is made or dressed (`slots`).
//!
//! In a dressed slot a template's snapshot is restored, made unique and stopped again: a create only lets it go on and gives it the
//! time and fresh entropy. It serves no other template, and nothing but a create. So half of the slots stay empty, for whatever comes, and the other half is shared
//! out among the templates by what was asked for lately.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, PoisonError},
};

/// Creates that count for what is likely to be asked for next.
const REMEMBERED: usize = 8;

/// Templates that were asked for, the last one last.
#[derive(Debug, Default)]
pub struct Asked(Mutex<VecDeque<String>>);

impl Asked {
    /// This template was asked for.
    pub fn note(&self, template: &str) {
        let mut asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() == REMEMBERED {
            asked.pop_front();
        }
        asked.push_back(template.to_owned());
    }

    /// Whether it was asked for lately.
    pub fn has(&self, template: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|asked| asked == template)
    }

    /// The one that was asked for last.
    pub fn last(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).back().cloned()
    }

    /// How often each of these templates was asked for lately; once each, as long as none was.
    pub fn votes<'a>(&self, templates: impl Iterator<Item = &'a str>) -> BTreeMap<String, usize> {
        let asked = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |name: &str| asked.iter().filter(|template| *template == name).count();
        let mut votes: BTreeMap<_, _> = templates.map(|name| (name.to_owned(), count(name))).collect();
        if votes.values().all(|count| *count == 0) {
            votes.values_mut().for_each(|count| *count = 1);
        }
        votes
    }
}

/// What to do next about the slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// All is as it shall be.
    Rest,
    /// An empty one is missing.
    Make,
    /// This empty one shall be dressed for this template.
    Dress(usize, String),
    /// This dressed one takes the place of another one.
    Discard(usize),
}

/// The next step towards `slots` slots. `ready` says for each slot which template it is dressed for, if any.
pub fn next_step(ready: &[Option<String>], votes: &BTreeMap<String, usize>, slots: usize) -> Step {
    let shares = shares(votes, slots / 2);
    let dressed = |template: &str| ready.iter().flatten().filter(|name| *name == template).count();
    let share = |template: &str| shares.get(template).copied().unwrap_or(0);
    let missing = shares.keys().find(|template| dressed(template) < share(template));
    let empty = ready.iter().position(Option::is_none);
    if let (Some(template), Some(at)) = (missing, empty) {
        return Step::Dress(at, template.clone());
    }
    if ready.len() < slots {
        return Step::Make;
    }
    let empties = ready.iter().filter(|slot| slot.is_none()).count();
    let surplus = ready.iter().position(|slot| slot.as_ref().is_some_and(|name| dressed(name) > share(name)));
    match surplus {
        Some(at) if missing.is_some() || empties < slots - shares.values().sum::<usize>() => {
            Step::Discard(at)
        }
        _ => Step::Rest,
    }
}

/// Shares `seats` out by votes (highest averages, after D'Hondt): whoever has none gets none.
fn shares(votes: &BTreeMap<String, usize>, seats: usize) -> BTreeMap<String, usize> {
    let mut shares = BTreeMap::new();
    for _ in 0..seats {
        let worth = |name: &String| {
            let divisor = shares.get(name).copied().unwrap_or(0) + 1;
            // In thousandths: the numbers are small.
            votes[name] * 1000 / divisor
        };
        // Of equals the first one by name.
        let next = votes.keys().filter(|name| votes[*name] > 0).rev().max_by_key(|name| worth(name));
        let Some(next) = next.cloned() else { break };
        *shares.entry(next).or_insert(0) += 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*, sample::select};

    use super::*;

    const NAMES: [&str; 3] = ["a", "b", "c"];

    fn votes(counts: [usize; 3]) -> BTreeMap<String, usize> {
        NAMES.iter().zip(counts).map(|(name, count)| ((*name).to_owned(), count)).collect()
    }

    #[test]
    fn seats_go_by_what_was_asked_for() {
        let share = |counts, seats| {
            let shares = shares(&votes(counts), seats);
            NAMES.map(|name| shares.get(name).copied().unwrap_or(0))
        };

        assert_eq!(share([1, 1, 1], 2), [1, 1, 0]);
        assert_eq!(share([4, 4, 0], 2), [1, 1, 0]);
        assert_eq!(share([7, 1, 0], 2), [2, 0, 0]);
        assert_eq!(share([0, 8, 0], 3), [0, 3, 0]);
        assert_eq!(share([0, 0, 0], 3), [0, 0, 0]);
    }

    #[test]
    fn what_was_never_asked_for_counts_once_until_something_is() {
        let asked = Asked::default();
        assert_eq!(asked.votes(NAMES.into_iter()), votes([1, 1, 1]));

        for _ in 0..20 {
            asked.note("b");
        }
        asked.note("gone");

        assert_eq!(asked.votes(NAMES.into_iter()), votes([0, REMEMBERED - 1, 0]));
        assert_eq!(asked.last().as_deref(), Some("gone"));
    }

    proptest! {
        /// From whatever there is, a few steps lead to rest, with every seat taken as it shall be.
        #[test]
        fn steps_lead_to_rest(
            start in vec(option::of(select(&NAMES[..])), 0..12),
            counts in [0usize..4, 0usize..4, 0usize..4],
            slots in 0usize..10,
        ) {
            let votes = votes(counts);
            let mut ready: Vec<_> = start.into_iter().map(|slot| slot.map(str::to_owned)).collect();
            let most = ready.len().max(slots);
            for _ in 0..100 {
                match next_step(&ready, &votes, slots) {
                    Step::Rest => break,
                    Step::Make => ready.push(None),
                    Step::Dress(at, template) => {
                        prop_assert_eq!(&ready[at], &None);
                        ready[at] = Some(template);
                    }
                    Step::Discard(at) => {
                        prop_assert!(ready.remove(at).is_some());
                    }
                }
                prop_assert!(ready.len() <= most);
            }
            prop_assert_eq!(next_step(&ready, &votes, slots), Step::Rest);
            prop_assert!(ready.len() >= slots);
            for (template, share) in shares(&votes, slots / 2) {
                let dressed = ready.iter().flatten().filter(|name| **name == template).count();
                prop_assert!(dressed >= share);
            }
        }
    }
}
