//! What a guest's answer may do to the origin it is served from. Pure.
//!
//! Where the guest's `/` is a path below ours, it shares an origin (scheme, host, port) with others: its answers may not speak
//! for all of it. A `Location` that names the guest by the address that only it knows is made to lead back to it.

use http::{HeaderMap, HeaderName, HeaderValue, header};

use crate::headers::Forwarded;

/// Headers that hold for a whole origin: service workers of other paths, cleared or forced storage and transport, and reports
/// about requests of others, addresses with tokens in them included.
const FOR_ALL: [HeaderName; 9] = [
    HeaderName::from_static("service-worker-allowed"),
    HeaderName::from_static("clear-site-data"),
    HeaderName::from_static("nel"),
    HeaderName::from_static("report-to"),
    HeaderName::from_static("reporting-endpoints"),
    HeaderName::from_static("origin-agent-cluster"),
    header::STRICT_TRANSPORT_SECURITY,
    header::ALT_SVC,
    header::PUBLIC_KEY_PINS,
];

/// Keeps an answer that is served below `prefix` within it. The address may hold a token, so no other site is told it.
pub fn confine(headers: &mut HeaderMap, prefix: &str) {
    for name in FOR_ALL {
        headers.remove(name);
    }
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("same-origin"));
    let cookies: Vec<HeaderValue> = headers
        .get_all(header::SET_COOKIE)
        .iter()
        .filter_map(|cookie| HeaderValue::from_str(&confined_cookie(cookie.to_str().ok()?, prefix)).ok())
        .collect();
    headers.remove(header::SET_COOKIE);
    for cookie in cookies {
        headers.append(header::SET_COOKIE, cookie);
    }
}

/// A cookie for `prefix` and below, of this host alone.
fn confined_cookie(cookie: &str, prefix: &str) -> String {
    let mut parts = cookie.split(';');
    let mut out = parts.next().unwrap_or_default().trim().to_owned();
    let mut path = "/";
    for part in parts {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        match name.trim().to_ascii_lowercase().as_str() {
            "path" if value.trim().starts_with('/') => path = value.trim(),
            "path" | "domain" => {}
            _ => {
                out.push_str("; ");
                out.push_str(part.trim());
            }
        }
    }
    // A program that knows of the prefix has put it there already.
    let below =
        path.strip_prefix(prefix).filter(|rest| rest.is_empty() || rest.starts_with('/')).unwrap_or(path);
    out.push_str("; Path=");
    out.push_str(prefix);
    out.push_str(if below.is_empty() { "/" } else { below });
    out
}

/// Makes a `Location` that leads to the guest's own address, or to a path of its, lead there through us.
pub fn translate_location(headers: &mut HeaderMap, to: &Forwarded) {
    let Some(location) = headers.get(header::LOCATION).and_then(|value| value.to_str().ok()) else { return };
    let Some(translated) = translated(location, to) else { return };
    if let Ok(value) = HeaderValue::from_str(&translated) {
        headers.insert(header::LOCATION, value);
    }
}

fn translated(location: &str, to: &Forwarded) -> Option<String> {
    let below = |path: &str| {
        let inside = path.strip_prefix(to.prefix.as_str());
        // Already where it should be.
        let already = inside.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']));
        if to.prefix.is_empty() || already { path.to_owned() } else { format!("{}{path}", to.prefix) }
    };
    for scheme in ["http://", "https://"] {
        if let Some(rest) =
            location.strip_prefix(scheme).and_then(|rest| rest.strip_prefix(to.guest.as_str()))
        {
            let path = match rest.chars().next() {
                None => "/".to_owned(),
                Some('/') => rest.to_owned(),
                Some('?' | '#') => format!("/{rest}"),
                Some(_) => return None,
            };
            return Some(format!("{}://{}{}", to.scheme, to.host, below(&path)));
        }
    }
    let own = location.starts_with('/') && !location.starts_with("//") && !location.starts_with("/\\");
    (own && !to.prefix.is_empty()).then(|| below(location))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_stay_below_the_prefix() {
        for (given, kept) in [
            ("a=b", "a=b; Path=/v1/p/t/"),
            ("a=b; Path=/; Domain=example.com; HttpOnly", "a=b; HttpOnly; Path=/v1/p/t/"),
            ("a=b; path=/app ; Secure", "a=b; Secure; Path=/v1/p/t/app"),
            ("a=b; Path=/v1/p/t/app", "a=b; Path=/v1/p/t/app"),
            ("a=b; Path=/v1/p/tt", "a=b; Path=/v1/p/t/v1/p/tt"),
            ("a=b; Path=elsewhere; domain", "a=b; Path=/v1/p/t/"),
        ] {
            assert_eq!(confined_cookie(given, "/v1/p/t"), kept);
        }
    }

    #[test]
    fn an_answer_does_not_speak_for_the_origin() {
        let mut headers = HeaderMap::new();
        for name in FOR_ALL {
            headers.insert(name, HeaderValue::from_static("x"));
        }
        headers.append(header::SET_COOKIE, HeaderValue::from_static("a=1"));
        headers.append(header::SET_COOKIE, HeaderValue::from_bytes(b"b=\xff").unwrap());
        confine(&mut headers, "/v1/p/t");
        let mut left: Vec<_> =
            headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        left.sort_unstable();
        assert_eq!(left, [("referrer-policy", "same-origin"), ("set-cookie", "a=1; Path=/v1/p/t/")]);
    }

    #[test]
    fn locations_lead_back() {
        let to = |prefix: &str| Forwarded {
            guest: "10.200.0.2:3000".into(),
            host: "h.test:8081".into(),
            scheme: "https",
            prefix: prefix.into(),
            peer: None,
            sandbox: "x".into(),
        };
        for (given, at_root, below) in [
            (
                "http://10.200.0.2:3000/a?b",
                Some("https://h.test:8081/a?b"),
                Some("https://h.test:8081/p/a?b"),
            ),
            ("http://10.200.0.2:3000", Some("https://h.test:8081/"), Some("https://h.test:8081/p/")),
            ("http://10.200.0.2:30001/", None, None),
            ("http://elsewhere/", None, None),
            ("//elsewhere/", None, None),
            ("relative", None, None),
            ("/login", None, Some("/p/login")),
            ("/p/login", None, Some("/p/login")),
            ("/pp", None, Some("/p/pp")),
        ] {
            assert_eq!(translated(given, &to("")).as_deref(), at_root, "{given}");
            assert_eq!(translated(given, &to("/p")).as_deref(), below, "{given}");
        }
    }
}
