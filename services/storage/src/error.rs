//! What can go wrong: one variant per thing the caller can do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

use pandastack_bus as bus;
use pandastack_daemon::chain;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, StorageError>;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// There is no such thing. Nothing changed.
    #[error("{0}")]
    NotFound(String),
    /// A thing of that name is already there. Nothing changed.
    #[error("{0}")]
    Exists(String),
    /// The request can never succeed as it is. Nothing changed.
    #[error("{0}")]
    Invalid(String),
    /// Another verb must come first. Nothing changed.
    #[error("{0}")]
    WrongState(String),
    /// Ask again soon. Nothing changed.
    #[error("{0}")]
    NotReady(String),
    /// Not enough space on the data partition: delete something. Nothing was made.
    #[error("{0}")]
    NoSpace(String),
    /// What has to do with quotas: its own error says what to do. Nothing was made.
    #[error("{}", .0.message())]
    Refused(bus::Error),
    /// The data partition is of the wrong kind: make another one.
    #[error("the file system of {} cannot share blocks between files (reflink): it has to be XFS made with reflink=1", path.display())]
    NoReflink {
        /// The state directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file could not be read or changed.
    #[error("{}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Some of it was removed and some was not; the rest is tried again at the next start.
    #[error("not everything could be removed: {}", .0.join("; "))]
    Incomplete(Vec<String>),
    /// A thread of ours ended early.
    #[error("a task of the daemon ended early")]
    Task(#[source] tokio::task::JoinError),
    /// The bus does not let us serve.
    #[error("the bus does not let us serve")]
    Bus(#[source] bus::zbus::Error),
}

/// Says which path an I/O error is about.
pub trait At<T> {
    /// The same result with the path in its error.
    ///
    /// # Errors
    /// [`StorageError::Io`], or [`StorageError::NoSpace`] when the data partition is full.
    fn at(self, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> At<T> for std::result::Result<T, E> {
    fn at(self, path: &Path) -> Result<T> {
        self.map_err(|error| {
            let source = error.into();
            match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    StorageError::NoSpace("the data partition is full".into())
                }
                _ => StorageError::Io { path: path.to_owned(), source },
            }
        })
    }
}

impl From<StorageError> for bus::Error {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::NotFound(text) => Self::NotFound(text),
            StorageError::Exists(text) => Self::Exists(text),
            StorageError::Invalid(text) => Self::InvalidArgument(text),
            StorageError::WrongState(text) => Self::WrongState(text),
            StorageError::NotReady(text) => Self::NotReady(text),
            StorageError::NoSpace(text) => Self::NoSpace(text),
            StorageError::Refused(error) => error,
            error => Self::Internal(chain(&error)),
        }
    }
}
