//! The form of a preview token. Pure.
//!
//! `base64url(payload) "." base64url(HMAC-SHA256(payload))` without padding, where the payload is
//! `sandbox|port|expires|workspace`, and `|path,path` where only these are allowed.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, Mac};
use pandastack_bus::SandboxId;
use sha2::{Digest, Sha256};

/// Bytes of the key.
pub const KEY_BYTES: usize = 32;
/// Characters of a token at most: 32 paths of 256 bytes, and the rest.
const LONGEST: usize = 16 << 10;

/// The key of all tokens. Never shown.
#[derive(Clone)]
pub struct Key([u8; KEY_BYTES]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(…)")
    }
}

/// What a token allows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// TCP port in it.
    pub port: u16,
    /// Unix seconds from which on it allows nothing.
    pub expires_unix: u64,
    /// Owner of the sandbox.
    pub workspace: String,
    /// Paths that it allows, each with what is below; none: all.
    pub paths: Vec<String>,
}

impl Key {
    /// A fresh one.
    pub fn random() -> Self {
        let mut bytes = [0; KEY_BYTES];
        getrandom::fill(&mut bytes).expect("the kernel's random generator answers once the machine is up");
        Self(bytes)
    }

    /// As it was kept.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// To be kept.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    fn mac(&self, payload: &[u8]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("any length is a key for HMAC");
        mac.chain_update(payload)
    }

    /// Signs a claim.
    pub fn sign(&self, claim: &Claim) -> String {
        let payload = claim.payload();
        let mac = self.mac(payload.as_bytes()).finalize().into_bytes();
        format!("{}.{}", URL_SAFE_NO_PAD.encode(&payload), URL_SAFE_NO_PAD.encode(mac))
    }

    /// What a token claims, if it is ours. Says nothing about its time. The comparison takes the same time wherever they differ.
    pub fn verify(&self, token: &str) -> Option<Claim> {
        if token.len() > LONGEST {
            return None;
        }
        let (payload, mac) = token.split_once('.')?;
        let (payload, mac) = (URL_SAFE_NO_PAD.decode(payload).ok()?, URL_SAFE_NO_PAD.decode(mac).ok()?);
        self.mac(&payload).verify_slice(&mac).ok()?;
        Claim::parse(std::str::from_utf8(&payload).ok()?)
    }
}

impl Claim {
    fn payload(&self) -> String {
        let Self { sandbox, port, expires_unix, workspace, paths } = self;
        let mut payload = format!("{sandbox}|{port}|{expires_unix}|{workspace}");
        if !paths.is_empty() {
            payload.push('|');
            payload.push_str(&paths.join(","));
        }
        payload
    }

    fn parse(payload: &str) -> Option<Self> {
        let mut parts = payload.split('|');
        let sandbox = parts.next()?.parse().ok()?;
        let port = parts.next()?.parse().ok().filter(|port| *port != 0)?;
        let expires_unix = parts.next()?.parse().ok()?;
        let workspace = parts.next()?.to_owned();
        let paths =
            parts.next().map(|paths| paths.split(',').map(str::to_owned).collect()).unwrap_or_default();
        parts.next().is_none().then_some(Self { sandbox, port, expires_unix, workspace, paths })
    }

    /// Whether a path of a request (as it came, without its query) is allowed.
    pub fn allows(&self, path: &str) -> bool {
        if self.paths.is_empty() {
            return true;
        }
        let Ok(path) = percent_encoding::percent_decode_str(path).decode_utf8() else { return false };
        // What the program behind it may read as another path is not allowed where only some are.
        let odd = path.split(['/', '\\']).any(|part| part == ".." || part == ".")
            || path.contains(['\\', '\0', '%', ';'])
            || path.contains("//");
        !odd && self.paths.iter().any(|allowed| {
            let allowed = allowed.trim_end_matches('/');
            path.strip_prefix(allowed).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }
}

/// The public name of a token.
pub fn public_name(token: &str) -> String {
    Sha256::digest(token.as_bytes()).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn claim(paths: &[&str]) -> Claim {
        Claim {
            sandbox: "abcdefghij0123456789".parse().unwrap(),
            port: 3000,
            expires_unix: 1_800_000_000,
            workspace: "default".into(),
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }
    }

    /// Tokens outlive images: these bytes stay.
    #[test]
    fn the_form_is_this() {
        let key = Key::from_bytes(&[7; 32]).unwrap();
        let payload = |token: &str| {
            let bytes = URL_SAFE_NO_PAD.decode(token.split_once('.').unwrap().0).unwrap();
            String::from_utf8(bytes).unwrap()
        };
        let (all, some) = (key.sign(&claim(&[])), key.sign(&claim(&["/a", "/b/c"])));
        assert_eq!(payload(&all), "abcdefghij0123456789|3000|1800000000|default");
        assert_eq!(payload(&some), "abcdefghij0123456789|3000|1800000000|default|/a,/b/c");
        assert_eq!(all, GOLDEN);
        assert_eq!(public_name(&all).len(), 16);
    }

    const GOLDEN: &str = "YWJjZGVmZ2hpajAxMjM0NTY3ODl8MzAwMHwxODAwMDAwMDAwfGRlZmF1bHQ.JvTC-aL5J5UBVW0jwQhJ5g8qUysq4kmdFeWiYLy5zp0";

    #[test]
    fn only_allowed_paths_are_allowed() {
        let claim = claim(&["/public", "/app/"]);
        for path in ["/public", "/public/", "/public/a/b", "/app", "/app/x", "/public/%41"] {
            assert!(claim.allows(path), "{path}");
        }
        for path in [
            "/",
            "",
            "/publicity",
            "/public/..",
            "/public/../secret",
            "/public/%2e%2e/secret",
            "/public/..%2fsecret",
            "/other",
            "/public\\..\\x",
            "//public",
            "/public//x",
            "/%2570ublic",
            "/public/%252e%252e/x",
            "/public/..;/x",
            "/public/%ff",
        ] {
            assert!(!claim.allows(path), "{path}");
        }
        assert!(super::tests::claim(&["/"]).allows("/anything"));
        assert!(super::tests::claim(&[]).allows("/a/../b"));
    }

    fn any_claim() -> impl Strategy<Value = Claim> {
        let paths = proptest::collection::vec("/[^|,]{0,20}", 0..4);
        ("[a-z0-9]{20}", 1u16.., any::<u64>(), "[a-z0-9-]{1,40}", paths).prop_map(
            |(sandbox, port, expires_unix, workspace, paths)| Claim {
                sandbox: sandbox.parse().unwrap(),
                port,
                expires_unix,
                workspace,
                paths,
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_signed_is_what_it_claims(claim in any_claim()) {
            let key = Key::random();
            prop_assert_eq!(key.verify(&key.sign(&claim)), Some(claim.clone()));
            prop_assert_eq!(Key::random().verify(&key.sign(&claim)), None);
        }

        #[test]
        fn nothing_else_is_taken(claim in any_claim(), at in any::<prop::sample::Index>(), with in "[A-Za-z0-9._-]") {
            let key = Key::from_bytes(&[7; 32]).unwrap();
            let token = key.sign(&claim);
            let at = at.index(token.len());
            let mut changed = token.clone();
            changed.replace_range(at..=at, &with);
            prop_assume!(changed != token);
            prop_assert_eq!(key.verify(&changed), None);
            prop_assert_eq!(key.verify(&token[..at]), None);
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = Key::from_bytes(&[7; 32]).unwrap().verify(&text);
            let _ = Claim::parse(&text);
            let _ = claim(&["/a"]).allows(&text);
        }
    }
}
