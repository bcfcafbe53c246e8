//! The storage daemon on a real XFS in a file. Needs root, `mkfs.xfs` and loop devices; where they are missing each test
//! prints why it was skipped.

#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod bus;
mod capture;
mod disk;
mod manager;
mod own;
mod snapshot;
mod unprivileged;
mod verify;
mod volume;
mod volume_snapshot;
