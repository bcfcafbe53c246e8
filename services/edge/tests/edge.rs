//! The edge over real sockets, with the real agent as every guest: it connects to ports of this machine.
#![allow(clippy::unwrap_used)]

mod common;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use common::{Edge, ID, program};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use pandastack_bus::{edge::EdgeBackend, vmm::State};
use pandastack_edge::hosts::Mode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, DigitallySignedStruct, SignatureScheme,
        client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        crypto::ring,
        pki_types::{CertificateDer, ServerName, UnixTime},
    },
};

struct Reply {
    status: u16,
    headers: http::HeaderMap,
    text: String,
}

async fn get(edge: &Edge, host: &str, path: &str) -> Reply {
    send(edge, Request::get(path).header("host", host)).await
}

async fn send(edge: &Edge, request: http::request::Builder) -> Reply {
    let stream = TcpStream::connect(edge.address).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let (head, body) =
        sender.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap().into_parts();
    let text = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    Reply { status: head.status.as_u16(), headers: head.headers, text }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_preview_opens_its_port_and_paths_only() {
    let edge = Edge::start("", Mode::Open).await;
    let port = program().await;
    let minted = edge.mint(port, 60, &["/open"]).await;
    let below = |path: &str| format!("/v1/p/{}{path}", minted.token);

    let reply = get(&edge, "edge.test:8081", &below("/open/a%20b?x=1&access_token=pds_1")).await;
    assert_eq!(
        (reply.status, reply.text.lines().next()),
        (200, Some("GET /open/a%20b?x=1")),
        "{}",
        reply.text
    );
    let told = reply.text.to_lowercase();
    assert!(told.contains(&format!("host: 10.200.0.2:{port}")), "{told}");
    assert!(
        told.contains("x-forwarded-host: edge.test:8081") && told.contains("x-forwarded-for: 127.0.0.1"),
        "{told}"
    );
    assert_eq!(reply.headers["set-cookie"], format!("a=b; Path={}", below("/")));
    assert!(!reply.headers.contains_key("service-worker-allowed"));

    let forbidden = get(&edge, "edge.test", &below("/open/%2e%2e/x")).await;
    let body: serde_json::Value = serde_json::from_str(&forbidden.text).unwrap();
    assert_eq!((forbidden.status, &body["error"]), (403, &"preview path not in token ACL".into()));
    assert_eq!(
        (&body["requested"], &body["allowed_paths"]),
        (&"/open/%2e%2e/x".into(), &serde_json::json!(["/open"]))
    );
    for (path, status) in
        [("/v1/p/", 400), ("/v1/p/x.y/", 401), ("/", 404), ("/healthz", 200), ("/v1/sandboxes", 404)]
    {
        assert_eq!(get(&edge, "edge.test", path).await.status, status, "{path}");
    }
    let all = edge.mint(port, 60, &[]).await;
    let moved = get(&edge, "edge.test", &format!("/v1/p/{}?a=b", all.token)).await;
    assert_eq!(
        (moved.status, moved.headers["location"].to_str().unwrap()),
        (307, format!("/v1/p/{}/?a=b", all.token).as_str())
    );
    let with_token = Request::get(format!("/v1/p/{}/", all.token))
        .header("host", "h")
        .header("authorization", "Bearer pds_0");
    assert!(!send(&edge, with_token).await.text.contains("pds_0"), "a token of the API is not passed on");
    let of_app = Request::get(format!("/v1/p/{}/", all.token))
        .header("host", "h")
        .header("authorization", "Bearer app");
    assert!(send(&edge, of_app).await.text.contains("Bearer app"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_revoked_or_foreign_token_opens_nothing() {
    let edge = Edge::start("", Mode::Open).await;
    let port = program().await;
    let (short, long) = (edge.mint(port, 1, &[]).await, edge.mint(port, 60, &[]).await);
    let status = async |token: &str| get(&edge, "h", &format!("/v1/p/{token}/")).await.status;
    assert_eq!(status(&long.token).await, 200);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!((status(&short.token).await, status(&long.token).await), (401, 200));

    assert!(!edge.backend.revoke("other".into(), ID.into(), long.info.id.clone()).await.unwrap());
    assert!(edge.backend.revoke("default".into(), ID.into(), long.info.id.clone()).await.unwrap());
    assert_eq!(status(&long.token).await, 401);

    let moved = edge.mint(port, 60, &[]).await;
    edge.vmm.info.lock().unwrap().workspace = "other".into();
    tokio::time::sleep(pandastack_edge::sandboxes::GOOD_FOR).await;
    assert_eq!(status(&moved.token).await, 404, "the sandbox is not the workspace's that made it");
}

/// What a client trusts here: any certificate whose signature is right. Only names and trust are not looked at.
#[derive(Debug)]
struct Trusting;

impl ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &ring::default_provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

async fn secure(edge: &Edge, protocol: &[u8]) -> tokio_rustls::client::TlsStream<TcpStream> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Trusting))
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(edge.secure).await.unwrap();
    let name = ServerName::try_from("edge.test").unwrap();
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol));
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_speaks_both_versions_and_the_guest_is_told() {
    let edge = Edge::start("", Mode::Open).await;
    let minted = edge.mint(program().await, 60, &[]).await;
    let path = format!("/v1/p/{}/x", minted.token);

    let one = TokioIo::new(secure(&edge, b"http/1.1").await);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(one).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get(&path).header("host", "edge.test").body(Full::<Bytes>::default()).unwrap();
    let told = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&told).contains("x-forwarded-proto: https"));

    let two = TokioIo::new(secure(&edge, b"h2").await);
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), two).await.unwrap();
    tokio::spawn(connection);
    let request = Request::get(format!("https://edge.test{path}")).body(Full::<Bytes>::default()).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    assert_eq!((answer.status().as_u16(), answer.version()), (200, http::Version::HTTP_2));
    let told = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&told).contains("x-forwarded-host: edge.test"));
}

