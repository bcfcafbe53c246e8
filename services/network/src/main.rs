//! The network daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    pandastack_daemon::run("network", pandastack_network::serve::serve)
}
