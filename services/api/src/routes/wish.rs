//! What a caller wishes, made exact: a new sandbox, labels, the name of a request.
//!
//! Owns: limits, reserved labels, whose a template, snapshot or volume is. Refuses to know: how any of it is made.

use std::collections::BTreeMap;

use http::{HeaderMap, StatusCode};
use pandastack_bus::{SandboxId, storage::VolumeUse, vmm::SandboxSpec};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use super::{
    lifecycle::ttl,
    snapshots::own_snapshot,
    templates::is_name,
    volumes::{NAME_RULE, own_volume, shown},
};
use crate::{
    app::App,
    auth::hex,
    input::{text, whole},
    problem::Problem,
    wire::SECRET,
};

const DEFAULT_TEMPLATE: &str = "base";
const METADATA_ENTRIES: usize = 64;
/// Bytes of all keys and values together.
const METADATA_BYTES: usize = 64 << 10;
/// Also vmm's limit.
const MAX_DISK_GB: u64 = 1024;
/// Where the digest of an idempotent request is kept: among the labels, where nobody sees it.
pub const DIGEST_KEY: &str = "secret.pandastack.request";
/// How the name of a request without a key begins.
const ONCE: &str = "once-";
/// As many drives of each kind every template was baked with.
const VOLUMES_OF_A_KIND: usize = 4;

/// What a new sandbox shall be. Unknown fields are ignored, `cpu` and `memory_mb` among them: a template has its size.
#[derive(Debug, Default, Deserialize, ToSchema)]
pub struct CreateSandbox {
    /// Name or alias of a template; `base` when absent.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    pub template: Option<String>,
    /// Snapshot to start from. Its template and sizes hold, whatever `template` and `disk_gb` say.
    #[schema(max_length = 64)]
    pub from_snapshot: Option<String>,
    /// Size of the root disk in GiB, at least the template's; absent or 0 means the template's.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 1024)]
    pub disk_gb: Option<u64>,
    /// Seconds without a request after which it is deleted, at most 30 days; absent or 0 means an hour.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2592000)]
    pub ttl_seconds: Option<u64>,
    /// Exempt from the idle limit.
    pub persistent: Option<bool>,
    /// Labels: at most 64, 64 KiB in total. `workspace` is always set by the server; those whose key begins with `secret.`
    /// are never returned.
    pub metadata: Option<BTreeMap<String, String>>,
    /// Volumes to attach, in the order of their devices: at most 4 writable and 4 read-only ones. Each is mounted at
    /// `/mnt/<name>`. Not together with `from_snapshot`.
    #[schema(max_items = 8)]
    pub volumes: Option<Vec<VolumeMount>>,
}

/// A volume to attach.
#[derive(Debug, Deserialize, ToSchema)]
pub struct VolumeMount {
    /// Its name.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9._-]+$")]
    pub name: String,
    /// Whether it is attached read-only: by many at once then, else by one sandbox only.
    #[serde(default)]
    pub read_only: Option<bool>,
}

fn reserved(key: &str, value: &str) -> bool {
    key.starts_with("fork_")
        || key.starts_with("secret.pandastack.")
        || key.strip_prefix("port.").is_some_and(|rest| rest.parse::<u32>().is_ok())
        || matches!(key, "app.id" | "app.name" | "db.label")
        || (key == "kind" && matches!(value, "app" | "database"))
}

/// Labels within their limits and with the workspace; reserved keys are refused.
pub fn labels(
    wished: BTreeMap<String, String>,
    workspace: &str,
) -> Result<BTreeMap<String, String>, Problem> {
    let labels = bounded(wished, workspace)?;
    if let Some((key, _)) = labels.iter().find(|(key, value)| reserved(key, value)) {
        return Err(
            Problem::invalid(format!("metadata key {} is reserved", shown(key))).with("field", "metadata")
        );
    }
    Ok(labels)
}

