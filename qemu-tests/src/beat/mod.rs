//! A guest that shows whether its memory and its disk are of one moment: a program in it counts in both and compares them.
//!
//! Owns: that program ([`PROGRAM`]), the questions to it, and the procedure that takes a sandbox through captures, forks
//! and hibernation ([`every_copy_agrees`]). Refuses to know: how any of these work.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::json;

use crate::api::Api;

/// The program.
pub const PROGRAM: &str = include_str!("beat.py");
/// How far a guest's clock may be from ours: ours and the appliance's are not the same.
const CLOCK: f64 = 20.0;

/// What the program answers.
#[derive(Debug, Clone, Deserialize)]
pub struct Told {
    /// Beats so far.
    pub n: u64,
    /// Checksum of all that the program has in memory.
    pub crc: u64,
    /// Milliseconds: the longest time since the last answer in which nothing ran.
    pub gap_ms: f64,
    /// The guest's clock, Unix seconds.
    pub unix: f64,
    /// Process id of the program.
    pub pid: u64,
    /// What memory and disk disagree about.
    pub wrong: Vec<String>,
}

/// Starts the program in a sandbox.
///
/// # Errors
/// When it does not start.
pub fn start(api: &Api, id: &str) -> Result<Told> {
    api.write(id, "/root/beat.py", PROGRAM.as_bytes())?;
    api.exec(
        id,
        "setsid python3 /root/beat.py >/root/beat.err 2>&1 </dev/null & \
         for i in $(seq 200); do [ -p /run/beat.in ] && break; sleep 0.2; done; cat /root/beat.err",
    )?;
    ask(api, id, "state")
}

/// Asks it one of its words.
///
/// # Errors
/// When it does not answer.
pub fn ask(api: &Api, id: &str, word: &str) -> Result<Told> {
    let text = api.exec(id, &format!("echo {word} >/run/beat.in && cat /run/beat.out"))?;
    serde_json::from_str(&text).with_context(|| format!("{id} answered {text:?} to {word:?}"))
}

/// Asserts that a held sandbox is what `held` was, that its memory and disk agree, then lets it beat and sees that it
/// does.
///
/// # Errors
/// When any of it is not so.
pub fn whole(api: &Api, id: &str, held: &Told) -> Result<()> {
    let told = ask(api, id, "check")?;
    ensure!(told.wrong.is_empty(), "{id}: memory and disk disagree: {:?}", told.wrong);
    ensure!(
        (told.n, told.crc, told.pid) == (held.n, held.crc, held.pid),
        "{id} is {told:?} and was {held:?}"
    );
    goes_on(api, id)
}

/// Lets it beat and sees that it does, and that its clock is right.
///
/// # Errors
/// When it stands still.
pub fn goes_on(api: &Api, id: &str) -> Result<()> {
    let from = ask(api, id, "go")?;
    let deadline = Instant::now() + Duration::from_secs(20);
    while ask(api, id, "state")?.n <= from.n {
        ensure!(Instant::now() < deadline, "{id} stands still at {}", from.n);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64();
    ensure!((ask(api, id, "state")?.unix - now).abs() < CLOCK, "{id}: its clock is wrong");
    Ok(())
}

/// Takes one sandbox through captures while it beats and while it is held, `ways` forks at once, and hibernation again and
/// again. In every copy memory and disk agree.
///
/// # Errors
/// The first copy that does not.
pub fn every_copy_agrees(api: &Api, ways: usize, rounds: usize, say: &dyn Fn(&str)) -> Result<()> {
    let id = api.create_base()?;
    start(api, &id)?;
    for round in 0..rounds {
        // While it beats: a copy need only agree with itself, and not be older than what was seen before.
        let before = ask(api, &id, "state")?;
        let copy = from_snapshot(api, &id)?;
        agrees(api, &copy, &before)?;
        say(&format!("round {round}: a snapshot's copy agrees"));

        let before = ask(api, &id, "state")?;
        for child in api.fork(&id, ways)? {
            agrees(api, &child, &before).with_context(|| format!("child {child}"))?;
        }
        say(&format!("round {round}: {ways} children agree"));

        // Held: everything is exactly as it was, page by page.
        let held = ask(api, &id, "hold")?;
        let children = api.fork(&id, 2)?;
        api.done(&id, "hibernate")?;
        api.done(&id, "wake")?;
        whole(api, &id, &held).context("after hibernation")?;
        let again = ask(api, &id, "hold")?;
        api.done(&id, "hibernate")?;
        whole(api, &id, &again).context("after the second hibernation, woken by use")?;
        for child in children {
            whole(api, &child, &held).with_context(|| format!("held child {child}"))?;
            let held = ask(api, &child, "hold")?;
            let grandchild = api.fork(&child, 1)?.remove(0);
            delete(api, &child)?;
            whole(api, &grandchild, &held).with_context(|| format!("grandchild {grandchild}"))?;
            delete(api, &grandchild)?;
        }
        say(&format!("round {round}: hibernation and grandchildren are exact"));
    }
    delete(api, &id)
}

/// A copy that was beating when it was taken: it agrees with itself, goes on, and is then deleted.
fn agrees(api: &Api, id: &str, before: &Told) -> Result<()> {
    let told = ask(api, id, "check")?;
    ensure!(told.wrong.is_empty(), "memory and disk disagree: {:?}", told.wrong);
    ensure!(told.n >= before.n && told.pid == before.pid, "it is {told:?}, and before it was {before:?}");
    goes_on(api, id)?;
    delete(api, id)
}

/// A sandbox from a snapshot of another, which is then deleted.
///
/// # Errors
/// When one of the steps is refused.
pub fn from_snapshot(api: &Api, id: &str) -> Result<String> {
    let snapshot = api.done(id, "snapshots")?.text("id")?;
    let copy = api.create(&json!({"template": "base", "from_snapshot": snapshot}))?;
    let answer = api.call("DELETE", &format!("/v1/snapshots/{snapshot}"), None)?;
    ensure!(answer.status == 204, "{answer:?}");
    Ok(copy)
}

fn delete(api: &Api, id: &str) -> Result<()> {
    let answer = api.delete(id)?;
    ensure!(answer.status == 204, "deleting {id}: {answer:?}");
    Ok(())
}
