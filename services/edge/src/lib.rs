//! The edge: what browsers reach of sandboxes without a token of the API.
//!
//! Owns: the tokens of signed previews and their key, host names of previews, the sockets for both. Refuses to know: tokens of
//! the API, any machine. Whether a sandbox is there, and whose it is, vmm says.
//!
//! ```text
//!   listener ──► router ──► preview (token, host name) ──► proxy ──► guest
//!                                 │
//!             D-Bus: Mint, Revoke, List ──► records
//! ```

pub mod backend;
pub mod config;
pub mod hosts;
pub mod listener;
pub mod previews;
pub mod router;
pub mod sandboxes;
pub mod start;
pub mod tls;
pub mod token;
