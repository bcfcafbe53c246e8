//! Where a guest can go. The internet, the metadata service and the neighbours are played.

use anyhow::{Result, ensure};

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

pub fn a_guest_reaches_the_internet_and_nothing_else(fixture: &Fixture) -> Result<()> {
    let peer = fixture.bring("peer")?;
    let addresses = WORLD.map(|(address, _)| address);
    let everywhere = addresses.map(|address| format!("{address}:7000")).join(" ");
    world::build(fixture, &addresses, &format!("{peer} {everywhere}"))?;
    let api = fixture.api()?;
    let (one, two) = (api.create_base()?, api.create_base()?);
    let other = api.get(&two)?.body["guest_ip"].as_str().unwrap_or_default().to_owned();
    api.exec(&two, "setsid python3 -m http.server 7000 >/dev/null 2>&1 < /dev/null & sleep 2")?;

    let mut wrong = Vec::new();
    for (address, reachable) in &WORLD {
        let (tcp, udp) = (tcp(fixture, &one, address, 7000)?, udp(fixture, &one, address)?);
        if tcp != *reachable || udp != *reachable {
            wrong.push(format!("{address}: tcp {tcp}, udp {udp}"));
        }
    }
    let own = api.get(&one)?.body["guest_ip"].as_str().unwrap_or_default().to_owned();
    // The host by every address it has, the API's port and SSH's; the other guest.
    for (address, port) in [
        ("10.200.0.1", 8080),
        ("10.200.0.1", 22),
        ("172.31.255.1", 8080),
        ("10.200.0.1", 8081),
        ("10.0.2.15", 8081),
        ("10.0.2.15", 8080),
        ("10.0.2.15", 22),
        ("10.0.2.2", 22),
        (own.as_str(), 8080),
    ] {
        if tcp(fixture, &one, address, port)? {
            wrong.push(format!("the host at {address}:{port}"));
        }
    }
    if tcp(fixture, &one, &other, 7000)? || tcp(fixture, &one, &other, 22)? {
        wrong.push(format!("the other guest at {other}"));
    }
    let six = api.exec(&one, "cat /proc/net/if_inet6 | grep -v ' lo$'; python3 -c \"\nimport socket\nfor a in ('fe80::1%eth0','fd00::1','2001:db8::1','::ffff:169.254.169.254'):\n  try:\n    s=socket.socket(socket.AF_INET6); s.settimeout(2); s.connect((a,80)); print('reached',a)\n  except OSError: pass\"")?;
    if !six.trim().is_empty() {
        wrong.push(format!("IPv6: {six}"));
    }
    let spoofed = api.exec(&one, "ip addr add 10.77.7.7/32 dev lo; python3 -c \"\nimport socket\ns=socket.socket(); s.settimeout(3); s.bind(('10.77.7.7',0))\ntry:\n  s.connect(('198.51.100.10',7000)); print('reached')\nexcept OSError: print('silence')\"")?;
    if spoofed.contains("reached") {
        wrong.push("a foreign source address gets out".into());
    }
    api.delete_all()?;
    world::tear_down(fixture, &addresses)?;

    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    fixture.assert_nothing_leaks()
}

fn tcp(fixture: &Fixture, id: &str, address: &str, port: u16) -> Result<bool> {
    let code = format!(
        "import socket\ns=socket.socket(); s.settimeout(3)\ntry:\n  s.connect(('{address}',{port})); print('reached')\nexcept OSError: print('silence')"
    );
    Ok(fixture.api()?.exec(id, &format!("python3 -c \"{code}\""))?.contains("reached"))
}

fn udp(fixture: &Fixture, id: &str, address: &str) -> Result<bool> {
    let code = format!(
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(3)\ntry:\n  s.sendto(b'x',('{address}',7000)); s.recv(99); print('reached')\nexcept OSError: print('silence')"
    );
    Ok(fixture.api()?.exec(id, &format!("python3 -c \"{code}\""))?.contains("reached"))
}
