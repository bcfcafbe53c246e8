//! The short form of `make fuzz`, without coverage: every seed, everything that once failed, and some mutations of these.

use std::{
    path::Path,
    process::abort,
    sync::mpsc::{RecvTimeoutError, channel},
    time::Duration,
};

use qemu_tests_fuzz::{Target, bodies, mutate, target};

/// An input that takes longer hangs; the slowest takes milliseconds.
const HANG: Duration = Duration::from_secs(60);

/// Runs a target over its seeds, its corpus and so many mutations. Prints the input before a panic does.
fn short(name: &str, mutations: u64) {
    let target = target(name).expect("a target of this name");
    let (alive, watched) = channel();
    std::thread::spawn(move || {
        loop {
            match watched.recv_timeout(HANG) {
                Ok(()) => {}
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("an input hangs");
                    abort();
                }
            }
        }
    });
    let run = |input: &[u8]| {
        let outcome = std::panic::catch_unwind(|| (target.run)(input));
        assert!(outcome.is_ok(), "input {:?}, put it into corpus/{name}", String::from_utf8_lossy(input));
        alive.send(()).expect("the watchdog lives");
    };
    let inputs = inputs(&target);
    inputs.iter().for_each(|input| run(input));
    let (names, start) = (bodies::names(), u64::from(std::process::id()));
    eprintln!("mutations of seeds {start}..");
    for seed in start..start + mutations {
        let mut random = mutate::Random::new(seed);
        let mut input = inputs[random.below(inputs.len())].clone();
        mutate::input(&mut input, target.json_after, &names, &mut random);
        run(&input);
    }
}

fn inputs(target: &Target) -> Vec<Vec<u8>> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
    let failed = std::fs::read_dir(corpus).into_iter().flatten().flatten();
    let failed = failed.map(|entry| std::fs::read(entry.path()).expect("a file of the corpus"));
    (target.seeds)().into_iter().chain(failed).collect()
}

#[test]
fn guests() {
    short("guest", 20_000);
}

#[test]
fn the_edge() {
    short("edge", 5_000);
}

#[test]
fn bodies_of_the_api() {
    short("bodies", 5_000);
}
