use std::collections::BTreeSet;

use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

const STATES: &[State] = &[
    State::New,
    State::Preparing,
    State::Ready,
    State::Dressing,
    State::Creating,
    State::Baking,
    State::Running,
    State::Recovering,
    State::Failed,
    State::Stopping,
    State::Gone,
];
const EVENTS: &[Event] = &[
    Event::Begin,
    Event::Take,
    Event::TakeDressed,
    Event::Dress,
    Event::Bake,
    Event::Done,
    Event::Fault,
    Event::Setback,
    Event::Boot,
    Event::Died,
    Event::Delete,
    Event::Lost { recover: true },
    Event::Lost { recover: false },
    Event::Adopt,
];

/// What exists in the world because of one sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Model {
    record: Option<State>,
    held: BTreeSet<&'static str>,
}

impl Model {
    /// Does one effect; false when it was attempted in a world in which it must not be.
    fn perform(&mut self, state: State, effect: Effect) -> bool {
        match effect {
            Effect::Save => self.record = Some(state),
            Effect::Prepare => drop(self.held.insert("directory")),
            Effect::StartUnit => drop(self.held.insert("unit")),
            Effect::Attach => drop(self.held.insert("network")),
            Effect::StopUnit => drop(self.held.remove("unit")),
            Effect::Detach => drop(self.held.remove("network")),
            Effect::Release => {
                if self.held.contains("unit") {
                    return false;
                }
                self.held.remove("directory");
            }
            Effect::Forget => {
                if !self.held.is_empty() {
                    return false;
                }
                self.record = None;
            }
            Effect::Seal if self.held.contains("unit") => return false,
            _ => {}
        }
        // Whatever exists has a record that names it.
        self.held.is_empty() || self.record.is_some()
    }

    /// Runs an event to its end, `budget` effects at most (then power is cut: `None`).
    fn run(&mut self, mut state: State, mut event: Event, budget: &mut usize) -> Option<State> {
        loop {
            let Some((next, effects)) = state.on(event) else { return Some(state) };
            state = next;
            for effect in effects {
                *budget = budget.checked_sub(1)?;
                assert!(self.perform(state, *effect), "{effect:?} in {state:?}: {self:?}");
            }
            if !state.is_working(event) || effects.is_empty() {
                return Some(state);
            }
            event = Event::Done;
        }
    }
}

/// What start-up does with a record, as reconciliation decides it.
fn after_restart(record: State, unit: bool, recover: bool) -> Event {
    match record {
        State::Running if unit => Event::Adopt,
        State::Failed => Event::Adopt,
        _ => Event::Lost { recover },
    }
}

#[test]
fn every_state_that_was_acknowledged_survives_a_restart() {
    for (state, kept) in [
        (State::Running, true),
        (State::Recovering, true),
        (State::Failed, true),
        (State::Creating, false),
        (State::Preparing, false),
        (State::Baking, false),
        (State::Stopping, false),
    ] {
        let (next, _) = state.on(after_restart(state, false, false)).unwrap();

        assert_eq!(next != State::Stopping, kept, "{state:?}");
    }
}

#[test]
fn a_deletion_is_durable_before_anything_acknowledged_is_taken_away() {
    for state in [State::Running, State::Recovering, State::Failed] {
        let (_, effects) = state.on(Event::Delete).unwrap();

        assert_eq!(effects.first(), Some(&Effect::Save), "{state:?}");
    }
}

#[test]
fn the_outcome_of_an_event_is_never_a_state_of_before() {
    for state in STATES {
        for event in EVENTS {
            if let Some((next, _)) = state.on(*event) {
                assert!(next != State::New, "{state:?} {event:?}");
                assert!(
                    *state != State::Gone || next == State::Gone,
                    "{state:?} {event:?} brings back the dead"
                );
            }
        }
    }
}

