//! The agent, driven by the host's own client over a pair of connected streams, with real processes and files.
//!
//! Runs as root on Linux. Where a cgroup2 hierarchy can be written to, sessions are in cgroups as in a guest.

mod exec;
mod files;
mod log;
mod requests;
mod sessions;
mod world;
