//! A process is killed in the middle of a state change: what was acknowledged is there and whole, what was not has left
//! nothing, and the next capture is right.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use qemu_tests::{
    api::{Answer, Api, ids},
    beat::{self, Told},
    soak::model::Random,
};
use serde_json::{Value, json};

use crate::{faults::wait_active, fixture::Fixture};

const VERBS: [&str; 4] = ["snapshots", "fork", "hibernate", "wake"];

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Daemon(&'static str),
    /// The sandbox's own, or those that might become its own.
    Firecracker,
}

const VICTIMS: [Victim; 3] = [Victim::Daemon("vmm"), Victim::Daemon("storage"), Victim::Firecracker];

/// How long things take here, so that a kill falls into the middle of them.
#[derive(Debug)]
struct Pace {
    /// From calling ssh until its command runs.
    ssh: Duration,
    verbs: [Duration; VERBS.len()],
}

pub fn killed_in_the_middle(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    api.delete_all()?;
    let pace = measure(fixture, &api)?;
    eprintln!("  {pace:?}");
    let mut random = Random::new(u64::from(std::process::id()));
    for victim in VICTIMS {
        let mut subject = None;
        for (verb, usual) in VERBS.into_iter().zip(pace.verbs) {
            let (id, held) = match subject.take() {
                Some(kept) => kept,
                None => make(&api)?,
            };
            let within = u64::try_from(usual.as_millis())?.max(1);
            let after = Duration::from_millis(random.below(within));
            let what = format!("{victim:?} killed {after:?} into {verb} of {id}");
            subject = trial(fixture, &api, victim, verb, after, &pace, (id, held)).context(what)?;
        }
        api.delete_all()?;
        fixture.assert_nothing_leaks().with_context(|| format!("after {victim:?}"))?;
    }
    Ok(())
}

fn make(api: &Api) -> Result<(String, Told)> {
    let id = api.create_base()?;
    beat::start(api, &id)?;
    let held = beat::ask(api, &id, "hold")?;
    Ok((id, held))
}

fn measure(fixture: &Fixture, api: &Api) -> Result<Pace> {
    let clock = |work: &dyn Fn() -> Result<()>| -> Result<Duration> {
        let from = Instant::now();
        work()?;
        Ok(from.elapsed())
    };
    let (id, _) = make(api)?;
    let mut verbs = [Duration::ZERO; VERBS.len()];
    for (verb, took) in VERBS.into_iter().zip(&mut verbs) {
        *took = clock(&|| api.done(&id, verb).map(|_| ()))?;
    }
    let ssh = clock(&|| fixture.ssh("true").map(|_| ()))?;
    api.delete_all()?;
    Ok(Pace { ssh, verbs })
}

/// One verb with one kill. Answers the sandbox, held again, if it outlived it.
fn trial(
    fixture: &Fixture,
    api: &Api,
    victim: Victim,
    verb: &str,
    after: Duration,
    pace: &Pace,
    (id, held): (String, Told),
) -> Result<Option<(String, Told)>> {
    if verb == "wake" {
        api.done(&id, "hibernate")?;
    }
    let kill = command(fixture, victim, verb, &id)?;
    let answer = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            thread::sleep(pace.ssh.saturating_sub(after));
            api.verb(&id, verb)
        });
        thread::sleep(after.saturating_sub(pace.ssh));
        let killed = fixture.ssh(&kill);
        let answer = caller.join().expect("the caller does not panic");
        killed.map(|_| answer)
    })?;
    if let Victim::Daemon(daemon) = victim {
        wait_active(fixture, daemon)?;
    }
    let told = answer.as_ref().map_or("no answer".to_owned(), |answer| answer.status.to_string());
    eprintln!("  {victim:?} {after:?} into {verb}: {told}");
    let acknowledged = answer.as_ref().is_ok_and(|answer| (200..300).contains(&answer.status));
    if let Ok(answer) = &answer {
        ensure!(
            acknowledged || answer.body["error"].is_string(),
            "not an answer of the contract: {answer:?}"
        );
    }

    // What was made is whole, and nothing else was made.
    let made = answer.ok().filter(|_| acknowledged);
    let id = id.as_str();
    match verb {
        "snapshots" => snapshot_is_whole_or_nothing(api, made.as_ref(), &held)?,
        "fork" => children_are_whole_or_nothing(api, id, made.as_ref(), &held)?,
        _ => {}
    }
    let status = settled(api, id)?;
    let expected: &[&str] = match (verb, acknowledged, victim) {
        // Its machine was killed just before or just after.
        ("snapshots" | "fork", _, Victim::Firecracker) => &["failed", "running"],
        ("hibernate", false, Victim::Firecracker) => &["failed", "running", "hibernated"],
        // Its machine may have been killed after the answer.
        ("wake", true, Victim::Firecracker) => &["failed", "running"],
        ("snapshots" | "fork", _, _) | ("wake", true, _) => &["running"],
        ("hibernate", true, _) => &["hibernated"],
        _ => &["running", "hibernated"],
    };
    ensure!(expected.contains(&status.as_str()), "it is {status}; {expected:?} were expected");
    if status == "failed" {
        ensure!(api.delete(id)?.status == 204, "it cannot be deleted");
        return Ok(None);
    }
    if status == "hibernated" {
        api.done(id, "wake")?;
    }
    beat::whole(api, id, &held)?;
    next_capture_is_right(api, id).context("the next capture").map(|held| Some((id.to_owned(), held)))
}