proptest! {
    /// Any history, a power cut at any effect, a restart, again: in the end a delete leaves nothing, and at no time does
    /// anything exist without a record.
    #[test]
    fn nothing_is_ever_left_over(
        rounds in vec((vec(select(EVENTS), 0..12), 0usize..40, any::<bool>()), 1..5),
    ) {
        let mut model = Model::default();
        let mut state = State::New;
        for (events, mut budget, recover) in rounds {
            let mut alive = model.run(state, Event::Begin, &mut budget);
            for event in events {
                let Some(now) = alive else { break };
                // Only start-up and the shell say these.
                if matches!(event, Event::Lost { .. } | Event::Adopt | Event::Done | Event::Fault | Event::Setback | Event::Boot) { continue }
                if event == Event::Died { model.held.remove("unit"); }
                alive = model.run(now, event, &mut budget);
            }
            // Power is gone: no process survives, files and records do.
            model.held.remove("unit");
            model.held.remove("network");
            state = match model.record {
                None => { prop_assert!(model.held.is_empty()); State::New }
                Some(record) => {
                    let event = after_restart(record, false, recover);
                    let state = model.run(record, event, &mut usize::MAX.clone()).unwrap();
                    match state {
                        State::Recovering => model.run(state, Event::Boot, &mut usize::MAX.clone()).unwrap(),
                        other => other,
                    }
                }
            };
        }
        if let Some(record) = model.record {
            let state = if state == State::New { record } else { state };
            let end = model.run(state, Event::Delete, &mut usize::MAX.clone()).unwrap();
            prop_assert_eq!(end, State::Gone);
        }
        prop_assert_eq!(model, Model::default());
    }

    /// A failure in the middle of work ends in a state at rest: taken down, or failed without a process.
    #[test]
    fn a_fault_ends_at_rest(state in select(STATES)) {
        if let Some((next, effects)) = state.on(Event::Fault) {
            prop_assert!(matches!(next, State::Stopping | State::Failed | State::Running | State::Gone));
            if state.is_abortable() {
                prop_assert!(effects.contains(&Effect::StopUnit) && effects.contains(&Effect::Detach));
            }
        }
    }
}

#[test]
fn a_recovery_waits_for_its_turn_and_survives_a_setback() {
    let (waiting, effects) = State::Running.on(Event::Lost { recover: true }).unwrap();
    assert_eq!(waiting, State::Recovering);
    assert!(!effects.contains(&Effect::Boot) && !waiting.is_working(Event::Lost { recover: true }));

    let (booting, effects) = waiting.on(Event::Boot).unwrap();
    assert!(effects.contains(&Effect::Boot) && booting.is_working(Event::Boot));

    let (after, effects) = booting.on(Event::Setback).unwrap();
    assert_eq!(after, State::Recovering);
    assert!(effects.contains(&Effect::StopUnit) && !after.is_working(Event::Setback));
}

#[test]
fn only_what_ends_or_is_lost_goes_on_without_its_record() {
    for state in STATES {
        let ends = matches!(state, State::Stopping | State::Failed | State::Recovering);
        assert_eq!(Effect::Save.is_dispensable(*state), ends, "{state:?}");
        assert!(!Effect::Forget.is_dispensable(*state));
    }
}

#[test]
fn a_create_is_on_disk_as_a_slot_until_its_guest_is_unique() {
    for event in [Event::Take, Event::TakeDressed] {
        let (creating, effects) = State::Ready.on(event).unwrap();
        let greeted = effects.contains(&Effect::Identify) || effects.contains(&Effect::Freshen);
        assert!(greeted && !effects.contains(&Effect::Save), "{event:?}");

        let (running, effects) = creating.on(Event::Done).unwrap();
        assert_eq!((running, effects.first()), (State::Running, Some(&Effect::Save)));
    }
}

#[test]
fn a_dressed_slot_is_unique_and_waits_without_running() {
    let (dressing, effects) = State::Ready.on(Event::Dress).unwrap();
    assert_eq!(effects[effects.len() - 2..], [Effect::Identify, Effect::Pause]);
    assert_eq!(dressing.on(Event::Done).unwrap(), (State::Ready, &[][..]));
}
