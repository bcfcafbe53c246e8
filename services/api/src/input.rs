//! What comes in, made typed or refused with a sentence: query strings, guest paths, JSON bodies.
//!
//! Owns: limits of size and form. Refuses to know: what a route does with it.

use std::{collections::BTreeMap, fmt, ops::RangeInclusive, pin::Pin, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::{Stream, StreamExt};
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Deserializer, de::DeserializeOwned};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::time::{Instant, timeout_at};

use crate::{auth::Caller, problem::Problem};

/// Bytes of a JSON body at most.
pub const JSON_LIMIT: usize = 1 << 20;
/// How long a client may pause within a JSON body.
const PAUSE: Duration = Duration::from_secs(30);
/// How long it may take for all of it.
const WHOLE: Duration = Duration::from_secs(600);
/// Bytes of a path in the guest at most.
const PATH_LIMIT: usize = 4096;

/// The body as it arrives.
pub type BodyStream = Pin<Box<dyn Stream<Item = Result<Bytes, warp::Error>> + Send>>;

/// A request as the handlers see it.
pub struct Input {
    /// Whose it is.
    pub caller: Caller,
    /// Its id.
    pub request_id: String,
    /// Its query string, undecoded, without any access token.
    pub query: String,
    /// Its headers, without the token.
    pub headers: HeaderMap,
    /// Its body.
    pub body: BodyStream,
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Input").field("caller", &self.caller).finish_non_exhaustive()
    }
}

impl Input {
    /// The whole body, bounded.
    pub async fn bytes(&mut self, limit: usize) -> Result<Bytes, Problem> {
        let slow =
            |_| Problem::new(StatusCode::REQUEST_TIMEOUT, "slow_upload", "the request body came too slowly");
        let end = Instant::now() + WHOLE;
        let mut whole = BytesMut::new();
        loop {
            let by = end.min(Instant::now() + PAUSE);
            let Some(part) = timeout_at(by, self.body.next()).await.map_err(slow)? else { break };
            let part = part.map_err(|_| Problem::invalid("the request body ended early"))?;
            if whole.len() + part.len() > limit {
                linger(std::mem::replace(&mut self.body, Box::pin(futures_util::stream::empty())));
                return Err(Problem::too_large(format!("the request body is over {} KiB", limit >> 10)));
            }
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }

    /// The body as JSON, whatever its content type says. An empty body is `{}`.
    pub async fn json<T: DeserializeOwned>(&mut self, limit: usize) -> Result<T, Problem> {
        parse_json(&self.bytes(limit).await?)
    }

    /// A body that says nothing: absent, empty or any JSON object.
    pub async fn nothing(&mut self) -> Result<(), Problem> {
        self.json::<serde::de::IgnoredAny>(JSON_LIMIT).await.map(drop)
    }

    /// The query's pairs, decoded.
    pub fn pairs(&self) -> Result<Vec<(String, String)>, Problem> {
        pairs(&self.query)
    }

    /// The `path` of the query: absolute, without `..`.
    pub fn path(&self, default: Option<&str>) -> Result<String, Problem> {
        let given = self.pairs()?.into_iter().find(|(key, _)| key == "path").map(|(_, value)| value);
        match (given, default) {
            (Some(path), _) => guest_path(path),
            (None, Some(default)) => Ok(default.to_owned()),
            (None, None) => Err(Problem::invalid("query parameter `path` is required")),
        }
    }
}

/// Reads on what a client still sends, within limits, so that it sees the refusal instead of a reset connection.
pub fn linger(mut body: BodyStream) {
    const BYTES: usize = 256 << 20;
    const TIME: std::time::Duration = std::time::Duration::from_secs(20);
    tokio::spawn(tokio::time::timeout(TIME, async move {
        let mut left = BYTES;
        while let Some(Ok(part)) = body.next().await {
            left = left.saturating_sub(part.len());
            if left == 0 {
                break;
            }
        }
    }));
}

/// Parses JSON; the sentence of a refusal names the field.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let bytes = bytes.trim_ascii();
    let bytes: &[u8] = if bytes.is_empty() || bytes == b"null" { b"{}" } else { bytes };
    if !bytes.starts_with(b"{") {
        return Err(Problem::invalid("the request body must be a JSON object"));
    }
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut parser).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_syntax() || inner.is_eof() || path == "." {
            Problem::invalid(format!("the request body is not valid JSON: {inner}"))
        } else {
            let text = inner.to_string();
            let text = text.split(" at line ").next().unwrap_or_default();
            Problem::invalid(format!("field `{path}`: {text}")).with("field", path)
        }
    })?;
    parser.end().map_err(|_| Problem::invalid("the request body has text after its JSON object"))?;
    Ok(value)
}

