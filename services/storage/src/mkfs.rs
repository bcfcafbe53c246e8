//! A fresh ext4 in a file, made by `mkfs.ext4` before any guest has the file: the host never reads a file system that a
//! guest could have written to.

use std::{
    io::{self, Read},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::error::{At, Result};

const PROGRAM: &str = "/usr/sbin/mkfs.ext4";
/// It writes a few MiB, whatever the size is.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(2);
/// Longest label of an ext4, bytes.
const LABEL_LIMIT: usize = 16;

/// Makes a file system in all of `file`, which reads as zeros. The label is `fcvol-` and the beginning of `name`.
///
/// # Errors
/// The program is missing, fails or does not end; `file` is of no use then.
pub fn ext4(file: &Path, name: &str) -> Result<()> {
    let mut command = Command::new(PROGRAM);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // The file is sparse: nothing has to be zeroed or discarded. Blocks of the size of a page, whatever the size is.
    command.args(["-q", "-F", "-b", "4096", "-m", "0", "-L", &label(name)]);
    command.args(["-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", "--"]).arg(file);
    let mut child = command.spawn().at(Path::new(PROGRAM))?;
    let ended = wait(&mut child);
    if ended.is_err() {
        // It is ours and not waited for yet.
        let _ = child.kill();
        let _ = child.wait();
    }
    ended.at(file)
}

fn wait(child: &mut Child) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                let mut said = String::new();
                if let Some(stderr) = child.stderr.take() {
                    stderr.take(1000).read_to_string(&mut said)?;
                }
                return Err(io::Error::other(format!("mkfs.ext4: {status}: {}", said.trim())));
            }
            None if Instant::now() > end => return Err(io::ErrorKind::TimedOut.into()),
            None => thread::sleep(LOOK),
        }
    }
}

fn label(name: &str) -> String {
    let mut label = format!("fcvol-{name}");
    // Names are ASCII.
    label.truncate(LABEL_LIMIT);
    label
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn every_size_gets_a_file_system_that_takes_next_to_nothing() {
        use std::os::unix::fs::MetadataExt;

        for mib in [1, 2, 8, 256, 65536] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            File::create(&path).unwrap().set_len(mib << 20).unwrap();

            ext4(&path, "a-very-long-name").unwrap();

            let found = std::fs::metadata(&path).unwrap();
            assert_eq!(found.len(), mib << 20);
            assert!(found.blocks() * 512 <= 16 << 20, "{mib} MiB: {} bytes", found.blocks() * 512);
            let check = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(&path).output().unwrap();
            assert!(check.status.success(), "{mib} MiB: {}", String::from_utf8_lossy(&check.stdout));
            let head = std::fs::File::open(&path).unwrap();
            let mut text = [0; 16];
            std::os::unix::fs::FileExt::read_exact_at(&head, &mut text, 1024 + 0x78).unwrap();
            assert_eq!(&text, b"fcvol-a-very-lon");
        }
    }

    #[test]
    fn a_failure_says_what_the_program_said() {
        let dir = tempfile::tempdir().unwrap();
        let error = ext4(&dir.path().join("absent"), "x").unwrap_err();
        assert!(pandastack_daemon::chain(&error).contains("absent"), "{error}");
    }
}
