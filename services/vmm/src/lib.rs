//! The conductor: the life of every sandbox.
//!
//! Owns: which sandboxes there are and what state they are in; slots, bakes, admission, idleness, recovery. It asks storage
//! for directories, network for attachments, PID 1 for processes, Firecracker for machines and the guest for its identity,
//! and gives callers a connected stream to the guest. Refuses to know: HTTP, tokens, file systems, packets, what a
//! guest is used for.
//!
//! ```text
//!   backend ──► create, fork, hibernate, wake,      when something shall happen
//!                  │     reap, bake, startup
//!                  │ event
//!                  ▼
//!               sandbox ──► machine (pure)          what follows from it
//!                  │ effects
//!                  ▼
//!               effects, capture, volumes ──► ports how it is done: unit, firecracker, agent, remote
//! ```

pub mod admission;
pub mod agent;
pub mod amend;
pub mod backend;
pub mod bake;
pub mod capture;
pub mod catalogue;
pub mod commit;
pub mod console;
pub mod create;
pub mod effects;
pub mod firecracker;
pub mod fork;
pub mod garbage;
pub mod hibernate;
pub mod history;
pub mod machine;
pub mod manager;
pub mod meter;
pub mod ports;
pub mod quota;
pub mod reap;
pub mod reconcile;
pub mod record;
pub mod recover;
pub mod remote;
pub mod sandbox;
pub mod slots;
pub mod socket;
pub mod startup;
pub mod unit;
pub mod volume_snapshot;
pub mod volumes;
pub mod wake;
pub mod wardrobe;
