//! Every path of the storage daemon, and nothing else: no other module joins path names.
//!
//! ```text
//!   <state>/artefacts/<sha256>                   firecracker, vmlinux, initrd.img: linked into sandbox directories
//!   <state>/artefacts/current.json               which of them belong to the running image
//!   <state>/templates/<name>/disk/               root.img, manifest.json: the pristine disk, imported
//!   <state>/templates/<name>/own.json            of a workspace's own: its <name> is an id of ours, its title is in here
//!   <state>/templates/<name>/bakes/<bake>/       mem, state, root.img, manifest.json: sealed, never written again
//!   <state>/sandboxes/<id>/                      what a unit sees as /vm; `s/` in it is Firecracker's own, `c.*` a capture
//!                                                that is not finished
//!   <state>/snapshots/<id>/                      mem, state, root.img, drives, manifest.json, hashes.json: sealed, too; damage.txt
//!                                                when a check found some
//!   <state>/volumes/<id>/                        disk.img, manifest.json; the id is ours, names of tenants are no paths
//!   <state>/volume-snapshots/<id>/               disk.img, manifest.json: of a volume that may be gone; never written again
//!   <state>/holds/<sandbox>.json                 the volumes that a sandbox has
//!   <state>/quotas/<workspace>.json              how many volumes, and how large, a workspace may have
//!   <state>/zero.img                             what a read-only drive without a volume is
//!   <state>/manifest.key                         what manifests of snapshots are authenticated with
//!   <state>/staging/                             everything that is not finished; emptied at start
//!   <state>/trash/                               everything that is on its way out; emptied at start
//!   <differences>/<id>/                          what its unit sees as /vm/d, in memory: mem, a difference that is not laid over
//!                                                its base yet
//! ```

use std::path::{Path, PathBuf};

use pandastack_bus::SandboxId;

use crate::{bake::BakeId, identity::Digest, template::TemplateName};

/// Directory of a sandbox that Firecracker may write to.
pub const SOCKETS: &str = "s";
/// Where the unit of a sandbox has its directory of [`Layout::differences`].
pub const DIFFERENCE: &str = "d";
/// Root disk.
pub const ROOT: &str = "root.img";
/// Guest memory.
pub const MEM: &str = "mem";
/// State of the virtual machine.
pub const STATE: &str = "state";
/// Guest kernel.
pub const KERNEL: &str = "vmlinux";
/// Guest initramfs.
pub const INITRD: &str = "initrd.img";
/// The program that runs the guest.
pub const FIRECRACKER: &str = "firecracker";
/// Symbolic link whose text says what filled a sandbox directory; made last.
pub const FILLED: &str = ".filled";
/// Drives that are writable, in the order of their devices in the guest: placeholders, or volumes in their place.
pub const WRITABLE: [&str; 4] = ["w0.img", "w1.img", "w2.img", "w3.img"];
/// Drives that are read-only.
pub const READ_ONLY: [&str; 4] = ["r0.img", "r1.img", "r2.img", "r3.img"];
/// Contents of a volume.
pub const DISK: &str = "disk.img";
/// Which parts of a capture's memory were in page cache when it was taken.
pub const RESIDENT: &str = "resident.json";
/// Hash tree of a snapshot.
pub const HASHES: &str = "hashes.json";
/// What a check found wrong with a snapshot; its presence says that it must not be restored.
pub const DAMAGE: &str = "damage.txt";
/// What a directory of ours holds; its presence says that the directory is complete.
pub const MANIFEST: &str = "manifest.json";
/// Description of a template on its partition.
pub const DESCRIPTION: &str = "template.toml";
/// Beside the disk of a template that a workspace made: whose it is.
pub const OWN: &str = "own.json";
/// Directory of the imported disk of a template.
pub const PRISTINE: &str = "disk";
/// Optional on the template partition: a text that changes whenever the disk image does.
pub const IDENTITY: &str = "identity";

/// All drives but the root disk.
pub fn drives() -> impl Iterator<Item = &'static str> {
    WRITABLE.into_iter().chain(READ_ONLY)
}

/// Name that a file of a sandbox directory has in an unfinished capture.
pub fn captured(name: &str) -> String {
    format!("c.{name}")
}

/// The paths below one state directory.
#[derive(Debug, Clone)]
pub struct Layout {
    state: PathBuf,
    differences: PathBuf,
}

impl Layout {
    /// The layout below `state`, with a directory in memory for differences.
    pub fn new(state: &Path, differences: &Path) -> Self {
        Self { state: state.to_owned(), differences: differences.to_owned() }
    }

    /// The state directory itself.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Parent of all artefacts.
    pub fn artefacts(&self) -> PathBuf {
        self.state.join("artefacts")
    }

    /// One artefact.
    pub fn artefact(&self, digest: &Digest) -> PathBuf {
        self.artefacts().join(digest.as_str())
    }

    /// Which artefacts belong to the running image.
    pub fn current_artefacts(&self) -> PathBuf {
        self.artefacts().join("current.json")
    }

    /// Parent of all templates.
    pub fn templates(&self) -> PathBuf {
        self.state.join("templates")
    }

    /// One template.
    pub fn template(&self, name: &TemplateName) -> PathBuf {
        self.templates().join(name.as_str())
    }

    /// The imported disk of a template, with its manifest.
    pub fn disk(&self, name: &TemplateName) -> PathBuf {
        self.template(name).join(PRISTINE)
    }

    /// Parent of the bakes of a template.
    pub fn bakes(&self, name: &TemplateName) -> PathBuf {
        self.template(name).join("bakes")
    }

