//! One error type for every interface: each variant is a different thing the caller may do next.

use zbus::DBusError;

/// What a method of ours answers when it does not do what was asked.
///
/// On the wire: `ai.pandastack.Error.<Variant>`, with one sentence for a person.
#[derive(Debug, Clone, PartialEq, DBusError)]
#[zbus(prefix = "ai.pandastack.Error")]
pub enum Error {
    /// The bus itself failed: peer gone, no reply in time, malformed message. Whether the call had an effect is unknown.
    #[zbus(error)]
    Bus(zbus::Error),
    /// There is no such thing. Nothing changed.
    NotFound(String),
    /// A thing of that name is already there. Nothing changed.
    Exists(String),
    /// The request can never succeed as it is. Nothing changed.
    InvalidArgument(String),
    /// Not in this state; another verb must come first. Nothing changed.
    WrongState(String),
    /// No memory or processors to spare now; ask again later. Nothing was made.
    NoCapacity(String),
    /// The workspace has as much as it may have; ask again when something is deleted. Nothing was made.
    Quota(String),
    /// This alone is more than the workspace may have; asking again does not help. Nothing was made.
    BeyondQuota(String),
    /// Not enough storage. Nothing was made.
    NoSpace(String),
    /// Not ready yet (a template is still being baked, a daemon is still starting); ask again soon. Nothing was made.
    NotReady(String),
    /// The guest does not answer.
    GuestUnreachable(String),
    /// The guest answers, and says no: nothing listens on that port. Nothing changed.
    Refused(String),
    /// It took too long and was given up; what was half done has been undone.
    Timeout(String),
    /// Our own fault, logged where it happened.
    Internal(String),
}

/// Result of a bus method.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The sentence, without the error's name.
    pub fn message(&self) -> String {
        match self {
            Self::Bus(error) => error.to_string(),
            Self::NotFound(text)
            | Self::Exists(text)
            | Self::InvalidArgument(text)
            | Self::WrongState(text)
            | Self::NoCapacity(text)
            | Self::Quota(text)
            | Self::BeyondQuota(text)
            | Self::NoSpace(text)
            | Self::NotReady(text)
            | Self::GuestUnreachable(text)
            | Self::Refused(text)
            | Self::Timeout(text)
            | Self::Internal(text) => text.clone(),
        }
    }
}
