//! The heads of requests and answers on their way through. Pure.
//!
//! Owns: which headers belong to one connection only and end here (RFC 9110, 7.6.1), what the guest is told about the client.
//! What a client says about itself in `X-Forwarded-…` or `Forwarded` is replaced, never passed on.

use std::net::IpAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{
        CONNECTION, CONTENT_LENGTH, EXPECT, FORWARDED, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE,
        TRAILER, TRANSFER_ENCODING, UPGRADE,
    },
    request,
};

/// What the guest is told.
#[derive(Debug, Clone)]
pub struct Forwarded {
    /// Its own address and port: the `Host` of the request.
    pub guest: String,
    /// Host that the client asked for.
    pub host: String,
    /// How it asked: `http` or `https`.
    pub scheme: &'static str,
    /// Path before the guest's `/`; empty, or without a slash at its end.
    pub prefix: String,
    /// Who asked.
    pub peer: Option<IpAddr>,
    /// The sandbox's id.
    pub sandbox: String,
}

const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// Makes the head of a request that of the one to the guest. Answers whether it asks for an upgrade. `has_body`: whether
/// something follows the head.
pub fn outgoing(head: &mut request::Parts, has_body: bool, to: &Forwarded) -> bool {
    let upgrade = wanted_upgrade(head);
    let chunked = head.headers.contains_key(TRANSFER_ENCODING);
    let sized = head.headers.contains_key(CONTENT_LENGTH) && !chunked;
    remove_hop_by_hop(&mut head.headers);
    // The server in front has answered it already.
    head.headers.remove(EXPECT);
    if !sized {
        head.headers.remove(CONTENT_LENGTH);
    }
    if chunked || (has_body && !sized) {
        // Said aloud: without it hyper drops the body of a GET whose length it does not know.
        head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    }
    if let Some(protocol) = &upgrade {
        head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        head.headers.insert(UPGRADE, protocol.clone());
    }
    for name in
        ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-prefix"]
    {
        head.headers.remove(name);
    }
    for name in ["x-real-ip", "x-fcs-sandbox"] {
        head.headers.remove(name);
    }
    head.headers.remove(FORWARDED);
    set(&mut head.headers, HOST, &to.guest);
    set(&mut head.headers, HeaderName::from_static("x-forwarded-host"), &to.host);
    set(&mut head.headers, HeaderName::from_static("x-forwarded-proto"), to.scheme);
    if let Some(peer) = to.peer {
        set(&mut head.headers, HeaderName::from_static("x-forwarded-for"), &peer.to_canonical().to_string());
    }
    if !to.prefix.is_empty() {
        set(&mut head.headers, HeaderName::from_static("x-forwarded-prefix"), &to.prefix);
    }
    set(&mut head.headers, HeaderName::from_static("x-fcs-sandbox"), &to.sandbox);
    head.version = Version::HTTP_11;
    upgrade.is_some()
}

/// Makes the head of the guest's answer that of ours.
pub fn incoming(headers: &mut HeaderMap, status: StatusCode) {
    let protocol = headers.get(UPGRADE).cloned();
    remove_hop_by_hop(headers);
    if status == StatusCode::SWITCHING_PROTOCOLS {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        if let Some(protocol) = protocol {
            headers.insert(UPGRADE, protocol);
        }
    }
}

/// The protocol that a request wants to change to. Never `h2c`: a tunnel of HTTP requests that nobody looks at.
fn wanted_upgrade(head: &request::Parts) -> Option<HeaderValue> {
    if head.version != Version::HTTP_11 || head.method == Method::CONNECT {
        return None;
    }
    if !tokens(&head.headers).any(|token| token.eq_ignore_ascii_case("upgrade")) {
        return None;
    }
    let mut wanted = head.headers.get_all(UPGRADE).iter();
    let (protocol, more) = (wanted.next()?, wanted.next());
    let text = protocol.to_str().ok()?;
    let single = !text.contains(',') && more.is_none();
    let http = text.trim_start().get(..2).is_some_and(|start| start.eq_ignore_ascii_case("h2"))
        || text.trim_start().get(..4).is_some_and(|start| start.eq_ignore_ascii_case("http"));
    (single && !http && !text.trim().is_empty()).then(|| protocol.clone())
}

