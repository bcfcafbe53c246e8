//! What state a sandbox is in, what is captured of it and what it has, through the API.
#![allow(clippy::unwrap_used)]

#[path = "../client/mod.rs"]
mod client;
#[path = "../common/mod.rs"]
mod common;

mod audit;
mod builds;
mod events;
mod execs;
mod forks;
mod logs;
mod ports;
mod previews;
mod proxy;
mod snapshots;
mod verbs;
mod volume_snapshots;
mod volumes;