/// As [`labels`]; reserved keys are left out, so that a child can be given its parent's labels.
pub fn unreserved_labels(
    wished: BTreeMap<String, String>,
    workspace: &str,
) -> Result<BTreeMap<String, String>, Problem> {
    let mut labels = bounded(wished, workspace)?;
    labels.retain(|key, value| !reserved(key, value));
    Ok(labels)
}

fn bounded(wished: BTreeMap<String, String>, workspace: &str) -> Result<BTreeMap<String, String>, Problem> {
    if wished.len() > METADATA_ENTRIES {
        return Err(Problem::invalid(format!("field `metadata` has over {METADATA_ENTRIES} entries"))
            .with("field", "metadata"));
    }
    if wished.iter().map(|(key, value)| key.len() + value.len()).sum::<usize>() > METADATA_BYTES {
        let sentence =
            format!("field `metadata` is over {} KiB, keys and values together", METADATA_BYTES >> 10);
        return Err(Problem::invalid(sentence).with("field", "metadata"));
    }
    for (key, value) in &wished {
        if key.is_empty() {
            return Err(Problem::invalid("field `metadata` has an empty key").with("field", "metadata"));
        }
        text("metadata", key, 256)?;
        text("metadata", value, 16 << 10)?;
    }
    let mut labels = wished;
    labels.insert("workspace".into(), workspace.to_owned());
    Ok(labels)
}

/// The caller's name for the wish.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    match value.to_str() {
        Ok(key) if (1..=255).contains(&key.trim().len()) => Ok(Some(key.trim().to_owned())),
        _ => Err(Problem::invalid("the header Idempotency-Key has 1 to 255 printable ASCII characters")),
    }
}

/// The name for vmm of a request without a key, which it need not remember for long.
pub fn once() -> String {
    format!("{ONCE}{}", SandboxId::random())
}

/// The request's name for vmm: never the same for two workspaces, never guessable without the key.
pub fn request_name(workspace: &str, key: &str) -> String {
    let digest = Sha256::new().chain_update(workspace).chain_update([0]).chain_update(key).finalize();
    hex(&digest[..20])
}

/// What a wish was, secrets included. With the key in it, nobody guesses a short secret from the digest alone.
pub fn digest(key: &str, wish: &impl Serialize) -> String {
    let wish = serde_json::to_vec(wish).unwrap_or_default();
    hex(&Sha256::new().chain_update(key).chain_update([0]).chain_update(wish).finalize())
}

/// Takes the `secret.` labels out. Nothing reads them yet and vmm keeps labels in the clear on disk, so they end here; of
/// an idempotent request only the digest goes on.
pub fn without_secrets(labels: &mut BTreeMap<String, String>) {
    labels.retain(|key, _| !key.starts_with(SECRET));
}

/// A wish made exact, its owner checked, or a refusal.
pub async fn specify(app: &App, wish: CreateSandbox, workspace: &str) -> Result<SandboxSpec, Problem> {
    let volumes = attachments(wish.volumes.unwrap_or_default())?;
    let from_snapshot = wish.from_snapshot.filter(|snapshot| !snapshot.is_empty());
    if from_snapshot.is_some() && !volumes.is_empty() {
        return Err(Problem::invalid(
            "`volumes` do not go with `from_snapshot`: what the snapshot has comes as clones",
        )
        .with("field", "volumes"));
    }
    let ttl_seconds = ttl(wish.ttl_seconds)?;
    let metadata = labels(wish.metadata.unwrap_or_default(), workspace)?;
    let disk_gb = wish.disk_gb.unwrap_or(0);
    if disk_gb > MAX_DISK_GB {
        return Err(
            Problem::invalid(format!("field `disk_gb` is over {MAX_DISK_GB}")).with("field", "disk_gb")
        );
    }
    let persistent = wish.persistent.unwrap_or(false);
    if let Some(snapshot) = from_snapshot {
        let snapshot = own_snapshot(app, workspace, &snapshot).await?;
        if !snapshot.unusable.is_empty() {
            return Err(Problem::new(StatusCode::CONFLICT, "unusable_snapshot", snapshot.unusable));
        }
        return Ok(SandboxSpec {
            workspace: workspace.to_owned(),
            template: snapshot.spec.template,
            metadata,
            ttl_seconds,
            persistent,
            disk_mib: 0,
            snapshot: snapshot.spec.id,
            volumes,
        });
    }
    let name = wish.template.unwrap_or_else(|| DEFAULT_TEMPLATE.into());
    let template = match is_name(&name) {
        true => app.catalogue.find(&app.storage, workspace, &name).await?,
        false => None,
    };
    let Some(template) = template else {
        let shown: String = name.chars().take(64).collect();
        return Err(Problem::invalid(format!(
            "unknown template {shown:?}: not in the template catalog; GET /v1/templates lists it"
        ))
        .with("field", "template"));
    };
    let disk_mib = disk_gb * 1024;
    if disk_mib != 0 && disk_mib < template.disk_mib {
        return Err(Problem::invalid(format!(
            "field `disk_gb`: a disk only grows, and the template's has {} MiB",
            template.disk_mib
        ))
        .with("field", "disk_gb"));
    }
    for volume in &volumes {
        own_volume(app, workspace, &volume.name).await?;
    }
    Ok(SandboxSpec {
        workspace: workspace.to_owned(),
        template: template.name.clone(),
        metadata,
        ttl_seconds,
        persistent,
        disk_mib,
        snapshot: String::new(),
        volumes,
    })
}

