//! Everything else that a host asks, and what is no request.

use pandastack_protocol::*;
use tokio::io::AsyncWriteExt;

use crate::world::*;

#[tokio::test]
async fn forwarding() {
    let world = World::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.expect("copied");
    });
    let (mut stream, rest) = world.client().await.forward(port, LIMIT).await.expect("connected");
    assert!(rest.is_empty());
    stream.write_all(b"echo").await.expect("written");
    stream.shutdown().await.expect("half closed");
    let mut back = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut back).await.expect("read");
    assert_eq!(back, "echo");
    let unused =
        std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("an address").port();
    assert_eq!(code(world.client().await.forward(unused, LIMIT).await.map(|(_, rest)| rest)), Code::Refused);
}

#[tokio::test]
async fn control() {
    let world = World::new();
    let mut client = world.client().await;
    for request in [Request::Sync {}, Request::GrowRoot {}, Request::Shutdown {}] {
        let () = client.call(&request, LIMIT).await.expect("done");
    }
    until("shutting down", || *world.machine.0.lock().expect("lock") == ["grow", "shut down"]).await;
}

#[tokio::test]
async fn only_volumes_are_mounted_and_only_below_mnt() {
    let world = World::new();
    let mut client = world.client().await;
    let mount = |device: &str, path: &str| Mount {
        device: device.to_owned(),
        path: path.to_owned(),
        read_only: false,
    };
    let good = [mount("vdb", "/mnt/data"), mount("vdz", "/mnt/more/of it")];
    let () = client.call(&Request::Mount { mounts: good.to_vec() }, LIMIT).await.expect("mounted");
    let bad_devices = ["", "vda", "vdB", "vd", "vdbc", "sdb", "/dev/vdb", "../vdb", "vd\0"];
    let bad_paths = [
        "",
        "mnt/a",
        "/mnt",
        "/mnt/",
        "/mnt//a",
        "/mnt/a/",
        "/mnt/./a",
        "/mnt/../etc",
        "/mnt/a/..",
        "/etc",
        "/mnta",
        "/mnt/a\0",
    ];
    let bad = bad_devices.map(|device| mount(device, "/mnt/x"));
    let bad = bad.into_iter().chain(bad_paths.map(|path| mount("vdc", path)));
    let twice = [mount("vdb", "/mnt/x"), mount("vdx", "/mnt/data")];
    for wrong in bad.chain(twice) {
        let mounts = vec![good[0].clone(), wrong.clone()];
        assert_eq!(
            code(client.call::<()>(&Request::Mount { mounts }, LIMIT).await),
            Code::Invalid,
            "{wrong:?}"
        );
    }
    assert_eq!(*world.machine.0.lock().expect("lock"), ["mount 2"]);
}

#[tokio::test]
async fn a_request_may_come_along_with_the_greeting() {
    let world = World::new();
    let request = Request::Health {};
    let (mut client, health): (_, Health) =
        Client::greet_and_call(world.raw(), 7, &request, LIMIT).await.expect("both answers");
    assert_eq!((client.hello.nonce, health.sessions), (7, 0));
    let () = client.call(&Request::GrowRoot {}, LIMIT).await.expect("the connection goes on");
    let missing = Request::Kill { session: id() };
    assert_eq!(
        code(Client::greet_and_call::<()>(world.raw(), 7, &missing, LIMIT).await.map(drop)),
        Code::NotFound
    );

    // The agent also answers a host that waits for its greeting, and one that sends it in pieces.
    let mut stream = world.raw();
    let mut out = bytes::BytesMut::new();
    encode(Kind::Hello, br#"{"proto":1,"nonce":7}"#, &mut out);
    encode(Kind::Request, br#"{"op":"health"}"#, &mut out);
    for piece in out.chunks(7) {
        stream.write_all(piece).await.expect("written");
        tokio::task::yield_now().await;
    }
    let (mut decoder, mut kinds) = (Decoder::new(), Vec::new());
    while kinds.len() < 2 {
        assert!(tokio::io::AsyncReadExt::read_buf(&mut stream, decoder.buffer()).await.expect("read") > 0);
        while let Some(frame) = decoder.next_frame().expect("frames") {
            kinds.push(frame.kind);
        }
    }
    assert_eq!(kinds, [Kind::Hello, Kind::Done]);
}

#[tokio::test]
async fn garbage_ends_a_connection_and_nothing_else() {
    use tokio::io::AsyncReadExt;
    let world = World::new();
    let hello = serde_json::to_vec(&Hello { proto: 1, nonce: 1, agent: String::new() }).expect("JSON");
    let mut greeting = bytes::BytesMut::new();
    encode(Kind::Hello, &hello, &mut greeting);
    let mut old = bytes::BytesMut::new();
    encode(Kind::Hello, br#"{"proto":0,"nonce":1}"#, &mut old);
    let too_long = [2, 255, 255, 255, 255];
    for bytes in
        [&[0xff; 4096][..], b"GET / HTTP/1.1\r\n\r\n", &too_long, &old, &[&greeting[..], &too_long].concat()]
    {
        let mut stream = world.raw();
        stream.write_all(bytes).await.expect("written");
        stream.shutdown().await.expect("half closed");
        let mut answer = Vec::new();
        tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("in time").expect("closed");
    }
    // Requests that do not parse are answered, and the connection goes on.
    let mut stream = world.raw();
    let mut out = greeting.clone();
    encode(Kind::Request, b"{", &mut out);
    encode(Kind::Request, br#"{"op":"of_the_future"}"#, &mut out);
    encode(Kind::Ack, b"left over", &mut out);
    encode(Kind::Request, br#"{"op":"health","later":1}"#, &mut out);
    stream.write_all(&out).await.expect("written");
    let mut decoder = Decoder::new();
    let mut answers = Vec::new();
    while answers.len() < 4 {
        assert!(stream.read_buf(decoder.buffer()).await.expect("read") > 0);
        while let Some(frame) = decoder.next_frame().expect("frames") {
            answers.push(frame);
        }
    }
    let failure = |frame: &Frame| serde_json::from_slice::<Failure>(&frame.payload).expect("a failure").code;
    assert_eq!((failure(&answers[1]), failure(&answers[2])), (Code::Invalid, Code::Unsupported));
    assert_eq!(answers[3].kind, Kind::Done);
    assert_eq!(world.sh("echo still here").await.out(), "still here\n");
}
