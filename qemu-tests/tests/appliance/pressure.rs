//! Not enough of something: a clear refusal in the form that the clients ask again, and nothing half made.

use std::{collections::BTreeSet, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use qemu_tests::api::{Api, ids};
use serde_json::{Value, json};

use crate::fixture::Fixture;

/// Creates at one time; several times the slots.
const BURST: usize = 20;
/// Admission looks at a figure that may be as old as five seconds, and the machine may be slow.
const SPACE_IS_OLD: Duration = Duration::from_secs(12);

pub fn a_burst_of_creates(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;

    let made: Vec<Result<String>> = thread::scope(|scope| {
        let callers: Vec<_> = (0..BURST).map(|_| scope.spawn(|| api.create_base())).collect();
        callers.into_iter().map(|caller| caller.join().expect("a caller does not panic")).collect()
    });

    let failed: Vec<String> =
        made.iter().filter_map(|one| Some(format!("{:#}", one.as_ref().err()?))).collect();
    ensure!(failed.is_empty(), "{} of {BURST} failed: {failed:?}", failed.len());
    let made = made.into_iter().collect::<Result<BTreeSet<String>>>()?;
    ensure!(made.len() == BURST, "the same id twice");
    for id in &made {
        ensure!(api.exec(id, "echo well")? == "well\n", "{id} does not answer");
    }
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

/// 16 forks of a 2 GiB parent on a small host, then on one that has nothing left at all.
pub fn forks_beyond_memory(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let parent = api.create_base()?;
    api.exec(&parent, "echo kept > /root/kept; echo kept > /dev/shm/kept")?;
    let path = format!("/v1/sandboxes/{parent}/fork-tree");
    let kept = |id: &str| api.exec(id, "cat /root/kept /dev/shm/kept");

    let result = (|| {
        // Room for one or two.
        take_memory(fixture, 900)?;
        let some = api.call("POST", &path, Some(&json!({"count": 16})))?;
        let children = ids(&some.body["children"]);
        eprintln!("  16 forks with little memory: {} with {} children", some.status, children.len());
        if some.status == 201 {
            let errors = some.body["errors"].as_array().map_or(0, Vec::len);
            ensure!(!children.is_empty() && children.len() + errors == 16, "{some:?}");
        } else {
            ensure!(some.is_capacity_refusal(), "{some:?}");
        }
        for child in &children {
            ensure!(kept(child)? == "kept\nkept\n", "{child} is not whole");
            ensure!(api.delete(child)?.status == 204, "{child} cannot be deleted");
        }
        only(&api, &parent)?;

        take_memory(fixture, 0)?;
        for (path, body) in [
            (path.as_str(), json!({"count": 2})),
            (&path.replace("-tree", ""), json!({})),
            ("/v1/sandboxes", json!({"template": "base"})),
        ] {
            let none = api.call("POST", path, Some(&body))?;
            ensure!(none.is_capacity_refusal(), "{path} with no memory left: {none:?}");
        }
        only(&api, &parent)
    })();
    fixture.ssh("umount -l /run/suite-hog 2>/dev/null; rmdir /run/suite-hog 2>/dev/null; true")?;
    result?;

    let child = api.fork(&parent, 1)?.remove(0);
    ensure!(kept(&child)? == "kept\nkept\n" && kept(&parent)? == "kept\nkept\n", "not whole afterwards");
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

/// Takes the appliance's memory until so much is left above its reserve, MiB.
fn take_memory(fixture: &Fixture, spare: u64) -> Result<()> {
    let text = fixture.ssh("mkdir -p /run/suite-hog; mountpoint -q /run/suite-hog || mount -t tmpfs -o size=95% suite-hog /run/suite-hog; busctl --json=short call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Capacity")?;
    let capacity: Value = serde_json::from_str(&text)?;
    let number = |at: usize| capacity["data"][at].as_u64().with_context(|| text.clone());
    let take = number(4)?.saturating_sub(number(5)? + spare);
    fixture.ssh(&format!("head -c {take}M /dev/zero > $(mktemp -p /run/suite-hog)")).map(|_| ())
}

pub fn a_full_data_partition(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let parent = api.create_base()?;
    api.exec(&parent, "echo kept > /root/kept; echo kept > /dev/shm/kept; sync")?;
    let (at, hog) = (format!("/v1/sandboxes/{parent}"), "/var/lib/suite-hog");

    let result = (|| {
        let text = fixture.ssh("busctl --json=short call ai.pandastack.storage1 /ai/pandastack/storage1 ai.pandastack.storage1.Manager Usage")?;
        let usage: Value = serde_json::from_str(&text)?;
        let number = |at: usize| usage["data"][at].as_u64().with_context(|| text.clone());
        // Into the reserve, but not to the end: the appliance itself goes on writing.
        let take = number(1)?.saturating_sub(number(2)? / 2);
        fixture.ssh(&format!("fallocate -l {take} {hog}"))?;
        thread::sleep(SPACE_IS_OLD);
        for (path, body) in [
            ("/v1/sandboxes".to_owned(), json!({"template": "base"})),
            (format!("{at}/snapshots"), json!({})),
            (format!("{at}/fork"), json!({})),
            (format!("{at}/fork-tree"), json!({"count": 3})),
            ("/v1/volumes".to_owned(), json!({"name": "suite-full", "size_mb": 64})),
        ] {
            let answer = api.call("POST", &path, Some(&body))?;
            ensure!(
                answer.status == 507 && answer.body["error"].is_string(),
                "{path} on a full disk: {answer:?}"
            );
        }
        only(&api, &parent)?;
        ensure!(api.snapshots()?.is_empty(), "a snapshot is left");
        // It may use the reserve, because a shutdown must not lose anything; but it does not stop half-way.
        let answer = api.verb(&parent, "hibernate")?;
        let expected = if answer.status == 200 { "hibernated" } else { "running" };
        ensure!(answer.status == 200 || answer.status == 507, "hibernate on a full disk: {answer:?}");
        ensure!(api.status(&parent)? == expected, "{answer:?} left it {}", api.status(&parent)?);
        ensure!(api.exec(&parent, "cat /root/kept /dev/shm/kept")? == "kept\nkept\n", "it is not whole");
        Ok(())
    })();
    fixture.ssh(&format!("rm -f {hog}"))?;
    result?;
    thread::sleep(SPACE_IS_OLD);

    api.done(&parent, "hibernate")?;
    ensure!(
        api.exec(&parent, "cat /root/kept /dev/shm/kept")? == "kept\nkept\n",
        "it is not whole afterwards"
    );
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

/// Nothing but this sandbox is in the workspace.
fn only(api: &Api, parent: &str) -> Result<()> {
    let listed = ids(&Value::Array(api.list()?));
    ensure!(listed == [parent], "left are {listed:?} and not only {parent}");
    Ok(())
}
