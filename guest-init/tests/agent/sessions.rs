//! Sessions: left and come back to, signalled, copied with their machine.

use std::time::{Duration, Instant};

use pandastack_protocol::*;

use crate::world::*;

#[tokio::test]
async fn attaching_after_a_lost_connection_gives_exactly_what_is_missing() {
    let world = World::new();
    // As much as is kept for one who comes back, so that it is several rounds also when every event is as large as can be.
    let count = 75_000;
    let exec = sh(&format!("i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); done"));
    let expected: String = (0..count).map(|i| format!("line {i}\n")).collect();
    assert!(expected.len() < REPLAY_BYTES && expected.len() > 8 * CHUNK);
    let mut stream = world.exec(exec.clone()).await;
    let mut text = Vec::new();
    let mut rounds = 0;
    'all: loop {
        for _ in 0..3 {
            match tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").expect("an event") {
                ExecEvent::Stdout(bytes) => text.extend_from_slice(&bytes),
                ExecEvent::Stderr(_) => panic!("nothing was written there"),
                ExecEvent::Exit(exit) => {
                    assert_eq!((exit.code, exit.dropped, exit.output_bytes), (0, 0, expected.len() as u64));
                    break 'all;
                }
            }
        }
        let offset = stream.offset();
        drop(stream);
        rounds += 1;
        stream = world
            .client()
            .await
            .attach(&exec.session, offset, LIMIT)
            .await
            .map_err(|e| e.1)
            .expect("attached");
        assert_eq!(stream.started.offset, offset);
    }
    assert!(rounds > 1);
    assert!(text == expected.as_bytes());
    // The same id is never run twice: it is attached to at 0, which is partly gone by now.
    let again = collect(world.exec(Exec { argv: vec!["/bin/false".into()], ..exec }).await).await;
    assert_eq!(again.exit.code, 0);
    assert!(expected.as_bytes().ends_with(&again.stdout));
    let missing = world.client().await.attach(&id(), 0, LIMIT).await.expect_err("no such session").1;
    assert!(matches!(missing, ClientError::Guest(Failure { code: Code::NotFound, .. })));
}

