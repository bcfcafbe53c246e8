//! Where a guest can go. The internet, the metadata service and the neighbours are played.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use qemu_tests::api::Api;
use serde_json::json;

use crate::{fixture::Fixture, world};

/// Addresses of the played world: the first two are the internet, the others must not be reached.
const WORLD: [(&str, bool); 8] = [
    ("198.51.100.10", true),
    ("203.0.113.7", true),
    ("169.254.169.254", false),
    ("169.254.7.7", false),
    ("10.9.9.9", false),
    ("172.20.1.1", false),
    ("192.168.77.1", false),
    ("100.64.3.3", false),
];
const PORT: u16 = 7000;
/// The host by every address it has: the API's port, the edge's and SSH's.
const HOST: [(&str, u16); 8] = [
    ("10.200.0.1", 8080),
    ("10.200.0.1", 22),
    ("172.31.255.1", 8080),
    ("10.200.0.1", 8081),
    ("10.0.2.15", 8081),
    ("10.0.2.15", 8080),
    ("10.0.2.15", 22),
    ("10.0.2.2", 22),
];
/// Tries every place of the JSON list on its command line, `[protocol, address, port, source]`, all at once, because one that
/// drops packets says so only by its silence. Prints those that answer.
const PROBE: &str = r#"
import json, socket, sys, threading
def probe(place):
    protocol, address, port, source = place
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM) as probe:
        probe.settimeout(8)
        try:
            if source: probe.bind((source, 0))
            if protocol == "udp": probe.sendto(b"x", (address, port)); probe.recv(99)
            else: probe.connect((address, port))
        except OSError: return
    print(json.dumps(place), flush=True)
for place in json.loads(sys.argv[1]): threading.Thread(target=probe, args=[place]).start()
"#;

type Place = (&'static str, String, u16, &'static str);

pub fn a_guest_reaches_the_internet_and_nothing_else(fixture: &Fixture) -> Result<()> {
    let peer = fixture.bring("peer")?;
    let addresses = WORLD.map(|(address, _)| address);
    let everywhere = addresses.map(|address| format!("{address}:{PORT}")).join(" ");
    world::build(fixture, &addresses, &format!("{peer} {everywhere}"))?;
    let api = fixture.api()?;
    let (one, two) = (api.create_base()?, api.create_base()?);
    let ip = |id: &str| -> Result<String> {
        Ok(api.get(id)?.body["guest_ip"].as_str().context("no guest_ip")?.to_owned())
    };
    let (own, other) = (ip(&one)?, ip(&two)?);
    let serve = format!(
        "setsid python3 -m http.server {PORT} >/dev/null 2>&1 < /dev/null & \
         for _ in $(seq 400); do bash -c ': < /dev/tcp/127.0.0.1/{PORT}' 2>/dev/null && echo up && break; sleep 0.2; done"
    );
    // What is not there cannot be reached either.
    ensure!(api.exec(&two, &serve)? == "up\n", "the other guest does not listen");
    ensure!(
        api.exec(&one, "ip addr add 10.77.7.7/32 dev lo && echo added")? == "added\n",
        "no foreign address"
    );

    let mut expected = BTreeSet::new();
    let mut places = Vec::<Place>::new();
    for (address, reachable) in WORLD {
        for protocol in ["tcp", "udp"] {
            let place = (protocol, address.to_owned(), PORT, "");
            if reachable {
                expected.insert(json!(place).to_string());
            }
            places.push(place);
        }
    }
    places.extend(HOST.map(|(address, port)| ("tcp", address.into(), port, "")));
    // The guest's address seen from outside; the other guest; the internet from an address that is not the guest's.
    places.push(("tcp", own, 8080, ""));
    places.extend([PORT, 22].map(|port| ("tcp", other.clone(), port, "")));
    places.push(("tcp", "198.51.100.10".into(), PORT, "10.77.7.7"));
    for address in ["fe80::1%eth0", "fd00::1", "2001:db8::1", "::ffff:169.254.169.254"] {
        places.push(("tcp", address.into(), 80, ""));
    }
    let reached = reached(&api, &one, &places)?;
    let six = api.exec(&one, "grep -v ' lo$' /proc/net/if_inet6 || true")?;
    api.delete_all()?;
    world::tear_down(fixture, &addresses)?;

    ensure!(reached == expected, "reached {reached:?} instead of {expected:?}");
    ensure!(six.trim().is_empty(), "IPv6: {six}");
    fixture.assert_nothing_leaks()
}

/// Which of these places answer.
fn reached(api: &Api, id: &str, places: &[Place]) -> Result<BTreeSet<String>> {
    let list = serde_json::to_string(places)?;
    let said = api.exec(id, &format!("python3 - '{list}' <<'END'\n{PROBE}\nEND\n"))?;
    said.lines().map(|line| Ok(serde_json::from_str::<serde_json::Value>(line)?.to_string())).collect()
}
