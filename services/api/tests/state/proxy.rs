//! Programs in a sandbox through the API, with the real agent: it connects to ports of this machine.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use crate::{
    client::Api,
    common::{Appliance, TOKEN},
};

/// Tells what it was asked. Changes its protocol to an echo when it is asked to. Counts.
async fn told(
    mut request: Request<Incoming>,
    count: Arc<AtomicUsize>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    count.fetch_add(1, Ordering::Relaxed);
    if request.headers().contains_key("upgrade") {
        let upgrade = hyper::upgrade::on(&mut request);
        tokio::spawn(async move {
            let mut stream = TokioIo::new(upgrade.await.unwrap());
            let mut buffer = [0; 1024];
            while let Ok(read @ 1..) = stream.read(&mut buffer).await {
                stream.write_all(&buffer[..read]).await.unwrap();
            }
        });
        let answer =
            Response::builder().status(101).header("connection", "upgrade").header("upgrade", "websocket");
        return Ok(answer.body(Full::default()).unwrap());
    }
    let headers: serde_json::Map<String, Value> = request
        .headers()
        .iter()
        .map(|(name, value)| (name.to_string(), value.to_str().unwrap().into()))
        .collect();
    let (method, uri) = (request.method().to_string(), request.uri().to_string());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let told =
        json!({"method": method, "uri": uri, "headers": headers, "body": String::from_utf8_lossy(&body)});
    let answer = Response::builder()
        .status(418)
        .header("set-cookie", "a=b; Path=/; Domain=test")
        .header("location", "/next");
    Ok(answer.body(Full::from(told.to_string())).unwrap())
}

