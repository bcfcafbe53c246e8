//! The forwarder between a guest and a resolver, all of them on the loopback interface.

use std::net::SocketAddr;

use super::*;

fn question(id: u16) -> Vec<u8> {
    let mut bytes = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1];
    bytes[..2].copy_from_slice(&id.to_be_bytes());
    bytes
}

fn answered(mut question: Vec<u8>, padding: usize) -> Vec<u8> {
    question[2] |= 0x80;
    question.resize(question.len() + padding, 0x5a);
    question
}

/// A resolver on one port of both kinds. Over UDP it sends two forgeries before its answer; over TCP the answer is
/// larger than a datagram may be. The first `silent` questions over UDP get none.
async fn resolver(mut silent: usize) -> SocketAddr {
    let (udp, tcp) = bind_both("127.0.0.1:0".parse().expect("an address")).await.expect("bound");
    let address = udp.local_addr().expect("an address");
    tokio::spawn(async move {
        let mut buffer = vec![0; DATAGRAM];
        while let Ok((length, source)) = udp.recv_from(&mut buffer).await {
            if silent > 0 {
                silent -= 1;
                continue;
            }
            let asked = buffer[..length].to_vec();
            let mut other_id = answered(asked.clone(), 1);
            other_id[0] ^= 0xff;
            let mut other_name = answered(asked.clone(), 2);
            other_name[13] = b'b';
            for reply in [other_id, other_name, answered(asked, 10)] {
                udp.send_to(&reply, source).await.expect("sent");
            }
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let asked = read_message(&mut stream, DATAGRAM).await.expect("a question");
            write_message(&mut stream, &answered(asked, 10_000)).await.expect("answered");
        }
    });
    address
}

async fn forwarder(upstream: Option<SocketAddr>, change: impl FnOnce(&mut Config)) -> SocketAddr {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("resolv.conf");
    let text = upstream.map_or(String::new(), |upstream| format!("nameserver {}\n", upstream.ip()));
    std::fs::write(&file, text).expect("written");
    let mut config = Config {
        listen: "127.0.0.1:0".parse().expect("an address"),
        resolvers: vec![file],
        port: upstream.map_or(53, |upstream| upstream.port()),
        patience: Duration::from_millis(500),
        idle: Duration::from_millis(500),
        ..Config::default()
    };
    change(&mut config);
    let forwarder = Forwarder::bind(config).await.expect("bound");
    let address = forwarder.address().expect("an address");
    tokio::spawn(async move {
        forwarder.serve().await;
        drop(directory);
    });
    address
}

async fn guest(forwarder: SocketAddr) -> UdpSocket {
    let socket = UdpSocket::bind("127.0.0.1:0").await.expect("bound");
    socket.connect(forwarder).await.expect("connected");
    socket
}

async fn receive(socket: &UdpSocket, limit: Duration) -> Option<Vec<u8>> {
    let mut buffer = vec![0; DATAGRAM];
    let length = timeout(limit, socket.recv(&mut buffer)).await.ok()?.expect("received");
    Some(buffer[..length].to_vec())
}

#[tokio::test]
async fn a_datagram_gets_the_true_answer_under_its_own_number() {
    let socket = guest(forwarder(Some(resolver(0).await), |_| {}).await).await;

    socket.send(&question(0xbeef)).await.expect("sent");

    let answer = receive(&socket, Duration::from_secs(5)).await.expect("an answer");
    assert_eq!(answer, answered(question(0xbeef), 10));
}

#[tokio::test]
async fn a_connection_carries_several_questions_and_long_answers() {
    let address = forwarder(Some(resolver(0).await), |_| {}).await;
    let mut stream = TcpStream::connect(address).await.expect("connected");

    for id in [1, 2, 3] {
        write_message(&mut stream, &question(id)).await.expect("asked");
        let answer = read_message(&mut stream, 65535).await.expect("an answer");
        assert_eq!(answer, answered(question(id), 10_000));
    }
}

#[tokio::test]
async fn silence_becomes_server_failure() {
    for upstream in [None, Some(resolver(usize::MAX).await)] {
        let socket = guest(forwarder(upstream, |_| {}).await).await;

        socket.send(&question(5)).await.expect("sent");

        let answer = receive(&socket, Duration::from_secs(5)).await.expect("an answer");
        assert_eq!(answer[..4], [0, 5, 0x81, 0x82], "{upstream:?}");
    }
}

#[tokio::test]
async fn questions_beyond_the_bound_are_dropped_and_the_bound_is_given_back() {
    let upstream = resolver(2).await;
    let socket = guest(forwarder(Some(upstream), |config| config.per_source = 2).await).await;

    for id in 1..=4 {
        socket.send(&question(id)).await.expect("sent");
    }
    let mut failed = 0;
    while let Some(answer) = receive(&socket, Duration::from_secs(1)).await {
        assert_eq!(answer[3] & 0x0f, 2, "the resolver was silent to what came through");
        failed += 1;
    }
    assert_eq!(failed, 2);

    socket.send(&question(9)).await.expect("sent");
    let answer = receive(&socket, Duration::from_secs(5)).await.expect("an answer");
    assert_eq!(answer, answered(question(9), 10));
}

#[tokio::test]
async fn garbage_and_idle_connections_end_without_harm() {
    let address = forwarder(Some(resolver(0).await), |_| {}).await;
    let socket = guest(address).await;
    for garbage in [vec![], vec![0xff; 3], vec![0; 5000], vec![0xff; DATAGRAM], answered(question(1), 0)] {
        socket.send(&garbage).await.expect("sent");
    }
    let mut idle = TcpStream::connect(address).await.expect("connected");
    let mut long = TcpStream::connect(address).await.expect("connected");
    long.write_all(&[0xff, 0xff, 0]).await.expect("sent");

    for stream in [&mut idle, &mut long] {
        let mut rest = Vec::new();
        // A reset is an end, too.
        let ended = timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok() && rest.is_empty());
    }
    socket.send(&question(2)).await.expect("sent");
    let answer = receive(&socket, Duration::from_secs(5)).await.expect("an answer");
    assert_eq!(answer, answered(question(2), 10), "the first thing that is answered is the question");
}

#[test]
fn only_sandboxes_may_ask() {
    let asks = |address: [u8; 4]| may_ask(SocketAddr::from((address, 1000)));
    assert!(asks([10, 200, 0, 2]) && asks([10, 200, 255, 254]));
    assert!(!asks([10, 200, 0, 1]) && !asks([10, 201, 0, 2]) && !asks([198, 51, 100, 1]));
    assert!(!may_ask("[::1]:1000".parse().expect("an address")));
}
