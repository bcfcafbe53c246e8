//! What is under way, so that it can be cut.
//!
//! Owns: the list of connections. Refuses to know: why one is cut.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// Ended keys that are remembered; one matters for the moment in which it is being used.
const ENDED_KEPT: usize = 16_384;

/// What allowed a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// Its name.
    pub id: String,
    /// Unix seconds from which on it allows nothing.
    pub until_unix: u64,
}

/// A connection under way.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Sandbox that it leads into.
    pub sandbox: String,
    /// Port there.
    pub port: u16,
    /// What allowed it, when that can end before the sandbox does.
    pub key: Option<Key>,
    cut: CancellationToken,
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct Live(Arc<Mutex<Entries>>);

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    all: HashMap<u64, Entry>,
    /// Keys that ended before their time. Who was let in by one a moment before is not in the list yet.
    ended: HashSet<String>,
}

/// A connection in the list, until it is dropped.
#[derive(Debug)]
pub struct Listed {
    live: Live,
    number: u64,
    /// Is cancelled when the connection shall end.
    pub cut: CancellationToken,
}

impl Live {
    /// A connection begins.
    pub fn enter(&self, sandbox: &str, port: u16, key: Option<Key>) -> Listed {
        let cut = CancellationToken::new();
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if key.as_ref().is_some_and(|key| entries.ended.contains(&key.id)) {
            cut.cancel();
        }
        let entry = Entry { sandbox: sandbox.to_owned(), port, key, cut: cut.clone() };
        let number = entries.next;
        entries.next += 1;
        entries.all.insert(number, entry);
        Listed { live: self.clone(), number, cut }
    }

    /// Cuts those; answers how many.
    pub fn cut(&self, which: impl Fn(&Entry) -> bool) -> usize {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.all.values().filter(|entry| which(entry)).map(|entry| entry.cut.cancel()).count()
    }

    /// A key allows nothing any more: cuts what it allowed; answers how many.
    pub fn end(&self, key: &str) -> usize {
        {
            let ended = &mut self.0.lock().unwrap_or_else(PoisonError::into_inner).ended;
            if ended.len() >= ENDED_KEPT {
                ended.clear();
            }
            ended.insert(key.to_owned());
        }
        self.cut(|entry| entry.key.as_ref().is_some_and(|own| own.id == key))
    }

    /// Cuts those whose right has ended by now.
    pub fn expire(&self, now_unix: u64) -> usize {
        self.cut(|entry| entry.key.as_ref().is_some_and(|key| key.until_unix <= now_unix))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).all.len()
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.live.0.lock().unwrap_or_else(PoisonError::into_inner).all.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_meant_is_cut() {
        let live = Live::default();
        let key = |id: &str, until_unix| Some(Key { id: id.into(), until_unix });
        let one = live.enter("a", 80, key("x", 10));
        let two = live.enter("a", 81, key("y", 20));
        let three = live.enter("b", 80, None);

        assert_eq!(live.end("x"), 1);
        assert!(live.enter("a", 80, key("x", 10)).cut.is_cancelled(), "who was let in before is cut, too");
        assert!(one.cut.is_cancelled() && !two.cut.is_cancelled());
        assert_eq!((live.expire(19), live.expire(20)), (1, 2));
        assert!(two.cut.is_cancelled() && !three.cut.is_cancelled());
        drop((one, two));
        assert_eq!((live.count(), live.cut(|_| true)), (1, 1));
        assert!(three.cut.is_cancelled());
    }
}
