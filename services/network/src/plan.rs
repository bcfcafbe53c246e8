//! What the network looks like: names, addresses and rules, derived from the owners.
//!
//! Owns: the policy, as text for `nft -f -`, and the numbers and names of every interface.
//! Refuses to know: how any of it gets into a kernel. Pure.
//!
//! ```text
//!  guest 172.31.255.2 ── tap0 172.31.255.1 ┐ namespace of the sandbox ┌ up0 10.200.x.y ── v<id> ┐ host ┌ uplink
//!                        only this MAC and │ 172.31.255.2 ⇄ 10.200.x.y │      only this interface │      │ masqueraded,
//!                        source come in    │ :53 → 10.200.0.1:53       │      and source come in  │      │ public only
//! ```

use std::{fmt::Write as _, net::Ipv4Addr};

use pandastack_bus::SandboxId;

/// The guest's own address; the same in every sandbox.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 2);
/// The guest's gateway and resolver: our end of its tap.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 31, 255, 1);
/// Prefix length of the net between guest and gateway.
pub const GUEST_PREFIX: u8 = 30;
/// The host as sandboxes see it: the forwarder of names, and the source of connections that the host makes to guests.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 1);
/// The net of outside addresses.
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 0);
/// Its prefix length.
pub const OUTSIDE_PREFIX: u8 = 16;
/// MTU of tap and link, bytes.
pub const MTU: u32 = 1450;
/// The interface that the host's address is on.
pub const HOST_DEVICE: &str = "panda0";
/// Name of the tap in every sandbox's namespace; it is part of the snapshots.
pub const TAP: &str = "tap0";
/// Name of the link's inner end in every sandbox's namespace.
pub const UP: &str = "up0";
/// Interface group of every link's host end: this, not a name, says that an interface is ours.
pub const GROUP: u32 = 10_200;
/// MAC address of the guest; it is part of the snapshots.
pub const GUEST_MAC: [u8; 6] = [0x06, 0x00, 0xac, 0x1f, 0xff, 0x02];
/// MAC address of the tap: fixed, because a restored guest remembers its gateway's.
pub const TAP_MAC: [u8; 6] = [0x06, 0x00, 0xac, 0x1f, 0xff, 0x01];
/// Connections that one sandbox may have in the connection tracking tables.
pub const FLOWS: u32 = 4096;

/// Destinations that no sandbox may reach beyond the host: ourselves, private and shared nets, link-local and metadata,
/// benchmarking, multicast, reserved, broadcast. 198.51.100.0/24 and 203.0.113.0/24 are not among them: tests play the
/// internet there.
const CLOSED: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 169.254.0.0/16, 172.16.0.0/12, 192.0.0.0/24, \
                      192.168.0.0/16, 198.18.0.0/15, 224.0.0.0/3";

/// A sandbox and the address it has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    /// The sandbox.
    pub id: SandboxId,
    /// Its outside address.
    pub address: Ipv4Addr,
}

impl Owner {
    /// Name of the host's end of its link.
    pub fn link(&self) -> String {
        link_name(&self.id)
    }

    /// MAC address of the host's end of its link.
    pub fn host_mac(&self) -> [u8; 6] {
        self.mac(0x02)
    }

    /// MAC address of the inner end of its link.
    pub fn up_mac(&self) -> [u8; 6] {
        self.mac(0x01)
    }

    /// Locally administered, unique by the outside address.
    fn mac(&self, end: u8) -> [u8; 6] {
        let [a, b, c, d] = self.address.octets();
        [0x06, end, a, b, c, d]
    }

    fn element(&self) -> String {
        format!("\"{}\" . {}", self.link(), self.address)
    }
}

/// Name of the host's end of a sandbox's link: fits into the kernel's fifteen characters.
pub fn link_name(id: &SandboxId) -> String {
    format!("v{}", &id.as_str()[..12])
}

