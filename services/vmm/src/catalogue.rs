//! The templates as storage last told, so that a create asks nobody.
//!
//! Owns: a copy and its renewal. Refuses to know: how a template gets its snapshot (`bake`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pandastack_bus::{
    Error, Result,
    storage::{BUILDS, StorageBackend, TemplateInfo, TemplateState},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

/// The copy.
#[derive(Debug)]
pub struct Catalogue {
    templates: Mutex<BTreeMap<String, TemplateInfo>>,
    /// Hidden templates that were asked for: only then they are worth a bake.
    wanted: Mutex<BTreeSet<String>>,
    renewed: watch::Sender<u64>,
}

impl Default for Catalogue {
    fn default() -> Self {
        Self { templates: Mutex::default(), wanted: Mutex::default(), renewed: watch::Sender::new(0) }
    }
}

/// Whether it is for the appliance itself, and not a workspace's that is only not published yet.
fn is_internal(template: &TemplateInfo) -> bool {
    template.hidden && template.workspace.is_empty()
}

/// Whether a workspace may make sandboxes from a template.
pub fn may_use(workspace: &str, template: &TemplateInfo) -> bool {
    if workspace == BUILDS {
        return is_internal(template);
    }
    !template.hidden && (template.workspace.is_empty() || template.workspace == workspace)
}

impl Catalogue {
    /// Copies it anew.
    ///
    /// # Errors
    /// Storage does not answer; the old copy stays.
    pub async fn renew<S: StorageBackend>(&self, storage: &S) -> Result<()> {
        let all = storage.templates().await?;
        let all = all.into_iter().map(|template| (template.name.clone(), template)).collect();
        *self.templates.lock().unwrap_or_else(PoisonError::into_inner) = all;
        self.renewed.send_modify(|count| *count += 1);
        Ok(())
    }

    /// All templates, by name.
    pub fn all(&self) -> Vec<TemplateInfo> {
        self.templates.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Whether a template shall have a bake: one for the appliance itself only once it was asked for.
    pub fn is_wanted(&self, template: &TemplateInfo) -> bool {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        !is_internal(template) || wanted.contains(&template.name)
    }

    /// Completes when the copy was renewed after `seen` renewals; answers how many there were.
    pub async fn renewal_after(&self, seen: u64) -> u64 {
        let mut renewed = self.renewed.subscribe();
        let count = renewed.wait_for(|count| *count > seen).await.ok().map(|count| *count);
        match count {
            Some(count) => count,
            None => std::future::pending().await,
        }
    }

    /// One template, as the copy has it.
    pub fn get(&self, name: &str) -> Option<TemplateInfo> {
        self.templates.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// A template that can be restored from; one that is still being baked is waited for until `deadline`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is none of that name, [`Error::NotReady`] when it is not baked by then or
    /// cannot be.
    pub async fn baked<S: StorageBackend>(
        self: &Arc<Self>,
        storage: &S,
        name: &str,
        deadline: Instant,
    ) -> Result<TemplateInfo> {
        let mut seen = *self.renewed.borrow();
        if let Some(template) = self.get(name).filter(|template| template.state == TemplateState::Baked) {
            return Ok(template);
        }
        loop {
            let template = match storage.template(name.to_owned()).await {
                Err(Error::NotFound(_)) => return Err(unknown(name)),
                other => other?,
            };
            if is_internal(&template) {
                let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
                if wanted.insert(template.name.clone()) {
                    self.renewed.send_modify(|count| *count += 1);
                }
            }
            match template.state {
                TemplateState::Baked => return Ok(template),
                TemplateState::Failed => {
                    return Err(Error::NotReady(format!(
                        "template {name:?} cannot be used: {}",
                        template.reason
                    )));
                }
                TemplateState::Importing | TemplateState::Unbaked => {}
            }
            if Instant::now() >= deadline {
                return Err(Error::NotReady(format!(
                    "template {name:?} is still being prepared; try again soon"
                )));
            }
            let limit = deadline.min(Instant::now() + Duration::from_secs(2));
            if let Ok(count) = timeout_at(limit, self.renewal_after(seen)).await {
                seen = count;
            }
        }
    }
}

/// The error for a template that there is not, or not for the caller.
pub fn unknown(name: &str) -> Error {
    let shown: String = name.chars().take(64).collect();
    Error::InvalidArgument(format!("unknown template {shown:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_is_for_whom_it_is_made() {
        let template = |workspace: &str, hidden| TemplateInfo {
            name: "x".into(),
            title: "x".into(),
            workspace: workspace.into(),
            hidden,
            created_unix_ms: 0,
            aliases: Vec::new(),
            description: String::new(),
            category: String::new(),
            tools: Vec::new(),
            vcpus: 1,
            memory_mib: 128,
            disk_mib: 64,
            env: BTreeMap::new(),
            workdir: "/".into(),
            warmup: String::new(),
            size_bytes: 0,
            state: TemplateState::Baked,
            reason: String::new(),
        };
        for (owner, hidden, users) in
            [("", false, &["a", "b"][..]), ("", true, &[BUILDS]), ("a", false, &["a"]), ("a", true, &[])]
        {
            let may: Vec<_> = ["a", "b", BUILDS]
                .into_iter()
                .filter(|user| may_use(user, &template(owner, hidden)))
                .collect();
            assert_eq!(may, users, "{owner:?} {hidden}");
        }
    }
}
