use std::sync::Arc;

use guest_init::agent::{Agent, machine::Inert, serve};
use tokio::net::{TcpListener, UnixListener};

use super::*;
use crate::socket::Sockets;

type Place = (tempfile::TempDir, Agents, SandboxId, UnixListener);

fn place() -> Place {
    let root = tempfile::tempdir().unwrap();
    let id = SandboxId::random();
    let s = root.path().join(id.as_str()).join("s");
    std::fs::create_dir_all(&s).unwrap();
    let listener = UnixListener::bind(s.join(VSOCK)).unwrap();
    let agents = Agents::new(Sockets::new(root.path()));
    (root, agents, id, listener)
}

fn nobody() -> Identification {
    Identification { machine_id: None, env: Default::default(), workdir: "/srv".into() }
}

/// Reads `CONNECT 52\n`.
async fn connected(listener: &UnixListener) -> UnixStream {
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut line = [0; 11];
    stream.read_exact(&mut line).await.unwrap();
    assert_eq!(&line, b"CONNECT 52\n");
    stream
}

#[tokio::test]
async fn a_stream_is_handed_out_after_the_ok_line() {
    let (_root, agents, id, listener) = place();
    let server = async {
        let mut stream = connected(&listener).await;
        stream.write_all(b"OK 1073").await.unwrap();
        stream.write_all(b"741824\n").await.unwrap();
        stream
    };

    let (stream, mut served) = tokio::join!(agents.open(&id), server);

    let mut stream = UnixStream::from_std(std::os::unix::net::UnixStream::from(stream.unwrap())).unwrap();
    served.write_all(b"x").await.unwrap();
    assert_eq!(stream.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn a_guest_that_speaks_first_or_never_ends_its_line_is_refused() {
    for said in [&b"OK 1\nextra"[..], &[b'O'; 64], b"NO\n", b""] {
        let (_root, agents, id, listener) = place();
        let server = async {
            let mut stream = connected(&listener).await;
            stream.write_all(said).await.unwrap();
            stream.shutdown().await.unwrap();
        };

        let (stream, ()) = tokio::join!(agents.open(&id), server);

        assert!(matches!(stream, Err(Error::GuestUnreachable(_))), "{said:?}");
    }
}

#[tokio::test]
async fn a_port_is_reached_through_the_agent_and_refused_when_nothing_listens() {
    let (_root, agents, id, listener) = place();
    let program = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = program.local_addr().unwrap().port();
    tokio::spawn(async move {
        let agent = Agent::new(Inert, None);
        loop {
            let mut stream = connected(&listener).await;
            stream.write_all(b"OK 1\n").await.unwrap();
            tokio::spawn(serve(stream, Arc::clone(&agent)));
        }
    });

    let (opened, accepted) = tokio::join!(agents.forward(&id, port), program.accept());
    let (stream, first) = opened.unwrap();
    let mut near = UnixStream::from_std(std::os::unix::net::UnixStream::from(stream)).unwrap();
    let mut far = accepted.unwrap().0;
    far.write_all(b"220 ready").await.unwrap();
    let mut said = vec![0; 9 - first.len()];
    near.read_exact(&mut said).await.unwrap();
    near.write_u8(b'?').await.unwrap();

    assert_eq!([first, said].concat(), b"220 ready");
    assert_eq!(far.read_u8().await.unwrap(), b'?');
    drop(program);
    assert!(matches!(agents.forward(&id, port).await, Err(Error::Refused(_))));
}

#[tokio::test]
async fn a_connection_that_is_closed_at_first_is_tried_again() {
    let (_root, agents, id, listener) = place();
    let tries = tokio::spawn(async move {
        let mut count = 0;
        loop {
            drop(connected(&listener).await);
            count += 1;
            if count == 3 {
                return count;
            }
        }
    });

    let limit = Instant::now() + Duration::from_millis(900);
    let answer = agents.identify(&id, &nobody(), limit).await;

    assert!(matches!(answer, Err(Error::GuestUnreachable(_))), "fails closed: {answer:?}");
    assert_eq!(tries.await.unwrap(), 3);
}

#[tokio::test]
async fn beside_a_connection_that_is_never_answered_another_one_is() {
    let (_root, agents, id, listener) = place();
    let guest = tokio::spawn(async move {
        let mut lost = connected(&listener).await;
        lost.write_all(b"OK 1\n").await.unwrap();
        let mut second = connected(&listener).await;
        second.write_all(b"OK 2\n").await.unwrap();
        let mut said = [0; 4096];
        let mut still_there = || match lost.try_read(&mut said) {
            Ok(count) => count > 0,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        let waits = still_there() && still_there();
        let _ = serve(second, Agent::new(Inert, None)).await;
        waits
    });

    let answer = agents.identify(&id, &nobody(), Instant::now() + Duration::from_secs(20)).await;

    answer.unwrap();
    assert!(guest.await.unwrap(), "the first connection was given up, and its guest may only be slow");
}

#[tokio::test]
async fn a_slow_guest_answers_its_first_connection() {
    let (_root, agents, id, listener) = place();
    tokio::spawn(async move {
        let mut slow = connected(&listener).await;
        slow.write_all(b"OK 1\n").await.unwrap();
        let mut second = connected(&listener).await;
        second.write_all(b"OK 2\n").await.unwrap();
        let _ = serve(slow, Agent::new(Inert, None)).await;
        drop(second);
    });

    agents.identify(&id, &nobody(), Instant::now() + Duration::from_secs(20)).await.unwrap();
}

#[tokio::test]
async fn a_silent_guest_is_given_up_at_the_deadline() {
    let (_root, agents, id, _listener) = place();
    let start = Instant::now();

    let answer = agents.identify(&id, &nobody(), start + Duration::from_millis(300)).await;

    assert!(matches!(answer, Err(Error::GuestUnreachable(_))));
    assert!(start.elapsed() < Duration::from_secs(3));
}

#[test]
fn identities_differ_and_have_their_form() {
    let id = SandboxId::random();
    let who =
        Identification { machine_id: Some(machine_id()), env: Default::default(), workdir: "/srv".into() };

    let (one, two) = (identity(&id, &who), identity(&id, &who));

    assert_eq!(one.defaults.unwrap().workdir, "/srv");
    assert_ne!(one.entropy, two.entropy);
    assert_eq!(one.entropy.len(), 128);
    let (one, two) = (one.unique.unwrap(), two.unique.unwrap());
    assert_eq!(one.machine_id, two.machine_id);
    assert_ne!(one.boot_id, two.boot_id);
    let lengths: Vec<_> = one.boot_id.split('-').map(str::len).collect();
    assert_eq!(lengths, [8, 4, 4, 4, 12]);
    assert_eq!(&one.boot_id[14..15], "4");
    assert_eq!(one.hostname, format!("sb-{}", &id.as_str()[..12]));
}
