//! Documents that nobody else can have written: JSON with a MAC (HMAC-SHA-256) under a key of this machine.
//!
//! Owns the key and the form of the document. Refuses to know what is in it. The MAC is over the bytes of the body as
//! they stand, so that no two programs have to agree on how to write JSON.

use std::{io, path::Path};

use hmac::{Hmac, Mac};
use pandastack_daemon::files;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::value::RawValue;
use sha2::Sha256;

use crate::error::{At, Result};

const LENGTH: usize = 32;

/// Signs documents and tells whether they were signed here.
pub struct Signer {
    key: [u8; LENGTH],
}

#[derive(Serialize, Deserialize)]
struct Document<'a> {
    #[serde(borrow)]
    body: &'a RawValue,
    mac: String,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signer")
    }
}

impl Signer {
    /// Reads the key; makes it, durably, at the first start.
    ///
    /// # Errors
    /// It cannot be read or made, or is not a key. Then nothing is made up: every snapshot would be lost.
    pub fn open(path: &Path) -> Result<Self> {
        let found = files::read_limited(path, LENGTH as u64).at(path)?;
        let key = match found {
            Some(bytes) => bytes
                .try_into()
                .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not a key of 32 bytes"))
                .at(path)?,
            None => {
                let mut key = [0; LENGTH];
                getrandom::fill(&mut key).map_err(io::Error::from).at(path)?;
                files::write_atomic(path, &key, 0o600).at(path)?;
                key
            }
        };
        Ok(Self { key })
    }

    /// The document with this body. `kind` is part of what is signed: one kind does not pass for another.
    ///
    /// # Errors
    /// The body has no JSON form.
    pub fn sign<T: Serialize>(&self, kind: &str, body: &T) -> io::Result<Vec<u8>> {
        let body = serde_json::value::to_raw_value(body)?;
        let mac = hex(&self.mac(kind, body.get()).finalize().into_bytes());
        Ok(serde_json::to_vec(&Document { body: &body, mac })?)
    }

    /// The body of a document, and whether it was signed here.
    ///
    /// # Errors
    /// It is not such a document.
    pub fn read<T: DeserializeOwned>(&self, kind: &str, document: &[u8]) -> io::Result<(T, bool)> {
        let Document { body, mac } = serde_json::from_slice(document)?;
        let expected = self.mac(kind, body.get());
        let authentic = unhex(&mac).is_some_and(|mac| expected.verify_slice(&mac).is_ok());
        Ok((serde_json::from_str(body.get())?, authentic))
    }

    fn mac(&self, kind: &str, body: &str) -> Hmac<Sha256> {
        let mut mac =
            <Hmac<Sha256> as Mac>::new_from_slice(&self.key).expect("HMAC takes keys of any length");
        mac.update(&(kind.len() as u64).to_le_bytes());
        mac.update(kind.as_bytes());
        mac.update(body.as_bytes());
        mac
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let pairs = text.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, os::unix::fs::PermissionsExt};

    use proptest::prelude::*;

    use super::*;

    fn signer() -> Signer {
        Signer { key: [7; LENGTH] }
    }

    #[test]
    fn the_key_is_made_once_for_us_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let first = Signer::open(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert_eq!(Signer::open(&path).unwrap().key, first.key);
        assert_ne!(Signer::open(&dir.path().join("other")).unwrap().key, first.key);

        std::fs::write(&path, b"short").unwrap();
        assert!(Signer::open(&path).is_err());
    }

    #[test]
    fn hmac_is_that_of_the_standard() {
        // RFC 4231, test case 2, through the crate that is used here.
        let mut mac = <Hmac<Sha256> as Mac>::new_from_slice(b"Jefe").unwrap();
        mac.update(b"what do ya want for nothing?");
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hex(&mac.finalize().into_bytes()), expected);
    }

    proptest! {
        #[test]
        fn whatever_is_changed_is_noticed(
            body in prop::collection::btree_map("[a-z]{1,4}", any::<u32>(), 0..4),
            at in any::<prop::sample::Index>(),
            bit in 0..8u32,
        ) {
            let document = signer().sign("a", &body).unwrap();
            prop_assert_eq!(&signer().read::<BTreeMap<String, u32>>("a", &document).unwrap(), &(body, true));
            prop_assert!(!signer().read::<BTreeMap<String, u32>>("b", &document).unwrap().1);
            let other = Signer { key: [8; LENGTH] };
            prop_assert!(!other.read::<BTreeMap<String, u32>>("a", &document).unwrap().1);

            let mut changed = document.clone();
            let at = at.index(changed.len());
            changed[at] ^= 1 << bit;
            if let Ok((_, true)) = signer().read::<BTreeMap<String, u32>>("a", &changed) {
                // Only how the MAC is written may differ.
                prop_assert!(changed.eq_ignore_ascii_case(&document));
            }
        }
    }
}
