//! How far each template is, as a value; what the bus is told of it. No files.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use pandastack_bus::storage::{TemplateInfo, TemplateState};

use crate::{
    identity::Digest,
    own::Owned,
    template::{Described, Template, TemplateName},
};

/// A template of the catalogue.
#[derive(Debug)]
pub struct Entry {
    /// What it says of itself.
    pub described: Described,
    /// Whose it is; `None`: it is for all.
    owned: Option<Owned>,
    /// A fill reads under this lock, so that no bake vanishes while it is linked.
    progress: RwLock<Progress>,
}

/// How far a template is.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    /// Identity of the disk that is imported, if it is the one on the partition.
    pub disk: Option<Digest>,
    /// The bake that fits is there.
    pub baked: bool,
    /// Why the import or the last bake failed.
    pub failure: Option<String>,
    /// Bytes its files take.
    pub size_bytes: u64,
}

impl Progress {
    /// The state that follows from it.
    pub fn state(&self) -> TemplateState {
        match self {
            Self { disk: Some(_), baked: true, .. } => TemplateState::Baked,
            Self { failure: Some(_), .. } => TemplateState::Failed,
            Self { disk: Some(_), .. } => TemplateState::Unbaked,
            Self { disk: None, .. } => TemplateState::Importing,
        }
    }
}

impl Entry {
    /// A template of which nothing is known yet.
    pub fn new(described: Described) -> Self {
        Self { described, owned: None, progress: RwLock::default() }
    }

    /// One of a workspace's own.
    pub fn owned(described: Described, owned: Owned) -> Self {
        Self { owned: Some(owned), ..Self::new(described) }
    }

    /// Whose it is; `None`: it is for all.
    pub fn owner(&self) -> Option<&Owned> {
        self.owned.as_ref()
    }

    /// What it says of itself.
    pub fn template(&self) -> &Template {
        &self.described.template
    }

    /// Its name.
    pub fn name(&self) -> &TemplateName {
        &self.described.template.name
    }

    /// How far it is, and stays until the guard is dropped.
    pub fn read(&self) -> RwLockReadGuard<'_, Progress> {
        self.progress.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// To change how far it is.
    pub fn write(&self) -> RwLockWriteGuard<'_, Progress> {
        self.progress.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the bus is told.
    pub fn info(&self) -> TemplateInfo {
        let progress = self.read().clone();
        let template = self.template().clone();
        let owned = self.owned.as_ref();
        TemplateInfo {
            name: template.name.to_string(),
            title: owned.map_or(template.name.as_str(), Owned::title).to_owned(),
            workspace: owned.map_or("", Owned::workspace).to_owned(),
            hidden: owned.map_or(template.hidden, |owned| owned.published() == 0),
            created_unix_ms: owned.map_or(0, Owned::created_unix_ms),
            aliases: template.aliases.iter().map(ToString::to_string).collect(),
            description: template.description,
            category: template.category,
            tools: template.tools,
            vcpus: template.vcpus,
            memory_mib: template.memory_mib,
            disk_mib: template.disk_mib,
            env: template.env,
            workdir: template.workdir,
            warmup: template.warmup,
            size_bytes: progress.size_bytes,
            state: progress.state(),
            reason: match progress.state() {
                TemplateState::Failed => progress.failure.unwrap_or_default(),
                _ => String::new(),
            },
        }
    }
}

/// The wire's word for a state.
pub fn state_name(state: TemplateState) -> &'static str {
    match state {
        TemplateState::Importing => "importing",
        TemplateState::Unbaked => "unbaked",
        TemplateState::Baked => "baked",
        TemplateState::Failed => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_follows_from_what_is_there() {
        let (disk, failure) = (Some(Digest::of(b"disk")), Some("why".to_owned()));
        let state = |disk: &Option<Digest>, baked, failure: &Option<String>| {
            Progress { disk: disk.clone(), baked, failure: failure.clone(), size_bytes: 0 }.state()
        };

        assert_eq!(state(&None, false, &None), TemplateState::Importing);
        assert_eq!(state(&None, false, &failure), TemplateState::Failed);
        assert_eq!(state(&disk, false, &None), TemplateState::Unbaked);
        assert_eq!(state(&disk, false, &failure), TemplateState::Failed);
        assert_eq!(state(&disk, true, &None), TemplateState::Baked);
        assert_eq!(
            state(&disk, true, &failure),
            TemplateState::Baked,
            "a later bake failed, but this one is good"
        );
    }
}