#[tokio::test]
async fn nobody_attached_drops_the_oldest_and_counts() {
    let world = World::new();
    let exec = Exec { detach: true, ..sh("sleep 0.3; head -c 3000000 /dev/zero; echo end") };
    drop(world.exec(exec.clone()).await);
    let mut client = world.client().await;
    let deadline = Instant::now() + LIMIT;
    loop {
        let list: Sessions = client.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
        let info = &list.sessions[0];
        assert!(info.detached && info.session == exec.session);
        if info.exit.is_some() {
            break;
        }
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stream = client.attach(&exec.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    let started = stream.started.clone();
    let outcome = collect(stream).await;
    assert!(outcome.stdout.ends_with(b"end\n"));
    assert_eq!(outcome.exit.output_bytes, 3_000_004);
    assert_eq!(outcome.exit.dropped + outcome.stdout.len() as u64, 3_000_004);
    assert_eq!(started.dropped, outcome.exit.dropped);
    assert!(outcome.stdout.len() <= REPLAY_BYTES && outcome.stdout.len() > REPLAY_BYTES / 2);
}

/// Of a guest that was restored: a copy has a name of its own.
fn restored(copy: bool) -> Request {
    let unique = Unique {
        sandbox: "copy".into(),
        machine_id: "0".repeat(32),
        boot_id: "01234567-89ab-4cde-8f01-23456789abcd".into(),
        hostname: "sb-copy".into(),
    };
    let unique = copy.then_some(unique);
    Request::Identity(Identity { unix_nanos: 1, entropy: "00".into(), unique, defaults: None })
}

#[tokio::test]
async fn a_copy_detaches_what_runs_and_a_wake_does_not() {
    let world = World::new();
    let running = sh("read word; echo got $word");
    let mut stream = world.exec(Exec { stdin: true, ..running.clone() }).await;
    let ended = sh("true");
    assert_eq!(collect(world.exec(ended.clone()).await).await.exit.code, 0);
    let mut client = world.client().await;
    let mut detached = async |request: &Request| {
        let () = client.call(request, LIMIT).await.expect("done");
        let list: Sessions = client.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
        let of = |exec: &Exec| {
            list.sessions.iter().find(|info| info.session == exec.session).expect("it is there")
        };
        (of(&running).detached, of(&ended).detached)
    };
    assert_eq!(detached(&restored(false)).await, (false, false));
    assert_eq!(detached(&restored(true)).await, (true, false));
    // Whoever was attached belongs to the parent; anybody may go on here.
    assert!(matches!(stream.next().await, Err(ClientError::Lost(_))));
    let mut stream =
        world.client().await.attach(&running.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    stream.stdin(b"word\n");
    assert_eq!(collect(stream).await.out(), "got word\n");
}

#[tokio::test]
async fn in_a_copy_nothing_holds_output_up() {
    let world = World::new();
    let exec = sh("head -c 3000000 /dev/zero; echo end");
    // It is attached to and never acknowledges, so its program is held up.
    let parent = world.exec(exec.clone()).await;
    let mut client = world.client().await;
    let mut info = async || {
        let list: Sessions = client.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
        list.sessions[0].clone()
    };
    while info().await.output_bytes < REPLAY_BYTES as u64 / 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(info().await.exit, None);
    let () = world.client().await.call(&restored(true), LIMIT).await.expect("done");
    let exit = loop {
        match info().await.exit {
            Some(exit) => break exit,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!((exit.code, exit.output_bytes), (0, 3_000_004));
    assert!(exit.dropped > 0);
    drop(parent);
    let kept = world.client().await.attach(&exec.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    let outcome = collect(kept).await;
    assert!(outcome.stdout.ends_with(b"end\n"), "the oldest is dropped, not the newest");
    assert_eq!(outcome.exit.dropped + outcome.stdout.len() as u64, 3_000_004);
}

#[tokio::test]
async fn an_attachment_takes_over_from_an_older_one() {
    let world = World::new();
    let exec = sh("sleep 0.5; echo late");
    let mut first = world.exec(exec.clone()).await;
    let second =
        world.client().await.attach(&exec.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    assert!(matches!(first.next().await, Err(ClientError::Lost(_))));
    assert_eq!(collect(second).await.out(), "late\n");
}

#[tokio::test]
async fn signals_kill_and_sessions() {
    let world = World::new();
    let exec = sh("trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done");
    let mut stream = world.exec(exec).await;
    assert!(matches!(stream.next().await, Ok(ExecEvent::Stdout(_))));
    stream.signal(10);
    let outcome = collect(stream).await;
    assert_eq!((outcome.out(), outcome.exit.code), ("caught\n", 5));

    let exec = sh("setsid sleep 1000 & echo $!; sleep 1000");
    let mut stream = world.exec(exec.clone()).await;
    let Ok(ExecEvent::Stdout(pid)) = stream.next().await else { panic!("a pid") };
    let pid = String::from_utf8(pid.to_vec()).expect("UTF-8");
    let () =
        world.client().await.call(&Request::Kill { session: exec.session }, LIMIT).await.expect("killed");
    let exit = collect(stream).await.exit;
    assert_eq!((exit.code, exit.signal, exit.timed_out), (137, 9, false));
    if world.cgroup.0.is_some() {
        until("the end of the other session", || !alive(&pid)).await;
    }
    let missing = world.client().await.call::<()>(&Request::Kill { session: id() }, LIMIT).await;
    assert!(matches!(missing, Err(ClientError::Guest(Failure { code: Code::NotFound, .. }))));
}

#[tokio::test]
async fn terminals() {
    let world = World::new();
    let exec = Exec {
        tty: Some(Window { rows: 30, cols: 100 }),
        ..sh("stty size; tty; echo err >&2; read x; echo got $x; stty size; echo $TERM")
    };
    let mut stream = world.exec(exec).await;
    let mut text = String::new();
    while !text.contains("err") {
        let Ok(ExecEvent::Stdout(bytes)) = stream.next().await else { panic!("output") };
        text.push_str(std::str::from_utf8(&bytes).expect("UTF-8"));
    }
    assert!(text.starts_with("30 100\r\n/dev/pts/"), "{text:?}");
    stream.resize(Window { rows: 10, cols: 20 });
    stream.stdin(b"word\r");
    let outcome = collect(stream).await;
    assert!(outcome.out().ends_with("got word\r\n10 20\r\nxterm-256color\r\n"), "{:?}", outcome.out());
    assert_eq!(outcome.exit.code, 0);
}
