//! Calls to the other daemons that may be repeated, and for how long.

use std::time::Duration;

pub use pandastack_daemon::retry::{again, again_knowing, patiently};

/// How long a caller waits for a capture and what follows from it; the clients hang up after 180 s at the latest.
pub const PATIENCE: Duration = Duration::from_secs(170);
