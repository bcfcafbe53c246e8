//! Workspaces and tokens: who exists, and what opens what.
//!
//! Owns: the records below the state directory (`workspaces/`, `tokens/`, `boot/`), a copy of them in memory, first boot.
//! Refuses to know: HTTP and D-Bus.
//!
//! A token is kept as its SHA-256 hash; its secret is shown once, when it is made. Records change on disk first, then
//! in memory. All changes are taken one after another.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use pandastack_daemon::records::{Records, RecordsError};
use serde::{Deserialize, Serialize};

use crate::{
    auth::{Caller, Token, same_hash},
    limit::{MOST, RATE, Rate},
    scope::Grant,
};

pub use crate::tenant::{NewToken, TokenRecord, Workspace};

/// The workspace that exists from the first boot on.
pub const DEFAULT_WORKSPACE: &str = "default";
/// Tokens a workspace may have.
pub const TOKENS_PER_WORKSPACE: usize = 1000;
/// Names that somebody could take for more than a tenant. No name has rights of its own here; `default` is a workspace like
/// any other.
const RESERVED: [&str; 12] = [
    "admin",
    "administrator",
    "anonymous",
    "api",
    "internal",
    "operator",
    "pandastack",
    "public",
    "root",
    "system",
    "www",
    "me",
];
const LAST_USED_STEP_MS: u64 = 60_000;
const DAY_MS: u64 = 86_400_000;

/// What happened at boots before this one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Boot {
    /// A first token was handed out, one way or the other.
    first_token: bool,
    /// Hash of the credential that was applied last.
    preset: String,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum TenancyError {
    /// Choose another name.
    #[error("a workspace name is a DNS label of at most 40 characters (a-z, 0-9, -) and not reserved")]
    BadName,
    /// Make the workspace first.
    #[error("workspace {0:?} does not exist")]
    NoWorkspace(String),
    /// Shorten the label or the time.
    #[error("{0}")]
    BadToken(&'static str),
    /// Revoke one first.
    #[error("the workspace has {TOKENS_PER_WORKSPACE} tokens already; revoke one first")]
    TooMany,
    /// Use another token.
    #[error("a token that may not do everything makes no others")]
    NotWhole,
    /// Ask for less, or more.
    #[error(
        "a workspace has 1 to {MOST} requests per second, a burst of 1 to {MOST}, and up to {MOST} tool calls a minute"
    )]
    BadRate,
    /// The default workspace stays.
    #[error("the default workspace cannot be deleted")]
    Permanent,
    /// The disk did not take it.
    #[error("the records cannot be changed")]
    Records(#[from] RecordsError),
}

/// Everything about tenants. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Tenancy(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    memory: RwLock<Memory>,
    disk: Arc<Disk>,
    changes: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Memory {
    workspaces: BTreeMap<String, Workspace>,
    tokens: HashMap<String, TokenRecord>,
}

#[derive(Debug)]
struct Disk {
    workspaces: Records<Workspace>,
    tokens: Records<TokenRecord>,
    boot: Records<Boot>,
}

/// Milliseconds since 1970.
pub fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

impl Tenancy {
    /// Opens the records. Blocking.
    pub fn open(state: &Path) -> Result<Self, RecordsError> {
        let disk = Disk {
            workspaces: Records::open(&state.join("workspaces"))?,
            tokens: Records::open(&state.join("tokens"))?,
            boot: Records::open(&state.join("boot"))?,
        };
        let memory = Memory {
            workspaces: disk.workspaces.iter()?.into_iter().collect(),
            tokens: disk.tokens.iter()?.into_iter().collect(),
        };
        Ok(Self(Arc::new(Shared {
            memory: RwLock::new(memory),
            disk: Arc::new(disk),
            changes: tokio::sync::Mutex::new(()),
        })))
    }

    /// See [`Records::is_poisoned`].
    pub fn is_poisoned(&self) -> bool {
        let disk = &self.0.disk;
        disk.workspaces.is_poisoned() || disk.tokens.is_poisoned() || disk.boot.is_poisoned()
    }

