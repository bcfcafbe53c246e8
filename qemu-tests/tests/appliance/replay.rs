//! A log of the disk's writes, cut at flushes: the harder form of a power cut, because everything that was not flushed is
//! gone, too.

use std::{fs, process::Command, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use qemu_tests::{api::Api, writelog};
use serde_json::json;

use crate::{
    fixture::Fixture,
    is_long,
    power::{self, Return},
};

/// Something that was acknowledged when the log was so long.
#[derive(Debug)]
enum Acknowledged {
    Synced(String, &'static str),
    Asleep(String, &'static str),
    Captured(String, &'static str),
    Deleted(String),
}

pub fn cuts_at_flush_boundaries(fixture: &Fixture) -> Result<()> {
    fixture.take()?.power_down(Duration::from_secs(120))?;
    let directory = fixture.directory().clone();
    let (disk, frozen, log) =
        (directory.join("disk.qcow2"), directory.join("frozen.qcow2"), directory.join("writes.log"));
    fs::rename(&disk, &frozen)?;
    overlay(&frozen, &disk)?;
    fixture.start(|appliance| appliance.log_writes(log.clone()))?;
    let api = fixture.api()?;
    let length = || -> Result<u64> { Ok(fs::metadata(&log)?.len()) };
    let mut acknowledged = Vec::new();
    let workload_from = length()?;
    for text in ["one", "two", "three"] {
        let id = power::persistent(&api, text, &[])?;
        acknowledged.push((length()?, Acknowledged::Synced(id.clone(), text)));
        let snapshot = api.done(&id, "snapshots")?.text("id")?;
        acknowledged.push((length()?, Acknowledged::Captured(snapshot, text)));
        if text == "two" {
            api.done(&id, "hibernate")?;
            acknowledged.push((length()?, Acknowledged::Asleep(id, text)));
        }
        let other = power::persistent(&api, "gone", &[])?;
        ensure!(api.delete(&other)?.status == 204, "not deleted");
        acknowledged.push((length()?, Acknowledged::Deleted(other)));
        thread::sleep(Duration::from_secs(2));
    }
    thread::sleep(Duration::from_secs(3));
    fixture.take()?.power_cut()?;

    let entries = writelog::read(&log)?;
    let flushes: Vec<usize> = writelog::flushes(&entries)
        .into_iter()
        .filter(|count| entries[count - 1].end() > workload_from)
        .collect();
    // Places of the log at which the disk is cut.
    let cuts = if is_long() { 3 } else { 1 };
    ensure!(flushes.len() > cuts, "only {} flushes in {} entries", flushes.len(), entries.len());
    for cut in 1..=cuts {
        // Not the same places each time, but spread over the workload.
        let jitter = std::process::id() as usize % (flushes.len() / cuts).max(1);
        let count = flushes[(flushes.len() * cut / cuts - 1).saturating_sub(jitter / 2)];
        let position = entries[count - 1].end();
        eprintln!("  cut after {count} of {} writes", entries.len());
        fs::remove_file(&disk)?;
        overlay(&frozen, &disk)?;
        writelog::replay(&log, &entries, count, &disk)?;
        fixture.start(|appliance| appliance)?;
        let api = fixture.api()?;
        for (at, what) in &acknowledged {
            match what {
                Acknowledged::Synced(id, text) if *at <= position => {
                    power::came_back(&api, id, text, Return::Either).context("synced before the cut")?
                }
                Acknowledged::Asleep(id, text) if *at <= position => {
                    power::came_back(&api, id, text, Return::Woken).context("hibernated before the cut")?
                }
                Acknowledged::Captured(snapshot, text) if *at <= position => {
                    captured(&api, snapshot, text).context("captured before the cut")?
                }
                Acknowledged::Deleted(id) if *at <= position => {
                    ensure!(api.get(id)?.status == 404, "deleted {id} is back")
                }
                _ => {}
            }
        }
        fixture.assert_nothing_leaks()?;
        fixture.take()?.power_cut()?;
    }
    Ok(())
}

/// A sandbox from the snapshot has the file.
fn captured(api: &Api, snapshot: &str, text: &str) -> Result<()> {
    let copy = api.create(&json!({"template": "base", "from_snapshot": snapshot}))?;
    ensure!(api.exec(&copy, "cat /root/kept")? == text, "{snapshot} does not have it");
    ensure!(api.delete(&copy)?.status == 204, "not deleted");
    Ok(())
}

fn overlay(base: &std::path::Path, path: &std::path::Path) -> Result<()> {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .arg(base)
        .arg(path)
        .status()?;
    ensure!(made.success(), "qemu-img: {made}");
    Ok(())
}
