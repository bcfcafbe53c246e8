//! Who follows a command: the last one who asked. Those before end, instead of taking it from each other for ever.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

/// All commands that are followed.
#[derive(Debug, Default)]
pub struct Followers(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: u64,
    of: HashMap<(String, String), u64>,
}

/// The right to follow a command, until somebody else has it.
#[derive(Debug)]
pub struct Follower {
    all: Arc<Followers>,
    command: (String, String),
    number: u64,
}

impl Followers {
    /// Takes the right to follow a command of a sandbox.
    pub fn take(self: &Arc<Self>, sandbox: &str, session: &str) -> Follower {
        let command = (sandbox.to_owned(), session.to_owned());
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.last += 1;
        let number = state.last;
        state.of.insert(command.clone(), number);
        Follower { all: Arc::clone(self), command, number }
    }
}

impl Follower {
    /// Whether nobody has taken it since.
    pub fn is_last(&self) -> bool {
        let state = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.of.get(&self.command) == Some(&self.number)
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut state = self.all.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.of.get(&self.command) == Some(&self.number) {
            state.of.remove(&self.command);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_follows_and_nobody_is_remembered_for_ever() {
        let all = Arc::<Followers>::default();
        let one = all.take("sandbox", "session");
        let other = all.take("sandbox", "other");
        assert!(one.is_last() && other.is_last());
        let two = all.take("sandbox", "session");
        assert!(!one.is_last() && two.is_last());
        drop(one);
        assert!(two.is_last());
        drop((two, other));
        assert!(all.0.lock().unwrap().of.is_empty());
    }
}
