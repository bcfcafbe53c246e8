//! `appliance`: the development machine's power button, console and screwdriver for the appliance.

use std::process::ExitCode;

use qemu_tests::{
    download, fuzz, soak,
    workbench::{self, Workbench},
};

const USAGE: &str = "\
usage: appliance COMMAND

  run               boot the image with the kept disk in .run, return when the API answers
  stop              shut it down cleanly; after a minute, cut the power
  status            what runs, with what, and whether it answers
  console           follow the serial console
  shell [COMMAND]   a root shell in the appliance, or one command
  push FILE…        try freshly built programs in the running appliance, until it restarts
  bench [ROUNDS]    measure a throw-away appliance; the table also goes to .run/bench.json
  push --units      the same for the unit files in systemd/system
  soak [--steps N] [--seed N]
                    random state changes in a throw-away appliance, compared with a model after each
  fuzz PROGRAM [--minutes N] [--only guest|edge|bodies|api]
                    what strangers send, mutated, ten minutes of each; `make fuzz` builds the program
  download [--mib N]
                    a preview of a throw-away appliance under load: by default 1024 MiB, byte for byte
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = Workbench::here().and_then(|bench| match words.as_slice() {
        ["run"] => workbench::run(&bench),
        ["stop"] => workbench::stop(&bench),
        ["status"] => workbench::status(&bench),
        ["console"] => workbench::console(&bench),
        ["shell", command @ ..] => workbench::shell(&bench, command),
        ["bench"] => qemu_tests::bench::run(bench.directory(), 20),
        ["bench", rounds] => qemu_tests::bench::run(bench.directory(), rounds.parse()?),
        ["soak", options @ ..] => soak::run(soak::Options::parse(options)?),
        ["fuzz", options @ ..] => fuzz::run(bench.directory(), &fuzz::Options::parse(options)?),
        ["download", options @ ..] => download::run(download::Options::parse(options)?),
        ["push", "--units"] => workbench::push_units(&bench),
        ["push", files @ ..] if !files.is_empty() => workbench::push(&bench, files),
        _ => {
            eprint!("{USAGE}");
            Ok(ExitCode::from(2))
        }
    });
    result.unwrap_or_else(|error| {
        eprintln!("appliance: {error:#}");
        ExitCode::FAILURE
    })
}