/// The shell line that kills, with everything looked up beforehand.
fn command(fixture: &Fixture, victim: Victim, verb: &str, id: &str) -> Result<String> {
    let pids = match (victim, verb) {
        (Victim::Daemon(daemon), _) => {
            fixture.ssh(&format!("systemctl show -P MainPID pandastack-{daemon}.service"))?
        }
        // It has no machine yet, but will get one of these.
        (Victim::Firecracker, "wake") => fixture.ssh("systemctl show -P MainPID 'pandastack-sandbox@*'")?,
        (Victim::Firecracker, _) => {
            let text = fixture.ssh(&format!("busctl --json=short call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Get s {id}"))?;
            let told: Value = serde_json::from_str(&text)?;
            let machine = told["data"][19].as_str().with_context(|| text.clone())?;
            fixture.ssh(&format!("systemctl show -P MainPID pandastack-sandbox@{machine}.service"))?
        }
    };
    let pids: Vec<&str> = pids.split_whitespace().filter(|pid| *pid != "0").collect();
    ensure!(!pids.is_empty(), "there is no {victim:?} to kill");
    Ok(format!("kill -9 {} || true", pids.join(" ")))
}

/// The state that it comes to rest in.
fn settled(api: &Api, id: &str) -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut last = String::new();
    loop {
        if let Ok(answer) = api.get(id)
            && answer.status == 200
        {
            let status = answer.text("status")?;
            // A machine that was killed is seen a moment later.
            if status == last && ["running", "hibernated", "failed"].contains(&status.as_str()) {
                return Ok(status);
            }
            last = status;
        }
        ensure!(Instant::now() < deadline, "{id} does not come to rest: {last:?}");
        thread::sleep(Duration::from_secs(1));
    }
}

fn snapshot_is_whole_or_nothing(api: &Api, made: Option<&Answer>, held: &Told) -> Result<()> {
    let snapshots = eventually(|| api.snapshots(), |all| all.len() == usize::from(made.is_some()))?;
    let Some(answer) = made else { return Ok(()) };
    ensure!(snapshots == [answer.text("id")?], "there are {snapshots:?} and not {answer:?}");
    let copy = api.create(&json!({"template": "base", "from_snapshot": snapshots[0]}))?;
    beat::whole(api, &copy, held).context("a sandbox from the snapshot")?;
    ensure!(api.delete(&copy)?.status == 204, "the copy cannot be deleted");
    let gone = api.call("DELETE", &format!("/v1/snapshots/{}", snapshots[0]), None)?;
    ensure!(gone.status == 204, "{gone:?}");
    Ok(())
}

fn children_are_whole_or_nothing(api: &Api, id: &str, made: Option<&Answer>, held: &Told) -> Result<()> {
    let expected = made.map_or(Vec::new(), |answer| ids(&answer.body["children"]));
    let children = || {
        let all = api.list()?.into_iter().filter(|one| one["parent_id"] == id);
        Ok(ids(&Value::Array(all.collect())))
    };
    let found = eventually(children, |all: &Vec<String>| *all == expected)?;
    for child in found {
        beat::whole(api, &child, held).with_context(|| format!("child {child}"))?;
        ensure!(api.delete(&child)?.status == 204, "the child cannot be deleted");
    }
    Ok(())
}

/// Beats a while, is held, and is forked: the child is what its parent was, page by page.
fn next_capture_is_right(api: &Api, id: &str) -> Result<Told> {
    let held = beat::ask(api, id, "hold")?;
    let child = api.fork(id, 1)?.remove(0);
    beat::whole(api, &child, &held)?;
    ensure!(api.delete(&child)?.status == 204, "the child cannot be deleted");
    Ok(held)
}

/// The first answer that is as it should be; a daemon that was killed needs a moment to clear away.
fn eventually<T: std::fmt::Debug>(look: impl Fn() -> Result<T>, good: impl Fn(&T) -> bool) -> Result<T> {
    let deadline = Instant::now() + Duration::from_secs(45);
    loop {
        match look() {
            Ok(found) if good(&found) => return Ok(found),
            other if Instant::now() > deadline => bail!("it stays so: {other:?}"),
            _ => thread::sleep(Duration::from_millis(500)),
        }
    }
}
