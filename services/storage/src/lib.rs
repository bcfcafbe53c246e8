//! Templates, root disks and captures on XFS: what the storage daemon does, as a library.
//!
//! Owns: the state directory (see [`layout`]), and with it every file that a sandbox sees as `/vm`.
//! Refuses to know: what runs in a sandbox, who asked for it, units, networks. It calls nobody.
//!
//! Pure: [`template`], [`progress`], [`gc`], [`ext4`], [`identity`], [`layout`]. Effects: [`place`], [`artefact`], [`import`],
//! [`bake`], [`sandbox`]. [`manager`] puts them behind the bus interface, [`serve`] on the bus.

pub mod artefact;
pub mod bake;
pub mod copy;
pub mod error;
pub mod ext4;
pub mod gc;
pub mod identity;
pub mod import;
pub mod keyed;
pub mod layout;
pub mod manager;
pub mod place;
pub mod progress;
pub mod reflink;
pub mod sandbox;
pub mod serve;
pub mod template;

pub use error::StorageError;
pub use manager::{Config, Manager};
pub use serve::serve;
