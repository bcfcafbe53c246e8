//! The vmm daemon.

use std::process::ExitCode;

fn main() -> ExitCode {
    pandastack_daemon::run("vmm", pandastack_vmm::startup::serve)
}