fn tokens(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = tokens(headers).filter_map(|token| token.parse().ok()).collect();
    for name in named {
        // What says how long the message is cannot be talked away.
        if name != CONTENT_LENGTH && name != HOST {
            headers.remove(name);
        }
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove("http2-settings");
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    match HeaderValue::from_str(value) {
        Ok(value) => drop(headers.insert(name, value)),
        Err(_) => drop(headers.remove(name)),
    }
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    fn to() -> Forwarded {
        Forwarded {
            guest: "10.200.0.2:3000".into(),
            host: "3000-x.preview.test".into(),
            scheme: "https",
            prefix: String::new(),
            peer: Some("::ffff:192.0.2.7".parse().unwrap()),
            sandbox: "x".into(),
        }
    }

    fn sent(method: &str, version: Version, headers: &[(&str, &str)], has_body: bool) -> (HeaderMap, bool) {
        let mut request = Request::builder().method(method).version(version).uri("/");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let (mut head, ()) = request.body(()).unwrap().into_parts();
        let upgrade = outgoing(&mut head, has_body, &to());
        (head.headers, upgrade)
    }

    #[test]
    fn what_belongs_to_one_connection_ends_here() {
        let (headers, upgrade) = sent(
            "POST",
            Version::HTTP_11,
            &[
                ("connection", "close, X-Mine"),
                ("x-mine", "1"),
                ("keep-alive", "timeout=5"),
                ("te", "trailers"),
                ("proxy-authorization", "Basic eA=="),
                ("expect", "100-continue"),
                ("content-length", "3"),
                ("cookie", "a=b"),
                ("authorization", "Bearer app"),
            ],
            true,
        );
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(
            names,
            [
                "authorization",
                "content-length",
                "cookie",
                "host",
                "x-fcs-sandbox",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-proto"
            ]
        );
        assert!(!upgrade);
    }

    #[test]
    fn nobody_says_who_he_is_or_unsays_the_length() {
        let (headers, _) = sent(
            "POST",
            Version::HTTP_11,
            &[
                ("host", "evil"),
                ("x-forwarded-for", "1.2.3.4"),
                ("x-forwarded-host", "evil"),
                ("forwarded", "for=1.2.3.4"),
                ("x-real-ip", "1.2.3.4"),
                ("x-fcs-sandbox", "other"),
                ("connection", "content-length, host"),
                ("content-length", "3"),
            ],
            true,
        );
        assert_eq!(headers["host"], "10.200.0.2:3000");
        assert_eq!(headers["x-forwarded-for"], "192.0.2.7");
        assert_eq!(headers["x-forwarded-host"], "3000-x.preview.test");
        assert_eq!(
            (&headers["x-fcs-sandbox"], &headers["content-length"]),
            (&"x".parse().unwrap(), &"3".parse().unwrap())
        );
        assert!(!headers.contains_key("forwarded") && !headers.contains_key("x-real-ip"));
    }

    #[test]
    fn a_body_has_exactly_one_length() {
        let length = |version, headers: &[(&str, &str)], has_body| {
            let (headers, _) = sent("GET", version, headers, has_body);
            let text = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            (text("content-length"), text("transfer-encoding"))
        };
        let chunked = Some("chunked".to_owned());
        let both = [("content-length", "3"), ("transfer-encoding", "chunked")];
        assert_eq!(length(Version::HTTP_11, &both, true), (None, chunked.clone()));
        assert_eq!(length(Version::HTTP_11, &both[..1], true), (Some("3".into()), None));
        assert_eq!(
            length(Version::HTTP_11, &[("transfer-encoding", "gzip, chunked")], true),
            (None, chunked.clone())
        );
        assert_eq!(length(Version::HTTP_2, &[], true), (None, chunked));
        assert_eq!(length(Version::HTTP_2, &[], false), (None, None));
    }

    #[test]
    fn upgrades_pass_unless_they_are_http_again() {
        let ask = |version, protocol: &str, connection: &str| {
            sent("GET", version, &[("connection", connection), ("upgrade", protocol)], false)
        };
        let (headers, upgrade) = ask(Version::HTTP_11, "websocket", "keep-alive, Upgrade");
        assert!(upgrade && headers["upgrade"] == "websocket" && headers["connection"] == "upgrade");
        for (version, protocol, connection) in [
            (Version::HTTP_11, "h2c", "Upgrade, HTTP2-Settings"),
            (Version::HTTP_11, "websocket, h2c", "upgrade"),
            (Version::HTTP_11, "HTTP/2.0", "upgrade"),
            (Version::HTTP_11, "websocket", "keep-alive"),
            (Version::HTTP_10, "websocket", "upgrade"),
            (Version::HTTP_2, "websocket", "upgrade"),
        ] {
            let (headers, upgrade) = ask(version, protocol, connection);
            assert!(
                !upgrade && !headers.contains_key("upgrade") && !headers.contains_key("connection"),
                "{protocol}"
            );
        }
    }

    #[test]
    fn an_answer_keeps_its_upgrade_only_with_101() {
        let answer = |status| {
            let mut headers = HeaderMap::new();
            for (name, value) in
                [("connection", "Upgrade, x-hop"), ("upgrade", "websocket"), ("x-hop", "1"), ("etag", "e")]
            {
                headers.insert(name, value.parse().unwrap());
            }
            incoming(&mut headers, status);
            headers
        };
        let switched = answer(StatusCode::SWITCHING_PROTOCOLS);
        assert_eq!(
            (&switched["connection"], &switched["upgrade"]),
            (&"upgrade".parse().unwrap(), &"websocket".parse().unwrap())
        );
        let plain = answer(StatusCode::OK);
        assert_eq!(plain.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["etag"]);
    }
}