    /// Makes the default workspace, applies the preset token, and without one hands a fresh first token to `show`, once
    /// in the life of this appliance. When `show` fails nothing is remembered and the next start tries again.
    pub async fn first_boot(
        &self,
        preset: Option<Token>,
        show: impl FnOnce(&Token) -> std::io::Result<()>,
    ) -> Result<(), TenancyError> {
        self.create_workspace(DEFAULT_WORKSPACE).await?;
        let _turn = self.0.changes.lock().await;
        let boot = self.blocking(|disk| disk.boot.get("boot")).await?.unwrap_or_default();
        let after = match preset {
            Some(token) if same_hash(&token.hash(), &boot.preset) => return Ok(()),
            Some(token) => {
                self.forget_presets().await?;
                let grant = Grant::default();
                self.put_token(&token, DEFAULT_WORKSPACE, "preset", 0, true, grant).await?;
                tracing::info!(token = token.prefix(), "the preset token opens the default workspace");
                Boot { first_token: true, preset: token.hash() }
            }
            None if boot.first_token => return Ok(()),
            None => {
                let token = Token::random();
                if let Err(error) = show(&token) {
                    tracing::error!(%error, "the first token could not be shown on the console; none was made");
                    return Ok(());
                }
                let grant = Grant::default();
                self.put_token(&token, DEFAULT_WORKSPACE, "first boot", 0, false, grant).await?;
                tracing::info!(token = token.prefix(), "a first token was written to the console");
                Boot { first_token: true, ..boot }
            }
        };
        self.blocking(move |disk| disk.boot.put("boot", &after)).await?;
        Ok(())
    }

    /// Whom a token belongs to; `None` when it opens nothing (any more). Records its use.
    pub fn authenticate(&self, token: &Token, now: u64) -> Option<Caller> {
        let (caller, stale) = {
            let memory = self.read();
            let record = memory.tokens.get(token.prefix())?;
            if !same_hash(&record.hash, &token.hash())
                || (record.expires_unix_ms != 0 && record.expires_unix_ms <= now)
                || !memory.workspaces.contains_key(&record.workspace)
            {
                return None;
            }
            let caller = Caller {
                workspace: record.workspace.clone(),
                prefix: token.prefix().to_owned(),
                grant: record.grant.clone(),
            };
            (caller, now.saturating_sub(record.last_used_unix_ms) >= LAST_USED_STEP_MS)
        };
        if stale {
            self.used(&caller.prefix, now);
        }
        Some(caller)
    }

    /// Makes a workspace; answers whether it is new.
    pub async fn create_workspace(&self, name: &str) -> Result<bool, TenancyError> {
        let _turn = self.0.changes.lock().await;
        if self.has_workspace(name) {
            return Ok(false);
        }
        check_name(name)?;
        let (key, value) = (name.to_owned(), Workspace { created_unix_ms: now_ms(), rate: None });
        let record = value.clone();
        self.blocking(move |disk| disk.workspaces.put(&key, &record)).await?;
        self.write().workspaces.insert(name.to_owned(), value);
        Ok(true)
    }

    /// Names of all workspaces.
    pub fn workspaces(&self) -> Vec<String> {
        self.read().workspaces.keys().cloned().collect()
    }

    /// Whether a workspace exists.
    pub fn has_workspace(&self, name: &str) -> bool {
        self.read().workspaces.contains_key(name)
    }

    /// A workspace.
    pub fn workspace(&self, name: &str) -> Option<Workspace> {
        self.read().workspaces.get(name).cloned()
    }

    /// Whether a text names a workspace as an organisation, by id or by name.
    pub fn is_org(&self, workspace: &str, text: &str) -> bool {
        self.workspace(workspace).is_some_and(|found| text == workspace || text == found.org_id(workspace))
    }

    /// How much a workspace may ask.
    pub fn rate(&self, workspace: &str) -> Rate {
        self.read().workspaces.get(workspace).and_then(|found| found.rate).unwrap_or(RATE)
    }

