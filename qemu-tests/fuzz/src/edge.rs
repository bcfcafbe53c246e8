//! What anybody sends to the edge: raw bytes on its socket, and its parsers by themselves.
//!
//! The first byte says which gets the rest. In raw bytes `{TOKEN}` stands for a token that is good and `{HOST}` for a host name that is
//! one, so that what lies behind those is reached. The sandbox has failed: nothing is ever passed on, and no port of this machine
//! is touched. Every answer is a well-formed one below 500, or says when to come again.

use std::{
    cell::LazyCell,
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, header, request};
use pandastack_bus::vmm::State;
use pandastack_edge::{
    hosts::{self, Host, Mode},
    listener,
    router::Client,
    token::{Key, public_name},
};
use pandastack_proxy::{
    headers::{self, Forwarded},
    origin,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::{Builder, Runtime},
};

use crate::edge_common::{Edge, ID};

const SUFFIX: &str = "preview.test";
/// An answer that takes longer is a hang: nothing waits for anybody here.
const LIMIT: Duration = Duration::from_secs(10);

struct Bench {
    runtime: Runtime,
    edge: Edge,
    token: String,
    host: String,
}

thread_local! {
    static BENCH: LazyCell<Bench> = LazyCell::new(Bench::new);
}

impl Bench {
    fn new() -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        let (edge, token) = runtime.block_on(async {
            let edge = Edge::start(SUFFIX, Mode::Open).await;
            let token = edge.mint(3000, 600_000, &["/open"]).await.token;
            (edge, token)
        });
        edge.vmm.info.lock().expect("nobody panicked").state = State::Failed;
        Self { runtime, edge, token, host: format!("3000-{ID}.{SUFFIX}") }
    }
}

/// Reads an input.
pub fn run(input: &[u8]) {
    let Some((which, bytes)) = input.split_first() else { return };
    match which % 4 {
        0 | 1 => BENCH.with(|bench| raw(bench, bytes)),
        2 => names(&String::from_utf8_lossy(bytes)),
        _ => heads(bytes),
    }
}

fn replace(bytes: &[u8], what: &[u8], with: &[u8]) -> Vec<u8> {
    let mut all = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some(at) = rest.windows(what.len()).position(|window| window == what) {
        all.extend_from_slice(&rest[..at]);
        all.extend_from_slice(with);
        rest = &rest[at + what.len()..];
    }
    all.extend_from_slice(rest);
    all
}

/// Bytes on a connection, and the end of them.
fn raw(bench: &Bench, bytes: &[u8]) {
    let bytes = replace(bytes, b"{TOKEN}", bench.token.as_bytes());
    let bytes = replace(&bytes, b"{HOST}", bench.host.as_bytes());
    let answer = bench.runtime.block_on(async {
        let (mut near, far) = tokio::io::duplex(1 << 20);
        let client = Client { peer: IpAddr::V4(Ipv4Addr::LOCALHOST), scheme: "http" };
        let asked = Arc::new(AtomicBool::new(false));
        let served = tokio::spawn(listener::http(far, Arc::clone(&bench.edge.router), client, asked));
        let mut answer = Vec::new();
        let exchange = async {
            let _ = near.write_all(&bytes).await;
            let _ = near.shutdown().await;
            let _ = near.read_to_end(&mut answer).await;
            drop(near);
            served.await
        };
        let ended = tokio::time::timeout(LIMIT, exchange).await.expect("the edge hangs");
        if let Err(error) = ended {
            assert!(!error.is_panic(), "the edge panics: {error}");
        }
        answer
    });
    answered(&answer);
}

/// The first answer of HTTP/1.
fn answered(answer: &[u8]) {
    let Some(line) = answer.strip_prefix(b"HTTP/1.") else { return };
    let status: u16 = line
        .get(2..5)
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
        .expect("an answer has a status");
    let text = String::from_utf8_lossy(answer);
    // 503 is the failed sandbox's.
    assert!(status < 500 || status == 503, "{text}");
    assert!(!text.contains("x-fcs-sandbox"), "{text}");
}

/// Host names, tokens and the paths they allow.
fn names(text: &str) {
    let suffix = hosts::suffix(text);
    if let Some(suffix) = &suffix {
        assert_eq!(hosts::suffix(suffix).as_ref(), Some(suffix), "a suffix is one again");
    }
    for suffix in ["", SUFFIX, suffix.as_deref().unwrap_or("x")] {
        if let Host::Preview(sandbox, port) = hosts::parse(text, suffix) {
            let again = format!("{port}-{sandbox}.{suffix}");
            assert_eq!(hosts::parse(&again, suffix), Host::Preview(sandbox, port));
            assert!(port != 0 && port != 22 && !suffix.is_empty());
        }
    }
    let (one, other) = text
        .split_at(text.len() / 2 + (0..4).find(|n| text.is_char_boundary(text.len() / 2 + n)).unwrap_or(0));
    BENCH.with(|bench| {
        let key = Key::from_bytes(&[7; 32]).expect("a key");
        assert_eq!(key.verify(text), None, "nobody guesses a token");
        assert_eq!(public_name(text).len(), 16);
        let (claim, _) = bench.edge.router.previews.check(&bench.token, 0).expect("the good token");
        if claim.allows(text) {
            let path = percent_decoded(text);
            assert!(path == "/open" || path.starts_with("/open/"), "{text:?} is allowed");
            assert!(
                !path.contains("..//") && !path.split('/').any(|part| part == ".."),
                "{text:?} is allowed"
            );
        }
        let mixed = format!("{one}{}{other}", bench.token);
        if mixed != bench.token {
            assert!(bench.edge.router.previews.check(&mixed, 0).is_none(), "{mixed}");
        }
    });
}

