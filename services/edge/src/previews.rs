//! The tokens of signed previews: made, listed, revoked, checked.
//!
//! Owns: the key and a record per token below the state directory, a copy in memory. A token is checked by its signature and its
//! time; the record says what was made and what is revoked, and goes when the token has expired. Refuses to know: HTTP, D-Bus.

use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use pandastack_bus::{
    Error, Result,
    edge::{PreviewInfo, PreviewSpec},
};
use pandastack_daemon::{
    files,
    records::{Records, RecordsError},
};
use serde::{Deserialize, Serialize};

use crate::token::{Claim, KEY_BYTES, Key, public_name};

/// Tokens of a workspace that are good at one time.
pub const PER_WORKSPACE: usize = 1000;
/// Seconds that a token is good at most.
pub const MAX_TTL: u64 = 604_800;
const KEY_FILE: &str = "preview.key";

/// A token on disk, keyed by its public name. Its secret is not kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    workspace: String,
    sandbox: String,
    port: u16,
    paths: Vec<String>,
    created_unix: u64,
    expires_unix: u64,
    #[serde(default)]
    revoked: bool,
}

/// Why the tokens are not usable.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The records cannot be opened.
    #[error("the records of previews cannot be opened")]
    Records(#[from] RecordsError),
    /// The key cannot be read or made.
    #[error("the key of previews")]
    Key(#[source] io::Error),
}

/// All tokens. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Previews(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    key: Key,
    memory: RwLock<HashMap<String, Record>>,
    disk: Arc<Records<Record>>,
    /// Changes come one after another.
    changes: tokio::sync::Mutex<()>,
}

/// Seconds since 1970.
pub fn now_unix() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

fn info(id: &str, record: &Record) -> PreviewInfo {
    PreviewInfo {
        id: id.to_owned(),
        workspace: record.workspace.clone(),
        sandbox: record.sandbox.clone(),
        port: record.port,
        paths: record.paths.clone(),
        created_unix: record.created_unix,
        expires_unix: record.expires_unix,
    }
}

impl Previews {
    /// Opens the records and the key; makes the key if there is none. Blocking.
    pub fn open(state: &Path) -> std::result::Result<Self, OpenError> {
        let key = open_key(&state.join(KEY_FILE)).map_err(OpenError::Key)?;
        let disk = Records::open(&state.join("previews"))?;
        let memory = RwLock::new(disk.iter()?.into_iter().collect());
        Ok(Self(Arc::new(Shared { key, memory, disk: Arc::new(disk), changes: tokio::sync::Mutex::new(()) })))
    }

    /// See [`Records::is_poisoned`].
    pub fn is_poisoned(&self) -> bool {
        self.0.disk.is_poisoned()
    }

    /// What a token allows now; `None` when it is not ours, has expired or is revoked. With it, its public name.
    pub fn check(&self, token: &str, now_unix: u64) -> Option<(Claim, String)> {
        let claim = self.0.key.verify(token)?;
        let id = public_name(token);
        let memory = self.0.memory.read().unwrap_or_else(PoisonError::into_inner);
        let revoked = memory.get(&id).is_some_and(|record| record.revoked);
        (!revoked && now_unix < claim.expires_unix).then_some((claim, id))
    }