    /// Sets how much a workspace may ask, from now on; nothing: what holds for all.
    pub async fn set_rate(&self, name: &str, rate: Option<Rate>) -> Result<(), TenancyError> {
        let good = |Rate { per_second, burst, tool_calls }: Rate| {
            (1..=MOST).contains(&per_second) && (1..=MOST).contains(&burst) && tool_calls <= MOST
        };
        if !rate.is_none_or(good) {
            return Err(TenancyError::BadRate);
        }
        let _turn = self.0.changes.lock().await;
        let missing = || TenancyError::NoWorkspace(name.chars().take(64).collect());
        let value = Workspace { rate, ..self.workspace(name).ok_or_else(missing)? };
        let (key, record) = (name.to_owned(), value.clone());
        self.blocking(move |disk| disk.workspaces.put(&key, &record)).await?;
        self.write().workspaces.insert(name.to_owned(), value);
        Ok(())
    }

    /// Removes a workspace and its tokens; answers whether it was there. The caller has made sure that it is empty.
    pub async fn delete_workspace(&self, name: &str) -> Result<bool, TenancyError> {
        if name == DEFAULT_WORKSPACE {
            return Err(TenancyError::Permanent);
        }
        let _turn = self.0.changes.lock().await;
        if !self.has_workspace(name) {
            return Ok(false);
        }
        let prefixes: Vec<String> = self.tokens(name).into_iter().map(|(prefix, _)| prefix).collect();
        for prefix in prefixes {
            self.drop_token(&prefix).await?;
        }
        let key = name.to_owned();
        self.blocking(move |disk| disk.workspaces.remove(&key)).await?;
        self.write().workspaces.remove(name);
        Ok(true)
    }

    /// Makes a token.
    pub async fn create_token(
        &self,
        workspace: &str,
        wish: NewToken,
    ) -> Result<(Token, TokenRecord), TenancyError> {
        self.make_token(workspace, wish, 0).await
    }

    /// Makes a token on behalf of another one, which it never outlives: its time is cut to that of the caller's.
    pub async fn mint(&self, caller: &Caller, wish: NewToken) -> Result<(Token, TokenRecord), TenancyError> {
        let made_by = self.read().tokens.get(&caller.prefix).cloned();
        // Revoked meanwhile.
        let made_by = made_by.ok_or_else(|| TenancyError::NoWorkspace(caller.workspace.clone()))?;
        if !made_by.grant.is_whole() {
            return Err(TenancyError::NotWhole);
        }
        self.make_token(&caller.workspace, wish, made_by.expires_unix_ms).await
    }

    /// `latest`: Unix milliseconds at which it must have expired; 0 means that it need not.
    async fn make_token(
        &self,
        workspace: &str,
        wish: NewToken,
        latest: u64,
    ) -> Result<(Token, TokenRecord), TenancyError> {
        let NewToken { label, expires_in_days, grant } = wish;
        if label.len() > 200 || label.chars().any(char::is_control) {
            return Err(TenancyError::BadToken("a label has at most 200 bytes and no control characters"));
        }
        if expires_in_days > 36_500 {
            return Err(TenancyError::BadToken("a token lives at most 36500 days"));
        }
        let _turn = self.0.changes.lock().await;
        if !self.has_workspace(workspace) {
            return Err(TenancyError::NoWorkspace(workspace.chars().take(64).collect()));
        }
        if self.tokens(workspace).len() >= TOKENS_PER_WORKSPACE {
            return Err(TenancyError::TooMany);
        }
        let token = std::iter::repeat_with(Token::random)
            .find(|token| !self.read().tokens.contains_key(token.prefix()))
            .expect("an endless iterator finds a free prefix");
        let wished = match expires_in_days {
            0 => u64::MAX,
            days => now_ms() + u64::from(days) * DAY_MS,
        };
        let expires = wished.min(if latest == 0 { u64::MAX } else { latest });
        let expires = if expires == u64::MAX { 0 } else { expires };
        let record = self.put_token(&token, workspace, &label, expires, false, grant).await?;
        Ok((token, record))
    }

    /// A token by its prefix.
    pub fn token(&self, prefix: &str) -> Option<(String, TokenRecord)> {
        self.read().tokens.get_key_value(prefix).map(|(prefix, record)| (prefix.clone(), record.clone()))
    }