/// Decodes a query string: `+` is a space, percent sequences are UTF-8.
pub fn pairs(query: &str) -> Result<Vec<(String, String)>, Problem> {
    let decode = |text: &str| {
        percent_encoding::percent_decode_str(&text.replace('+', " "))
            .decode_utf8()
            .map(std::borrow::Cow::into_owned)
            .map_err(|_| Problem::invalid("the query string is not UTF-8"))
    };
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            Ok((decode(key)?, decode(value)?))
        })
        .collect()
}

/// A yes or no of a query string.
pub fn flag(key: &str, value: &str) -> Result<bool, Problem> {
    match value {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(Problem::invalid(format!("query parameter `{key}` must be true or false"))),
    }
}

/// A count of a query string, within a range.
pub fn count(key: &str, value: &str, range: RangeInclusive<usize>) -> Result<usize, Problem> {
    value.parse().ok().filter(|count| range.contains(count)).ok_or_else(|| {
        let (least, most) = range.into_inner();
        Problem::invalid(format!("query parameter `{key}` must be a whole number from {least} to {most}"))
    })
}

/// A time of a query string, RFC 3339 or Unix seconds, in Unix milliseconds; one before 1970 is 0.
pub fn moment(key: &str, value: &str) -> Result<u64, Problem> {
    if let Ok(seconds) = value.parse::<f64>()
        && seconds.is_finite()
        && seconds.abs() < 1e12
    {
        return Ok((seconds.max(0.0) * 1000.0) as u64);
    }
    // The plus of a zone that was not encoded has become a space.
    let time = OffsetDateTime::parse(&value.replace(' ', "+"), &Rfc3339).map_err(|_| {
        Problem::invalid(format!("query parameter `{key}` must be a time in RFC 3339 or Unix seconds"))
    })?;
    Ok(u64::try_from(time.unix_timestamp_nanos() / 1_000_000).unwrap_or(0))
}

/// A path in the guest.
pub fn guest_path(path: String) -> Result<String, Problem> {
    if path.is_empty() {
        return Err(Problem::invalid("`path` is empty"));
    }
    if path.contains('\0') {
        return Err(Problem::invalid("`path` has a NUL character"));
    }
    if path.len() > PATH_LIMIT {
        return Err(Problem::invalid("`path` is over 4096 bytes"));
    }
    if !path.starts_with('/') {
        return Err(Problem::invalid("`path` must be absolute"));
    }
    if path.split('/').any(|part| part == "..") {
        return Err(Problem::invalid("`path` must not contain `..`"));
    }
    Ok(path)
}

/// One segment of a URL path, decoded.
pub fn segment(raw: &str) -> String {
    percent_encoding::percent_decode_str(raw).decode_utf8_lossy().into_owned()
}

/// A text that travels on D-Bus and into the guest: bounded, without NUL.
pub fn text(field: &str, value: &str, limit: usize) -> Result<(), Problem> {
    if value.contains('\0') {
        return Err(Problem::invalid(format!("field `{field}` has a NUL character")).with("field", field));
    }
    if value.len() > limit {
        return Err(Problem::invalid(format!("field `{field}` is over {limit} bytes")).with("field", field));
    }
    Ok(())
}

/// Environment variables of an exec.
pub fn environment(env: &BTreeMap<String, String>) -> Result<(), Problem> {
    for (key, value) in env {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains('\0') {
            return Err(Problem::invalid(
                "field `env`: names are not empty and without `=`, nothing contains NUL",
            )
            .with("field", "env"));
        }
        if key.len() + value.len() > 120 << 10 {
            return Err(Problem::invalid("field `env`: a variable is over 120 KiB").with("field", "env"));
        }
    }
    Ok(())
}

/// For serde: a whole number from 0 on, refused with a sentence otherwise.
pub fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match Option::<serde_json::Number>::deserialize(deserializer)
        .map_err(|_| serde::de::Error::custom("must be a whole number, 0 or more"))?
    {
        None => Ok(None),
        Some(number) => whole_number(&number)
            .map(Some)
            .ok_or_else(|| serde::de::Error::custom("must be a whole number, 0 or more")),
    }
}

