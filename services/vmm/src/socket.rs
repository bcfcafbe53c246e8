//! Connecting to unix sockets that the untrusted side made.
//!
//! Owns: the paths below a sandbox's `s/` and the care with which they are opened. Firecracker may write that directory, so
//! a name in it can be anything: nothing is followed, and only a socket is connected to.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

use pandastack_bus::SandboxId;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use tokio::net::UnixStream;

/// Firecracker's API.
pub const API: &str = "api.sock";
/// Host side of the guest's vsock.
pub const VSOCK: &str = "v.sock";

/// Where the sandbox directories are.
#[derive(Debug, Clone)]
pub struct Sockets {
    root: PathBuf,
}

impl Sockets {
    /// `root` holds one directory per sandbox.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// Connects to a socket of a sandbox.
    ///
    /// # Errors
    /// `NotFound` while it is not there yet, `ConnectionRefused` while nobody listens, `InvalidData` when something else
    /// than a socket is there.
    pub async fn connect(&self, id: &SandboxId, name: &str) -> io::Result<UnixStream> {
        let directory = self.directory(id)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let socket = rustix::fs::openat(directory.as_fd(), name, flags, Mode::empty())?;
        let found = FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode);
        if found != FileType::Socket {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{name} is no socket but {found:?}"),
            ));
        }
        // The descriptor is the very inode that was looked at; its number is the only way to connect to it.
        UnixStream::connect(format!("/proc/self/fd/{}", socket.as_raw_fd())).await
    }

    /// Removes the sockets that a machine of before a power cut left behind. Missing ones are fine.
    pub fn clear(&self, id: &SandboxId) -> io::Result<()> {
        let directory = match self.directory(id) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for name in [API, VSOCK] {
            match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn directory(&self, id: &SandboxId) -> io::Result<std::os::fd::OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::open(self.root.join(id.as_str()).join("s"), flags, Mode::empty())?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> (tempfile::TempDir, Sockets, SandboxId, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let id = SandboxId::random();
        let s = root.path().join(id.as_str()).join("s");
        std::fs::create_dir_all(&s).unwrap();
        let sockets = Sockets::new(root.path());
        (root, sockets, id, s)
    }

    #[tokio::test]
    async fn a_socket_is_connected_to() {
        let (_root, sockets, id, s) = place();
        let listener = tokio::net::UnixListener::bind(s.join(VSOCK)).unwrap();

        let (client, served) = tokio::join!(sockets.connect(&id, VSOCK), listener.accept());

        assert!(client.is_ok() && served.is_ok());
    }

    #[tokio::test]
    async fn a_planted_link_is_not_followed() {
        let (root, sockets, id, s) = place();
        let elsewhere = root.path().join("elsewhere");
        let _listener = tokio::net::UnixListener::bind(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, s.join(VSOCK)).unwrap();

        let error = sockets.connect(&id, VSOCK).await.unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[tokio::test]
    async fn a_file_in_its_place_is_refused() {
        let (_root, sockets, id, s) = place();
        std::fs::write(s.join(API), "x").unwrap();

        assert_eq!(sockets.connect(&id, API).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(
            sockets.connect(&SandboxId::random(), API).await.unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn clearing_removes_sockets_and_is_idempotent() {
        let (_root, sockets, id, s) = place();
        drop(std::os::unix::net::UnixListener::bind(s.join(API)).unwrap());

        sockets.clear(&id).unwrap();
        sockets.clear(&id).unwrap();

        assert_eq!(std::fs::read_dir(&s).unwrap().count(), 0);
    }
}