/// The whole policy of the host: replaces what is there in one transaction, so that no packet ever passes without one.
pub fn host_ruleset(owners: &[Owner]) -> String {
    let elements = match owners {
        [] => String::new(),
        _ => format!("\t\telements = {{ {} }}\n", elements(owners)),
    };
    format!(
        r#"table inet pandastack
delete table inet pandastack
table inet pandastack {{
	set links {{
		type ifname . ipv4_addr
{elements}	}}
	set flows {{
		type ipv4_addr
		size 65536
		flags dynamic
	}}
	set queries {{
		type ipv4_addr
		size 65536
		flags dynamic,timeout
		timeout 1m
	}}
	chain early {{
		type filter hook prerouting priority raw; policy accept;
		iifgroup {GROUP} goto from_sandbox
		ip saddr {OUTSIDE}/{OUTSIDE_PREFIX} iifname != "lo" counter drop
	}}
	chain from_sandbox {{
		meta nfproto != ipv4 counter drop
		iifname . ip saddr != @links counter drop
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		iifgroup {GROUP} goto to_host
	}}
	chain to_host {{
		ct state new add @flows {{ ip saddr ct count over {FLOWS} }} counter drop
		ip daddr {HOST} udp dport 53 goto to_resolver
		ct state established,related accept
		ip daddr {HOST} tcp dport 53 ct state new goto to_resolver
		counter drop
	}}
	chain to_resolver {{
		update @queries {{ ip saddr limit rate over 200/second burst 400 packets }} counter drop
		accept
	}}
	chain forward {{
		type filter hook forward priority filter; policy drop;
		meta nfproto != ipv4 counter drop
		ct state invalid counter drop
		ct state established,related accept
		iifgroup {GROUP} goto to_world
		counter drop
	}}
	chain to_world {{
		ip daddr {{ {CLOSED} }} counter drop
		oifgroup {GROUP} counter drop
		ct state new add @flows {{ ip saddr ct count over {FLOWS} }} counter drop
		accept
	}}
	chain translate {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {OUTSIDE}/{OUTSIDE_PREFIX} ip saddr != {HOST} oifgroup != {GROUP} masquerade
	}}
}}
"#
    )
}

/// A change of the host's policy in one transaction. What is added may be there already, what is removed may be gone.
pub fn host_change(added: &[Owner], removed: &[Owner]) -> String {
    let mut text = String::new();
    if !removed.is_empty() {
        let elements = elements(removed);
        // Deleting what is absent fails the whole transaction, adding what is present does not.
        let _ = writeln!(text, "add element inet pandastack links {{ {elements} }}");
        let _ = writeln!(text, "delete element inet pandastack links {{ {elements} }}");
    }
    if !added.is_empty() {
        let _ = writeln!(text, "add element inet pandastack links {{ {} }}", elements(added));
    }
    text
}

/// The policy inside the namespace of one sandbox: translation between its two addresses, and nothing for the
/// namespace itself.
pub fn namespace_ruleset(address: Ipv4Addr) -> String {
    let mac = mac_text(GUEST_MAC);
    format!(
        r#"table inet pandastack
delete table inet pandastack
table inet pandastack {{
	chain early {{
		type filter hook prerouting priority raw; policy drop;
		meta nfproto != ipv4 counter drop
		iifname "{TAP}" ether saddr {mac} ip saddr {GUEST} accept
		iifname "{UP}" ip daddr {address} accept
		counter
	}}
	chain arrive {{
		type nat hook prerouting priority dstnat; policy accept;
		iifname "{TAP}" ip daddr {GATEWAY} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {HOST}
		iifname "{UP}" ip daddr {address} dnat ip to {GUEST}
	}}
	chain input {{
		type filter hook input priority filter; policy drop;
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
		meta nfproto ipv4 ct state related accept
	}}
	chain forward {{
		type filter hook forward priority filter; policy drop;
		ct state invalid counter drop
		ct state established,related accept
		ct state new ct count over {FLOWS} counter drop
		iifname "{TAP}" oifname "{UP}" accept
		iifname "{UP}" oifname "{TAP}" accept
		counter
	}}
	chain depart {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{UP}" ip saddr {GUEST} snat ip to {address}
	}}
}}
"#
    )
}

