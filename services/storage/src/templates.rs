//! What is done with templates: imports, fills from them, sealing a bake. How far each is follows from what is on disk.

use std::sync::{Arc, MutexGuard, PoisonError};

use pandastack_bus::{SandboxId, storage::*};
use pandastack_daemon::chain;

use crate::{
    bake::{self, Key},
    error::{Result, StorageError},
    identity::Digest,
    import, layout,
    manager::Inner,
    progress::{Entry, Progress, state_name},
    sandbox::{self, Content, DISK_LIMIT_MIB},
    template::{Template, TemplateName},
};

impl Inner {
    /// All templates, by name.
    pub(crate) fn entries(&self) -> Vec<Arc<Entry>> {
        self.catalogue.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Makes a template known.
    pub(crate) fn insert(&self, entry: Arc<Entry>) {
        let mut catalogue = self.catalogue.write().unwrap_or_else(PoisonError::into_inner);
        catalogue.insert(entry.name().clone(), entry);
    }

    /// Forgets a template that is gone.
    pub(crate) fn forget(&self, name: &TemplateName) {
        self.catalogue.write().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// The right to make, publish or delete a template.
    pub(crate) fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn find(&self, name: &str) -> Result<Arc<Entry>> {
        let catalogue = self.catalogue.read().unwrap_or_else(PoisonError::into_inner);
        let by_alias =
            |entry: &&Arc<Entry>| entry.template().aliases.iter().any(|alias| alias.as_str() == name);
        let by_name = name.parse().ok().and_then(|name: TemplateName| catalogue.get(&name));
        by_name.or_else(|| catalogue.values().find(by_alias)).cloned().ok_or_else(|| {
            let shown: String = name.chars().take(64).collect();
            StorageError::NotFound(format!("template {shown:?} not found"))
        })
    }

    pub(crate) fn key(&self, entry: &Entry, disk: &Digest) -> Key {
        Key::new(&self.artefacts, disk, &entry.described.text, &self.processor)
    }

    /// Finds out what is on disk for a template whose disk has the identity `wanted`.
    pub(crate) fn look(&self, name: &TemplateName, entry: &Entry, wanted: &Digest) {
        let layout = &self.place.layout;
        let disk = import::imported(layout, name).filter(|found| found == wanted);
        let key = self.key(entry, wanted);
        let baked = disk.is_some() && bake::present(layout, name, &key);
        let bake = if baked { import::blocks(&layout.bake(name, &key.id())) } else { 0 };
        let size_bytes = import::blocks(&layout.disk(name)) + bake;
        self.change(entry, |progress| *progress = Progress { disk, baked, failure: None, size_bytes });
    }

    pub(crate) fn change(&self, entry: &Entry, change: impl FnOnce(&mut Progress)) {
        let mut progress = entry.write();
        let before = progress.state();
        change(&mut progress);
        let after = progress.state();
        drop(progress);
        if before != after {
            tracing::info!(template = %entry.name(), "{}", state_name(after));
            self.tell(entry);
        }
    }

    /// Tells listeners that something about a template changed.
    pub(crate) fn tell(&self, entry: &Entry) {
        // Without a listener nobody wants to know.
        let _ = self.changes.send((entry.name().clone(), entry.read().state()));
    }

    /// Answers how many failed.
    pub(crate) fn import_missing(&self) -> usize {
        let entries = self.entries();
        let missing = entries.iter().filter(|entry| entry.owner().is_none() && entry.read().disk.is_none());
        let import = |entry: &&Arc<Entry>| {
            let name = entry.name();
            let outcome = import::identity(&self.sources, name).and_then(|wanted| {
                import::import(&self.place, &self.sources, entry.template(), &wanted)?;
                self.look(name, entry, &wanted);
                Ok(())
            });
            if let Err(error) = &outcome {
                let reason = chain(error);
                tracing::error!(template = %name, "could not be imported: {reason}");
                self.change(entry, |progress| progress.failure = Some(reason));
            }
            outcome.is_err()
        };
        missing.filter(import).count()
    }

    pub(crate) fn fill(&self, id: &SandboxId, template: &str, fill: Fill, disk_mib: u64) -> Result<()> {
        let entry = self.find(template)?;
        let Template { name, disk_mib: least, .. } = entry.template();
        let disk_mib = if disk_mib == 0 { *least } else { disk_mib };
        if !(*least..=DISK_LIMIT_MIB).contains(&disk_mib) {
            let most = DISK_LIMIT_MIB;
            return Err(StorageError::Invalid(format!(
                "a disk of template {name} has {least} to {most} MiB"
            )));
        }
        let progress = entry.read();
        let disk = match (&progress.disk, fill, progress.state()) {
            (Some(disk), Fill::Pristine, _) | (Some(disk), Fill::Baked, TemplateState::Baked) => disk,
            (_, _, TemplateState::Failed) => {
                let reason = progress.failure.as_deref().unwrap_or_default();
                return Err(StorageError::WrongState(format!("template {name} cannot be used: {reason}")));
            }
            (None, ..) => {
                return Err(StorageError::NotReady(format!("template {name} is still being imported")));
            }
            _ => return Err(StorageError::NotReady(format!("template {name} is not baked yet"))),
        };
        let (layout, key) = (&self.place.layout, self.key(&entry, disk));
        let (folder, links, kind) = match fill {
            Fill::Baked => {
                let bake = layout.bake(name, &key.id());
                let links = [layout::MEM, layout::STATE].map(|file| (bake.join(file), file)).to_vec();
                (bake, links, "baked")
            }
            Fill::Pristine => {
                let [_, (kernel, kernel_name), (initrd, initrd_name)] = self.artefacts.named();
                let links =
                    vec![(layout.artefact(kernel), kernel_name), (layout.artefact(initrd), initrd_name)];
                (layout.disk(name), links, "pristine")
            }
        };
        let record = record(kind, name, &key, disk_mib);
        let content = Content {
            disk: folder.join(layout::ROOT),
            disk_bytes: disk_mib << 20,
            links,
            drives: Vec::new(),
            record,
        };
        sandbox::fill(&self.place, id, &self.artefacts.firecracker, &content)?;
        Ok(())
    }

    /// Makes a volume of a template's root disk.
    pub(crate) fn clone_template(
        &self,
        template: &str,
        workspace: &str,
        name: &str,
        size_mib: u64,
    ) -> Result<VolumeInfo> {
        let entry = self.find(template)?;
        let progress = entry.read();
        if progress.disk.is_none() {
            let name = entry.name();
            return Err(StorageError::NotReady(format!("template {name} is still being imported")));
        }
        let disk = self.place.layout.disk(entry.name()).join(layout::ROOT);
        let size_mib = size_mib.max(entry.template().disk_mib);
        self.volumes.clone_of(&self.place, &disk, workspace, name, size_mib)
    }

    pub(crate) fn seal(&self, id: &SandboxId, template: &str) -> Result<()> {
        let entry = self.find(template)?;
        let name = entry.name();
        let folder = sandbox::existing(&self.place.layout, id)?;
        let disk = entry.read().disk.clone();
        let disk =
            disk.ok_or_else(|| StorageError::NotReady(format!("template {name} is still being imported")))?;
        let key = self.key(&entry, &disk);
        let expected = record("pristine", name, &key, entry.template().disk_mib);
        if sandbox::filled(&folder)?.as_ref() != Some(&expected) {
            return Err(StorageError::WrongState(format!(
                "sandbox {id} was not booted from template {name} as it is now"
            )));
        }
        let staged = bake::collect(&self.place, &folder, &key)?;
        let changed = {
            // No fill links from the bake while it is replaced.
            let _alone = entry.write();
            bake::publish(&self.place, name, &key, staged)?
        };
        self.look(name, &entry, &disk);
        tracing::info!(sandbox = %id, template = %name, changed, "sealed as bake {}", key.id().as_str());
        Ok(())
    }
}

fn record(kind: &str, name: &TemplateName, key: &Key, disk_mib: u64) -> String {
    format!("{kind} {name} {} {disk_mib}", key.id().as_str())
}
