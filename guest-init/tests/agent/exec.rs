//! Programs: how they are started, fed and ended, and what becomes of their output.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use pandastack_protocol::*;

use crate::world::*;

#[tokio::test]
async fn streams_are_separate_and_exit_codes_right() {
    let world = World::new();
    let outcome = world.sh("echo out; echo err >&2; exit 7").await;
    assert_eq!((outcome.out(), outcome.err()), ("out\n", "err\n"));
    assert_eq!((outcome.exit.code, outcome.exit.signal, outcome.exit.output_bytes), (7, 0, 8));
    assert_eq!(world.sh("true").await.exit.code, 0);
    let killed = world.sh("kill -9 $$").await.exit;
    assert_eq!((killed.code, killed.signal, killed.timed_out, killed.oom), (137, 9, false, false));
    assert_eq!(world.sh("nonexistent-command").await.exit.code, 127);
}

#[tokio::test]
async fn missing_and_unusable_programs() {
    let world = World::new();
    let missing = Exec { session: id(), argv: vec!["no-such-program".into()], ..Exec::default() };
    let outcome = collect(world.exec(missing).await).await;
    assert_eq!((outcome.exit.code, outcome.err()), (127, "no-such-program: not found\n"));
    let locked = Exec { session: id(), argv: vec!["/etc/passwd".into()], ..Exec::default() };
    let outcome = collect(world.exec(locked).await).await;
    assert_eq!(outcome.exit.code, 126);
    assert!(outcome.err().starts_with("/etc/passwd: cannot execute: "), "{}", outcome.err());
    let by_path = Exec { session: id(), argv: vec!["true".into()], ..Exec::default() };
    assert_eq!(collect(world.exec(by_path).await).await.exit.code, 0);
}

