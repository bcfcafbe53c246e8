//! Real ext4 on loop devices, in a mount namespace of its own. Needs root, `mkfs.ext4` and loop devices; where they are
//! missing each test says that it was skipped.

use std::{fmt::Debug, process::Command};

use nix::{
    sched::{CloneFlags, unshare},
    sys::statvfs::{FsFlags, statvfs},
};

use super::*;

const MIB: u64 = 1 << 20;
/// For drives that have their size already.
const AT_ONCE: Duration = Duration::ZERO;

/// A loop device over a file.
struct Drive {
    device: PathBuf,
    image: PathBuf,
}

impl Drive {
    /// A file system of `claimed` bytes on a drive of `bytes`.
    fn new(directory: &Path, name: &str, claimed: u64, bytes: u64) -> Option<Self> {
        let image = directory.join(name);
        File::create(&image).and_then(|file| file.set_len(claimed)).expect("a file");
        run(Command::new("mkfs.ext4").arg("-q").arg(&image))?;
        resize(&image, bytes);
        Self::of(image, &[])
    }

    fn of(image: PathBuf, options: &[&str]) -> Option<Self> {
        let device = run(Command::new("losetup").args(options).args(["--find", "--show"]).arg(&image))?;
        Some(Self { device: device.trim().into(), image })
    }
}

impl Drop for Drive {
    fn drop(&mut self) {
        run(Command::new("losetup").arg("--detach").arg(&self.device));
    }
}

fn resize(image: &Path, bytes: u64) {
    fs::OpenOptions::new().write(true).open(image).and_then(|file| file.set_len(bytes)).expect("resized");
}

fn run(command: &mut Command) -> Option<String> {
    match command.output() {
        Ok(output) if output.status.success() => Some(String::from_utf8_lossy(&output.stdout).into_owned()),
        other => {
            println!("skipped: {command:?}: {other:?}");
            None
        }
    }
}

/// Runs `test` where its mounts are nobody else's; `None` from it means that something is missing here.
fn alone(test: impl FnOnce(&Path) -> Option<()> + Send) {
    let run = || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
            println!("skipped: unshare: {error}");
            return;
        }
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
        let directory = tempfile::tempdir().expect("a directory");
        test(directory.path());
    };
    std::thread::scope(|scope| scope.spawn(run).join().expect("the test passes"));
}

/// Whether this machine lets us grow a mounted file system (`CAP_SYS_RESOURCE`).
fn may_grow() -> bool {
    let status = fs::read_to_string("/proc/self/status").expect("our own status");
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    let may = u64::from_str_radix(held.trim(), 16).expect("a mask") >> 24 & 1 == 1;
    if !may {
        println!("skipped: growing");
    }
    may
}

fn refused<T: Debug>(result: Result<T, Failure>) -> Code {
    result.expect_err("refused").code
}

fn bytes(path: &Path) -> u64 {
    let space = statvfs(path).expect("a file system");
    space.blocks() * space.fragment_size()
}

#[test]
fn a_volume_is_mounted_once_and_grown_to_its_drive() {
    alone(|directory| {
        let size = if may_grow() { 48 * MIB } else { 8 * MIB };
        let drive = Drive::new(directory, "image", 8 * MIB, size)?;
        let path = directory.join("mnt/deep/data");
        place(&drive.device, &path, false, AT_ONCE).expect("mounted").expect("newly").keep();
        assert!(bytes(&path) > size / 3 * 2, "{}", bytes(&path));
        let flags = statvfs(&path).expect("a file system").flags();
        assert!(
            flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV) && !flags.contains(FsFlags::ST_RDONLY)
        );
        fs::write(path.join("file"), "kept").expect("written");

        assert!(place(&drive.device, &path, false, AT_ONCE).expect("left alone").is_none());

        umount2(&path, MntFlags::empty()).expect("one mount, not two");
        assert!(!path.join("file").exists());
        place(&drive.device, &path, true, AT_ONCE).expect("mounted").expect("newly").keep();
        assert_eq!(fs::read_to_string(path.join("file")).expect("there"), "kept");
        assert_eq!(
            fs::write(path.join("file"), "x").expect_err("read-only").raw_os_error(),
            Some(libc::EROFS)
        );
        umount2(&path, MntFlags::empty()).ok()
    });
}

#[test]
fn a_drive_that_the_host_holds_read_only_is_mounted_so_or_refused() {
    alone(|directory| {
        let image = Drive::new(directory, "image", 8 * MIB, 16 * MIB)?.image.clone();
        let drive = Drive::of(image, &["--read-only"])?;
        let path = directory.join("data");
        assert_eq!(refused(place(&drive.device, &path, false, AT_ONCE)), Code::Denied);
        assert!(!path.exists());
        place(&drive.device, &path, true, AT_ONCE).expect("mounted").expect("newly").keep();
        umount2(&path, MntFlags::empty()).ok()
    });
}

#[test]
fn a_drive_may_show_its_size_late() {
    alone(|directory| {
        let drive = Drive::new(directory, "image", 8 * MIB, MIB)?;
        let path = directory.join("data");
        assert_eq!(refused(place(&drive.device, &path, false, AT_ONCE)), Code::Invalid);
        let placed = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| place(&drive.device, &path, false, Duration::from_secs(20)));
            resize(&drive.image, 8 * MIB);
            run(Command::new("losetup").arg("--set-capacity").arg(&drive.device)).expect("a new size");
            waiting.join().expect("no panic")
        });
        let placed = placed.expect("mounted").expect("newly");
        assert!(bytes(&path) > 4 * MIB);
        // Dropping is how a failure after this one takes it back.
        drop(placed);
        assert!(!path.exists());
        Some(())
    });
}

#[test]
fn a_mount_that_cannot_be_grown_is_taken_back() {
    if may_grow() {
        return;
    }
    alone(|directory| {
        let drive = Drive::new(directory, "image", 8 * MIB, 16 * MIB)?;
        let path = directory.join("a/b");
        assert_eq!(refused(place(&drive.device, &path, false, AT_ONCE)), Code::Internal);
        assert!(!directory.join("a").exists());
        Some(())
    });
}

#[test]
fn what_is_no_volume_is_refused_and_leaves_nothing() {
    alone(|directory| {
        let drive = Drive::new(directory, "image", 8 * MIB, 8 * MIB)?;
        let path = directory.join("a/b");
        assert_eq!(refused(place(Path::new("/dev/vdz9"), &path, false, AT_ONCE)), Code::NotFound);
        assert_eq!(refused(place(Path::new("/dev/null"), &path, false, AT_ONCE)), Code::Invalid);
        fs::create_dir(directory.join("elsewhere")).expect("mkdir");
        std::os::unix::fs::symlink("elsewhere", directory.join("link")).expect("symlink");
        let led_astray = directory.join("link/data");
        assert_eq!(refused(place(&drive.device, &led_astray, false, AT_ONCE)), Code::NotADirectory);
        assert!(!led_astray.exists());

        // Its superblock is whole, what it leads to is not.
        let device = fs::OpenOptions::new().write(true).open(&drive.device).expect("the device");
        std::os::unix::fs::FileExt::write_all_at(&device, &[0xff; 64 << 10], 2048).expect("damaged");
        assert!(matches!(
            refused(place(&drive.device, &path, false, AT_ONCE)),
            Code::Invalid | Code::Internal
        ));
        std::os::unix::fs::FileExt::write_all_at(&device, &[0; 64 << 10], 0).expect("erased");
        assert_eq!(refused(place(&drive.device, &path, false, AT_ONCE)), Code::Invalid);
        assert!(!directory.join("a").exists());
        Some(())
    });
}
