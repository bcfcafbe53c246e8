//! A played internet: a namespace inside the emulated machine with addresses of its own, in which a program of the suite
//! serves. Nothing leaves the machine, even when a rule under test fails.

use anyhow::{Result, ensure};

use crate::fixture::Fixture;

/// Makes these addresses reachable, and starts a program that serves there.
///
/// # Errors
/// It does not start.
pub fn build(fixture: &Fixture, addresses: &[&str], command: &str) -> Result<()> {
    let mut script = String::from(
        "ip netns add world; ip link add w0 type veth peer name w1 netns world; ip addr add 192.0.2.1/30 dev w0; ip link set w0 up;\
         ip -n world addr add 192.0.2.2/30 dev w1; ip -n world link set w1 up; ip -n world link set lo up; ip -n world route add default via 192.0.2.1;",
    );
    for address in addresses {
        script.push_str(&format!(
            "ip -n world addr add {address}/32 dev lo; ip route add {address}/32 via 192.0.2.2;"
        ));
    }
    script.push_str(&format!(
        "systemd-run --quiet --unit=suite-world -p NetworkNamespacePath=/run/netns/world {command}; sleep 1; systemctl is-active suite-world"
    ));
    let state = fixture.ssh(&script)?;
    ensure!(state.trim() == "active", "the played world does not start: {state}");
    Ok(())
}

/// Takes all of it away.
///
/// # Errors
/// The appliance cannot be asked.
pub fn tear_down(fixture: &Fixture, addresses: &[&str]) -> Result<()> {
    let mut script =
        String::from("systemctl stop suite-world; ip netns del world; ip link del w0 2>/dev/null;");
    for address in addresses {
        script.push_str(&format!("ip route del {address}/32 2>/dev/null;"));
    }
    fixture.ssh(&format!("{script} true"))?;
    Ok(())
}
