//! The bytes of protocol version 1. They never change: old snapshots hold old agents. A new version adds a file.

use std::collections::BTreeMap;

use bytes::BytesMut;
use pandastack_protocol::*;
use serde::{Serialize, de::DeserializeOwned};

/// What is encoded is these bytes, and these bytes decode to it.
#[track_caller]
fn frame(kind: Kind, payload: &[u8], header: [u8; 5]) {
    let mut out = BytesMut::new();
    encode(kind, payload, &mut out);
    let expected = [&header[..], payload].concat();
    assert_eq!(&out[..], &expected[..]);
    let mut decoder = Decoder::new();
    decoder.buffer().extend_from_slice(&expected);
    let decoded = decoder.next_frame().expect("a frame").expect("a whole frame");
    assert_eq!((decoded.kind, &decoded.payload[..]), (kind, payload));
    assert_eq!(decoder.next_frame(), Ok(None));
}

#[track_caller]
fn json<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(message: &T, text: &str) {
    assert_eq!(serde_json::to_string(message).expect("JSON"), text);
    assert_eq!(&serde_json::from_str::<T>(text).expect(text), message);
}

/// Text of an older side, without fields that came later.
#[track_caller]
fn reads<T: DeserializeOwned + PartialEq + std::fmt::Debug>(text: &str, message: &T) {
    assert_eq!(&serde_json::from_str::<T>(text).expect(text), message);
}

#[test]
fn frames() {
    frame(Kind::Hello, b"{}", [1, 2, 0, 0, 0]);
    frame(Kind::Request, b"{}", [2, 2, 0, 0, 0]);
    frame(Kind::Ready, b"null", [3, 4, 0, 0, 0]);
    frame(Kind::Done, b"null", [4, 4, 0, 0, 0]);
    frame(Kind::Error, b"{}", [5, 2, 0, 0, 0]);
    frame(Kind::Started, b"{}", [6, 2, 0, 0, 0]);
    frame(Kind::Exit, b"{}", [7, 2, 0, 0, 0]);
    frame(Kind::Stdin, b"abc", [16, 3, 0, 0, 0]);
    frame(Kind::StdinEnd, b"", [17, 0, 0, 0, 0]);
    frame(Kind::Stdout, &output_payload(0x0102, b"x"), [18, 9, 0, 0, 0]);
    frame(Kind::Stderr, &output_payload(u64::MAX, b""), [19, 8, 0, 0, 0]);
    frame(Kind::Ack, &7u64.to_le_bytes(), [20, 8, 0, 0, 0]);
    frame(Kind::Signal, &15u32.to_le_bytes(), [21, 4, 0, 0, 0]);
    frame(Kind::Resize, &[24, 0, 80, 0], [22, 4, 0, 0, 0]);
    frame(Kind::StdinTaken, &7u64.to_le_bytes(), [23, 8, 0, 0, 0]);
    frame(Kind::Data, &[0xab; 0x1_0203], [32, 0x03, 0x02, 0x01, 0]);
    frame(Kind::DataEnd, b"", [33, 0, 0, 0, 0]);
    assert_eq!(output_payload(0x0102, b"x"), [2, 1, 0, 0, 0, 0, 0, 0, b'x']);
}

#[test]
fn parts_of_a_log() {
    let session = "abcdefghij0123456789";
    let bytes = log_payload(0x0102, 0x0304, session, LogStream::Stderr, b"x\xff").expect("a payload");
    let head = [2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0];
    assert_eq!(bytes, [&head[..], session.as_bytes(), &[2], b"x\xff"].concat());
    let part = split_log(bytes.into()).expect("a part");
    assert_eq!((part.position, part.unix_ms, &*part.session), (0x0102, 0x0304, session));
    assert_eq!((part.stream, &part.bytes[..]), (LogStream::Stderr, &b"x\xff"[..]));
    let out = log_payload(0, 0, session, LogStream::Stdout, b"").expect("a payload");
    assert_eq!((out.len(), out[36]), (LOG_HEAD, 1));
    assert_eq!(log_payload(0, 0, "short", LogStream::Stdout, b""), None);
    for bad in [vec![0; LOG_HEAD - 1], vec![0; LOG_HEAD], [&[b'a'; 36][..], &[3]].concat()] {
        assert_eq!(split_log(bad.into()), Err(FrameError::BadLog));
    }
}

