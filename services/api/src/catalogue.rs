//! Templates as creates need them, remembered for a moment: a create asks vmm and nobody else.
//!
//! Owns: how long what storage said is good. Refuses to know: what a template is for.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use pandastack_bus::storage::{StorageProxy, TemplateInfo};

use crate::{problem::Problem, routes::templates::resolve};

/// A change is told by a signal; this bounds how long one that was missed matters.
const GOOD_FOR: Duration = Duration::from_secs(10);

/// Answers kept at most.
const KEPT: usize = 4096;

/// What storage said, by the workspace and the name that it asked for. Only names that exist are kept.
#[derive(Debug, Default)]
pub struct Catalogue(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    changes: u64,
    templates: HashMap<(String, String), (Arc<TemplateInfo>, Instant)>,
}

impl Catalogue {
    /// The template that a workspace means by a name or alias; `None` when there is none.
    pub async fn find(
        &self,
        storage: &StorageProxy<'static>,
        workspace: &str,
        name: &str,
    ) -> Result<Option<Arc<TemplateInfo>>, Problem> {
        let key = (workspace.to_owned(), name.to_owned());
        let changes = {
            let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            match known.templates.get(&key) {
                Some((template, since)) if since.elapsed() < GOOD_FOR => {
                    return Ok(Some(Arc::clone(template)));
                }
                _ => known.changes,
            }
        };
        let Some(template) = resolve(storage, workspace, name).await?.map(Arc::new) else { return Ok(None) };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // What was asked before a change may be older than it.
        if known.changes == changes {
            if known.templates.len() >= KEPT {
                known.templates.clear();
            }
            known.templates.insert(key, (Arc::clone(&template), Instant::now()));
        }
        Ok(Some(template))
    }

    /// A template changed; aliases make it simplest to forget all.
    pub fn changed(&self) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.changes += 1;
        known.templates.clear();
    }
}