fn percent_decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let code = (*first == b'%')
            .then(|| {
                after.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok())
            })
            .flatten();
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// `name: value` lines as the head of a request and of an answer on their way through.
fn heads(bytes: &[u8]) {
    let Some((flags, bytes)) = bytes.split_first() else { return };
    let mut all = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n').take(200) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = line[colon + 1..].trim_ascii();
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(value))
        {
            all.append(name, value);
        }
    }
    let to = Forwarded {
        guest: "10.200.0.2:3000".into(),
        host: format!("3000-{ID}.{SUFFIX}"),
        scheme: "http",
        prefix: "/v1/p/x".into(),
        peer: Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        sandbox: ID.into(),
    };
    request_head(all.clone(), flags & 1 != 0, &to);
    let status = if flags & 2 != 0 { StatusCode::SWITCHING_PROTOCOLS } else { StatusCode::OK };
    headers::incoming(&mut all, status);
    origin::confine(&mut all, &to.prefix);
    origin::translate_location(&mut all, &to);
    for name in ["keep-alive", "proxy-authenticate", "transfer-encoding", "trailer", "te", "clear-site-data"]
    {
        assert!(!all.contains_key(name), "{name} of the guest's is passed on");
    }
    for cookie in all.get_all(header::SET_COOKIE) {
        let text = String::from_utf8_lossy(cookie.as_bytes()).to_ascii_lowercase();
        let attributes: Vec<(&str, &str)> = text
            .split(';')
            .skip(1)
            .map(|attribute| attribute.split_once('=').unwrap_or((attribute, "")))
            .map(|(name, value)| (name.trim(), value.trim()))
            .collect();
        assert!(!attributes.iter().any(|(name, _)| *name == "domain"), "{text}");
        let paths: Vec<&str> =
            attributes.iter().filter(|(name, _)| *name == "path").map(|(_, value)| *value).collect();
        assert!(!paths.is_empty() && paths.iter().all(|path| path.starts_with("/v1/p/x/")), "{text}");
    }
}

fn request_head(all: HeaderMap, has_body: bool, to: &Forwarded) {
    let (mut head, ()): (request::Parts, ()) = Request::get("/x").body(()).expect("a request").into_parts();
    head.headers = all;
    let upgrade = headers::outgoing(&mut head, has_body, to);
    let one = |name: &str| {
        let mut values = head.headers.get_all(name).iter();
        let first = values.next().map(|value| value.as_bytes().to_vec());
        assert!(values.next().is_none(), "{name} twice");
        first
    };
    assert_eq!(one("host").as_deref(), Some(to.guest.as_bytes()));
    assert_eq!(one("x-forwarded-host").as_deref(), Some(to.host.as_bytes()));
    assert_eq!(one("x-forwarded-for").as_deref(), Some(&b"127.0.0.1"[..]));
    assert_eq!(one("x-fcs-sandbox").as_deref(), Some(ID.as_bytes()));
    assert_eq!(one("connection").is_some(), upgrade);
    let length = head.headers.contains_key(header::CONTENT_LENGTH);
    assert!(!(length && one("transfer-encoding").is_some()), "a body of two lengths");
    for name in ["forwarded", "keep-alive", "proxy-authorization", "te", "trailer", "expect", "x-real-ip"] {
        assert!(!head.headers.contains_key(name), "{name} is passed on");
    }
}

/// Requests that are good, and nearly so.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let raw = [
        "GET /v1/p/{TOKEN}/open/a?x=1&access_token=pds_1 HTTP/1.1\r\nHost: edge\r\n\r\n",
        "GET /v1/p/{TOKEN}/open/../secret HTTP/1.1\r\nHost: edge\r\n\r\n",
        "GET /v1/p/{TOKEN} HTTP/1.0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {HOST}:8081\r\nContent-Length: 3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: {HOST}\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx: y\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {HOST}\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
        "GET http://{HOST}/x HTTP/1.1\r\nHost: other\r\nAuthorization: Bearer pds_1\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        "GET /healthz HTTP/1.1\r\nHost: edge\r\n\r\nGET /x HTTP/1.1\r\nHost: edge\r\n\r\n",
        "CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0",
    ];
    let names = [
        format!("3000-{ID}.{SUFFIX}:8443"),
        format!("00080-{ID}.PREVIEW.test."),
        "preview.example.com".into(),
        "/open/%41/b".into(),
        "/open/%2e%2e/x".into(),
    ];
    let heads = [
        "Host: a\nConnection: upgrade, x-a\nUpgrade: websocket\nX-A: b\nTE: trailers\nContent-Length: 3",
        "Transfer-Encoding: chunked\nContent-Length: 3\nX-Forwarded-For: 1.2.3.4\nForwarded: for=x\nExpect: 100-continue",
        "Set-Cookie: a=b; Path=/; Domain=.test\nLocation: http://10.200.0.2:3000/x\nService-Worker-Allowed: /\nClear-Site-Data: *",
    ];
    let mut seeds: Vec<Vec<u8>> = raw.iter().map(|text| [&[0], text.as_bytes()].concat()).collect();
    seeds.extend(names.iter().map(|text| [&[2], text.as_bytes()].concat()));
    seeds.extend(heads.iter().map(|text| [&[3, 1], text.as_bytes()].concat()));
    seeds.extend(heads.iter().map(|text| [&[3, 2], text.as_bytes()].concat()));
    seeds
}
