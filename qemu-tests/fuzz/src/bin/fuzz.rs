//! libFuzzer over a target, with coverage. `FUZZ_TARGET` names it; `FUZZ_SEEDS` is a directory that gets its seeds first.
//!
//! `make fuzz` builds and `appliance fuzz` starts it; options of libFuzzer are its arguments.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use qemu_tests_fuzz::{LONGEST, Target, bodies, mutate, target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
    target(&name).expect("a target of this name")
});
static NAMES: LazyLock<Vec<String>> = LazyLock::new(bodies::names);

fn write_seeds() {
    let Some(directory) = std::env::var_os("FUZZ_SEEDS") else { return };
    for (at, seed) in (TARGET.seeds)().into_iter().enumerate() {
        let path = std::path::Path::new(&directory).join(format!("seed-{at:03}"));
        std::fs::write(path, seed).expect("a seed can be written");
    }
}

fuzz_target!(init: write_seeds(), |input: &[u8]| {
    if input.len() <= LONGEST {
        (TARGET.run)(input);
    }
});

fuzz_mutator!(|data: &mut [u8], size: usize, most: usize, seed: u32| {
    let mut random = mutate::Random::new(seed.into());
    if TARGET.json_after.is_none() || random.below(2) == 0 {
        return fuzzer_mutate(data, size, most);
    }
    let mut input = data[..size].to_vec();
    mutate::input(&mut input, TARGET.json_after, &NAMES, &mut random);
    input.truncate(most);
    data[..input.len()].copy_from_slice(&input);
    input.len()
});