#[tokio::test]
async fn bad_requests_are_refused_and_the_connection_lives() {
    let world = World::new();
    assert_eq!(world.refused(Exec { cwd: "/nonexistent".into(), ..sh("true") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { cwd: "relative".into(), ..sh("true") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { user: "no-such-user".into(), ..sh("true") }).await, Code::NotFound);
    assert_eq!(world.refused(Exec { argv: vec![], ..sh("") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { argv: vec!["a\0b".into()], ..sh("") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { session: "short".into(), ..sh("") }).await, Code::Invalid);
    assert_eq!(world.refused(sh(&"x".repeat(200_000))).await, Code::Invalid);
    let bad_env = Exec { env: BTreeMap::from([("A=B".into(), "c".into())]), ..sh("true") };
    assert_eq!(world.refused(bad_env).await, Code::Invalid);
    // None of these left a session behind.
    let sessions: Sessions = world.client().await.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
    assert_eq!(sessions.sessions, vec![]);
}

#[tokio::test]
async fn environment_directory_and_user() {
    let world = World::new();
    let mut client = world.client().await;
    let defaults = Defaults {
        env: BTreeMap::from([
            ("PATH".into(), "/image/bin:/usr/bin:/bin".into()),
            ("IMAGE".into(), "yes".into()),
        ]),
        workdir: "/usr".into(),
    };
    let identity = Identity { unix_nanos: 5, entropy: "00".into(), unique: None, defaults: Some(defaults) };
    let () = client.call(&Request::Identity(identity.clone()), LIMIT).await.expect("identity");
    let script = "echo $PATH $IMAGE $HOME $USER $MORE; pwd; umask; cat /dev/stdin";
    let exec =
        Exec { cwd: String::new(), env: BTreeMap::from([("MORE".into(), "x y".into())]), ..sh(script) };
    let outcome = collect(world.exec(exec).await).await;
    assert_eq!(outcome.out(), "/image/bin:/usr/bin:/bin yes /root root x y\n/usr\n0022\n");
    let exec = Exec { user: "12345".into(), ..sh("id -u; id -g; id -G; cat /proc/self/oom_score_adj") };
    assert_eq!(collect(world.exec(exec).await).await.out(), "12345\n12345\n12345\n0\n");
    // What is known is not written again, which every sandbox of a template would have to wait for.
    let () = client.call(&Request::Identity(identity.clone()), LIMIT).await.expect("identity");
    assert_eq!(*world.machine.0.lock().expect("lock"), ["identity 5", "remember /usr", "identity 5"]);
    let failed = Identity { entropy: String::new(), ..identity };
    let error = client.call::<()>(&Request::Identity(failed), LIMIT).await.expect_err("refused");
    assert!(matches!(error, ClientError::Guest(Failure { code: Code::Internal, .. })));
}

#[tokio::test]
async fn standard_input_both_small_and_larger_than_every_buffer() {
    let world = World::new();
    let mut stream = world.exec(Exec { stdin: true, ..sh("cat; echo end") }).await;
    stream.stdin(b"hello ");
    stream.stdin(b"world\n");
    stream.stdin_end();
    assert_eq!(collect(stream).await.out(), "hello world\nend\n");

    // 5 MB in and 5 MB out at the same time, over a window and a replay buffer that are both smaller.
    let input: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut stream = world.exec(Exec { stdin: true, ..sh("cat") }).await;
    stream.stdin(&input);
    stream.stdin_end();
    let outcome = collect(stream).await;
    assert!(outcome.stdout == input, "{} bytes came back", outcome.stdout.len());
    assert_eq!(outcome.exit.dropped, 0);

    // A program that does not read its input holds nothing up.
    let mut stream = world.exec(Exec { stdin: true, ..sh("exec <&-; sleep 0.2; echo done") }).await;
    stream.stdin(&input);
    assert_eq!(collect(stream).await.out(), "done\n");
}

#[tokio::test]
async fn a_timeout_ends_everything_also_what_ignores_term() {
    for world in [World::new(), World::without_cgroups()] {
        let script = "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done' & wait";
        let begin = Instant::now();
        let outcome = collect(world.exec(Exec { timeout_ms: 300, ..sh(script) }).await).await;
        let took = begin.elapsed();
        assert!(outcome.exit.timed_out, "{:?}", outcome.exit);
        assert_eq!((outcome.exit.code, outcome.exit.signal), (143, 15));
        assert!(took >= Duration::from_millis(2200) && took < Duration::from_secs(8), "{took:?}");
        assert!(!alive(outcome.out()), "the child lives on");
    }
    let world = World::new();
    let begin = Instant::now();
    let outcome = collect(world.exec(Exec { timeout_ms: 200, ..sh("yes; true") }).await).await;
    assert!(outcome.exit.timed_out && begin.elapsed() < Duration::from_secs(2), "output hides the limit");
    let quick = collect(world.exec(Exec { timeout_ms: 5000, ..sh("exit 3") }).await).await;
    assert_eq!((quick.exit.code, quick.exit.timed_out), (3, false));
}

#[tokio::test]
async fn background_children_live_on_and_hold_nothing() {
    let world = World::new();
    let begin = Instant::now();
    let file = world.path("log");
    // It holds both pipes and writes into them for as long as it lives.
    let script =
        format!("(while :; do echo noise; echo tick >>{file}; sleep 0.05; done) & echo $!; echo last words");
    let outcome = world.sh(&script).await;
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(outcome.out().contains("last words\n"));
    let pid = outcome.out().lines().find(|line| line.parse::<u32>().is_ok()).expect("a pid").to_owned();
    let ticks = || fs::read_to_string(&file).unwrap_or_default().lines().count();
    let before = ticks();
    until("more ticks", || ticks() > before + 5).await;
    assert!(alive(&pid), "it died of its pipe");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.parse().expect("a pid")),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("kill");
}

#[tokio::test]
async fn what_was_written_before_the_end_is_complete() {
    let world = World::new();
    for _ in 0..20 {
        let outcome = world.sh("sleep 100 & head -c 65536 /dev/zero; printf x >&2; kill $!").await;
        assert_eq!((outcome.stdout.len(), outcome.err()), (65536, "x"));
    }
}

#[tokio::test]
async fn much_output_on_both_streams_with_a_slow_reader() {
    let world = World::new();
    let script = "head -c 5000000 /dev/zero & head -c 5000000 /dev/zero | tr '\\0' x >&2; wait";
    let mut stream = world.exec(sh(script)).await;
    let (mut out, mut err, mut events) = (0, 0, 0);
    let exit = loop {
        events += 1;
        if events % 16 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        match tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").expect("an event") {
            ExecEvent::Stdout(bytes) => {
                assert!(bytes.iter().all(|byte| *byte == 0));
                out += bytes.len();
            }
            ExecEvent::Stderr(bytes) => {
                assert!(bytes.iter().all(|byte| *byte == b'x'));
                err += bytes.len();
            }
            ExecEvent::Exit(exit) => break exit,
        }
    };
    assert_eq!(
        (out, err, exit.code, exit.dropped, exit.output_bytes),
        (5_000_000, 5_000_000, 0, 0, 10_000_000)
    );
    // The connection is idle again.
    let mut client = stream.into_client().expect("the client");
    let health: Health = client.call(&Request::Health {}, LIMIT).await.expect("health");
    assert_eq!(health.sessions, 0);
    assert!(health.memory_available_kib > 0 && health.disk_free_bytes > 0 && health.unix_nanos > 1 << 60);
}