#[test]
fn limits() {
    assert_eq!((PORT, PROTOCOL, PROTOCOL_OLDEST), (52, 1, 1));
    assert_eq!((MAX_PAYLOAD, CHUNK, REPLAY_BYTES), (1_048_576, 65_536, 1_048_576));
    assert_eq!((LOG_BYTES, LOG_PAGE, LOG_WAIT_MS), (1_048_576, 131_072, 30_000));
    assert_eq!((ACK_EVERY, STDIN_WINDOW, ORPHAN_SECONDS), (131_072, 262_144, 60));
}

#[test]
fn hello() {
    let hello = Hello { proto: 1, nonce: u64::MAX, agent: "0.1.0".into() };
    json(&hello, r#"{"proto":1,"nonce":18446744073709551615,"agent":"0.1.0"}"#);
    reads(r#"{"proto":1,"nonce":5,"later":true}"#, &Hello { proto: 1, nonce: 5, agent: String::new() });
}

#[test]
fn requests() {
    let path = || "/a".to_owned();
    let unique =
        Unique { sandbox: "s".into(), machine_id: "m".into(), boot_id: "b".into(), hostname: "h".into() };
    let defaults = Defaults { env: BTreeMap::from([("A".into(), "b".into())]), workdir: "/w".into() };
    json(
        &Request::Identity(Identity {
            unix_nanos: 5,
            entropy: "00".into(),
            unique: Some(unique),
            defaults: Some(defaults),
        }),
        r#"{"op":"identity","unix_nanos":5,"entropy":"00","unique":{"sandbox":"s","machine_id":"m","boot_id":"b","hostname":"h"},"defaults":{"env":{"A":"b"},"workdir":"/w"}}"#,
    );
    json(
        &Request::Identity(Identity { unix_nanos: 5, entropy: "00".into(), unique: None, defaults: None }),
        r#"{"op":"identity","unix_nanos":5,"entropy":"00"}"#,
    );
    let exec = Exec {
        session: "s".into(),
        argv: vec!["/bin/sh".into(), "-c".into(), "x".into()],
        cwd: "/".into(),
        env: BTreeMap::from([("A".into(), "b".into())]),
        user: "u".into(),
        timeout_ms: 9,
        stdin: true,
        detach: true,
        tty: Some(Window { rows: 24, cols: 80 }),
        unlogged: false,
    };
    json(
        &Request::Exec(exec),
        r#"{"op":"exec","session":"s","argv":["/bin/sh","-c","x"],"cwd":"/","env":{"A":"b"},"user":"u","timeout_ms":9,"stdin":true,"detach":true,"tty":{"rows":24,"cols":80}}"#,
    );
    reads(
        r#"{"op":"exec","session":"s","argv":["x"]}"#,
        &Request::Exec(Exec { session: "s".into(), argv: vec!["x".into()], ..Exec::default() }),
    );
    json(
        &Exec { session: "s".into(), unlogged: true, ..Exec::default() },
        r#"{"session":"s","argv":[],"cwd":"","env":{},"user":"","timeout_ms":0,"stdin":false,"detach":false,"unlogged":true}"#,
    );
    json(
        &Request::Log { position: u64::MAX, life: 2, session: "s".into(), wait_ms: 3 },
        r#"{"op":"log","position":18446744073709551615,"life":2,"session":"s","wait_ms":3}"#,
    );
    reads(
        r#"{"op":"log","position":1}"#,
        &Request::Log { position: 1, life: 0, session: String::new(), wait_ms: 0 },
    );
    json(&Request::Attach { session: "s".into(), offset: 3 }, r#"{"op":"attach","session":"s","offset":3}"#);
    json(&Request::Sessions {}, r#"{"op":"sessions"}"#);
    json(&Request::Kill { session: "s".into() }, r#"{"op":"kill","session":"s"}"#);
    json(&Request::ReadFile { path: path() }, r#"{"op":"read_file","path":"/a"}"#);
    json(
        &Request::WriteFile { path: path(), size: 1, mode: 420 },
        r#"{"op":"write_file","path":"/a","size":1,"mode":420}"#,
    );
    json(&Request::List { path: path() }, r#"{"op":"list","path":"/a"}"#);
    json(&Request::Stat { path: path() }, r#"{"op":"stat","path":"/a"}"#);
    json(&Request::Delete { path: path() }, r#"{"op":"delete","path":"/a"}"#);
    json(&Request::Forward { port: 80 }, r#"{"op":"forward","port":80}"#);
    json(&Request::Ports {}, r#"{"op":"ports"}"#);
    json(&Request::Sync {}, r#"{"op":"sync"}"#);
    json(&Request::GrowRoot {}, r#"{"op":"grow_root"}"#);
    let volume = Mount { device: "vdb".into(), path: "/mnt/v".into(), read_only: true };
    json(
        &Request::Mount { mounts: vec![volume.clone()] },
        r#"{"op":"mount","mounts":[{"device":"vdb","path":"/mnt/v","read_only":true}]}"#,
    );
    reads(r#"{"device":"vdb","path":"/mnt/v"}"#, &Mount { read_only: false, ..volume });
    json(&Request::Health {}, r#"{"op":"health"}"#);
    json(&Request::Shutdown {}, r#"{"op":"shutdown"}"#);
    reads(r#"{"op":"health","later":1}"#, &Request::Health {});
}

#[test]
fn answers() {
    let started = Started { session: "s".into(), pid: 2, offset: 3, dropped: 4, stdin: 5 };
    json(&started, r#"{"session":"s","pid":2,"offset":3,"dropped":4,"stdin":5}"#);
    reads(r#"{"session":"s","pid":2,"offset":3,"dropped":4}"#, &Started { stdin: 0, ..started });
    let exit = Exit {
        code: 137,
        signal: 9,
        timed_out: true,
        oom: true,
        duration_ms: 1,
        output_bytes: 2,
        dropped: 3,
    };
    let exit_text =
        r#"{"code":137,"signal":9,"timed_out":true,"oom":true,"duration_ms":1,"output_bytes":2,"dropped":3}"#;
    json(&exit, exit_text);
    reads(r#"{"code":0}"#, &Exit::default());
    let info = SessionInfo {
        session: "s".into(),
        command: "c".into(),
        pid: 2,
        started: 3,
        detached: true,
        exit: Some(exit),
        output_bytes: 4,
    };
    json(
        &Sessions { sessions: vec![info.clone(), SessionInfo { exit: None, ..info }] },
        &format!(
            r#"{{"sessions":[{{"session":"s","command":"c","pid":2,"started":3,"detached":true,"exit":{exit_text},"output_bytes":4}},{{"session":"s","command":"c","pid":2,"started":3,"detached":true,"output_bytes":4}}]}}"#
        ),
    );
    json(
        &vec![Entry { name: "é\u{0}".into(), kind: 'd', size: 1, mode: 493, mtime: -1 }],
        r#"[{"name":"é\u0000","kind":"d","size":1,"mode":493,"mtime":-1}]"#,
    );
    json(&LogEnd { life: 1, start: 2, next: 3, end: 4 }, r#"{"life":1,"start":2,"next":3,"end":4}"#);
    json(&Written { bytes: 1 }, r#"{"bytes":1}"#);
    json(&Ports { ports: vec![80, 3000] }, r#"{"ports":[80,3000]}"#);
    json(
        &Health { unix_nanos: 1, memory_available_kib: 2, disk_free_bytes: 3, sessions: 4 },
        r#"{"unix_nanos":1,"memory_available_kib":2,"disk_free_bytes":3,"sessions":4}"#,
    );
}

#[test]
fn failures() {
    let codes = [
        (Code::NotFound, "not_found"),
        (Code::NotADirectory, "not_a_directory"),
        (Code::IsADirectory, "is_a_directory"),
        (Code::Denied, "denied"),
        (Code::NoSpace, "no_space"),
        (Code::Invalid, "invalid"),
        (Code::Busy, "busy"),
        (Code::Refused, "refused"),
        (Code::Unsupported, "unsupported"),
        (Code::Internal, "internal"),
    ];
    for (code, name) in codes {
        json(&Failure { code, message: "m".into() }, &format!(r#"{{"code":"{name}","message":"m"}}"#));
    }
    reads(
        r#"{"code":"of_the_future","message":"m"}"#,
        &Failure { code: Code::Internal, message: "m".into() },
    );
}
