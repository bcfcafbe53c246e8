//! The network daemon: attaches each sandbox to the world, and keeps the world apart from it.
//!
//! It owns the address plan, every link and tap, the table `inet pandastack` of the host and of each sandbox's namespace,
//! and the forwarder of names. It refuses to know what a sandbox is, who has it and what it runs: an owner is an id and
//! a process.
//!
//! - [`ipam`], [`plan`]: pure. Who has which address; what rules follow.
//! - [`ledger`]: the address plan, kept.
//! - [`netns`], [`tap`], [`link`], [`firewall`], [`attach`]: effects, one kind each.
//! - [`manager`]: puts them in order, and answers on the bus.
//! - [`dns`]: the resolver that guests see.

pub mod attach;
pub mod dns;
pub mod error;
pub mod firewall;
pub mod ipam;
pub mod ledger;
pub mod link;
pub mod manager;
pub mod netns;
pub mod plan;
pub mod serve;
pub mod tap;
