//! One binary, three lives: PID 1 of the guest; under the name `panda-agent` the agent it starts; and `connect SOCKET`, which the
//! agent runs for the host as `/proc/self/exe connect SOCKET`, because the binary is in no file system that a guest sees.

use std::process::ExitCode;

fn main() -> ExitCode {
    let agent = std::env::args_os().next().is_some_and(|name| name == guest_init::layout::AGENT_NAME);
    if agent {
        return guest_init::agent::main();
    }
    if std::process::id() == 1 {
        guest_init::init::main();
    }
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|command| command == "connect") {
        return guest_init::connect::main(arguments);
    }
    eprintln!("guest-init is the init of a PandaStack guest and does nothing elsewhere");
    ExitCode::from(2)
}
