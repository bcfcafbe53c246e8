//! The api daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    pandastack_daemon::run("api", pandastack_api::start::run)
}
