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
    State::Pausing,
    State::Paused,
    State::Resuming,
    State::Hibernating { paused: false },
    State::Hibernating { paused: true },
    State::Hibernated,
    State::Waking,
    State::Recovering,
    State::Failed,
    State::Stopping,
    State::Gone,
];
/// States that no record has.
const NEVER_ON_DISK: &[State] = &[
    State::Pausing,
    State::Resuming,
    State::Hibernating { paused: false },
    State::Hibernating { paused: true },
    State::Waking,
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
    Event::Pause,
    Event::Resume,
    Event::Hibernate,
    Event::Wake,
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
    /// Its processors stand still.
    halted: bool,
}

impl Model {
    /// Does one effect; false when it was attempted in a world in which it must not be.
    fn perform(&mut self, state: State, effect: Effect) -> bool {
        match effect {
            Effect::Save => {
                assert!(!NEVER_ON_DISK.contains(&state), "{state:?} is never on disk");
                self.record = Some(state);
            }
            Effect::Prepare => drop(self.held.insert("directory")),
            Effect::StartUnit => drop(self.held.insert("unit")),
            Effect::Attach => drop(self.held.insert("network")),
            Effect::Load | Effect::Boot => self.halted = false,
            Effect::Halt => self.halted = true,
            Effect::Resume => self.halted = false,
            Effect::CaptureImage => {
                self.halted = true;
                self.held.insert("image");
            }
            Effect::Borrow => {
                // Two machines of one sandbox would write the same volumes.
                if self.held.contains("unit") {
                    return false;
                }
                self.held.insert("slot");
            }
            Effect::GiveBack => drop(self.held.remove("slot")),
            Effect::Commit => {
                let (next, _) = state.on(Event::Done).unwrap();
                if next == State::Hibernated && !self.held.contains("image") {
                    return false;
                }
                if state == State::Waking {
                    if !self.held.remove("slot") {
                        return false;
                    }
                    self.held.remove("image");
                    self.held.extend(["unit", "network", "directory"]);
                }
                self.record = Some(next);
            }
            Effect::DropImage => drop(self.held.remove("image")),
            Effect::StopUnit => {
                self.held.remove("unit");
                self.halted = false;
            }
            Effect::Detach => drop(self.held.remove("network")),
            Effect::Release => {
                if self.held.contains("unit") {
                    return false;
                }
                self.held.remove("directory");
            }
            Effect::DropVolumes if self.held.contains("unit") => return false,
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

    /// Runs an event to its end, `budget` effects at most (then power is cut: `None`). Effect number `fault`, counted down,
    /// fails and has no effect.
    fn run(
        &mut self,
        mut state: State,
        mut event: Event,
        budget: &mut usize,
        fault: &mut usize,
    ) -> Option<State> {
        loop {
            let Some((next, effects)) = state.on(event) else { return Some(state) };
            state = next;
            let mut failed = false;
            for effect in effects {
                // The shell's rules: what must not be done after a failure, and what is tried all the same.
                if failed && matches!(effect, Effect::Release | Effect::DropVolumes | Effect::Forget) {
                    continue;
                }
                *budget = budget.checked_sub(1)?;
                *fault = fault.wrapping_sub(1);
                if *fault == 0 {
                    failed = true;
                    if !effect.is_teardown() || state.is_abortable() {
                        break;
                    }
                    continue;
                }
                assert!(self.perform(state, *effect), "{effect:?} in {state:?}: {self:?}");
            }
            event = match event {
                Event::Fault if failed => return Some(state),
                _ if failed => Event::Fault,
                _ if !state.is_working(event) || effects.is_empty() => return Some(state),
                _ => Event::Done,
            };
        }
    }

    fn run_whole(&mut self, state: State, event: Event) -> State {
        self.run(state, event, &mut usize::MAX.clone(), &mut usize::MAX.clone()).unwrap()
    }

    /// Starts again from what is on disk, as start-up does it.
    fn restart(&mut self, recover: bool) -> State {
        // The slot has a record of its own, and garbage is collected.
        self.held.remove("slot");
        let Some(record) = self.record else { return State::New };
        let state = self.run_whole(record, after_restart(record, self.held.contains("unit"), recover));
        if !matches!(record, State::Hibernated | State::Stopping) {
            self.held.remove("image");
        }
        match state {
            State::Recovering => self.run_whole(state, Event::Boot),
            other => other,
        }
    }

    /// Whether what is there is what this state promises.
    fn keeps(&self, state: State) -> bool {
        let machine = ["unit", "network", "directory"].iter().all(|part| self.held.contains(part));
        let image = self.held.contains("image");
        match state {
            State::Running => machine && !self.halted && !image,
            State::Paused => machine && self.halted && !image,
            State::Hibernated => image,
            _ => true,
        }
    }
}

/// What start-up does with a record, as reconciliation decides it.
fn after_restart(record: State, unit: bool, recover: bool) -> Event {
    match record {
        State::Running | State::Paused if unit => Event::Adopt,
        State::Failed | State::Hibernated => Event::Adopt,
        _ => Event::Lost { recover },
    }
}

/// A sandbox at rest with everything that belongs to it.
fn at_rest(state: State) -> Model {
    let held = match state {
        State::Hibernated => vec!["image"],
        _ => vec!["unit", "network", "directory"],
    };
    Model { record: Some(state), held: held.into_iter().collect(), halted: state == State::Paused }
}

#[test]
fn a_verb_that_fails_anywhere_leaves_everything_as_before() {
    let verbs = [
        (State::Running, Event::Pause),
        (State::Paused, Event::Resume),
        (State::Running, Event::Hibernate),
        (State::Paused, Event::Hibernate),
        (State::Hibernated, Event::Wake),
    ];
    for (before, verb) in verbs {
        let (working, effects) = before.on(verb).unwrap();
        assert!(working.is_working(verb) && effects.last() == Some(&Effect::Commit), "{before:?} {verb:?}");
        for fault in 1..=effects.len() {
            let mut model = at_rest(before);

            let after = model.run(before, verb, &mut usize::MAX.clone(), &mut fault.clone()).unwrap();

            assert_eq!((after, &model), (before, &at_rest(before)), "{verb:?}, effect {fault} fails");
        }
        let mut model = at_rest(before);
        let after = model.run_whole(before, verb);
        assert!(after != before && model == at_rest(after), "{verb:?}: {model:?}");
    }
}

#[test]
fn a_verb_cut_short_anywhere_is_undone_or_done() {
    for before in [State::Running, State::Paused, State::Hibernated] {
        for verb in [Event::Pause, Event::Resume, Event::Hibernate, Event::Wake] {
            for budget in 0..12 {
                let mut model = at_rest(before);
                let done = model.run(before, verb, &mut budget.clone(), &mut usize::MAX.clone());
                let acknowledged = done.filter(|after| *after != before);

                let after = model.restart(true);

                assert!(model.keeps(after), "{before:?} {verb:?} {budget}: {after:?} {model:?}");
                assert!(acknowledged.is_none_or(|acknowledged| acknowledged == after), "{verb:?} {budget}");
            }
        }
    }
}

#[test]
fn every_state_that_was_acknowledged_survives_a_restart() {
    for (state, kept) in [
        (State::Running, true),
        (State::Recovering, true),
        (State::Paused, true),
        (State::Hibernated, true),
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
    for state in [State::Running, State::Paused, State::Hibernated, State::Recovering, State::Failed] {
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
    /// Any history, with failures, the daemon killed or power cut at any effect, a restart, again: at no time does anything
    /// exist without a record, what is acknowledged is kept, and in the end a delete leaves nothing.
    #[test]
    fn nothing_is_ever_left_over(
        rounds in vec((vec(select(EVENTS), 0..16), 0usize..60, 1usize..80, any::<bool>(), any::<bool>()), 1..5),
    ) {
        let mut model = Model::default();
        let mut state = State::New;
        for (events, mut budget, mut fault, power, recover) in rounds {
            let mut alive = model.run(state, Event::Begin, &mut budget, &mut fault);
            if alive == Some(State::Ready) {
                alive = model.run(State::Ready, Event::Take, &mut budget, &mut fault);
            }
            for event in events {
                let Some(now) = alive else { break };
                // Only start-up and the shell say these.
                if matches!(event, Event::Lost { .. } | Event::Adopt | Event::Done | Event::Fault | Event::Setback | Event::Boot) { continue }
                if event == Event::Died {
                    // Nobody watches a process that was stopped.
                    if now == State::Hibernated { continue }
                    model.held.remove("unit");
                }
                // A machine that is still there is taken down before another is borrowed.
                if event == Event::Wake && now == State::Hibernated && model.held.contains("unit") {
                    model.run_whole(now, Event::Adopt);
                }
                alive = model.run(now, event, &mut budget, &mut fault);
            }
            if power {
                // No process survives, files and records do.
                model.held.remove("unit");
                model.held.remove("network");
            }
            state = model.restart(recover);
            prop_assert!(model.keeps(state), "{:?} {:?}", state, model);
        }
        if let Some(record) = model.record {
            let state = if state == State::New { record } else { state };
            prop_assert_eq!(model.run_whole(state, Event::Delete), State::Gone);
        }
        prop_assert_eq!((model.record, model.held.len()), (None, 0));
    }

    /// A failure in the middle of work ends in a state at rest: taken down, or failed without a process.
    #[test]
    fn a_fault_ends_at_rest(state in select(STATES)) {
        if let Some((next, effects)) = state.on(Event::Fault) {
            prop_assert!(!next.is_working(Event::Fault) || next == State::Stopping);
            if state.is_abortable() && state != State::Waking {
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
        assert_eq!(effects.last(), Some(&Effect::Commit), "{event:?}");

        let (running, effects) = creating.on(Event::Done).unwrap();
        assert_eq!((running, effects), (State::Running, &[Effect::Announce][..]));
    }
}

#[test]
fn a_dressed_slot_is_unique_and_waits_without_running() {
    let (dressing, effects) = State::Ready.on(Event::Dress).unwrap();
    assert_eq!(effects[effects.len() - 2..], [Effect::Identify, Effect::Halt]);
    assert_eq!(dressing.on(Event::Done).unwrap(), (State::Ready, &[][..]));
}

#[test]
fn a_create_that_fails_anywhere_leaves_nothing() {
    for event in [Event::Take, Event::TakeDressed] {
        let (_, effects) = State::Ready.on(event).unwrap();
        for fault in 1..=effects.len() {
            let mut model = Model { record: Some(State::Preparing), ..at_rest(State::Running) };

            let after = model.run(State::Ready, event, &mut usize::MAX.clone(), &mut fault.clone()).unwrap();

            assert_eq!((after, model), (State::Gone, Model::default()), "{event:?}, effect {fault} fails");
        }
    }
}