    /// Makes a token.
    pub async fn mint(&self, spec: PreviewSpec, now_unix: u64) -> Result<(String, PreviewInfo)> {
        let sandbox = spec.sandbox.parse();
        let sandbox = sandbox.map_err(|_| Error::InvalidArgument("not a sandbox id".into()))?;
        let bad_path =
            |path: &String| !path.starts_with('/') || path.contains(['|', ',']) || path.len() > 300;
        let bad = spec.port == 0
            || !(1..=MAX_TTL).contains(&spec.ttl_seconds)
            || spec.workspace.is_empty()
            || spec.workspace.contains('|')
            || spec.workspace.len() > 64
            || spec.paths.len() > 32
            || spec.paths.iter().any(bad_path);
        if bad {
            return Err(Error::InvalidArgument(
                "a preview needs a workspace, a port, 1 to 604800 seconds, and paths".into(),
            ));
        }
        let _turn = self.0.changes.lock().await;
        self.forget_expired(now_unix).await?;
        if self.good(&spec.workspace, "", now_unix).len() >= PER_WORKSPACE {
            return Err(Error::Quota(format!(
                "the workspace has {PER_WORKSPACE} previews already; revoke one first"
            )));
        }
        let mut claim = Claim {
            sandbox,
            port: spec.port,
            expires_unix: now_unix + spec.ttl_seconds,
            workspace: spec.workspace,
            paths: spec.paths,
        };
        // The same claim is the same token: each gets a second of its own, so that revoking one leaves the others.
        let (token, id) = loop {
            let token = self.0.key.sign(&claim);
            let id = public_name(&token);
            if !self.0.memory.read().unwrap_or_else(PoisonError::into_inner).contains_key(&id) {
                break (token, id);
            }
            claim.expires_unix += 1;
        };
        let record = Record {
            workspace: claim.workspace,
            sandbox: claim.sandbox.to_string(),
            port: claim.port,
            paths: claim.paths,
            created_unix: now_unix,
            expires_unix: claim.expires_unix,
            revoked: false,
        };
        let info = info(&id, &record);
        self.put(id, record).await?;
        Ok((token, info))
    }

    /// Revokes a token, given by its public name or in full; answers the name of a good one that was.
    pub async fn revoke(
        &self,
        workspace: &str,
        sandbox: &str,
        token: &str,
        now_unix: u64,
    ) -> Result<Option<String>> {
        let id = if token.contains('.') { public_name(token) } else { token.to_owned() };
        let _turn = self.0.changes.lock().await;
        let found = self.good(workspace, sandbox, now_unix).into_iter().find(|info| info.id == id);
        if found.is_none() {
            return Ok(None);
        }
        let record = self.0.memory.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let Some(record) = record else { return Ok(None) };
        self.put(id.clone(), Record { revoked: true, ..record }).await?;
        Ok(Some(id))
    }

    /// Tokens that are good now, oldest first. An empty workspace or sandbox stands for any.
    pub fn good(&self, workspace: &str, sandbox: &str, now_unix: u64) -> Vec<PreviewInfo> {
        let memory = self.0.memory.read().unwrap_or_else(PoisonError::into_inner);
        let mut found: Vec<PreviewInfo> = memory
            .iter()
            .filter(|(_, record)| !record.revoked && now_unix < record.expires_unix)
            .filter(|(_, record)| workspace.is_empty() || record.workspace == workspace)
            .filter(|(_, record)| sandbox.is_empty() || record.sandbox == sandbox)
            .map(|(id, record)| info(id, record))
            .collect();
        found.sort_by(|one, two| (one.created_unix, &one.id).cmp(&(two.created_unix, &two.id)));
        found
    }

    /// Forgets tokens that have expired.
    async fn forget_expired(&self, now_unix: u64) -> Result<()> {
        let expired: Vec<String> = {
            let memory = self.0.memory.read().unwrap_or_else(PoisonError::into_inner);
            memory
                .iter()
                .filter(|(_, record)| record.expires_unix <= now_unix)
                .map(|(id, _)| id.clone())
                .collect()
        };
        for id in expired {
            let key = id.clone();
            self.blocking(move |disk| disk.remove(&key)).await?;
            self.0.memory.write().unwrap_or_else(PoisonError::into_inner).remove(&id);
        }
        Ok(())
    }

    async fn put(&self, id: String, record: Record) -> Result<()> {
        let (key, value) = (id.clone(), record.clone());
        self.blocking(move |disk| disk.put(&key, &value)).await?;
        self.0.memory.write().unwrap_or_else(PoisonError::into_inner).insert(id, record);
        Ok(())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Records<Record>) -> std::result::Result<T, RecordsError> + Send + 'static,
    ) -> Result<T> {
        let disk = Arc::clone(&self.0.disk);
        let done = tokio::task::spawn_blocking(move || work(&disk)).await;
        let done = done.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()));
        done.map_err(|error| match error {
            RecordsError::Full { .. } => Error::NoSpace("no space is left for the preview's record".into()),
            error => {
                tracing::error!("{}", pandastack_daemon::chain(&error));
                Error::Internal("the record of a preview".into())
            }
        })
    }
}

