//! What is on disk about a tenant. Pure.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{auth::hex, limit::Rate, scope::Grant};

/// A workspace on disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workspace {
    /// Unix milliseconds.
    pub created_unix_ms: u64,
    /// How much it may ask, where that is not what holds for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<Rate>,
}

impl Workspace {
    /// Its id as an organisation, of the form of a UUID. One that is made anew under the same name is another one.
    pub fn org_id(&self, name: &str) -> String {
        let digest = Sha256::new()
            .chain_update("org\0")
            .chain_update(name)
            .chain_update(self.created_unix_ms.to_be_bytes())
            .finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        // Version 8 (of our own making), variant 1.
        bytes[6] = bytes[6] & 0x0f | 0x80;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex = hex(&bytes);
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    }
}

/// A token on disk, keyed by its prefix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenRecord {
    /// SHA-256 of the token, hexadecimal.
    pub hash: String,
    /// Workspace it opens.
    pub workspace: String,
    /// Free text.
    pub label: String,
    /// Unix milliseconds.
    pub created_unix_ms: u64,
    /// Unix milliseconds; 0 means never.
    pub expires_unix_ms: u64,
    /// Unix milliseconds; 0 means not yet. At most a minute old.
    pub last_used_unix_ms: u64,
    /// Came from the system credential.
    #[serde(default)]
    pub preset: bool,
    /// What it may do.
    #[serde(default)]
    pub grant: Grant,
}

/// What a new token shall be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NewToken {
    /// Free text.
    pub label: String,
    /// 0 means for ever.
    pub expires_in_days: u32,
    /// What it may do.
    pub grant: Grant,
}
