//! One request over one connection, with hyper's own server as the program in the guest.
#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty, Full, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use pandastack_proxy::{
    Refusal, Streamed,
    exchange::{Lease, exchange},
    headers::Forwarded,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_util::sync::CancellationToken;

type Reply = Response<BoxBody<Bytes, Infallible>>;

fn to() -> Forwarded {
    Forwarded {
        guest: "10.200.0.2:3000".into(),
        host: "3000-x.preview.test".into(),
        scheme: "http",
        prefix: String::new(),
        peer: None,
        sandbox: "x".into(),
    }
}

fn lease() -> Lease {
    Lease { cut: CancellationToken::new(), held: Box::new(()) }
}

fn full(bytes: impl Into<Bytes>) -> BoxBody<Bytes, Infallible> {
    Full::new(bytes.into()).boxed()
}

/// A program behind a port; answers with the near end of the connection to it.
fn program<F, Fut>(service: F) -> DuplexStream
where
    F: Fn(Request<Incoming>) -> Fut + Send + Sync + Clone + 'static,
    Fut: Future<Output = Reply> + Send + 'static,
{
    let (near, far) = duplex(64 << 10);
    tokio::spawn(async move {
        let service = service_fn(move |request| {
            let answer = service(request);
            async move { Ok::<_, Infallible>(answer.await) }
        });
        http1::Builder::new().serve_connection(TokioIo::new(far), service).with_upgrades().await
    });
    near
}

/// A program that says these bytes to whatever it is asked.
fn raw(answer: impl Into<Vec<u8>>) -> DuplexStream {
    let (near, mut far) = duplex(1 << 20);
    let answer = answer.into();
    tokio::spawn(async move {
        let _ = far.read(&mut [0; 1024]).await;
        let _ = far.write_all(&answer).await;
    });
    near
}

async fn ask(stream: DuplexStream, request: Request<Full<Bytes>>) -> Result<Response<Streamed>, Refusal> {
    exchange(stream, request, None, &to(), lease()).await
}

fn get(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).body(Full::default()).unwrap()
}

#[tokio::test]
async fn bodies_pass_both_ways_with_their_lengths() {
    let echo = |request: Request<Incoming>| async move {
        let (head, body) = request.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        let said = format!(
            "{} {} {:?} {:?} {}",
            head.method,
            head.uri,
            head.headers.get("content-length"),
            head.headers.get("transfer-encoding"),
            body.len()
        );
        Response::builder().header("x-said", said).body(full(body)).unwrap()
    };
    let big: Bytes = (0..3 << 20).map(|i: u32| i as u8).collect::<Vec<u8>>().into();

    let sized = Request::put("/a/../b?q=%2f")
        .header("content-length", big.len())
        .body(Full::new(big.clone()))
        .unwrap();
    let answer = ask(program(echo), sized).await.unwrap();
    assert_eq!(answer.headers()["x-said"], format!("PUT /a/../b?q=%2f Some(\"{0}\") None {0}", big.len()));
    assert_eq!(answer.headers()["content-length"], big.len().to_string());
    assert!(answer.into_body().collect().await.unwrap().to_bytes() == big);

    let pieces: Vec<Bytes> = big.chunks(70_000).map(Bytes::copy_from_slice).collect();
    let body =
        StreamBody::new(stream::iter(pieces).map(|piece| Ok::<_, Infallible>(http_body::Frame::data(piece))));
    // A GET with a body of unknown length is rare and allowed.
    let chunked = Request::get("/").header("transfer-encoding", "chunked").body(body).unwrap();
    let answer = exchange(program(echo), chunked, None, &to(), lease()).await.unwrap();
    assert_eq!(answer.headers()["x-said"], format!("GET / None Some(\"chunked\") {}", big.len()));
    assert!(answer.into_body().collect().await.unwrap().to_bytes() == big);
}

#[tokio::test]
async fn answers_without_a_body_have_none() {
    let status = |request: Request<Incoming>| async move {
        let status: u16 = request.uri().path()[1..].parse().unwrap();
        let length = if status == 200 { "5" } else { "0" };
        let body = if request.method() == Method::HEAD || status != 200 { full("") } else { full("12345") };
        let mut answer = Response::builder().status(status);
        if status == 200 {
            answer = answer.header("content-length", length);
        }
        answer.body(body).unwrap()
    };
    let head = Request::head("/200").body(Full::default()).unwrap();
    let answer = ask(program(status), head).await.unwrap();
    assert_eq!(answer.headers()["content-length"], "5");
    assert!(http_body::Body::is_end_stream(answer.body()));
    for path in ["/204", "/304"] {
        let answer = ask(program(status), get(path)).await.unwrap();
        assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty(), "{path}");
    }
}

