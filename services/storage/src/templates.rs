//! What is done with templates: imports, fills from them, sealing a bake. How far each is follows from what is on disk.

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
    pub(crate) fn find(&self, name: &str) -> Result<&Entry> {
        let by_alias = |entry: &&Entry| entry.template().aliases.iter().any(|alias| alias.as_str() == name);
        let by_name = name.parse().ok().and_then(|name: TemplateName| self.catalogue.get(&name));
        by_name.or_else(|| self.catalogue.values().find(by_alias)).ok_or_else(|| {
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
            // Without a listener nobody wants to know.
            let _ = self.changes.send((entry.name().clone(), after));
        }
    }

    /// Answers how many failed.
    pub(crate) fn import_missing(&self) -> usize {
        let missing = self.catalogue.values().filter(|entry| entry.read().disk.is_none());
        let import = |entry: &&Entry| {
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
        let (layout, key) = (&self.place.layout, self.key(entry, disk));
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

    pub(crate) fn seal(&self, id: &SandboxId, template: &str) -> Result<()> {
        let entry = self.find(template)?;
        let name = entry.name();
        let folder = sandbox::existing(&self.place.layout, id)?;
        let disk = entry.read().disk.clone();
        let disk =
            disk.ok_or_else(|| StorageError::NotReady(format!("template {name} is still being imported")))?;
        let key = self.key(entry, &disk);
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
        self.look(name, entry, &disk);
        tracing::info!(sandbox = %id, template = %name, changed, "sealed as bake {}", key.id().as_str());
        Ok(())
    }
}

fn record(kind: &str, name: &TemplateName, key: &Key, disk_mib: u64) -> String {
    format!("{kind} {name} {} {disk_mib}", key.id().as_str())
}