    /// One bake.
    pub fn bake(&self, name: &TemplateName, bake: &BakeId) -> PathBuf {
        self.bakes(name).join(bake.as_str())
    }

    /// Parent of all sandbox directories.
    pub fn sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    /// One sandbox directory.
    pub fn sandbox(&self, id: &SandboxId) -> PathBuf {
        self.sandboxes().join(id.as_str())
    }

    /// Parent of all differences.
    pub fn differences(&self) -> PathBuf {
        self.differences.clone()
    }

    /// That of one sandbox.
    pub fn difference(&self, id: &SandboxId) -> PathBuf {
        self.differences.join(id.as_str())
    }

    /// Parent of all snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.state.join("snapshots")
    }

    /// One snapshot.
    pub fn snapshot(&self, id: &SandboxId) -> PathBuf {
        self.snapshots().join(id.as_str())
    }

    /// Parent of all volumes.
    pub fn volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// One volume.
    pub fn volume(&self, id: &SandboxId) -> PathBuf {
        self.volumes().join(id.as_str())
    }

    /// Parent of all snapshots of volumes.
    pub fn volume_snapshots(&self) -> PathBuf {
        self.state.join("volume-snapshots")
    }

    /// One snapshot of a volume.
    pub fn volume_snapshot(&self, id: &SandboxId) -> PathBuf {
        self.volume_snapshots().join(id.as_str())
    }

    /// What workspaces may have.
    pub fn quotas(&self) -> PathBuf {
        self.state.join("quotas")
    }

    /// Parent of the records of who has which volumes.
    pub fn holds(&self) -> PathBuf {
        self.state.join("holds")
    }

    /// The volumes of one sandbox.
    pub fn hold(&self, sandbox: &SandboxId) -> PathBuf {
        self.holds().join(format!("{sandbox}.json"))
    }

    /// The file that every read-only placeholder is a link to.
    pub fn zero(&self) -> PathBuf {
        self.state.join("zero.img")
    }

    /// Key of the manifests.
    pub fn manifest_key(&self) -> PathBuf {
        self.state.join("manifest.key")
    }

    /// Parent of what is not finished.
    pub fn staging(&self) -> PathBuf {
        self.state.join("staging")
    }

    /// A fresh name for something unfinished. `tag` and `number` are unique together within a process.
    pub fn staged(&self, tag: &str, number: u64) -> PathBuf {
        self.staging().join(format!("{tag}.{number}"))
    }

    /// Parent of what is on its way out.
    pub fn trash(&self) -> PathBuf {
        self.state.join("trash")
    }

    /// A fresh name for something on its way out.
    pub fn trashed(&self, tag: &str, number: u64) -> PathBuf {
        self.trash().join(format!("{tag}.{number}"))
    }
}

/// Where the image keeps what is brought onto the data partition.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Catalogue: `<name>/template.toml`, `<name>/root.img`.
    pub templates: PathBuf,
    /// Firecracker's binary.
    pub firecracker: PathBuf,
    /// Guest kernel, uncompressed.
    pub vmlinux: PathBuf,
    /// Guest initramfs.
    pub initrd: PathBuf,
}

impl Default for Sources {
    fn default() -> Self {
        Self {
            templates: "/usr/share/pandastack/templates".into(),
            firecracker: "/usr/lib/pandastack/firecracker".into(),
            vmlinux: "/usr/lib/pandastack/guest/vmlinux".into(),
            initrd: "/usr/lib/pandastack/guest/initrd.img".into(),
        }
    }
}

impl Sources {
    /// Folder of a template.
    pub fn template(&self, name: &TemplateName) -> PathBuf {
        self.templates.join(name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Component;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_name_of_anyone_leaves_its_directory(text in ".{0,70}", number in any::<u64>()) {
            let layout = Layout::new(Path::new("/state"), Path::new("/differences"));
            let mut paths = vec![layout.staged("x", number)];
            if let Ok(name) = text.parse::<TemplateName>() {
                paths.extend([layout.template(&name), layout.disk(&name), Sources::default().template(&name)]);
                prop_assert_eq!(layout.template(&name).parent().map(Path::to_owned), Some(layout.templates()));
            }
            if let Ok(id) = text.parse::<SandboxId>() {
                paths.extend([layout.sandbox(&id), layout.snapshot(&id), layout.volume(&id), layout.hold(&id), layout.difference(&id)]);
                paths.push(layout.volume_snapshot(&id));
            }
            if let Ok(digest) = text.parse::<Digest>() {
                paths.push(layout.artefact(&digest));
            }
            for path in paths {
                prop_assert!(!path.components().any(|part| part == Component::ParentDir), "{:?}", path);
                prop_assert!(path.is_absolute());
            }
        }
    }

    #[test]
    fn everything_is_below_the_state_directory() {
        let layout = Layout::new(Path::new("/state"), Path::new("/differences"));
        let name = "base".parse().unwrap();
        let bake = BakeId::from(&Digest::of(b"x"));
        for path in [
            layout.current_artefacts(),
            layout.artefact(&Digest::of(b"y")),
            layout.bake(&name, &bake),
            layout.sandbox(&SandboxId::random()),
            layout.snapshot(&SandboxId::random()),
            layout.volume(&SandboxId::random()),
            layout.volume_snapshot(&SandboxId::random()),
            layout.hold(&SandboxId::random()),
            layout.zero(),
            layout.manifest_key(),
            layout.staged("a", 1),
            layout.trashed("a", 1),
        ] {
            assert!(path.starts_with("/state"), "{path:?}");
        }
    }
}
