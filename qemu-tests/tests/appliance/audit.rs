//! Who owns what in the appliance: every unit, directory, link, rule and address belongs to a record of vmm.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::fixture::Fixture;

/// The ids that each part of the appliance knows.
#[derive(Debug)]
struct Owners {
    records: BTreeSet<String>,
    units: BTreeSet<String>,
    directories: BTreeSet<String>,
    addresses: BTreeSet<String>,
    /// First twelve characters of the id.
    links: BTreeSet<String>,
    /// Units that failed or limits that nobody needs.
    litter: Vec<String>,
}

/// One shell line, so that the picture is of one moment.
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
";

fn look(fixture: &Fixture) -> Result<Owners> {
    let text = fixture.ssh(LOOK)?;
    let of = |what: &str| -> BTreeSet<String> {
        text.lines()
            .filter_map(|line| line.strip_prefix(what)?.strip_prefix(' '))
            .filter_map(|rest| rest.split(' ').next())
            .map(str::to_owned)
            .collect()
    };
    let units = of("unit");
    let mut litter: Vec<String> = text
        .lines()
        .filter(|line| line.starts_with("unit ") && line.ends_with("failed"))
        .map(str::to_owned)
        .collect();
    litter.extend(of("limit").difference(&units).map(|id| format!("limit {id}")));
    litter.extend(of("trash").into_iter().map(|name| format!("trash {name}")));
    let links = of("link");
    litter.extend(of("rule").difference(&links).map(|link| format!("rule {link}")));
    Ok(Owners {
        records: of("record"),
        units,
        directories: of("directory"),
        addresses: of("address"),
        links,
        litter,
    })
}

fn wrong(owners: &Owners) -> Vec<String> {
    let mut wrong = owners.litter.clone();
    for (what, ids) in
        [("unit", &owners.units), ("directory", &owners.directories), ("address", &owners.addresses)]
    {
        wrong.extend(ids.difference(&owners.records).map(|id| format!("{what} {id} has no record")));
    }
    wrong
        .extend(owners.units.difference(&owners.directories).map(|id| format!("unit {id} has no directory")));
    let short: BTreeSet<String> = owners.addresses.iter().map(|id| id.chars().take(12).collect()).collect();
    wrong.extend(owners.links.difference(&short).map(|link| format!("link {link} has no owner")));
    wrong
}

/// Waits until nothing is left over.
pub fn settle(fixture: &Fixture, within: Duration) -> Result<()> {
    let deadline = Instant::now() + within;
    loop {
        let owners = look(fixture)?;
        let wrong = wrong(&owners);
        if wrong.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("left over: {}\n{owners:?}", wrong.join("; "));
        }
        std::thread::sleep(Duration::from_secs(2));
    }
}
