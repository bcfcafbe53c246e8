//! What a guest writes on its vsock stream, as the host reads it.
//!
//! The first byte says which reader gets the rest. Checked beside "no panic": the way the bytes are cut does not matter,
//! nothing piles up, a conversation ends with its bytes, a page of the log is not over its limit.

use std::{cell::LazyCell, time::Duration};

use bytes::{Bytes, BytesMut};
use pandastack_api::{
    lines::Lines,
    output::Utf8,
    routes::{cells::Outcome, kernels},
};
use pandastack_protocol::{
    Client, Decoder, Entry, Exec, ExecEvent, Exit, Failure, Frame, FrameError, Health, Hello, Kind, LOG_HEAD,
    LOG_PAGE, LogEnd, LogStream, MAX_PAYLOAD, PROTOCOL, Ports, Request, SessionInfo, Sessions, Started,
    Written, encode, log_payload, output_payload, split_log, split_output,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    runtime::{Builder, Runtime},
};

const NONCE: u64 = 7;
const SESSION: &str = "abcdefghij0123456789";
/// Never reached: the bytes of an input are all there, and then the stream ends.
const LIMIT: Duration = Duration::from_secs(600);

thread_local! {
    static RUNTIME: LazyCell<Runtime> =
        LazyCell::new(|| Builder::new_current_thread().enable_time().build().expect("a runtime"));
}

/// Reads an input.
pub fn run(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else { return };
    match which % 6 {
        0 => frames(bytes),
        1 => messages(bytes),
        2 => log(bytes),
        3 => text(bytes),
        which => RUNTIME.with(|runtime| runtime.block_on(conversation(which, bytes))),
    }
}

fn decode<'a>(chunks: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<FrameError>) {
    let (mut decoder, mut frames) = (Decoder::new(), Vec::new());
    for chunk in chunks {
        decoder.buffer().extend_from_slice(chunk);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
        assert!(decoder.buffer().len() < 5 + MAX_PAYLOAD, "bytes pile up");
    }
    (frames, None)
}

fn frames(bytes: &[u8]) {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let whole = decode(std::iter::once(bytes));
    let pieces = decode(bytes.chunks(usize::from(*cut).max(1)));
    assert_eq!(whole, pieces, "the way it is cut matters");
    for Frame { kind, payload } in whole.0 {
        let mut again = BytesMut::new();
        encode(kind, &payload, &mut again);
        assert_eq!(decode(std::iter::once(&again[..])).0, [Frame { kind, payload: payload.clone() }]);
        match kind {
            Kind::Data => drop(split_log(payload)),
            Kind::Stdout | Kind::Stderr => drop(split_output(payload)),
            _ => messages(&payload),
        }
    }
}

/// What parses is written and parsed again to the same.
fn message<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(message) = serde_json::from_slice::<T>(bytes) {
        let written = serde_json::to_vec(&message).expect("what was read can be written");
        assert_eq!(serde_json::from_slice::<T>(&written).expect("what was written can be read"), message);
    }
}

fn messages(bytes: &[u8]) {
    message::<Hello>(bytes);
    message::<Request>(bytes);
    message::<Started>(bytes);
    message::<Exit>(bytes);
    message::<Sessions>(bytes);
    message::<SessionInfo>(bytes);
    message::<LogEnd>(bytes);
    message::<Entry>(bytes);
    message::<Vec<Entry>>(bytes);
    message::<Written>(bytes);
    message::<Ports>(bytes);
    message::<Health>(bytes);
    message::<Failure>(bytes);
    drop(kernels::understand::<Outcome>(bytes));
}

/// Parts of a log, each with its length before it, become lines.
fn log(mut bytes: &[u8]) {
    let mut lines = Lines::default();
    let mut given = 0;
    let mut taken = 0;
    while let Some((length, rest)) = bytes.split_first() {
        let (part, rest) = rest.split_at((usize::from(*length) * 4).min(rest.len()));
        bytes = rest;
        let Ok(mut part) = split_log(Bytes::copy_from_slice(part)) else { continue };
        given += part.bytes.len();
        while let Some(line) = lines.next(&mut part) {
            taken += usize::from(!line.text.is_empty());
        }
        assert!(part.bytes.is_empty(), "a part is used up");
    }
    while let Some(line) = lines.rest() {
        taken += usize::from(!line.text.is_empty());
    }
    assert!(taken <= given, "lines out of nothing");
}

