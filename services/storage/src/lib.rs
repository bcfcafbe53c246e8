//! Templates, root disks and captures on XFS: what the storage daemon does, as a library.
//!
//! Owns: the state directory (see [`layout`]), and with it every file that a sandbox sees as `/vm`.
//! Refuses to know: what runs in a sandbox, who asked for it, units, networks. It calls nobody.
//!
//! Pure: [`template`], [`progress`], [`gc`], [`ext4`], [`identity`], [`layout`], [`mac`], [`hold`]. Effects: [`place`],
//! [`artefact`], [`import`], [`bake`], [`drive`], [`sandbox`], [`capture`], [`manifest`], [`snapshot`], [`hashes`],
//! [`mkfs`], [`volume`] (with `volume_index` and `volume_snapshot`), [`own`], [`verify`]. [`manager`], [`templates`] and [`backend`] put them behind the bus interface, [`serve`] on the bus.

pub mod artefact;
pub mod backend;
pub mod bake;
pub mod capture;
pub mod copy;
pub mod difference;
pub mod drive;
pub mod error;
pub mod ext4;
pub mod gc;
pub mod hashes;
pub mod hold;
pub mod identity;
pub mod import;
pub mod keyed;
pub mod layout;
pub mod mac;
pub mod manager;
pub mod manifest;
pub mod mkfs;
pub mod own;
pub mod place;
pub mod progress;
pub mod reflink;
pub mod resident;
pub mod sandbox;
pub mod serve;
pub mod snapshot;
pub mod template;
pub mod templates;
pub mod verify;
pub mod volume;
mod volume_index;
mod volume_snapshot;

pub use error::StorageError;
pub use manager::{Config, Manager};
pub use serve::serve;
