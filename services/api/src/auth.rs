//! Who asks: tokens on the wire and their hashes. Pure.
//!
//! Owns: the token's form, where it may stand in a request, the comparison. Refuses to know: which tokens exist.

use http::{HeaderMap, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::{problem::Problem, scope::Grant};

/// The caller of an authenticated request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// Workspace that the token opens.
    pub workspace: String,
    /// Public name of the token.
    pub prefix: String,
    /// What it may do there.
    pub grant: Grant,
}

/// A token: `pds_` and 32 lowercase hexadecimal digits. Shows itself only on demand.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({}…)", self.prefix())
    }
}

impl Token {
    /// A new random one.
    pub fn random() -> Self {
        let mut bytes = [0u8; 16];
        getrandom::fill(&mut bytes).expect("the kernel's random generator answers once the machine is up");
        Self(format!("pds_{}", hex(&bytes)))
    }

    /// A token that was given as text.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("pds_")?;
        let good = digits.len() == 32 && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        good.then(|| Self(text.to_owned()))
    }

    /// Its public name: the first 12 characters.
    pub fn prefix(&self) -> &str {
        &self.0[..12]
    }

    /// What is kept of it.
    pub fn hash(&self) -> String {
        hex(&Sha256::digest(self.0.as_bytes()))
    }

    /// The secret text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// Compares hashes in a time that does not depend on where they differ.
pub fn same_hash(one: &str, other: &str) -> bool {
    one.as_bytes().ct_eq(other.as_bytes()).into()
}

/// Lowercase hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The token of a request: the bearer header; where there is no such header, `access_token` in the query, or what a browser
/// can say when it opens a WebSocket, the subprotocol `bearer.<token>`.
pub fn token_of(headers: &HeaderMap, access_token: Option<&str>) -> Result<Token, Problem> {
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.trim().split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, token)| token.trim())
        .filter(|token| !token.is_empty());
    let given = bearer
        .or(access_token.filter(|token| !token.is_empty()))
        .or_else(|| subprotocols(headers).find_map(|name| name.strip_prefix(SUBPROTOCOL)))
        .ok_or_else(|| Problem::unauthorized("missing bearer token"))?;
    if !given.starts_with("pds_") {
        return Err(Problem::unauthorized("jwt auth disabled"));
    }
    Token::parse(given).ok_or_else(|| Problem::unauthorized("invalid api token"))
}

const SUBPROTOCOL: &str = "bearer.";

fn subprotocols(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
    offered.filter_map(|value| value.to_str().ok()).flat_map(|names| names.split(',')).map(str::trim)
}

/// Takes every token out of the headers.
pub fn remove_tokens(headers: &mut HeaderMap) {
    headers.remove(header::AUTHORIZATION);
    if headers.contains_key(header::SEC_WEBSOCKET_PROTOCOL) {
        let rest: Vec<&str> = subprotocols(headers).filter(|name| !name.starts_with(SUBPROTOCOL)).collect();
        let rest = rest.join(", ").parse();
        headers.remove(header::SEC_WEBSOCKET_PROTOCOL);
        if let Ok(rest) = rest {
            headers.insert(header::SEC_WEBSOCKET_PROTOCOL, rest);
        }
    }
}

/// Takes `access_token` out of a query string: what remains, and the token.
pub fn split_access_token(query: &str) -> (String, Option<String>) {
    let mut token = None;
    let rest: Vec<&str> = query
        .split('&')
        .filter(|pair| match pair.split_once('=') {
            Some(("access_token", value)) => {
                token.get_or_insert_with(|| crate::input::segment(value));
                false
            }
            _ => *pair != "access_token",
        })
        .collect();
    (rest.join("&"), token)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    fn detail(result: Result<Token, Problem>) -> String {
        result.unwrap_err().extra["detail"].as_str().unwrap().to_owned()
    }

    #[test]
    fn each_way_to_fail_has_its_detail() {
        assert_eq!(detail(token_of(&HeaderMap::new(), None)), "missing bearer token");
        assert_eq!(detail(token_of(&with("Basic eDp5"), None)), "missing bearer token");
        assert_eq!(detail(token_of(&with("Bearer "), Some(""))), "missing bearer token");
        assert_eq!(detail(token_of(&with("Bearer eyJhbGciOi.x.y"), None)), "jwt auth disabled");
        assert_eq!(detail(token_of(&with("Bearer pds_short"), None)), "invalid api token");
    }

    #[test]
    fn the_header_beats_the_query() {
        let (one, two) = (Token::random(), Token::random());
        let header = with(&format!("bearer {}", one.reveal()));

        assert_eq!(token_of(&header, Some(two.reveal())).unwrap(), one);
        assert_eq!(token_of(&with("Basic eDp5"), Some(two.reveal())).unwrap(), two);
    }

    #[test]
    fn a_subprotocol_can_be_the_token_and_is_taken_out() {
        let token = Token::random();
        let mut headers = HeaderMap::new();
        let offered = format!("lsp, bearer.{}", token.reveal());
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, offered.parse().unwrap());
        assert_eq!(token_of(&headers, None).unwrap(), token);

        headers.insert(header::AUTHORIZATION, "Bearer x".parse().unwrap());
        remove_tokens(&mut headers);
        assert_eq!(headers.len(), 1);
        assert_eq!(headers[header::SEC_WEBSOCKET_PROTOCOL], "lsp");
    }

    #[test]
    fn the_query_loses_its_token_only() {
        assert_eq!(
            split_access_token("a=1&access_token=pds_x&b=%2F&access_token=y"),
            ("a=1&b=%2F".to_owned(), Some("pds_x".to_owned()))
        );
        assert_eq!(split_access_token("a=1"), ("a=1".to_owned(), None));
    }

    #[test]
    fn a_token_hides_and_hashes() {
        let token = Token::parse("pds_0123456789abcdef0123456789abcdef").unwrap();

        assert_eq!(format!("{token:?}"), "Token(pds_01234567…)");
        assert_eq!(token.hash().len(), 64);
        assert!(same_hash(&token.hash(), &token.hash()));
        assert!(!same_hash(&token.hash(), &Token::random().hash()));
        assert!(Token::parse("pds_0123456789ABCDEF0123456789abcdef").is_none());
    }
}
