//! The edge daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    pandastack_daemon::run("edge", pandastack_edge::start::run)
}
