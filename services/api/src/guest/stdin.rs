//! Standard input on its way to a command. Pure.
//!
//! Owns: which bytes the guest is not known to have. They are kept, because a connection can be lost, and then they come
//! again from where the guest has them. Refuses to know: connections.

use bytes::{Buf, Bytes, BytesMut};

/// Standard input from its first byte that the guest may not have.
#[derive(Debug, Default)]
pub struct Stdin {
    kept: BytesMut,
    from: u64,
    ended: bool,
}

impl Stdin {
    /// All of it at once.
    pub fn whole(bytes: Bytes) -> Self {
        Self { kept: bytes.into(), from: 0, ended: true }
    }

    /// More is to come, behind what the guest has already.
    pub fn open(received: u64) -> Self {
        Self { from: received, ..Self::default() }
    }

    /// More of it. Nothing follows an end.
    pub fn push(&mut self, bytes: &[u8]) {
        if !self.ended {
            self.kept.extend_from_slice(bytes);
        }
    }

    /// Nothing follows.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Whether nothing follows.
    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// The guest has everything below `offset`.
    pub fn confirm(&mut self, offset: u64) {
        let known = offset.saturating_sub(self.from).min(self.kept.len() as u64);
        self.kept.advance(known as usize);
        self.from += known;
    }

    /// What the guest does not have when it has everything below `offset`.
    pub fn after(&self, offset: u64) -> &[u8] {
        let known = offset.saturating_sub(self.from).min(self.kept.len() as u64);
        &self.kept[known as usize..]
    }

    /// Bytes that are kept.
    pub fn waiting(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn whatever_the_guest_has_the_rest_comes_again(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..10),
            confirmed in proptest::collection::vec(0u64..400, 0..10),
            received in 0u64..400,
        ) {
            let whole: Vec<u8> = parts.concat();
            let mut stdin = Stdin::open(0);
            let mut known = 0;
            for (number, part) in parts.iter().enumerate() {
                stdin.push(part);
                let sent: usize = parts[..=number].iter().map(Vec::len).sum();
                if let Some(offset) = confirmed.get(number) {
                    known = known.max((*offset).min(sent as u64));
                    stdin.confirm(*offset);
                }
            }
            stdin.end();
            stdin.push(b"too late");
            let received = received.max(known).min(whole.len() as u64);
            prop_assert_eq!(stdin.after(received), &whole[received as usize..]);
            prop_assert_eq!(stdin.waiting(), whole.len() - known as usize);
        }
    }

    #[test]
    fn a_guest_that_claims_too_much_gets_nothing() {
        let stdin = Stdin::whole(Bytes::from_static(b"abc"));
        assert_eq!(stdin.after(u64::MAX), b"");
        assert!(stdin.is_ended());
        assert_eq!(Stdin::open(5).after(5), b"");
    }
}
