//! The decoder reads what a hostile guest writes.

use bytes::BytesMut;
use pandastack_protocol::{Decoder, Frame, FrameError, Kind, MAX_PAYLOAD, encode};
use proptest::prelude::*;

const KINDS: [Kind; 17] = [
    Kind::Hello,
    Kind::Request,
    Kind::Ready,
    Kind::Done,
    Kind::Error,
    Kind::Started,
    Kind::Exit,
    Kind::Stdin,
    Kind::StdinEnd,
    Kind::Stdout,
    Kind::Stderr,
    Kind::Ack,
    Kind::Signal,
    Kind::Resize,
    Kind::StdinTaken,
    Kind::Data,
    Kind::DataEnd,
];

/// A frame of a known kind, or one of a kind of the future, which is skipped.
fn frames() -> impl Strategy<Value = Vec<(u8, Vec<u8>)>> {
    let kind = prop_oneof![
        4 => prop::sample::select(KINDS.to_vec()).prop_map(|kind| kind as u8),
        1 => 100u8..=255,
    ];
    prop::collection::vec((kind, prop::collection::vec(any::<u8>(), 0..200)), 0..20)
}

fn decode_all(decoder: &mut Decoder, into: &mut Vec<Frame>) -> Result<(), FrameError> {
    while let Some(frame) = decoder.next_frame()? {
        into.push(frame);
    }
    Ok(())
}

proptest! {
    #[test]
    fn any_split_gives_the_same_frames(frames in frames(), cuts in prop::collection::vec(1usize..300, 1..200)) {
        let mut bytes = BytesMut::new();
        let mut expected = Vec::new();
        for (kind, payload) in &frames {
            match KINDS.into_iter().find(|known| *known as u8 == *kind) {
                Some(known) => {
                    encode(known, payload, &mut bytes);
                    expected.push((known, payload.clone()));
                }
                None => {
                    bytes.extend_from_slice(&[*kind]);
                    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
                    bytes.extend_from_slice(payload);
                }
            }
        }
        let mut decoder = Decoder::new();
        let mut decoded = Vec::new();
        let mut rest = &bytes[..];
        for cut in cuts.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            rest = later;
            decoder.buffer().extend_from_slice(now);
            decode_all(&mut decoder, &mut decoded).expect("valid frames");
        }
        let decoded: Vec<_> = decoded.into_iter().map(|frame| (frame.kind, frame.payload.to_vec())).collect();
        prop_assert_eq!(decoded, expected);
        prop_assert!(decoder.into_rest().is_empty());
    }

    #[test]
    fn arbitrary_bytes_never_panic_and_never_pile_up(
        chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..500), 0..50),
    ) {
        let mut decoder = Decoder::new();
        let mut frames = Vec::new();
        for chunk in chunks {
            decoder.buffer().extend_from_slice(&chunk);
            match decode_all(&mut decoder, &mut frames) {
                Ok(()) => {}
                Err(FrameError::TooLong(length)) => {
                    prop_assert!(length > MAX_PAYLOAD as u64);
                    break;
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
            prop_assert!(decoder.buffer().len() < 5 + MAX_PAYLOAD);
        }
        prop_assert!(frames.iter().all(|frame| frame.payload.len() <= MAX_PAYLOAD));
    }
}

#[test]
fn skipping_holds_nothing() {
    let mut decoder = Decoder::new();
    decoder.buffer().extend_from_slice(&[200, 0, 0, 16, 0]);
    for _ in 0..16 {
        decoder.buffer().extend_from_slice(&[7; 1 << 16]);
        assert_eq!(decoder.next_frame(), Ok(None));
        assert!(decoder.buffer().is_empty());
    }
    decoder.buffer().extend_from_slice(&[17, 0, 0, 0, 0]);
    assert_eq!(decoder.next_frame().expect("valid").expect("whole").kind, Kind::StdinEnd);
}

#[test]
fn the_longest_frame_passes_and_one_byte_more_does_not() {
    let mut out = BytesMut::new();
    encode(Kind::Data, &vec![1; MAX_PAYLOAD], &mut out);
    let mut decoder = Decoder::new();
    decoder.buffer().extend_from_slice(&out);
    assert_eq!(decoder.next_frame().expect("valid").expect("whole").payload.len(), MAX_PAYLOAD);
    decoder.buffer().extend_from_slice(&[32, 1, 0, 16, 0]);
    assert_eq!(decoder.next_frame(), Err(FrameError::TooLong(MAX_PAYLOAD as u64 + 1)));
}
