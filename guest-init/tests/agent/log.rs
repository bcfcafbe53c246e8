//! The log of all sessions.

use std::time::{Duration, Instant};

use pandastack_protocol::*;
use tokio::net::UnixStream;

use crate::world::*;

async fn log(client: &mut Client<UnixStream>, position: u64, session: &str, wait_ms: u64) -> LogPage {
    let request = Request::Log { position, life: 0, session: session.into(), wait_ms };
    client.log(&request, LIMIT).await.expect("a page")
}

fn said(page: &LogPage, session: &str, stream: LogStream) -> String {
    let of = page.parts.iter().filter(|part| part.session == session && part.stream == stream);
    of.map(|part| String::from_utf8_lossy(&part.bytes)).collect()
}

#[tokio::test]
async fn the_log_has_what_all_sessions_wrote_apart_and_in_order() {
    let world = World::new();
    let (one, two) = (sh("echo out; echo err >&2; printf half"), sh("echo other"));
    let (first, second) = (one.session.clone(), two.session.clone());
    collect(world.exec(one).await).await;
    collect(world.exec(two).await).await;
    collect(world.exec(Exec { unlogged: true, ..sh("echo unseen") }).await).await;
    let terminal = Exec { tty: Some(Window { rows: 9, cols: 9 }), ..sh("echo typed") };
    collect(world.exec(terminal).await).await;

    let mut client = world.client().await;
    let page = log(&mut client, 0, "", 0).await;

    assert_eq!(said(&page, &first, LogStream::Stdout), "out\nhalf\n");
    assert_eq!(said(&page, &first, LogStream::Stderr), "err\n");
    assert_eq!(said(&page, &second, LogStream::Stdout), "other\n");
    assert_eq!((page.end.start, page.end.next, page.end.end), (0, 19, 19));
    let only = log(&mut client, 0, &second, 0).await;
    assert_eq!((only.parts.len(), only.end.next), (1, 19));
}

#[tokio::test]
async fn a_reader_of_the_log_is_told_at_once_and_waits_no_longer_than_it_said() {
    let world = World::new();
    let mut client = world.client().await;
    let start = Instant::now();
    assert_eq!(log(&mut client, 0, "", 100).await.parts, []);
    assert!(start.elapsed() >= Duration::from_millis(100));

    let session = sh("echo late");
    let id = session.session.clone();
    let (page, _) = tokio::join!(log(&mut client, 0, &id, 20_000), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        collect(world.exec(sh("echo somebody else")).await).await;
        collect(world.exec(session).await).await
    });
    assert_eq!(said(&page, &id, LogStream::Stdout), "late\n");
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn what_the_background_writes_after_its_shell_is_in_the_log() {
    let world = World::new();
    let exec = sh("(sleep 0.3; echo behind; printf open) & echo front");
    let id = exec.session.clone();
    collect(world.exec(exec).await).await;
    let mut client = world.client().await;
    let deadline = Instant::now() + LIMIT;
    let mut page = log(&mut client, 0, &id, 0).await;
    while !said(&page, &id, LogStream::Stdout).contains("open\n") && Instant::now() < deadline {
        page = log(&mut client, 0, &id, 0).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(said(&page, &id, LogStream::Stdout), "front\nbehind\nopen\n");
}