    /// Tokens of a workspace, of all for the empty name, oldest first.
    pub fn tokens(&self, workspace: &str) -> Vec<(String, TokenRecord)> {
        let mut found: Vec<_> = self
            .read()
            .tokens
            .iter()
            .filter(|(_, record)| workspace.is_empty() || record.workspace == workspace)
            .map(|(prefix, record)| (prefix.clone(), record.clone()))
            .collect();
        found.sort_by(|(a, one), (b, other)| (one.created_unix_ms, a).cmp(&(other.created_unix_ms, b)));
        found
    }

    /// Revokes a token, of the given workspace only unless that is empty; answers whether it was there.
    pub async fn revoke(&self, prefix: &str, workspace: &str) -> Result<bool, TenancyError> {
        let _turn = self.0.changes.lock().await;
        let there = self
            .read()
            .tokens
            .get(prefix)
            .is_some_and(|record| workspace.is_empty() || record.workspace == workspace);
        if there {
            self.drop_token(prefix).await?;
        }
        Ok(there)
    }

    async fn forget_presets(&self) -> Result<(), TenancyError> {
        let old: Vec<String> = self
            .tokens("")
            .into_iter()
            .filter(|(_, record)| record.preset)
            .map(|(prefix, _)| prefix)
            .collect();
        for prefix in old {
            self.drop_token(&prefix).await?;
        }
        Ok(())
    }

    async fn put_token(
        &self,
        token: &Token,
        workspace: &str,
        label: &str,
        expires_unix_ms: u64,
        preset: bool,
        grant: Grant,
    ) -> Result<TokenRecord, TenancyError> {
        let now = now_ms();
        let record = TokenRecord {
            hash: token.hash(),
            workspace: workspace.to_owned(),
            label: label.to_owned(),
            created_unix_ms: now,
            expires_unix_ms,
            last_used_unix_ms: 0,
            preset,
            grant,
        };
        let (key, value) = (token.prefix().to_owned(), record.clone());
        self.blocking(move |disk| disk.tokens.put(&key, &value)).await?;
        self.write().tokens.insert(token.prefix().to_owned(), record.clone());
        Ok(record)
    }

    async fn drop_token(&self, prefix: &str) -> Result<(), TenancyError> {
        // Memory first: from now on it opens nothing, whatever the disk says.
        let record = self.write().tokens.remove(prefix);
        let key = prefix.to_owned();
        match self.blocking(move |disk| disk.tokens.remove(&key)).await {
            Ok(_) => Ok(()),
            Err(error) => {
                // It would be back after a restart: say so, and let the caller try again.
                if let Some(record) = record {
                    self.write().tokens.insert(prefix.to_owned(), record);
                }
                Err(error)
            }
        }
    }

    fn used(&self, prefix: &str, now: u64) {
        match self.write().tokens.get_mut(prefix) {
            Some(record) => record.last_used_unix_ms = now,
            None => return,
        }
        let (this, prefix) = (self.clone(), prefix.to_owned());
        tokio::spawn(async move {
            let _turn = this.0.changes.lock().await;
            // What is written is what is true now: a token revoked meanwhile must not come back.
            let Some(record) = this.read().tokens.get(&prefix).cloned() else { return };
            if let Err(error) = this.blocking(move |disk| disk.tokens.put(&prefix, &record)).await {
                tracing::warn!(%error, "the last use of a token was not recorded");
            }
        });
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Disk) -> Result<T, RecordsError> + Send + 'static,
    ) -> Result<T, TenancyError> {
        let disk = Arc::clone(&self.0.disk);
        match tokio::task::spawn_blocking(move || work(&disk)).await {
            Ok(result) => result.map_err(TenancyError::from),
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Memory> {
        self.0.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Memory> {
        self.0.memory.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a new workspace may have this name.
pub fn check_name(name: &str) -> Result<(), TenancyError> {
    let label = (1..=40).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-');
    if label && !RESERVED.contains(&name) { Ok(()) } else { Err(TenancyError::BadName) }
}

#[cfg(test)]
#[path = "tenancy_tests.rs"]
mod tests;
