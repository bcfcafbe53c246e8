//! JSON types that several routes share.

use std::collections::BTreeMap;

use pandastack_bus::vmm::{SandboxInfo, State};
use serde::Serialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use utoipa::ToSchema;

/// Label keys with this prefix are accepted and never returned.
pub const SECRET: &str = "secret.";

/// Every answer that is not a success.
#[derive(Debug, Serialize, ToSchema)]
pub struct Error {
    /// One sentence for people.
    #[schema(min_length = 1)]
    pub error: String,
    /// One word for programs.
    pub code: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// The request's id, also in the header `x-request-id` and in the journal.
    pub request_id: String,
    /// More about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The field that was wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
}

/// A sandbox.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Sandbox {
    /// Its id: 20 characters of `a-z0-9`.
    pub id: String,
    /// Template it came from.
    pub template: String,
    /// Virtual processors.
    pub cpu: u32,
    /// Guest memory in MiB.
    pub memory_mb: u64,
    /// Root disk in MiB.
    pub disk_mb: u64,
    /// `creating`, `running`, `paused`, `hibernated`, `stopping` or `failed`.
    pub status: String,
    /// Why it is `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Outside IPv4 address; absent while it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_ip: Option<String>,
    /// Labels, with `workspace`, without `secret.` keys.
    pub metadata: BTreeMap<String, String>,
    /// Milliseconds from the request to the guest's first answer.
    pub boot_ms: u64,
    /// `snapshot` for a restored guest, `fork` for a child of a fork, `wake` for one that was woken, `cold` for a booted one.
    pub boot_mode: String,
    /// Snapshot that it was created from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_snapshot: Option<String>,
    /// Sandbox that it was forked from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parent_id: Option<String>,
    /// Volumes that it has.
    pub volumes: Vec<Mount>,
    /// RFC 3339.
    pub created_at: String,
    /// Exempt from the idle limit.
    pub persistent: bool,
    /// Idle limit in seconds.
    pub ttl_seconds: u64,
}

/// A volume as a sandbox has it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Mount {
    /// Its name.
    pub name: String,
    /// Where the guest has it.
    pub path: String,
    /// Writes are refused by the host.
    pub read_only: bool,
    /// A clone of the sandbox's own, which ends with it: that of a fork's or a snapshot's child.
    pub private: bool,
}

impl From<SandboxInfo> for Sandbox {
    fn from(info: SandboxInfo) -> Self {
        let given = |text: String| (!text.is_empty()).then_some(text);
        let mut metadata = info.metadata;
        metadata.retain(|key, _| !key.starts_with(SECRET));
        metadata.insert("workspace".into(), info.workspace);
        Self {
            id: info.id,
            template: info.template,
            cpu: info.vcpus,
            memory_mb: info.memory_mib,
            disk_mb: info.disk_mib,
            status: info.state.as_str().to_owned(),
            reason: (info.state == State::Failed).then_some(info.reason),
            guest_ip: given(info.guest_ip),
            metadata,
            boot_ms: info.boot_ms,
            boot_mode: info.boot_mode,
            from_snapshot: given(info.snapshot),
            parent_id: given(info.parent),
            volumes: info
                .mounts
                .into_iter()
                .map(|mount| Mount {
                    name: mount.name,
                    path: mount.path,
                    read_only: mount.read_only,
                    private: mount.private,
                })
                .collect(),
            created_at: rfc3339(info.created_unix_ms),
            persistent: info.persistent,
            ttl_seconds: info.ttl_seconds,
        }
    }
}

/// A time as RFC 3339 in UTC.
pub fn rfc3339(unix_ms: u64) -> String {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000)
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_else(|| "1970-01-01T00:00:00Z".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc() {
        assert_eq!(rfc3339(1_767_323_045_250), "2026-01-02T03:04:05.25Z");
        assert_eq!(rfc3339(u64::MAX), "1970-01-01T00:00:00Z");
    }
}
