//! The only crate that says "D-Bus".
//!
//! It owns every bus name, object path, wire type and error of the private interfaces between our daemons, and the few
//! methods of PID 1 that we call. One definition per interface serves both ends: a daemon implements the plain trait
//! (`VmmBackend`, `StorageBackend`, …), its callers use the generated proxy (`VmmProxy`, `StorageProxy`, …).
//!
//! It refuses to know what any of it means: no state, no files, no policy.
//!
//! Calls go one way: api, edge → vmm → storage, network, PID 1; api may also ask storage about
//! templates and edge about previews. All daemons come
//! from one image, so these interfaces are changed freely between images; the golden introspection in `tests/` makes a
//! change deliberate.

mod error;
mod id;

pub mod api;
pub mod edge;
pub mod network;
pub mod quota;
pub mod storage;
pub mod systemd;
mod template;
pub mod vmm;
mod volume;

pub use error::{Error, Result};
pub use id::{BadId, SandboxId};
pub use zbus;

/// Seconds a caller waits for the reply to one method call. Longer than the longest thing a method may do (a create
/// that waits for its template's bake), shorter than the clients' patience of thirty seconds.
pub const METHOD_TIMEOUT_SECONDS: u64 = 28;

/// Connects to the system bus with our reply time limit.
pub async fn system() -> zbus::Result<zbus::Connection> {
    zbus::connection::Builder::system()
        .method_timeout(std::time::Duration::from_secs(METHOD_TIMEOUT_SECONDS))
        .build()
        .await
}