fn elements(owners: &[Owner]) -> String {
    owners.iter().map(Owner::element).collect::<Vec<_>>().join(", ")
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn owner(id: &str, last: u8) -> Owner {
        Owner { id: id.parse().expect("an id"), address: Ipv4Addr::new(10, 200, 0, last) }
    }

    fn two() -> [Owner; 2] {
        [owner("aaaaaaaaaaaaaaaaaaaa", 2), owner("0123456789abcdefghij", 3)]
    }

    /// Compares with the file of that name in `src/golden`; `PANDASTACK_GOLDEN=write` writes it instead.
    fn golden(name: &str, text: &str) {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/golden").join(name);
        if std::env::var_os("PANDASTACK_GOLDEN").is_some_and(|mode| mode == "write") {
            std::fs::write(&path, text).expect("the golden file is written");
        }
        let expected = std::fs::read_to_string(&path).expect("the golden file is there");
        assert_eq!(text, expected, "{name} changed; PANDASTACK_GOLDEN=write cargo test accepts it");
    }

    #[test]
    fn the_texts_are_the_reviewed_ones() {
        golden("host-empty.nft", &host_ruleset(&[]));
        golden("host-two.nft", &host_ruleset(&two()));
        golden("host-change.nft", &host_change(&two()[..1], &two()[1..]));
        golden("namespace.nft", &namespace_ruleset(Ipv4Addr::new(10, 200, 1, 77)));
    }

    #[test]
    fn no_change_is_no_text() {
        assert_eq!(host_change(&[], &[]), "");
    }

    #[test]
    fn names_fit_and_addresses_differ() {
        let [one, two] = two();

        assert_eq!(one.link(), "vaaaaaaaaaaaa");
        assert!(one.link().len() <= 15);
        let macs =
            BTreeSet::from([one.host_mac(), one.up_mac(), two.host_mac(), two.up_mac(), TAP_MAC, GUEST_MAC]);
        assert_eq!(macs.len(), 6);
        // Unicast and locally administered.
        assert!(macs.iter().all(|mac| mac[0] & 0b11 == 0b10));
    }

    /// Every word of a script that names an interface of a sandbox or an address that a sandbox can have.
    fn mentioned(script: &str) -> BTreeSet<String> {
        script
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '.' || c == '/'))
            .filter(|word| {
                let link = word.len() == 13 && word.starts_with('v');
                let address = word.parse().is_ok_and(|a: Ipv4Addr| a.octets()[..2] == [10, 200] && a != HOST);
                link || address
            })
            .map(str::to_owned)
            .collect()
    }

    prop_compose! {
        fn any_owner()(id in "[a-z0-9]{20}", low in 2u32..65_000) -> Owner {
            Owner { id: id.parse().expect("an id"), address: Ipv4Addr::from(u32::from(OUTSIDE) + low) }
        }
    }

    proptest! {
        #[test]
        fn scripts_name_the_owners_given_and_nobody_else(
            owners in proptest::collection::vec(any_owner(), 0..20),
            gone in proptest::collection::vec(any_owner(), 0..20),
        ) {
            let of = |owners: &[Owner]| -> BTreeSet<String> {
                owners.iter().flat_map(|owner| [owner.link(), owner.address.to_string()]).collect()
            };
            prop_assert_eq!(mentioned(&host_ruleset(&owners)), of(&owners));
            let both: Vec<_> = owners.iter().chain(&gone).cloned().collect();
            prop_assert_eq!(mentioned(&host_change(&owners, &gone)), of(&both));
            for owner in &owners {
                let inside = BTreeSet::from([owner.address.to_string()]);
                prop_assert_eq!(mentioned(&namespace_ruleset(owner.address)), inside);
            }
        }
    }
}