fn open_key(path: &Path) -> io::Result<Key> {
    if let Some(bytes) = files::read_limited(path, KEY_BYTES as u64)? {
        return Key::from_bytes(&bytes)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a key"));
    }
    let key = Key::random();
    files::write_atomic(path, key.as_bytes(), 0o600)?;
    tracing::info!("a key for previews was made");
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn spec(workspace: &str, ttl_seconds: u64) -> PreviewSpec {
        PreviewSpec {
            workspace: workspace.into(),
            sandbox: "abcdefghij0123456789".into(),
            port: 3000,
            ttl_seconds,
            paths: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_token_is_good_until_it_expires_or_is_revoked_and_that_is_remembered() {
        let state = tempfile::tempdir().unwrap();
        let previews = Previews::open(state.path()).unwrap();
        let (one, info) = previews.mint(spec("a", 60), NOW).await.unwrap();
        let (two, _) = previews.mint(spec("a", 60), NOW).await.unwrap();
        assert_ne!(one, two, "each is revoked by itself");
        assert_eq!(previews.check(&one, NOW + 59).unwrap().1, info.id);
        assert!(previews.check(&one, NOW + 60).is_none());

        for (workspace, sandbox, token) in
            [("b", "", &one), ("a", "x", &one), ("a", "", &"nothing".to_owned())]
        {
            assert_eq!(previews.revoke(workspace, sandbox, token, NOW).await, Ok(None));
        }
        assert_eq!(previews.revoke("a", "abcdefghij0123456789", &one, NOW).await, Ok(Some(info.id.clone())));
        assert_eq!(previews.revoke("a", "", &info.id, NOW).await, Ok(None), "only once");
        assert!(previews.check(&one, NOW).is_none() && previews.check(&two, NOW).is_some());
        drop(previews);

        let previews = Previews::open(state.path()).unwrap();
        assert!(previews.check(&one, NOW).is_none() && previews.check(&two, NOW).is_some());
        assert_eq!(previews.good("a", "", NOW).len(), 1);
        previews.mint(spec("a", 60), NOW + 100).await.unwrap();
        assert_eq!(previews.0.disk.iter().unwrap().len(), 1, "what has expired is forgotten");
        assert!(previews.check(&one, NOW + 100).is_none());
    }

    #[tokio::test]
    async fn a_new_key_ends_all_tokens() {
        let state = tempfile::tempdir().unwrap();
        let previews = Previews::open(state.path()).unwrap();
        let (token, _) = previews.mint(spec("a", 60), NOW).await.unwrap();
        drop(previews);
        std::fs::remove_file(state.path().join(KEY_FILE)).unwrap();
        assert!(Previews::open(state.path()).unwrap().check(&token, NOW).is_none());
    }

    #[tokio::test]
    async fn wrong_specs_make_nothing() {
        let state = tempfile::tempdir().unwrap();
        let previews = Previews::open(state.path()).unwrap();
        for bad in [
            spec("a", 0),
            spec("a", MAX_TTL + 1),
            spec("", 1),
            spec("a|b", 1),
            PreviewSpec { port: 0, ..spec("a", 1) },
            PreviewSpec { sandbox: "x".into(), ..spec("a", 1) },
            PreviewSpec { paths: vec!["a".into()], ..spec("a", 1) },
            PreviewSpec { paths: vec!["/a,b".into()], ..spec("a", 1) },
        ] {
            assert!(
                matches!(previews.mint(bad.clone(), NOW).await, Err(Error::InvalidArgument(_))),
                "{bad:?}"
            );
        }
        assert!(previews.good("", "", NOW).is_empty());
    }
}
