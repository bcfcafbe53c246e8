//! What strangers send, mutated.
//!
//! Owns: three targets, each a function of bytes that must not panic, hang or break what it promises; seeds to begin with, and a
//! mutation of JSON that keeps it JSON. Refuses to know: where the bytes come from. libFuzzer, which follows coverage, is in
//! `src/bin/fuzz.rs` (`make fuzz`); the suite's short form is `tests/short.rs`. What once failed stays in `corpus/<target>`.

pub mod bodies;
pub mod edge;
pub mod guest;
pub mod mutate;

// The appliances of the services' own tests, so that they stay in step with them.
#[allow(clippy::unwrap_used, unused)]
#[path = "../../../services/api/tests/common/mod.rs"]
mod api_common;
#[allow(clippy::unwrap_used)]
#[path = "../../../services/edge/tests/common/mod.rs"]
mod edge_common;

/// Bytes of an input at most: more than any bound below 64 KiB, so that those are crossed.
pub const LONGEST: usize = 80 << 10;

/// A function of bytes.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its folder in `corpus`.
    pub name: &'static str,
    /// Takes an input; panics when it breaks a promise.
    pub run: fn(&[u8]),
    /// Valid inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Bytes of an input before its JSON, where it has any.
    pub json_after: Option<usize>,
}

/// Every target.
pub const TARGETS: [Target; 3] = [
    Target { name: "guest", run: guest::run, seeds: guest::seeds, json_after: None },
    Target { name: "edge", run: edge::run, seeds: edge::seeds, json_after: None },
    Target { name: "bodies", run: bodies::run, seeds: bodies::seeds, json_after: Some(bodies::HEAD) },
];

/// The target of a name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS.into_iter().find(|target| target.name == name)
}
