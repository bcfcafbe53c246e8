//! One binary, two lives: PID 1 of the guest, and, under the name `panda-agent`, the agent it starts.

use std::process::ExitCode;

fn main() -> ExitCode {
    let agent = std::env::args_os().next().is_some_and(|name| name == guest_init::layout::AGENT_NAME);
    if agent {
        return guest_init::agent::main();
    }
    if std::process::id() == 1 {
        guest_init::init::main();
    }
    eprintln!("guest-init is the init of a PandaStack guest and does nothing elsewhere");
    ExitCode::from(2)
}