async fn websocket(edge: &Edge, host: &str, path: &str) -> TcpStream {
    let mut stream = TcpStream::connect(edge.address).await.unwrap();
    let head =
        format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&answer));
    stream.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello");
    stream
}

async fn ends(mut stream: TcpStream) {
    let mut rest = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
    assert!(end.is_ok(), "it is not cut; {} bytes more", rest.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_and_expiring_cut_what_is_under_way() {
    let edge = Edge::start("", Mode::Open).await;
    let port = program().await;
    let (revoked, expiring, kept) =
        (edge.mint(port, 60, &[]).await, edge.mint(port, 3, &[]).await, edge.mint(port, 60, &[]).await);
    let path = |token: &str, below: &str| format!("/v1/p/{token}/{below}");
    let socket = websocket(&edge, "h", &path(&revoked.token, "ws")).await;
    let mut download = TcpStream::connect(edge.address).await.unwrap();
    let head = format!("GET {} HTTP/1.1\r\nhost: h\r\n\r\n", path(&revoked.token, "endless"));
    download.write_all(head.as_bytes()).await.unwrap();
    download.read_exact(&mut [0; 100_000]).await.unwrap();
    let short = websocket(&edge, "h", &path(&expiring.token, "ws")).await;
    let mut other = websocket(&edge, "h", &path(&kept.token, "ws")).await;
    assert_eq!(edge.backend.connections().await.unwrap(), 4);

    assert!(edge.backend.revoke(String::new(), String::new(), revoked.token.clone()).await.unwrap());
    ends(socket).await;
    ends(download).await;
    ends(short).await;
    other.write_all(b"still").await.unwrap();
    other.read_exact(&mut [0; 5]).await.unwrap();
    assert!(edge.vmm.touched.lock().unwrap().iter().any(|id| id == ID), "its sandbox is in use");
    drop(other);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_leads_into_a_sandbox_that_is_captured_or_goes_is_cut() {
    let edge = Edge::start("", Mode::Open).await;
    let path = format!("/v1/p/{}/ws", edge.mint(program().await, 60, &[]).await.token);

    let one = websocket(&edge, "h", &path).await;
    edge.changed("running").await;
    edge.capture().await;
    ends(one).await;

    for state in ["hibernated", "failed", ""] {
        let another = websocket(&edge, "h", &path).await;
        edge.changed(state).await;
        ends(another).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn host_names_open_what_the_operator_allows() {
    let port = program().await;
    let host = format!("{port}-{ID}.preview.test");
    let off = Edge::start("", Mode::Open).await;
    assert_eq!(get(&off, &host, "/").await.status, 404);

    let open = Edge::start("preview.test", Mode::Open).await;
    let reply = get(&open, &host.to_uppercase(), "/v1/p/x/?access_token=app").await;
    assert_eq!((reply.status, reply.text.lines().next()), (200, Some("GET /v1/p/x/?access_token=app")));
    assert_eq!(reply.headers["set-cookie"], "a=b; Path=/", "an origin of its own");
    drop(websocket(&open, &host, "/ws").await);
    for unknown in [
        format!("{port}-{}.preview.test", "z".repeat(20)),
        "x.preview.test".to_owned(),
        format!("22-{ID}.preview.test"),
    ] {
        assert_eq!(get(&open, &unknown, "/").await.status, 404, "{unknown}");
    }

    let named = Edge::start("preview.test", Mode::Named).await;
    assert_eq!(get(&named, &host, "/").await.status, 404);
    named.vmm.info.lock().unwrap().metadata.insert(format!("port.{port}"), "web".into());
    tokio::time::sleep(pandastack_edge::sandboxes::GOOD_FOR).await;
    assert_eq!(get(&named, &host, "/").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sleeping_sandbox_is_woken_and_the_request_waits() {
    let edge = Edge::start("", Mode::Open).await;
    let minted = edge.mint(program().await, 60, &[]).await;
    edge.vmm.info.lock().unwrap().state = State::Hibernated;
    let mut all = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (address, path) = (edge.address, format!("/v1/p/{}/", minted.token));
        all.spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream
                .write_all(format!("GET {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").as_bytes())
                .await
                .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            answer.starts_with("HTTP/1.1 200")
        });
    }
    assert!(all.join_all().await.into_iter().all(|right| right));

    edge.vmm.info.lock().unwrap().state = State::Paused;
    let paused = get(&edge, "h", &format!("/v1/p/{}/", minted.token)).await;
    assert_eq!(paused.status, 503);
    assert!(paused.text.contains("sandbox not running"), "{}", paused.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_is_served_and_heads_are_bounded() {
    let edge = Edge::start("", Mode::Open).await;
    let minted = edge.mint(program().await, 60, &[]).await;
    let stream = TcpStream::connect(edge.address).await.unwrap();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let uri = format!("http://edge.test/v1/p/{}/two", minted.token);
    let answer =
        sender.send_request(Request::get(uri).body(Full::<Bytes>::default()).unwrap()).await.unwrap();
    assert_eq!(answer.status().as_u16(), 200);
    let text = String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap();
    assert!(text.starts_with("GET /two\n") && text.contains("x-forwarded-host: edge.test"), "{text}");

    let huge = Request::get("/healthz").header("host", "h").header("x", "y".repeat(100 << 10));
    assert_eq!(send(&edge, huge).await.status, 431);
}
