//! A real XFS in a file, mounted for one test, with an image's worth of sources beside it.

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Output},
};

use nix::unistd::Gid;
use pandastack_bus::storage::{
    CaptureKind, Fill, Purpose, SnapshotInfo, SnapshotSpec, StorageBackend as _, TemplateState, VolumeUse,
};
use pandastack_storage::{Config, Manager, layout::Sources};

/// Group of the sandboxes in tests; it needs no name.
pub const GROUP: u32 = 45_991;
pub const DISK_MIB: u64 = 64;
/// Memory of captured machines, bytes; a MiB.
pub const MEMORY: usize = 1 << 20;
/// Names in a prepared directory: the program, the sockets, the point for its difference, eight drives.
pub const PREPARED: usize = 11;

pub struct Disk {
    pub dir: tempfile::TempDir,
    pub state: PathBuf,
    pub differences: PathBuf,
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
        let differences = mount.join("differences");
        let disk = Self { dir, state, differences, sources };
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
        Config {
            state: self.state.clone(),
            differences: self.differences.clone(),
            sources: self.sources.clone(),
            group: Some(Gid::from_raw(GROUP)),
        }
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

    /// A sandbox that was restored from the bake of `base`, which is made if it is missing.
    pub async fn restored(&self, manager: &Manager, id: &str) {
        if self.bake("base").is_none() {
            self.bake_with(manager, "zzzzzzzzzzzzzzzzzzzz", "base", &[b'a'; MEMORY]).await;
            manager.release("zzzzzzzzzzzzzzzzzzzz".into()).await.unwrap();
        }
        manager.prepare(id.into()).await.unwrap();
        manager.fill(id.into(), "base".into(), Fill::Baked, 0).await.unwrap();
    }

    /// What Firecracker writes: a page of `byte` and the rest as it is.
    pub fn firecracker_writes(&self, id: &str, byte: u8) {
        let open = |name| fs::File::options().write(true).open(self.sandbox(id).join(name)).unwrap();
        let memory = open("c.mem");
        memory.set_len(MEMORY as u64).unwrap();
        memory.write_all_at(&[byte; 4096], 8192).unwrap();
        open("c.state").write_all_at(b"registers", 0).unwrap();
    }

    /// What Firecracker writes into an empty difference in memory: a page of `byte` and one of zeros.
    pub fn firecracker_writes_apart(&self, id: &str, byte: u8) {
        let open = |path: PathBuf| fs::File::options().write(true).open(path).unwrap();
        let difference = open(self.differences.join(id).join("mem"));
        difference.set_len(MEMORY as u64).unwrap();
        difference.write_all_at(&[byte; 4096], 8192).unwrap();
        difference.write_all_at(&[0; 4096], 32768).unwrap();
        open(self.sandbox(id).join("c.state")).write_all_at(b"registers", 0).unwrap();
    }

    /// A whole capture.
    pub async fn capture(
        &self,
        manager: &Manager,
        id: &str,
        byte: u8,
        spec: SnapshotSpec,
    ) -> (CaptureKind, SnapshotInfo) {
        let kind = manager.begin_capture(id.into()).await.unwrap();
        self.firecracker_writes(id, byte);
        manager.capture_disks(id.into(), true).await.unwrap();
        (kind, manager.commit_capture(id.into(), spec).await.unwrap())
    }

    pub fn snapshot(&self, id: &str) -> PathBuf {
        self.state.join("snapshots").join(id)
    }

    /// Writes as a guest does.
    pub fn guest_writes(&self, id: &str, drive: &str, at: u64, bytes: &[u8]) {
        let file = fs::File::options().write(true).open(self.sandbox(id).join(drive)).unwrap();
        file.write_all_at(bytes, at).unwrap();
    }
}

pub fn spec(id: &str, purpose: Purpose) -> SnapshotSpec {
    SnapshotSpec {
        id: id.into(),
        workspace: "work".into(),
        sandbox: "ssssssssssssssssssss".into(),
        purpose,
        template: "base".into(),
        vcpus: 1,
        memory_mib: 1,
        disk_mib: DISK_MIB,
        env: [("A".into(), "B".into())].into(),
        workdir: String::new(),
        volumes: Vec::new(),
    }
}

pub fn volume(name: &str, read_only: bool) -> VolumeUse {
    VolumeUse { name: name.into(), read_only }
}

pub fn inode(path: &Path) -> u64 {
    fs::symlink_metadata(path).unwrap().ino()
}

pub fn access(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap();
    (found.permissions().mode() & 0o7777, found.gid())
}

pub fn bytes(path: &Path, at: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fs::File::open(path).unwrap().read_exact_at(&mut bytes, at).unwrap();
    bytes
}

/// Takes so much space that less than the reserve is free.
pub fn fill_up(disk: &Disk, usage: &pandastack_bus::storage::Usage) -> fs::File {
    let ballast = fs::File::create(disk.state.join("../ballast")).unwrap();
    let length = i64::try_from(usage.free_bytes - usage.reserve_bytes + (64 << 20)).unwrap();
    nix::fcntl::fallocate(&ballast, nix::fcntl::FallocateFlags::empty(), 0, length).unwrap();
    ballast
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