/// The volumes of a wish, by form and number.
fn attachments(wished: Vec<VolumeMount>) -> Result<Vec<VolumeUse>, Problem> {
    let refused = |sentence: String| Err(Problem::invalid(sentence).with("field", "volumes"));
    let mut volumes: Vec<VolumeUse> = Vec::new();
    for VolumeMount { name, read_only } in wished {
        if !is_name(&name) {
            return refused(format!("{}: {NAME_RULE}", shown(&name)));
        }
        let read_only = read_only.unwrap_or(false);
        if volumes.iter().any(|volume| volume.name == name) {
            return refused(format!("volume {} is named twice", shown(&name)));
        }
        if volumes.iter().filter(|volume| volume.read_only == read_only).count() == VOLUMES_OF_A_KIND {
            return refused(format!(
                "a sandbox has at most {VOLUMES_OF_A_KIND} writable and {VOLUMES_OF_A_KIND} read-only volumes"
            ));
        }
        volumes.push(VolumeUse { name, read_only });
    }
    Ok(volumes)
}

/// 422: the key stands for another wish.
pub fn key_reused() -> Problem {
    Problem::new(
        StatusCode::UNPROCESSABLE_ENTITY,
        "idempotency_key_reused",
        "this Idempotency-Key was used for a different request",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_forced_reserved_and_bounded() {
        let one = |key: &str, value: &str| labels([(key.to_owned(), value.to_owned())].into(), "acme");
        assert_eq!(one("workspace", "other").unwrap()["workspace"], "acme");
        assert_eq!(one("kind", "demo").unwrap()["kind"], "demo");
        for (key, value) in [
            ("fork_tree_id", "x"),
            ("port.80", "web"),
            ("app.id", "x"),
            ("kind", "app"),
            ("secret.pandastack.request", "x"),
            ("", "x"),
            ("a\0", "x"),
            ("a", "\0"),
        ] {
            assert_eq!(one(key, value).unwrap_err().status.as_u16(), 400, "{key:?}");
        }
        let many = (0..=METADATA_ENTRIES).map(|i| (i.to_string(), String::new())).collect();
        assert_eq!(labels(many, "acme").unwrap_err().status.as_u16(), 400);
        let sized = |entries: usize| (0..entries).map(|i| (i.to_string(), "x".repeat(16_000))).collect();
        assert_eq!(labels(sized(4), "acme").unwrap().len(), 5);
        assert!(labels(sized(5), "acme").unwrap_err().message.contains("64 KiB"));
    }

    #[test]
    fn a_key_is_apart_per_workspace() {
        assert_ne!(request_name("a", "bc"), request_name("ab", "c"));
        assert_eq!(request_name("a", "b"), request_name("a", "b"));
    }
}
