//! The journal: every line goes there with its fields, upper-cased (`sandbox` becomes `SANDBOX`).
//!
//! `RUST_LOG` chooses what is logged, `info` by default. Where there is no journal (tests, a container), lines go to
//! standard error. A panic is a line like any other.

use tracing_journald::{Priority, PriorityMappings};
use tracing_subscriber::{EnvFilter, layer::SubscriberExt, util::SubscriberInitExt};

/// Installs the global subscriber. Does nothing if there is one already.
pub(crate) fn init(identifier: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let installed = match tracing_journald::layer() {
        Ok(journal) => registry
            .with(
                journal
                    .with_field_prefix(None)
                    .with_syslog_identifier(identifier.to_owned())
                    .with_priority_mappings(PriorityMappings {
                        info: Priority::Informational,
                        debug: Priority::Debug,
                        ..PriorityMappings::new()
                    }),
            )
            .try_init(),
        Err(_) => registry
            .with(tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false))
            .try_init(),
    };
    if installed.is_ok() {
        std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    }
}
