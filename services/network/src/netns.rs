//! Work inside the network namespace of another process.
//!
//! Owns: the thread that enters a namespace and ends with the work, so that no thread of the runtime ever stands in the
//! wrong one. Refuses to know: what is done there.

use std::{
    fs::File,
    future::Future,
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        linux::fs::MetadataExt,
    },
    time::Duration,
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Result},
    link::Netlink,
};

/// What work inside a namespace can reach.
#[derive(Debug)]
pub struct Namespaces {
    /// Links of the namespace that was entered.
    pub inner: Netlink,
    /// Links of the host, through a socket opened before entering.
    pub host: Netlink,
    /// The host's namespace, to place a link's other end in.
    host_namespace: File,
}

impl Namespaces {
    /// The host's namespace as the kernel wants it in a message.
    pub fn host_descriptor(&self) -> RawFd {
        self.host_namespace.as_raw_fd()
    }
}

/// Enters the network namespace of `process` (a pidfd) in a thread of its own, and runs `work` there, for at most
/// `limit`.
///
/// The work is a future on a runtime of that thread; what it executes, it executes in that namespace.
///
/// # Errors
/// [`Error::NotAProcess`], [`Error::ProcessGone`]; [`Error::HostNamespace`] if the process shares the namespace of the
/// caller; [`Error::Timeout`]; what `work` answers.
pub async fn within<T, F, Fut>(process: OwnedFd, limit: Duration, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(Namespaces) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T>>,
{
    let (done, result) = oneshot::channel();
    std::thread::Builder::new()
        .name("namespace".to_owned())
        .spawn(move || {
            // Nobody waits any more only when the daemon ends.
            let _ = done.send(enter_and_run(&process, limit, work));
        })
        .map_err(Error::system("a thread for the namespace"))?;
    result.await.map_err(|_| Error::Stopping)?
}

fn enter_and_run<T, F, Fut>(process: &OwnedFd, limit: Duration, work: F) -> Result<T>
where
    F: FnOnce(Namespaces) -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::system("a runtime for the namespace"))?;
    let outcome = runtime.block_on(async {
        let host_namespace = own_namespace()?;
        let host = Netlink::open()?;
        enter(process)?;
        if same_file(&host_namespace, &own_namespace()?)? {
            return Err(Error::HostNamespace);
        }
        let inner = Netlink::open()?;
        tokio::time::timeout(limit, work(Namespaces { inner, host, host_namespace }))
            .await
            .map_err(|_| Error::Timeout(limit))?
    });
    // Everything of the work is bounded; a thread that it left behind must not keep this one.
    runtime.shutdown_background();
    outcome
}

fn enter(process: &OwnedFd) -> Result<()> {
    setns(process, CloneFlags::CLONE_NEWNET).map_err(|errno| match errno {
        Errno::ESRCH => Error::ProcessGone,
        Errno::EINVAL | Errno::EBADF => Error::NotAProcess,
        errno => Error::System { what: "entering the namespace", source: errno.into() },
    })
}

fn own_namespace() -> Result<File> {
    File::open("/proc/thread-self/ns/net").map_err(Error::system("the own network namespace"))
}

fn same_file(one: &File, two: &File) -> Result<bool> {
    let identity = |file: &File| -> io::Result<(u64, u64)> {
        let data = file.metadata()?;
        Ok((data.st_dev(), data.st_ino()))
    };
    let read = Error::system("the identity of a network namespace");
    Ok(identity(one).map_err(&read)? == identity(two).map_err(&read)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn other_descriptors_are_refused() {
        let file = OwnedFd::from(File::open("/dev/null").expect("it exists"));

        let answer = within(file, Duration::from_secs(5), async |_| Ok(())).await;

        assert!(matches!(answer, Err(Error::NotAProcess)), "{answer:?}");
    }
}
