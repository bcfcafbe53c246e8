//! What can go wrong, by what the caller can do about it.

use std::{io, path::PathBuf, time::Duration};

use pandastack_bus as bus;
use pandastack_daemon::{chain, records::RecordsError};

use crate::ipam::Exhausted;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Send a sandbox id.
    #[error(transparent)]
    Id(#[from] bus::BadId),
    /// Send a pidfd.
    #[error("the descriptor is not that of a process")]
    NotAProcess,
    /// Start the sandbox's unit again and attach that.
    #[error("the process has ended")]
    ProcessGone,
    /// Start the unit with a network namespace of its own: rules meant for a sandbox must never be loaded in the host's.
    #[error("the process is in the host's own network namespace")]
    HostNamespace,
    /// Take another id.
    #[error("the link {0} belongs to another sandbox")]
    LinkTaken(String),
    /// Delete sandboxes first.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// Try again: what was half done has been undone.
    #[error("not done after {0:?}")]
    Timeout(Duration),
    /// The kernel refused a change of links, addresses or routes.
    #[error("{what}")]
    Netlink {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// A call to the operating system failed.
    #[error("{what}")]
    System {
        /// What was to be done.
        what: &'static str,
        /// Why it was not.
        #[source]
        source: io::Error,
    },
    /// `nft` refused the rules.
    #[error("nft: {0}")]
    Rules(String),
    /// A record was not read or written.
    #[error("the record of the address plan")]
    Record(#[from] RecordsError),
    /// The file names no resolver, or cannot be read.
    #[error("{}", path.display())]
    Resolvers {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Some steps of a teardown failed; all others were done. Repeat it.
    #[error("{}", .0.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; "))]
    Teardown(Vec<Error>),
    /// The part that would do it has ended; the daemon is about to restart.
    #[error("the daemon is stopping")]
    Stopping,
}

impl Error {
    /// A failed system call, with what it was for.
    pub(crate) fn system(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::System { what, source }
    }

    /// The number by which the kernel refused, if it did.
    pub(crate) fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink { source, .. } | Self::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

impl From<Error> for bus::Error {
    fn from(error: Error) -> Self {
        let text = chain(&error);
        match error {
            Error::Id(_) | Error::NotAProcess => Self::InvalidArgument(text),
            Error::ProcessGone | Error::HostNamespace => Self::WrongState(text),
            Error::LinkTaken(_) => Self::Exists(text),
            Error::Exhausted(_) => Self::NoCapacity(text),
            Error::Timeout(_) => Self::Timeout(text),
            Error::Stopping => Self::NotReady(text),
            _ => Self::Internal(text),
        }
    }
}
