//! Volumes of a sandbox: held before its directory is filled, put in the place of placeholder drives, mounted in the guest.
//!
//! Owns: which device a volume is. Refuses to know: files, what is in a volume.

use std::{collections::BTreeSet, sync::Arc};

use pandastack_bus::{
    Error, Result, SandboxId,
    storage::{StorageBackend, VolumeUse},
    vmm::SandboxSpec,
};
use pandastack_protocol::Mount;

use crate::{
    firecracker::VOLUMES,
    machine::{Event, State},
    manager::Manager,
    ports::{Guest, Hypervisor, World},
    record::{Record, Sandbox as Inner},
    sandbox::{Happening, Sandbox},
};

/// Devices of the placeholder drives in the guest, writable ones first; `vda` is the root disk.
const DEVICES: [&str; 2 * VOLUMES] = ["vdb", "vdc", "vdd", "vde", "vdf", "vdg", "vdh", "vdi"];

/// Whether these volumes can be a sandbox's.
///
/// # Errors
/// [`Error::InvalidArgument`].
pub fn check(volumes: &[VolumeUse]) -> Result<()> {
    let refuse = |text: String| Err(Error::InvalidArgument(text));
    let mut names = BTreeSet::new();
    for volume in volumes {
        if !is_name(&volume.name) {
            return refuse("a volume's name is 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'".into());
        }
        if !names.insert(&volume.name) {
            return refuse(format!("volume {} is asked for twice", volume.name));
        }
    }
    for read_only in [false, true] {
        if volumes.iter().filter(|volume| volume.read_only == read_only).count() > VOLUMES {
            let kind = if read_only { "read-only" } else { "writable" };
            return refuse(format!("a sandbox has at most {VOLUMES} {kind} volumes"));
        }
    }
    Ok(())
}

/// It becomes part of a path in the guest.
fn is_name(name: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(good) && name != "." && name != ".."
}

/// Drive and mount of each volume: the n-th writable one is `w<n>`, the n-th read-only one `r<n>`.
fn places(sandbox: &Inner) -> Vec<(String, Mount)> {
    let mut used = [0, 0];
    let place = |mounted: crate::record::Mounted<'_>| {
        let read_only = mounted.volume.read_only;
        let number = used[usize::from(read_only)];
        used[usize::from(read_only)] += 1;
        let device = DEVICES.get(usize::from(read_only) * VOLUMES + number)?;
        let mount = Mount { device: (*device).to_owned(), path: mounted.path(), read_only };
        Some((format!("{}{number}", if read_only { 'r' } else { 'w' }), mount))
    };
    sandbox.mounts().filter_map(place).collect()
}

impl<W: World> Manager<W> {
    /// Takes the volumes that a sandbox asks for, for the slot that is to become it. A slot that cannot have them waits for
    /// the next request.
    ///
    /// # Errors
    /// As storage answers: none is held.
    pub async fn hold_volumes(self: &Arc<Self>, slot: &Arc<Sandbox>, spec: &SandboxSpec) -> Result<()> {
        if spec.volumes.is_empty() {
            return Ok(());
        }
        let (storage, id) = (self.world.storage(), slot.id.to_string());
        let held = storage.hold_volumes(id.clone(), spec.workspace.clone(), spec.volumes.clone()).await;
        let Err(error) = held else { return Ok(()) };
        // Whether a lost call had an effect is unknown.
        match storage.drop_volumes(id).await {
            Ok(()) => self.push_slot(Arc::clone(slot)),
            Err(_) => drop(self.happen(slot, Event::Delete, Happening::default()).await),
        }
        Err(error)
    }

    /// Puts the volumes that a sandbox holds into the directory of a machine; its clones come with its capture.
    ///
    /// # Errors
    /// As storage answers.
    pub async fn insert_volumes(&self, machine: &SandboxId, record: &Record) -> Result<()> {
        let Some(inner) = record.sandbox().filter(|inner| !inner.spec.volumes.is_empty()) else {
            return Ok(());
        };
        let (workspace, volumes) = (inner.spec.workspace.clone(), inner.spec.volumes.clone());
        let storage = self.world.storage();
        storage.insert_volumes(machine.to_string(), record.id.to_string(), workspace, volumes).await
    }

    /// Lets the guest see its volumes and mount them. In a copy of a captured guest they are mounted already.
    ///
    /// # Errors
    /// As Firecracker or the guest answers.
    pub async fn mount_volumes(&self, machine: &SandboxId, record: &Record) -> Result<()> {
        let Some(inner) = record.sandbox() else { return Ok(()) };
        let boots = record.state == State::Recovering;
        let places = places(inner);
        if places.is_empty() || (!inner.source.is_empty() && !boots) {
            return Ok(());
        }
        let (drives, mounts): (Vec<_>, Vec<_>) = places.into_iter().unzip();
        if !boots {
            // The snapshot knows them by the size of the placeholders.
            for drive in &drives {
                self.world.hypervisor().renew_drive(machine, drive).await?;
            }
        }
        self.world.guest().mount(machine, mounts).await
    }

    /// Others may have the volumes that a sandbox held.
    ///
    /// # Errors
    /// As storage answers.
    pub async fn drop_volumes(&self, record: &Record) -> Result<()> {
        match record.sandbox().is_some_and(|inner| !inner.spec.volumes.is_empty()) {
            true => self.world.storage().drop_volumes(record.id.to_string()).await,
            false => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Shape;

    fn volume(name: &str, read_only: bool) -> VolumeUse {
        VolumeUse { name: name.into(), read_only }
    }

    #[test]
    fn a_volume_is_the_next_device_of_its_kind() {
        let volumes = vec![volume("a", true), volume("b", false), volume("c", true), volume("d", false)];
        let spec = SandboxSpec {
            workspace: "w".into(),
            template: "base".into(),
            metadata: Default::default(),
            ttl_seconds: 1,
            persistent: false,
            disk_mib: 0,
            snapshot: String::new(),
            volumes,
        };
        let shape = Shape {
            template: "base".into(),
            vcpus: 1,
            memory_mib: 128,
            disk_mib: 1,
            disk_grown: false,
            env: Default::default(),
            workdir: String::new(),
            warmup: String::new(),
        };

        let places = places(&Inner::new("", String::new(), spec, shape, "snapshot"));

        let short: Vec<_> = places
            .iter()
            .map(|(drive, mount)| {
                (drive.as_str(), mount.device.as_str(), mount.path.as_str(), mount.read_only)
            })
            .collect();
        assert_eq!(
            short,
            [
                ("r0", "vdf", "/mnt/a", true),
                ("w0", "vdb", "/mnt/b", false),
                ("r1", "vdg", "/mnt/c", true),
                ("w1", "vdc", "/mnt/d", false),
            ]
        );
    }

    #[test]
    fn four_of_a_kind_are_enough_and_names_are_names() {
        let many = |count: usize, read_only| -> Vec<_> {
            (0..count).map(|number| volume(&format!("{read_only}{number}"), read_only)).collect()
        };

        assert_eq!(check(&[many(4, false), many(4, true)].concat()), Ok(()));
        for bad in [many(5, false), many(5, true), vec![volume("a", false), volume("a", true)]] {
            assert!(matches!(check(&bad), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
        for bad in ["", ".", "..", "a/b", "ä", &"x".repeat(65)] {
            assert!(matches!(check(&[volume(bad, false)]), Err(Error::InvalidArgument(_))), "{bad}");
        }
    }
}
