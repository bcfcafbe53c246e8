//! What the programs that run inside the appliance share: small HTTP calls, and statistics.
//!
//! They measure and play neighbours; they know the appliance's paths and nothing of the host that QEMU runs on.

pub mod bare;
pub mod http;
pub mod stats;