/// Output in pieces reads like the whole.
fn text(bytes: &[u8]) {
    let Some((cut, bytes)) = bytes.split_first() else { return };
    let (mut utf8, mut text) = (Utf8::default(), String::new());
    for piece in bytes.chunks(usize::from(*cut).max(1)) {
        text.push_str(&utf8.push(piece));
        assert!(utf8.held() < 4);
    }
    text.push_str(&utf8.finish());
    assert_eq!(text, String::from_utf8_lossy(bytes));
}

/// A stream on which the guest has said all it will ever say. What the host writes is thrown away.
async fn guest(bytes: &[u8]) -> DuplexStream {
    let (host, guest) = tokio::io::duplex(1 << 20);
    let (mut from_host, mut to_host) = tokio::io::split(guest);
    let bytes = bytes.to_vec();
    tokio::spawn(async move {
        let _ = to_host.write_all(&bytes).await;
        let _ = to_host.shutdown().await;
        let _ = from_host.read_to_end(&mut Vec::new()).await;
    });
    host
}

/// A conversation with a guest that answers with these bytes, whatever it is asked. The greeting is a good one: behind a
/// bad one nothing is read.
async fn conversation(which: u8, bytes: &[u8]) {
    let mut said = BytesMut::new();
    let hello = Hello { proto: PROTOCOL, nonce: NONCE, agent: "fuzz".into() };
    encode(Kind::Hello, &json(&hello), &mut said);
    let Some((question, bytes)) = bytes.split_first() else { return };
    said.extend_from_slice(bytes);
    let Ok(mut client) = Client::greet(guest(&said).await, NONCE, LIMIT).await else {
        panic!("a good greeting is refused");
    };
    if which == 4 {
        session(client, *question, bytes.len()).await;
        return;
    }
    let request = Request::Log { position: 0, life: 0, session: String::new(), wait_ms: 0 };
    for turn in 0..4 {
        let goes_on = match (question >> (2 * turn)) % 4 {
            0 => match client.log(&request, LIMIT).await {
                Ok(page) => {
                    let size: usize = page.parts.iter().map(|part| part.bytes.len() + LOG_HEAD).sum();
                    assert!(size <= 2 * LOG_PAGE, "a page of {size} bytes");
                    true
                }
                Err(error) => matches!(error, pandastack_protocol::ClientError::Guest(_)),
            },
            1 => client.read_file("/x", LIMIT).await.is_ok() && while_some(&mut client).await,
            2 => {
                client.list("/x", LIMIT).await.is_ok()
                    && loop {
                        match client.next_entries(LIMIT).await {
                            Ok(Some(_)) => {}
                            Ok(None) => break true,
                            Err(_) => break false,
                        }
                    }
            }
            _ => client.call::<Health>(&Request::Health {}, LIMIT).await.is_ok(),
        };
        if !goes_on {
            return;
        }
    }
}