fn whole_number(number: &serde_json::Number) -> Option<u64> {
    // 5.0 is the integer 5 in JSON Schema's eyes.
    number.as_u64().or_else(|| {
        number
            .as_f64()
            .filter(|float| float.fract() == 0.0 && (0.0..=9_007_199_254_740_992.0).contains(float))
            .map(|float| float as u64)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Default, Deserialize)]
    #[serde(default)]
    struct Body {
        #[serde(deserialize_with = "whole")]
        count: Option<u64>,
        names: BTreeMap<String, String>,
    }

    async fn read(pause: Duration, parts: usize) -> Result<Bytes, Problem> {
        let body = futures_util::stream::unfold(0, move |sent| async move {
            tokio::time::sleep(pause).await;
            (sent < parts).then(|| (Ok(Bytes::from_static(b" ")), sent + 1))
        });
        let caller = Caller::default();
        let (request_id, query, headers) = (String::new(), String::new(), HeaderMap::new());
        Input { caller, request_id, query, headers, body: Box::pin(body) }.bytes(1 << 20).await
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_is_refused_in_time() {
        assert_eq!(read(PAUSE - Duration::from_secs(1), 10).await.unwrap().len(), 10);
        assert_eq!(read(PAUSE + Duration::from_secs(1), 10).await.unwrap_err().status.as_u16(), 408);
        let start = Instant::now();
        assert_eq!(read(PAUSE / 2, 1000).await.unwrap_err().status.as_u16(), 408);
        assert_eq!(start.elapsed().as_secs(), WHOLE.as_secs());
    }

    #[test]
    fn empty_bodies_are_empty_objects() {
        for body in ["", "  \n", "{}", "null"] {
            assert!(parse_json::<Body>(body.as_bytes()).unwrap().names.is_empty());
        }
    }

    #[test]
    fn a_refusal_names_the_field() {
        for (body, needle) in [
            (r#"{"count":-1}"#, "`count`"),
            (r#"{"count":1.5}"#, "`count`"),
            (r#"{"count":"1"}"#, "`count`"),
            (r#"{"count":true}"#, "`count`"),
            (r#"{"count":1e300}"#, "`count`"),
            (r#"{"names":{"a":1}}"#, "`names.a`"),
            (r#"{"names":[]}"#, "`names`"),
            ("[]", "object"),
            ("{", "not valid JSON"),
            (r#"{"count":"\ud800"}"#, "count"),
            ("{} {}", "after"),
        ] {
            let problem = parse_json::<Body>(body.as_bytes()).unwrap_err();
            assert_eq!(problem.status.as_u16(), 400);
            assert!(problem.message.contains(needle), "{body}: {}", problem.message);
        }
        assert_eq!(parse_json::<Body>(br#"{"count":5.0,"else":[1]}"#).unwrap().count, Some(5));
        assert_eq!(parse_json::<Body>(br#"{"count":null}"#).unwrap().count, None);
    }

    #[test]
    fn paths_are_absolute_and_never_climb() {
        for bad in ["", "a", "./a", "/a/../b", "/..", "/a\0b", &format!("/{}", "a".repeat(5000))] {
            assert_eq!(guest_path((*bad).to_owned()).unwrap_err().status.as_u16(), 400, "{bad:?}");
        }
        for good in ["/", "/a b/ü", "/a..b", "/...", "/a//b/"] {
            assert_eq!(guest_path(good.to_owned()).unwrap(), good);
        }
    }

    #[test]
    fn a_plus_is_a_space() {
        let got = pairs("path=%2Fa+b%2Bc&x&=y&path=2").unwrap();
        assert_eq!(got[0], ("path".to_owned(), "/a b+c".to_owned()));
        assert_eq!(got[1], ("x".to_owned(), String::new()));
        assert_eq!(pairs("path=%ff").unwrap_err().status.as_u16(), 400);
    }

    #[test]
    fn times_have_two_forms() {
        for (text, expected) in [
            ("1767323045", 1_767_323_045_000),
            ("1767323045.25", 1_767_323_045_250),
            ("2026-01-02T03:04:05.25Z", 1_767_323_045_250),
            ("2026-01-02T04:04:05+01:00", 1_767_323_045_000),
            ("2026-01-02T04:04:05 01:00", 1_767_323_045_000),
            ("-5", 0),
            ("1969-01-01T00:00:00Z", 0),
        ] {
            assert_eq!(moment("since", text).unwrap(), expected, "{text}");
        }
        for bad in ["", "x", "NaN", "inf", "1e300", "2026-01-02", "2026-13-02T03:04:05Z", "yesterday"] {
            let problem = moment("since", bad).unwrap_err();
            assert!(problem.status.as_u16() == 400 && problem.message.contains("`since`"), "{bad}");
        }
        assert_eq!(count("tail", "0", 0..=9).unwrap(), 0);
        for bad in ["", "-1", "10", "1.5", "x"] {
            assert_eq!(count("tail", bad, 0..=9).unwrap_err().status.as_u16(), 400, "{bad}");
        }
        assert_eq!((flag("f", "1").unwrap(), flag("f", "false").unwrap()), (true, false));
        assert_eq!(flag("f", "yes").unwrap_err().status.as_u16(), 400);
    }

    proptest! {
        #[test]
        fn no_time_panics(text in "\\PC{0,40}") {
            let _ = moment("since", &text);
        }

        #[test]
        fn no_body_panics(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = parse_json::<Body>(&bytes);
        }
    }
}