#[tokio::test]
async fn an_upgrade_becomes_a_tunnel_that_can_be_cut() {
    let upgrading = |mut request: Request<Incoming>| async move {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            let mut buffer = [0; 64];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..read]).await.unwrap();
            }
        });
        let answer =
            Response::builder().status(101).header("connection", "upgrade").header("upgrade", "websocket");
        answer.header("sec-websocket-accept", "x").body(full("")).unwrap()
    };
    // The client's side of a connection that changes its protocol comes from a server of hyper's.
    let cut = CancellationToken::new();
    let (client, server) = duplex(1024);
    let token = cut.clone();
    tokio::spawn(async move {
        let service = service_fn(move |mut request: Request<Incoming>| {
            let client = hyper::upgrade::on(&mut request);
            let lease = Lease { cut: token.clone(), held: Box::new(()) };
            async move { exchange(program(upgrading), request, Some(client), &to(), lease).await }
        });
        http1::Builder::new().serve_connection(TokioIo::new(server), service).with_upgrades().await
    });
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await.unwrap();
    tokio::spawn(connection.with_upgrades());
    let request = Request::get("/ws")
        .header("host", "h")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket");
    let answer = sender.send_request(request.body(Empty::<Bytes>::new()).unwrap()).await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["sec-websocket-accept"]),
        (101, &"x".parse().unwrap())
    );
    let mut stream = TokioIo::new(hyper::upgrade::on(answer).await.unwrap());
    for _ in 0..3 {
        stream.write_all(b"hello").await.unwrap();
        let mut back = [0; 5];
        stream.read_exact(&mut back).await.unwrap();
        assert_eq!(&back, b"hello");
    }

    cut.cancel();
    let end =
        tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await.expect("it is cut");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}

#[tokio::test]
async fn nobody_changes_the_protocol_unasked() {
    let answer =
        ask(raw("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n"), get("/"))
            .await;
    assert_eq!(answer.unwrap_err().status, StatusCode::BAD_GATEWAY);
}

#[tokio::test]
async fn what_is_not_an_answer_is_a_502() {
    let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(100_000));
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(500));
    for bad in [
        "",
        "SSH-2.0-OpenSSH_9.9\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        "HTTP/1.1 200 OK\r\nbad header: x\r\n\r\n",
        &long,
        &many,
    ] {
        let refusal = ask(raw(bad), get("/")).await.expect_err(&bad.chars().take(60).collect::<String>());
        assert_eq!(refusal.status, StatusCode::BAD_GATEWAY, "{refusal}");
        assert!(refusal.message.starts_with("upstream: "), "{refusal}");
    }
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_not_taken_for_whole() {
    for part in [
        "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        let answer = ask(raw(part), get("/")).await.unwrap();
        assert!(answer.into_body().collect().await.is_err(), "{part}");
    }
    let answer = ask(raw("HTTP/1.0 200 OK\r\n\r\nabc"), get("/")).await.unwrap();
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "abc");
}

/// A body without end that counts what was taken of it.
fn endless(taken: Arc<AtomicUsize>) -> BoxBody<Bytes, Infallible> {
    let piece = Bytes::from(vec![b'x'; 16 << 10]);
    let pieces = stream::repeat_with(move || {
        taken.fetch_add(1, Ordering::Relaxed);
        Ok::<_, Infallible>(http_body::Frame::data(piece.clone()))
    });
    BodyExt::boxed(StreamBody::new(pieces))
}

async fn settled(count: &AtomicUsize) -> usize {
    let mut before = usize::MAX;
    loop {
        let now = count.load(Ordering::Relaxed);
        if now == before {
            return now;
        }
        before = now;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test]
async fn a_slow_reader_slows_the_program_and_holds_little() {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let service = move |_| {
        let body = endless(Arc::clone(&count));
        async move { Response::new(body) }
    };
    let mut answer = ask(program(service), get("/")).await.unwrap().into_body();

    let at_rest = settled(&taken).await;
    assert!(at_rest * (16 << 10) < 2 << 20, "{at_rest} pieces wait");
    for _ in 0..200 {
        answer.frame().await.unwrap().unwrap();
    }
    assert!(settled(&taken).await > at_rest);

    // And a client that goes ends it.
    drop(answer);
    let end = settled(&taken).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(taken.load(Ordering::Relaxed), end);
}

#[tokio::test]
async fn an_upload_waits_for_a_program_that_does_not_read() {
    let taken = Arc::new(AtomicUsize::new(0));
    let request =
        Request::post("/").header("transfer-encoding", "chunked").body(endless(Arc::clone(&taken))).unwrap();
    let (near, _far) = duplex(64 << 10);
    let sent = tokio::spawn(async move { exchange(near, request, None, &to(), lease()).await });
    let at_rest = settled(&taken).await;
    assert!(at_rest > 0 && at_rest * (16 << 10) < 2 << 20, "{at_rest} pieces wait");
    sent.abort();
}

#[tokio::test]
async fn a_download_is_cut_on_demand_also_under_a_reader_who_stopped() {
    let service = |_| async { Response::new(endless(Arc::default())) };
    let cut = CancellationToken::new();
    let lease = Lease { cut: cut.clone(), held: Box::new(()) };
    let mut answer = exchange(program(service), get("/"), None, &to(), lease).await.unwrap().into_body();
    answer.frame().await.unwrap().unwrap();
    cut.cancel();
    let rest = tokio::time::timeout(Duration::from_secs(5), answer.collect()).await.expect("it is cut");
    assert!(rest.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_program_that_never_answers_is_given_up() {
    let (near, _far) = duplex(1024);
    let refusal = ask(near, get("/")).await.unwrap_err();
    assert_eq!(refusal.status, StatusCode::GATEWAY_TIMEOUT);
    assert!(!refusal.message.contains("timeout"), "{refusal}");
}

#[tokio::test]
async fn trailing_headers_and_late_hints_do_no_harm() {
    let answer = ask(
        raw("HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nconnection: x-hop\r\nx-hop: 1\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx-trailer: 1\r\n\r\n"),
        get("/"),
    )
    .await
    .unwrap();
    assert!(
        !answer.headers().contains_key("x-hop") && !answer.headers().contains_key(header::TRANSFER_ENCODING)
    );
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "a");
}
