//! Who owns what in the appliance: every unit, directory, link, rule, address, capture, volume and template belongs to a record.
//!
//! Owns: one picture of everything, taken by root's shell in the appliance, and the rules by which it must fit together
//! when nothing is under way. Refuses to know: how that shell is reached.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// One shell text, so that the picture is of one moment.
const LOOK: &str = r"
systemctl start pandastack-limits-clean.service
for f in /var/lib/pandastack/vmm/*/*.json; do case $f in */requests/*) ;; *) basename $f .json | sed 's/^/record /';; esac; done
systemctl list-units --all --plain --no-legend 'pandastack-sandbox@*' | sed 's/pandastack-sandbox@\([a-z0-9]*\).service *[^ ]* *\([^ ]*\).*/unit \1 \2/'
for d in /var/lib/pandastack/storage/sandboxes/*/; do [ -d $d ] && basename $d | sed 's/^/directory /'; done
busctl call ai.pandastack.network1 /ai/pandastack/network1 ai.pandastack.network1.Manager Owners | grep -oE '\b[a-z0-9]{20}\b' | sed 's/^/address /'
ip -o link | grep -oE ' v[a-z0-9]{12}[@:]' | tr -d ' @:' | sed 's/^v/link /'
nft list table inet pandastack | grep -oE '\bv[a-z0-9]{12}\b' | sort -u | sed 's/^v/rule /'
ls /run/systemd/system.control 2>/dev/null | grep -oE '[a-z0-9]{20}' | sed 's/^/limit /'
ls -A /var/lib/pandastack/storage/trash 2>/dev/null | sed 's/^/trash /'
for d in /var/lib/pandastack/storage/snapshots/*/; do [ -d $d ] && basename $d | sed 's/^/capture /'; done
for d in /var/lib/pandastack/storage/volume-snapshots/*/; do [ -d $d ] && basename $d | sed 's/^/kept /'; done
ls -A /var/lib/pandastack/api/builds/spool 2>/dev/null | sed 's/^/upload /'
find /var/lib/pandastack/storage/sandboxes -mindepth 2 -maxdepth 2 -name 'c.*' | sed 's/^/unfinished /'
say() { busctl --json=short call ai.pandastack.$1 /ai/pandastack/$1 ai.pandastack.$1.Manager $2 $3 ${3:+''} | sed 's/^/said '$2' /'; }
say vmm1 List s; say storage1 Snapshots s; say storage1 Volumes s; say storage1 VolumeSnapshots s; say storage1 Templates
";

/// The workspace of builds of templates.
const BUILDS: &str = "_builds";

/// What each part of the appliance knows.
#[derive(Debug, Default)]
struct Picture {
    /// Ids of all files of vmm, slots among them.
    records: BTreeSet<String>,
    sandboxes: BTreeMap<String, Sandbox>,
    units: BTreeSet<String>,
    directories: BTreeSet<String>,
    addresses: BTreeSet<String>,
    /// First twelve characters of the id.
    links: BTreeSet<String>,
    rules: BTreeSet<String>,
    limits: BTreeSet<String>,
    /// Directories of snapshots.
    captures: BTreeSet<String>,
    /// What storage says of each: its sandbox and its purpose.
    snapshots: BTreeMap<String, (String, String)>,
    /// Directories of snapshots of volumes.
    kept: BTreeSet<String>,
    /// What storage says of these.
    volume_snapshots: BTreeSet<String>,
    /// Sandbox and volume.
    holds: BTreeSet<(String, String)>,
    /// What should not be there at all.
    litter: Vec<String>,
}

/// What vmm says of a sandbox.
#[derive(Debug)]
struct Sandbox {
    state: String,
    machine: String,
    /// Volumes that it shares with nobody are not among them.
    volumes: BTreeSet<String>,
}

/// Waits until nothing is left over. `shell` is root's in the appliance.
///
/// # Errors
/// At the deadline, with what is left and the whole picture.
pub fn settle(shell: &dyn Fn(&str) -> Result<String>, within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    loop {
        let picture = read(&shell(LOOK)?)?;
        let wrong = wrong(&picture);
        if wrong.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("left over: {}\n{picture:?}", wrong.join("; "));
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}

fn read(text: &str) -> Result<Picture> {
    let mut picture = Picture::default();
    let mut said = 0;
    for line in text.lines() {
        let Some((what, rest)) = line.split_once(' ') else { continue };
        let id = || rest.split(' ').next().unwrap_or_default().to_owned();
        match what {
            "record" => drop(picture.records.insert(id())),
            "unit" => {
                picture.units.insert(id());
                if rest.ends_with("failed") {
                    picture.litter.push(line.to_owned());
                }
            }
            "directory" => drop(picture.directories.insert(id())),
            "address" => drop(picture.addresses.insert(id())),
            "link" => drop(picture.links.insert(id())),
            "rule" => drop(picture.rules.insert(id())),
            "limit" => drop(picture.limits.insert(id())),
            "capture" => drop(picture.captures.insert(id())),
            "kept" => drop(picture.kept.insert(id())),
            // Builds are over when things have come to rest.
            "trash" | "unfinished" | "upload" => picture.litter.push(line.to_owned()),
            "said" => {
                let (which, json) = rest.split_once(' ').context("an answer without a body")?;
                read_answer(&mut picture, which, json).with_context(|| format!("{which}: {json}"))?;
                said += 1;
            }
            _ => {}
        }
    }
    // A daemon that is being restarted says nothing; that is no picture.
    if said < 5 {
        picture.litter.push("vmm or storage does not answer".to_owned());
    }
    Ok(picture)
}

/// The places of a structure's fields are those of `pandastack_bus`.
fn read_answer(picture: &mut Picture, which: &str, json: &str) -> Result<()> {
    let answer: Value = serde_json::from_str(json)?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("a text was expected");
    for one in answer["data"][0].as_array().context("no array")? {
        match which {
            "List" => {
                let mut volumes = BTreeSet::new();
                for mount in one[20].as_array().context("no mounts")? {
                    if !mount[3].as_bool().context("private")? {
                        volumes.insert(text(&mount[0])?);
                    }
                }
                let sandbox = Sandbox { state: text(&one[6])?, machine: text(&one[19])?, volumes };
                picture.sandboxes.insert(text(&one[0])?, sandbox);
            }
            "Snapshots" => {
                let spec = &one[0];
                picture.snapshots.insert(text(&spec[0])?, (text(&spec[2])?, text(&spec[3])?));
            }
            "VolumeSnapshots" => drop(picture.volume_snapshots.insert(text(&one[0][0])?)),
            "Templates" => {
                let (id, owner) = (text(&one[0])?, text(&one[2])?);
                if one[3].as_bool().context("hidden")? && !owner.is_empty() {
                    picture.litter.push(format!("template {id} of {owner}, which nobody sees"));
                }
            }
            _ => {
                if one[0] == BUILDS {
                    picture.litter.push(format!("volume {} of a build", one[1]));
                }
                for holder in one[5].as_array().context("no holders")? {
                    picture.holds.insert((text(holder)?, text(&one[1])?));
                }
            }
        }
    }
    Ok(())
}

/// Ids under which something may exist: slots, and the machines of sandboxes.
fn machines(picture: &Picture) -> BTreeSet<String> {
    let mut ids: BTreeSet<String> =
        picture.records.iter().filter(|id| !picture.sandboxes.contains_key(*id)).cloned().collect();
    for (id, sandbox) in &picture.sandboxes {
        match sandbox.state.as_str() {
            "hibernated" => {}
            "running" | "paused" | "failed" if !sandbox.machine.is_empty() => {
                ids.insert(sandbox.machine.clone());
            }
            _ => {
                ids.insert(id.clone());
                ids.insert(sandbox.machine.clone());
            }
        }
    }
    ids
}

fn wrong(picture: &Picture) -> Vec<String> {
    let mut wrong = picture.litter.clone();
    let owners = machines(picture);
    for (what, ids) in
        [("unit", &picture.units), ("directory", &picture.directories), ("address", &picture.addresses)]
    {
        wrong.extend(ids.difference(&owners).map(|id| format!("{what} {id} has no owner")));
    }
    for (what, ids, others) in [
        ("unit without a directory", &picture.units, &picture.directories),
        ("limit without a unit", &picture.limits, &picture.units),
        ("rule without a link", &picture.rules, &picture.links),
        (
            "capture that storage does not know",
            &picture.captures,
            &picture.snapshots.keys().cloned().collect(),
        ),
        ("snapshot of a volume that storage does not know", &picture.kept, &picture.volume_snapshots),
        ("snapshot of a volume without files", &picture.volume_snapshots, &picture.kept),
        ("snapshot without files", &picture.snapshots.keys().cloned().collect(), &picture.captures),
        (
            "link without an owner",
            &picture.links,
            &picture.addresses.iter().map(|id| id.chars().take(12).collect()).collect(),
        ),
    ] {
        wrong.extend(ids.difference(others).map(|id| format!("{what}: {id}")));
    }
    wrong.extend(wrong_captures(picture));
    let holds = picture
        .sandboxes
        .iter()
        .flat_map(|(id, sandbox)| sandbox.volumes.iter().map(|volume| (id.clone(), volume.clone())))
        .collect();
    wrong.extend(picture.holds.difference(&holds).map(|hold| format!("volume held by nobody: {hold:?}")));
    wrong.extend(holds.difference(&picture.holds).map(|hold| format!("volume not held: {hold:?}")));
    wrong
}

/// A hibernated sandbox has one hibernation image, nobody else has; no fork's capture is left.
fn wrong_captures(picture: &Picture) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut images: BTreeMap<&str, usize> = BTreeMap::new();
    for (snapshot, (sandbox, purpose)) in &picture.snapshots {
        match purpose.as_str() {
            "fork" => wrong.push(format!("capture {snapshot} of a fork of {sandbox}")),
            "hibernation" => *images.entry(sandbox).or_default() += 1,
            _ => {}
        }
    }
    for (id, sandbox) in &picture.sandboxes {
        let expected = usize::from(sandbox.state == "hibernated");
        let found = images.remove(id.as_str()).unwrap_or_default();
        if found != expected {
            wrong.push(format!("{id} is {} and has {found} hibernation images", sandbox.state));
        }
    }
    wrong.extend(images.keys().map(|id| format!("a hibernation image of {id}, which nobody knows")));
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: &str = "aaaaaaaaaaaaaaaaaaaa";
    const AWAKE: &str = "bbbbbbbbbbbbbbbbbbbb";
    const MACHINE: &str = "cccccccccccccccccccc";
    const ASLEEP: &str = "dddddddddddddddddddd";
    const IMAGE: &str = "eeeeeeeeeeeeeeeeeeee";
    const KEPT: &str = "ffffffffffffffffffff";

    fn sandbox(id: &str, state: &str, machine: &str, volume: &str) -> String {
        format!(
            r#"["{id}","w","base",2,2048,1,"{state}","",{{"a":"b"}},1,1,false,"","wake",1,1,1,"","","{machine}",[["{volume}","/mnt/{volume}",false,false],["own","/mnt/own",false,true]]]"#
        )
    }

    fn text() -> String {
        let mut text = String::new();
        for id in [SLOT, AWAKE, ASLEEP] {
            text += &format!("record {id}\n");
        }
        for id in [SLOT, MACHINE] {
            text +=
                &format!("unit {id} active\ndirectory {id}\naddress {id}\nlink {}\nrule {0}\n", &id[..12]);
        }
        text += &format!("capture {IMAGE}\n");
        text += &format!(
            "said List {{\"data\":[[{},{}]]}}\n",
            sandbox(AWAKE, "running", MACHINE, "one"),
            sandbox(ASLEEP, "hibernated", "", "two")
        );
        text += &format!(
            "said Snapshots {{\"data\":[[[[\"{IMAGE}\",\"w\",\"{ASLEEP}\",\"hibernation\",\"base\",2,2048,1,{{}},[]],9,9,\"\"]]]}}\n"
        );
        text += &format!("kept {KEPT}\n");
        text +=
            &format!("said VolumeSnapshots {{\"data\":[[[[\"{KEPT}\",\"w\",\"one\",\"\",true],64,1,1]]]}}\n");
        text += "said Templates {\"data\":[[[\"builder\",\"builder\",\"\",true,0],[\"own\",\"mine\",\"w\",false,1]]]}\n";
        text += &format!(
            "said Volumes {{\"data\":[[[\"w\",\"one\",64,1,1,[\"{AWAKE}\"]],[\"w\",\"two\",64,1,1,[\"{ASLEEP}\"]],[\"w\",\"free\",64,1,1,[]]]]}}\n"
        );
        text
    }

    #[test]
    fn a_woken_a_hibernated_and_a_slot_fit_together() {
        let picture = read(&text()).expect("the text is whole");

        assert_eq!(wrong(&picture), Vec::<String>::new());
    }

    #[test]
    fn a_failed_one_keeps_the_disk_that_it_moved_to() {
        let text = text()
            .replace(&format!("unit {MACHINE} active\n"), "")
            .replace("\"running\"", "\"failed\"")
            .replace(&format!("address {MACHINE}\nlink {0}\nrule {0}\n", &MACHINE[..12]), "");

        assert_eq!(wrong(&read(&text).expect("the text is whole")), Vec::<String>::new());
        let stranger = text.replace(&format!("directory {MACHINE}"), &format!("directory {AWAKE}"));
        assert_ne!(wrong(&read(&stranger).expect("the text is whole")), Vec::<String>::new());
    }

    #[test]
    fn everything_that_is_left_over_is_seen() {
        let gone = |line: &str| text().replace(line, "");
        for (change, text) in [
            ("the old machine of a woken one", format!("{}directory {AWAKE}\n", text())),
            (
                "a machine of a hibernated one",
                format!("{}unit {ASLEEP} active\ndirectory {ASLEEP}\n", text()),
            ),
            ("an address of nobody", format!("{}address {IMAGE}\n", text())),
            ("half a capture", format!("{}unfinished /x/{SLOT}/c.mem\n", text())),
            ("a capture that nobody knows", format!("{}capture {SLOT}\n", text())),
            ("a capture without files", gone(&format!("capture {IMAGE}\n"))),
            ("a fork's capture", text().replace("hibernation", "fork")),
            ("a hibernation image of one that runs", text().replace("hibernated", "running")),
            (
                "a hold of one that is gone",
                text().replace(&format!("[\"{AWAKE}\"]"), &format!("[\"{IMAGE}\"]")),
            ),
            ("a mount without a hold", text().replace(&format!("[\"{AWAKE}\"]"), "[]")),
            ("a link of nobody", format!("{}link zzzzzzzzzzzz\n", text())),
            ("a snapshot of a volume without files", gone(&format!("kept {KEPT}\n"))),
            ("a snapshot of a volume that nobody knows", format!("{}kept {SLOT}\n", text())),
            ("an upload", format!("{}upload 0123456789abcdef\n", text())),
            ("a volume of a build", text().replace("[\"w\",\"free\"", "[\"_builds\",\"target\"")),
            ("a template that was not published", text().replace("\"w\",false,1", "\"w\",true,1")),
            ("a daemon that is silent", gone("said Volumes")),
        ] {
            assert_ne!(wrong(&read(&text).expect(change)), Vec::<String>::new(), "{change} was not seen");
        }
    }
}
