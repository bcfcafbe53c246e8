//! Digests of contents: what files are named by and compatibility is decided with.

use std::{fmt, fmt::Write as _, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};
use sha2::{Digest as _, Sha256};

/// SHA-256 as 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Digest(String);

/// The text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a SHA-256 digest: 64 lower-case hexadecimal digits are expected")]
pub struct BadDigest;

impl Digest {
    /// Digest of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::finish(Sha256::new_with_prefix(bytes))
    }

    /// Digest of parts: each counts with its length, so that no two lists of parts are alike.
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut sum = Sha256::new();
        for part in parts {
            sum.update((part.len() as u64).to_le_bytes());
            sum.update(part);
        }
        Self::finish(sum)
    }

    /// What a running sum comes to.
    pub fn finish(sum: Sha256) -> Self {
        let mut text = String::with_capacity(64);
        for byte in sum.finalize() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let good = text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if good { Ok(Self(text.to_owned())) } else { Err(BadDigest) }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What of this machine's processor a snapshot depends on: vendor, family, model, stepping, name, features, and the
/// hypervisor below if there is one. Taken from the instruction itself, not from `/proc`: two processors of one name
/// can differ in features (an emulated one, for example).
pub fn processor() -> Digest {
    use core::arch::x86_64::__cpuid_count;

    let mut parts = Vec::new();
    // (leaf, registers that are the same on every core and at every time: EAX, EBX, ECX, EDX)
    let leaves: [(u32, [u32; 4]); 8] = [
        (0x0000_0000, [0, !0, !0, !0]),
        // EBX holds the number of the core; bit 27 of ECX says what the system has switched on.
        (0x0000_0001, [!0, 0, !(1 << 27), !0]),
        (0x0000_0007, [!0; 4]),
        (0x4000_0000, [0, !0, !0, !0]),
        (0x8000_0001, [!0, 0, !0, !0]),
        (0x8000_0002, [!0; 4]),
        (0x8000_0003, [!0; 4]),
        (0x8000_0004, [!0; 4]),
    ];
    for (leaf, mask) in leaves {
        let found = __cpuid_count(leaf, 0);
        for (register, mask) in [found.eax, found.ebx, found.ecx, found.edx].into_iter().zip(mask) {
            parts.extend((register & mask).to_le_bytes());
        }
    }
    Digest::of(&parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_that_of_sha256() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").as_str(), empty);
        assert_eq!(empty.parse(), Ok(Digest::of(b"")));
        for bad in ["", "../../etc/passwd", &empty[1..], &empty.to_uppercase()] {
            assert_eq!(bad.parse::<Digest>(), Err(BadDigest));
        }
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        assert_ne!(Digest::of_parts(&[b"ab", b"c"]), Digest::of_parts(&[b"a", b"bc"]));
        assert_ne!(Digest::of_parts(&[b"a"]), Digest::of_parts(&[b"a", b""]));
    }

    #[test]
    fn the_processor_is_the_same_on_every_core() {
        let first = processor();
        let others: Vec<_> = (0..16).map(|_| std::thread::spawn(processor)).collect();
        for other in others {
            assert_eq!(other.join().unwrap(), first);
        }
    }
}
