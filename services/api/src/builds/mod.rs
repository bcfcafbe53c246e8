//! Builds of templates: asked for over HTTP, queued, done one at a time in a machine of their own.
//!
//! Owns: the records of builds, what was uploaded for them, their logs, the queue. Refuses to know what is in an archive or
//! a Dockerfile: nothing that a tenant wrote is unpacked, parsed or mounted on the host. That is the business of the
//! program in the hidden template `builder`; the host gives it files and empty or cloned volumes, and takes the volume
//! that it leaves as a template's root disk.
//!
//! ```text
//!   form ──► spool, record (queued) ──► 202
//!                 │ runner: one at a time
//!                 ▼
//!   record (pure) says what is next; work does it: volumes, machine, upload, program, adopt, bake, publish
//! ```

pub mod dockerfile;
pub mod form;
pub mod guest;
pub mod log;
pub mod record;
pub mod registry;
pub mod runner;
pub mod spool;
pub mod store;
pub mod work;

pub use record::{Build, Kind, Stage};
pub use store::Builds;

/// Where builds happen in their machine, and what does them.
#[derive(Debug, Clone)]
pub struct Workshop {
    /// The template with the program, a hidden one.
    pub template: String,
    /// The program; its argument is the path of the request.
    pub program: String,
    /// Where it finds what was uploaded, and leaves its result.
    pub directory: String,
    /// Where the agent mounts volumes.
    pub mounts: String,
}

impl Default for Workshop {
    fn default() -> Self {
        Self {
            template: "builder".into(),
            program: "/usr/lib/pandastack/build".into(),
            directory: "/work".into(),
            mounts: "/mnt".into(),
        }
    }
}
