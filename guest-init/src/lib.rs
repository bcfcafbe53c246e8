//! The guest's side of PandaStack: an init that mounts, forks and reaps, and an agent that serves the vsock protocol.
//!
//! The two are separate processes of one binary. Init has no threads and no runtime; when the agent dies, init starts it
//! again and what users run lives on.

pub mod agent;
pub mod connect;
pub mod identity_files;
pub mod init;
pub mod layout;
