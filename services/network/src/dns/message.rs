//! The little of a DNS message that a forwarder has to look at.
//!
//! Owns: header and question section. Refuses to know: every other record. Pure; takes any bytes without a panic.

const HEADER: usize = 12;
const RESPONSE: u8 = 0x80;
const OPCODE: u8 = 0x78;
const RECURSION_DESIRED: u8 = 0x01;
const RECURSION_AVAILABLE: u8 = 0x80;
const SERVER_FAILURE: u8 = 2;
/// Longest name on the wire, bytes.
const NAME: usize = 255;

/// A question as a guest sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Query {
    bytes: Vec<u8>,
    question_end: usize,
}

impl Query {
    /// A standard query with exactly one question; everything else is `None` and gets no answer.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let flags = *bytes.get(2)?;
        if flags & RESPONSE != 0 || flags & OPCODE != 0 {
            return None;
        }
        let question_end = question_end(bytes)?;
        Some(Self { bytes: bytes.to_vec(), question_end })
    }

    /// The question as it goes to a resolver, under another number.
    pub(super) fn renumbered(&self, id: u16) -> Vec<u8> {
        numbered(self.bytes.clone(), id)
    }

    /// The answer as it goes to the guest, if `answer` is a response to this question under the number `id`.
    pub(super) fn accept(&self, id: u16, answer: &[u8]) -> Option<Vec<u8>> {
        let is_response = answer.get(2)? & RESPONSE != 0;
        let end = question_end(answer)?;
        let same = number(answer) == Some(id)
            && answer[HEADER..end].eq_ignore_ascii_case(&self.bytes[HEADER..self.question_end]);
        (is_response && same).then(|| numbered(answer.to_vec(), self.number()))
    }

    /// "Server failure" in answer to this question.
    pub(super) fn failure(&self) -> Vec<u8> {
        let mut answer = self.bytes[..self.question_end].to_vec();
        answer[2] = RESPONSE | (self.bytes[2] & RECURSION_DESIRED);
        answer[3] = RECURSION_AVAILABLE | SERVER_FAILURE;
        // The question alone is left: no answer, authority or additional records.
        answer[6..HEADER].fill(0);
        answer
    }

    fn number(&self) -> u16 {
        u16::from_be_bytes([self.bytes[0], self.bytes[1]])
    }
}

fn number(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.first()?, *bytes.get(1)?]))
}

fn numbered(mut bytes: Vec<u8>, id: u16) -> Vec<u8> {
    bytes[..2].copy_from_slice(&id.to_be_bytes());
    bytes
}

/// Where the one question ends; `None` if there is not exactly one, well formed and uncompressed.
fn question_end(bytes: &[u8]) -> Option<usize> {
    if bytes.get(4..6)? != [0, 1] || bytes.len() < HEADER {
        return None;
    }
    let mut at = HEADER;
    loop {
        let length = usize::from(*bytes.get(at)?);
        at += 1 + length;
        match length {
            0 => break,
            1..=63 if at - HEADER < NAME => {}
            _ => return None,
        }
    }
    // Type and class.
    at += 4;
    (at <= bytes.len()).then_some(at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(id: u16, name: &[&str]) -> Vec<u8> {
        let mut bytes = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes[..2].copy_from_slice(&id.to_be_bytes());
        for label in name {
            bytes.push(u8::try_from(label.len()).expect("a short label"));
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.extend_from_slice(&[0, 0, 1, 0, 1]);
        bytes
    }

    #[test]
    fn a_failure_is_an_answer_to_the_question() {
        let asked = query(0x1234, &["example", "test"]);
        let mut with_extra = asked.clone();
        with_extra[11] = 1;
        with_extra.extend_from_slice(&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0]);

        let failure = Query::parse(&with_extra).expect("a query").failure();

        assert_eq!(failure[..12], [0x12, 0x34, 0x81, 0x82, 0, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(failure[12..], asked[12..]);
    }

    #[test]
    fn only_the_answer_to_the_question_is_accepted() {
        let ours = Query::parse(&query(7, &["example", "test"])).expect("a query");
        let mut answer = query(99, &["ExAmple", "test"]);
        assert_eq!(ours.accept(99, &answer), None, "a query is no response");
        answer[2] |= RESPONSE;

        assert_eq!(ours.accept(98, &answer), None, "another number");
        let mut other = query(99, &["example", "tesd"]);
        other[2] |= RESPONSE;
        assert_eq!(ours.accept(99, &other), None, "another name");
        let accepted = ours.accept(99, &answer).expect("the answer");
        assert_eq!(accepted[..2], [0, 7]);
        assert_eq!(accepted[2..], answer[2..]);
    }

    #[test]
    fn odd_messages_are_refused() {
        let good = query(1, &["a"]);
        let changed = |at: usize, to: u8| {
            let mut bytes = good.clone();
            bytes[at] = to;
            Query::parse(&bytes)
        };
        assert!(Query::parse(&good).is_some());
        assert_eq!(changed(2, 0x81), None, "a response");
        assert_eq!(changed(2, 0x28), None, "an update");
        assert_eq!(changed(5, 0), None, "no question");
        assert_eq!(changed(5, 2), None, "two questions");
        assert_eq!(changed(12, 0xc0), None, "a compressed name");
        assert_eq!(Query::parse(&good[..good.len() - 1]), None, "cut off");
        let long = "x".repeat(63);
        assert_eq!(Query::parse(&query(1, &[&long, &long, &long, &long])), None, "a name beyond 255 bytes");
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken(bytes in proptest::collection::vec(any::<u8>(), 0..600), id: u16) {
            if let Some(query) = Query::parse(&bytes) {
                prop_assert_eq!(&query.renumbered(id)[2..], &bytes[2..]);
                prop_assert!(query.failure().len() <= bytes.len());
                prop_assert_eq!(query.accept(id, &bytes), None);
            }
        }

        #[test]
        fn any_answer_is_taken(answer in proptest::collection::vec(any::<u8>(), 0..600), id: u16) {
            let ours = Query::parse(&query(7, &["example", "test"])).expect("a query");
            let accepted = ours.accept(id, &answer);
            prop_assert!(accepted.is_none_or(|accepted| accepted[2..] == answer[2..]));
        }
    }
}