async fn while_some(client: &mut Client<DuplexStream>) -> bool {
    loop {
        match client.read_chunk(LIMIT).await {
            Ok(Some(_)) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// A session's output: offsets never go backwards, and there is no more of it than the guest sent.
async fn session(client: Client<DuplexStream>, question: u8, sent: usize) {
    let exec = Exec { session: SESSION.into(), argv: vec!["x".into()], ..Exec::default() };
    let stream = match question % 2 {
        0 => client.exec(exec, LIMIT).await,
        _ => client.attach(SESSION, u64::from(question), LIMIT).await,
    };
    let Ok(mut stream) = stream else { return };
    stream.stdin(&[b'i'; 300]);
    let (mut offset, mut got) = (stream.offset(), 0);
    loop {
        match stream.next().await {
            Ok(ExecEvent::Stdout(bytes) | ExecEvent::Stderr(bytes)) => got += bytes.len(),
            Ok(ExecEvent::Exit(_)) => break,
            Err(_) => return,
        }
        assert!(stream.offset() >= offset, "output goes backwards");
        offset = stream.offset();
    }
    assert!(got <= sent, "output out of nothing");
    assert!(stream.into_client().is_some(), "the connection is idle after the exit");
}

/// One valid input for each reader and message.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let exit = Exit { code: 3, signal: 9, ..Exit::default() };
    let started = Started { session: SESSION.into(), pid: 5, offset: 0, dropped: 0, stdin: 0 };
    let entry = Entry { name: "a".into(), kind: 'f', size: 3, mode: 0o644, mtime: -1 };
    let info = SessionInfo {
        session: SESSION.into(),
        command: "x".into(),
        pid: 4,
        started: 1,
        detached: true,
        exit: Some(exit),
        output_bytes: 1,
    };
    let end = LogEnd { life: 1, start: 0, next: 5, end: 5 };
    let messages = [
        json(&Hello { proto: 1, nonce: NONCE, agent: "a".into() }),
        json(&started),
        json(&exit),
        json(&Sessions { sessions: vec![info] }),
        json(&end),
        json(&entry),
        json(&vec![entry.clone()]),
        json(&Written { bytes: 3 }),
        json(&Ports { ports: vec![80, 3000] }),
        json(&Health::default()),
        br#"{"code":"no_space","message":"full"}"#.to_vec(),
        br#"{"op":"log","position":1,"life":2,"session":"s","wait_ms":3}"#.to_vec(),
        br#"{"ok":{"stdout":"a","stderr":"","exit_code":0,"exit":0,"results":[{"text/plain":"1"}],"error":null,"duration_ms":1,"truncated":false,"timed_out":false,"restarted":false,"note":""}}"#.to_vec(),
    ];
    let part = log_payload(0, 9, SESSION, LogStream::Stdout, b"a line\nand more").expect("a payload");
    let frame = |kind, payload: &[u8]| {
        let mut out = BytesMut::new();
        encode(kind, payload, &mut out);
        out.to_vec()
    };
    let with = |head: &[u8], rest: &[&[u8]]| [head, &rest.concat()].concat();
    let mut seeds: Vec<Vec<u8>> = messages.iter().map(|message| with(&[1], &[message])).collect();
    seeds.push(with(
        &[0, 3],
        &[&frame(Kind::Started, &messages[1]), &frame(Kind::Stdout, &output_payload(0, b"x"))],
    ));
    seeds.push(with(
        &[0, 1],
        &[&frame(Kind::Data, &part), &[200, 2, 0, 0, 0, 1, 1], &frame(Kind::Exit, &messages[2])],
    ));
    seeds.push(with(&[2, part.len().div_ceil(4) as u8], &[&part]));
    seeds.push(with(&[3, 1], &["é\u{1F600}x".as_bytes(), b"\xff\xe2\x82"]));
    let output = [
        frame(Kind::Started, &messages[1]),
        frame(Kind::Stdout, &output_payload(0, b"out")),
        frame(Kind::StdinTaken, &300u64.to_le_bytes()),
        frame(Kind::Stderr, &output_payload(3, b"err")),
        frame(Kind::Exit, &messages[2]),
    ];
    seeds.push(with(&[4, 0], &[&output.concat()]));
    let page = [frame(Kind::Data, &part), frame(Kind::Done, &messages[4])].concat();
    let file = [
        frame(Kind::Ready, &messages[5]),
        frame(Kind::Data, b"bytes"),
        frame(Kind::DataEnd, b""),
        frame(Kind::Done, b"null"),
    ];
    let listing = [
        frame(Kind::Ready, b"null"),
        frame(Kind::Data, &messages[6]),
        frame(Kind::DataEnd, b""),
        frame(Kind::Done, b"null"),
    ];
    seeds.push(with(
        &[5, 0b1110_0100],
        &[&page, &file.concat(), &listing.concat(), &frame(Kind::Done, &messages[9])],
    ));
    seeds
}

fn json(message: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(message).expect("messages are JSON")
}