/// A program on a port of its own.
async fn program() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::<AtomicUsize>::default();
    let counted = Arc::clone(&count);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let count = Arc::clone(&counted);
            let service = service_fn(move |request| told(request, Arc::clone(&count)));
            tokio::spawn(
                http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades(),
            );
        }
    });
    (port, count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_reaches_the_program_without_the_token() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (id, (port, _)) = (api.sandbox().await, program().await);
    let prefix = format!("/v1/sandboxes/{id}/proxy/{port}");

    let reply = api
        .send(
            "PATCH",
            &format!("{prefix}/a//b/..%2fc?x=1&access_token=pds_x&y=%20"),
            &[("x-pandastack-broker-auth", "Bearer broker"), ("x-forwarded-for", "1.2.3.4")],
            "hello".as_bytes(),
        )
        .await;
    let told = reply.json();
    assert_eq!((reply.status, &told["method"], &told["body"]), (418, &json!("PATCH"), &json!("hello")));
    assert_eq!(told["uri"], "/a//b/..%2fc?x=1&y=%20");
    let headers = &told["headers"];
    assert_eq!(headers["host"], format!("10.200.0.2:{port}"));
    assert_eq!((&headers["authorization"], &headers["x-fcs-sandbox"]), (&json!("Bearer broker"), &json!(id)));
    assert_eq!(
        (&headers["x-forwarded-host"], &headers["x-forwarded-proto"]),
        (&json!("test"), &json!("http"))
    );
    assert_eq!((&headers["x-forwarded-for"], &headers["content-length"]), (&json!("127.0.0.1"), &json!("5")));
    assert!(!told.to_string().contains(TOKEN) && headers.get("x-pandastack-broker-auth").is_none());
    assert_eq!(reply.header("set-cookie"), Some(format!("a=b; Path={prefix}/").as_str()));
    assert_eq!(reply.header("location"), Some(format!("{prefix}/next").as_str()));

    assert_eq!(api.get(&prefix).await.json()["uri"], "/");
    assert_eq!(api.get(&prefix).await.json()["headers"].get("authorization"), None);
    let options = api.send("OPTIONS", &format!("{prefix}/o"), &[], b"").await;
    assert_eq!((options.status, options.json()["method"].clone()), (418, json!("OPTIONS")));
    let ahead = Api::without_token(&appliance)
        .send("OPTIONS", &format!("{prefix}/o"), &[("access-control-request-method", "PUT")], b"")
        .await;
    assert_eq!(ahead.status, 204);
    let head = api.send("HEAD", &format!("{prefix}/h"), &[], b"").await;
    assert_eq!((head.status, head.body.len()), (418, 0));
    assert!(
        appliance.vmm.touched.lock().unwrap().contains(&id) || {
            tokio::time::sleep(Duration::from_secs(2)).await;
            appliance.vmm.touched.lock().unwrap().contains(&id)
        }
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_be_reached_is_told_why() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (id, (port, count)) = (api.sandbox().await, program().await);
    let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let path = |port: &str| format!("/v1/sandboxes/{id}/proxy/{port}/");

    for bad in ["0", "22", "65536", "http", "-1"] {
        assert_eq!(api.get(&path(bad)).await.status, 400, "{bad}");
    }
    let nobody = api.get(&path(&unused.to_string())).await;
    let sentence = nobody.json()["error"].as_str().unwrap().to_owned();
    assert_eq!((nobody.status, sentence), (502, format!("upstream: nothing listens on port {unused}")));
    let (token, _) = appliance.other_workspace().await;
    assert_eq!(Api::with_token(&appliance, &token).get(&path(&port.to_string())).await.status, 404);
    assert_eq!(Api::without_token(&appliance).get(&path(&port.to_string())).await.status, 401);

    api.post(&format!("/v1/sandboxes/{id}/pause"), &json!({})).await;
    let paused = api.get(&path(&port.to_string())).await;
    assert_eq!((paused.status, paused.json()["code"].clone()), (503, json!("not_running")));
    assert!(paused.json()["error"].as_str().unwrap().starts_with("sandbox not running"));
    api.post(&format!("/v1/sandboxes/{id}/resume"), &json!({})).await;

    api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await;
    *appliance.vmm.wake_failure.lock().unwrap() = Some(pandastack_bus::Error::NoCapacity("no memory".into()));
    let asleep = api.get(&path(&port.to_string())).await;
    assert_eq!((asleep.status, asleep.header("retry-after")), (503, Some("5")));
    assert_eq!(asleep.json()["error"], "auto-wake: no memory");
    *appliance.vmm.wake_failure.lock().unwrap() = None;
    assert_eq!(count.load(Ordering::Relaxed), 0);
    assert_eq!(api.get(&path(&port.to_string())).await.status, 418);
    assert_eq!((count.load(Ordering::Relaxed), appliance.vmm.woken.load(Ordering::Relaxed)), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_at_once_are_served() {
    let appliance = Appliance::start().await;
    let api = Arc::new(Api::new(&appliance));
    let (id, (port, count)) = (api.sandbox().await, program().await);
    let mut all = tokio::task::JoinSet::new();
    for number in 0..100 {
        let (api, path) = (Arc::clone(&api), format!("/v1/sandboxes/{id}/proxy/{port}/{number}"));
        all.spawn(async move { api.get(&path).await.json()["uri"] == format!("/{number}") });
    }
    assert!(all.join_all().await.into_iter().all(|right| right));
    assert_eq!(count.load(Ordering::Relaxed), 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_passes_and_ends_with_its_sandbox() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let (id, (port, _)) = (api.sandbox().await, program().await);
    let mut stream = TcpStream::connect(appliance.address).await.unwrap();
    let head = format!(
        "GET /v1/sandboxes/{id}/proxy/{port}/ws?access_token={TOKEN} HTTP/1.1\r\nhost: test\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    let answer = String::from_utf8(answer).unwrap().to_lowercase();
    assert!(answer.starts_with("http/1.1 101") && answer.contains("upgrade: websocket"), "{answer}");
    for size in [1usize, 100_000] {
        let (mut read, mut write) = stream.split();
        let sent = vec![7u8; size];
        let mut back = vec![0; size];
        let (written, got) = tokio::join!(write.write_all(&sent), read.read_exact(&mut back));
        written.unwrap();
        got.unwrap();
        assert!(sent == back);
    }

    api.post(&format!("/v1/sandboxes/{id}/hibernate"), &json!({})).await;
    let end = tokio::time::timeout(Duration::from_secs(5), stream.read(&mut [0; 1])).await.expect("it ends");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}
