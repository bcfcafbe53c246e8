//! A real XFS in a file, mounted for one test, with an image's worth of sources beside it.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::unistd::Gid;
use pandastack_bus::storage::{Fill, StorageBackend as _, TemplateState};
use pandastack_storage::{Config, Manager, layout::Sources};

/// Group of the sandboxes in tests; it needs no name.
pub const GROUP: u32 = 45_991;
pub const DISK_MIB: u64 = 64;

pub struct Disk {
    pub dir: tempfile::TempDir,
    pub state: PathBuf,
    pub sources: Sources,
}

impl Disk {
    /// `None`, with a printed reason, where no file system may be mounted.
    pub fn mount(options: &[&str]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let (image, mount) = (dir.path().join("xfs"), dir.path().join("mnt"));
        fs::File::create(&image).unwrap().set_len(16 << 30).unwrap();
        fs::create_dir(&mount).unwrap();
        for command in [
            Command::new("mkfs.xfs").arg("-q").args(options).arg(&image),
            Command::new("mount").args(["-o", "loop,noatime"]).args([&image, &mount]),
        ] {
            match command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output() {
                Ok(Output { status, .. }) if status.success() => {}
                Ok(output) => {
                    println!("skipped: {command:?}: {}", String::from_utf8_lossy(&output.stderr));
                    return None;
                }
                Err(error) => {
                    println!("skipped: {command:?}: {error}");
                    return None;
                }
            }
        }
        let image = dir.path().join("image");
        let sources = Sources {
            templates: image.join("templates"),
            firecracker: image.join("firecracker"),
            vmlinux: image.join("vmlinux"),
            initrd: image.join("initrd.img"),
        };
        fs::create_dir_all(&sources.templates).unwrap();
        for (path, content) in
            [(&sources.firecracker, "program"), (&sources.vmlinux, "kernel"), (&sources.initrd, "initramfs")]
        {
            fs::write(path, content).unwrap();
        }
        let state = mount.join("state");
        fs::create_dir(&state).unwrap();
        let disk = Self { dir, state, sources };
        disk.add_template("base", "base disk");
        Some(disk)
    }

    /// Adds or replaces a template whose disk is an ext4 with one file.
    pub fn add_template(&self, name: &str, content: &str) {
        let folder = self.sources.templates.join(name);
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        let text = format!(
            "name = '{name}'\naliases = ['{name}-alias']\nvcpus = 1\nmemory_mib = 128\ndisk_mib = {DISK_MIB}\nwarmup = 'true'\n"
        );
        fs::write(folder.join("template.toml"), text).unwrap();
        let tree = self.dir.path().join("tree");
        let _ = fs::remove_dir_all(&tree);
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("content"), content.repeat(10_000)).unwrap();
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-F", "-d"]).arg(&tree).arg(folder.join("root.img")).arg(format!("{DISK_MIB}M"));
        assert!(mkfs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").output().unwrap().status.success());
    }

    pub fn config(&self) -> Config {
        Config { state: self.state.clone(), sources: self.sources.clone(), group: Some(Gid::from_raw(GROUP)) }
    }

    /// As the daemon starts; nothing is imported yet.
    pub fn open(&self) -> Manager {
        Manager::open(self.config()).unwrap()
    }

    /// As the daemon is when its imports are done.
    pub async fn open_imported(&self) -> Manager {
        let manager = self.open();
        manager.import_all().await;
        manager
    }

    pub fn sandbox(&self, id: &str) -> PathBuf {
        self.state.join("sandboxes").join(id)
    }

    /// The only bake of a template.
    pub fn bake(&self, template: &str) -> Option<PathBuf> {
        let bakes: Vec<_> = list(&self.state.join("templates").join(template).join("bakes"));
        assert!(bakes.len() < 2, "{bakes:?}");
        bakes.into_iter().next()
    }

    /// What vmm does for a bake, with a Firecracker that writes `memory`.
    pub async fn bake_with(&self, manager: &Manager, id: &str, template: &str, memory: &[u8]) {
        assert!(manager.prepare(id.into()).await.unwrap());
        manager.fill(id.into(), template.into(), Fill::Pristine, 0).await.unwrap();
        manager.prepare_capture(id.into()).await.unwrap();
        fs::write(self.sandbox(id).join("mem"), memory).unwrap();
        fs::write(self.sandbox(id).join("state"), b"registers").unwrap();
        let root = fs::File::options().write(true).open(self.sandbox(id).join("root.img")).unwrap();
        root.write_all_at(b"warmed up", 40 << 20).unwrap();
        manager.seal_template(id.into(), template.into()).await.unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let mount = self.dir.path().join("mnt");
        if !Command::new("umount").arg(&mount).status().is_ok_and(|status| status.success()) {
            let _ = Command::new("umount").arg("-l").arg(&mount).status();
        }
    }
}

pub async fn state_of(manager: &Manager, template: &str) -> TemplateState {
    manager.template(template.into()).await.unwrap().state
}

pub fn list(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}
