//! The id of a sandbox: one text that is unit instance, user suffix, cgroup, directory and DNS label at once.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize};

/// Twenty characters of `[a-z0-9]`, about 103 bits of randomness. Never used twice.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SandboxId(String);

/// The text is not an id. Says nothing about whether a sandbox of that name ever existed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a sandbox id: 20 characters of a-z and 0-9 are expected")]
pub struct BadId;

impl SandboxId {
    /// Length of an id in characters.
    pub const LEN: usize = 20;
    const ALPHABET: &'static [u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

    /// A fresh random id from the kernel's generator.
    pub fn random() -> Self {
        let mut text = String::with_capacity(Self::LEN);
        let mut pool = [0u8; 64];
        while text.len() < Self::LEN {
            getrandom::fill(&mut pool).expect("the kernel's random generator answers once the machine is up");
            // 252 is the largest multiple of 36 in a byte: dropping the rest keeps every character equally likely.
            for byte in pool.iter().filter(|byte| **byte < 252).take(Self::LEN - text.len()) {
                text.push(char::from(Self::ALPHABET[usize::from(byte % 36)]));
            }
        }
        Self(text)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SandboxId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        let good =
            text.len() == Self::LEN && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if good { Ok(Self(text.to_owned())) } else { Err(BadId) }
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for SandboxId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for SandboxId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_parses_and_differs_from_the_next() {
        let (one, two) = (SandboxId::random(), SandboxId::random());

        assert_eq!(one.as_str().parse(), Ok(one.clone()));
        assert_ne!(one, two);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "short",
            "ABCDEFGHIJKLMNOPQRST",
            "../../../etc/passwd!",
            "aaaaaaaaaaaaaaaaaaaaa",
            "aaaaaaaaaa aaaaaaaaa",
        ] {
            assert_eq!(text.parse::<SandboxId>(), Err(BadId), "{text:?}");
        }
    }
}
