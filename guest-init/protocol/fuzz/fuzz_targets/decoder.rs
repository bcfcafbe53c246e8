//! Whatever a guest writes: no panic, nothing piles up, and the way it is cut does not matter.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pandastack_protocol::{
    Decoder, Entry, Exit, Failure, Frame, FrameError, Health, Hello, Kind, MAX_PAYLOAD, Sessions, Started, Written,
    split_output,
};

fn decode(chunks: impl Iterator<Item = Vec<u8>>) -> (Vec<Frame>, Option<FrameError>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    for chunk in chunks {
        decoder.buffer().extend_from_slice(&chunk);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
        assert!(decoder.buffer().len() < 5 + MAX_PAYLOAD);
    }
    (frames, None)
}

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    let whole = decode(std::iter::once(bytes.to_vec()));
    let pieces = decode(bytes.chunks(usize::from(cut).max(1)).map(<[u8]>::to_vec));
    assert_eq!(whole, pieces);
    for Frame { kind, payload } in whole.0 {
        match kind {
            Kind::Hello => drop(serde_json::from_slice::<Hello>(&payload)),
            Kind::Error => drop(serde_json::from_slice::<Failure>(&payload)),
            Kind::Started => drop(serde_json::from_slice::<Started>(&payload)),
            Kind::Exit => drop(serde_json::from_slice::<Exit>(&payload)),
            Kind::Data => drop(serde_json::from_slice::<Vec<Entry>>(&payload)),
            Kind::Done => {
                drop(serde_json::from_slice::<Written>(&payload));
                drop(serde_json::from_slice::<Health>(&payload));
                drop(serde_json::from_slice::<Sessions>(&payload));
            }
            Kind::Stdout | Kind::Stderr => drop(split_output(payload)),
            _ => {}
        }
    }
});
