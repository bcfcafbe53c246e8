//! State changes that go on while the power is cut.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use qemu_tests::{
    api::Api,
    beat::{self, Told},
};
use serde_json::json;

/// Kept at one time; older ones are deleted.
const SNAPSHOTS: usize = 2;

/// A sandbox that is snapshotted, hibernated and woken again and again, and what its caller was told.
#[derive(Debug)]
pub struct Changing {
    id: String,
    held: Told,
    hibernated: bool,
    /// Acknowledged, and no delete of them was asked for.
    snapshots: Vec<String>,
    /// Their delete was acknowledged.
    deleted: Vec<String>,
    /// Asked for when the answers ended.
    unanswered: &'static str,
    changes: u32,
}

impl Changing {
    /// Makes the sandbox. It stands still: what it has is the same in every copy.
    pub fn begin(api: &Api) -> Result<Self> {
        let id = api.create_base()?;
        beat::start(api, &id)?;
        let held = beat::ask(api, &id, "hold")?;
        Ok(Self {
            id,
            held,
            hibernated: false,
            snapshots: Vec::new(),
            deleted: Vec::new(),
            unanswered: "",
            changes: 0,
        })
    }

    /// Changes its state until it is told to stop, or answers end.
    pub fn go_on(mut self, api: &Api, stop: &AtomicBool) -> Self {
        while !stop.load(Ordering::Relaxed) && self.round(api).is_ok() {}
        self
    }

    fn round(&mut self, api: &Api) -> Result<()> {
        let snapshot = self.told(api, "snapshots")?.unwrap_or_default();
        self.snapshots.push(snapshot);
        if self.snapshots.len() > SNAPSHOTS {
            let oldest = self.snapshots.remove(0);
            let answer = api.call("DELETE", &format!("/v1/snapshots/{oldest}"), None)?;
            ensure!(answer.status == 204, "{answer:?}");
            self.deleted.push(oldest);
        }
        self.told(api, "hibernate")?;
        self.hibernated = true;
        self.told(api, "wake")?;
        self.hibernated = false;
        Ok(())
    }

    fn told(&mut self, api: &Api, verb: &'static str) -> Result<Option<String>> {
        self.unanswered = verb;
        let answer = api.done(&self.id, verb)?;
        self.unanswered = "";
        self.changes += 1;
        Ok(answer.body["id"].as_str().map(str::to_owned))
    }

    /// What was acknowledged before the cut is there and whole after it.
    pub fn is_kept(&self, api: &Api) -> Result<()> {
        let listed = api.snapshots()?;
        let status = api.status(&self.id)?;
        eprintln!(
            "  {} state changes; {:?} was not answered; it is {status}, with {} snapshots",
            self.changes,
            self.unanswered,
            listed.len()
        );
        for snapshot in &self.snapshots {
            ensure!(listed.contains(snapshot), "acknowledged snapshot {snapshot} is lost");
        }
        for snapshot in &self.deleted {
            ensure!(!listed.contains(snapshot), "deleted snapshot {snapshot} is back");
        }
        let most = self.snapshots.len() + 1;
        ensure!(listed.len() <= most, "{} snapshots are listed, {most} at most were made", listed.len());
        // One that nobody was told of may be there, but then it is as good.
        for snapshot in listed {
            let copy = api.create(&json!({"template": "base", "from_snapshot": snapshot}))?;
            beat::whole(api, &copy, &self.held).with_context(|| format!("from snapshot {snapshot}"))?;
            ensure!(api.delete(&copy)?.status == 204, "the copy cannot be deleted");
        }
        // It is not persistent: what ran is lost, what slept is not.
        let expected: &[&str] = match (self.hibernated, self.unanswered) {
            (_, "wake") | (false, "hibernate") => &["hibernated", "failed"],
            (true, _) => &["hibernated"],
            (false, _) => &["failed"],
        };
        ensure!(expected.contains(&status.as_str()), "it is {status} and should be one of {expected:?}");
        if status == "hibernated" {
            beat::whole(api, &self.id, &self.held).context("hibernated before the cut")?;
        }
        Ok(())
    }
}
