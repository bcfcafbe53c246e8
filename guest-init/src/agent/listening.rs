//! Which TCP ports of this guest are listened on, as far as a connection of ours reaches them.
//!
//! The kernel's tables are text with addresses as hexadecimal words in the byte order of the machine (little-endian here).

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use pandastack_protocol::Ports;

use super::forward;

/// State of a socket that listens.
const LISTEN: &str = "0A";

/// The ports, in order.
pub fn ports() -> Ports {
    let reached: Vec<IpAddr> = forward::addresses().collect();
    let mut found = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = std::fs::read_to_string(table).unwrap_or_default();
        found.extend(
            listeners(&text).filter(|(address, _)| is_reached(*address, &reached)).map(|(_, port)| port),
        );
    }
    Ports { ports: found.into_iter().collect() }
}

/// Whether a connection to one of these addresses finds who listens on `address`.
fn is_reached(address: IpAddr, addresses: &[IpAddr]) -> bool {
    address.is_unspecified() || addresses.contains(&address.to_canonical())
}

/// Address and port of each socket in a table that listens.
fn listeners(table: &str) -> impl Iterator<Item = (IpAddr, u16)> + '_ {
    table.lines().skip(1).filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (local, state) = (words.nth(1)?, words.nth(1)?);
        let (address, port) = local.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok().filter(|port| *port != 0)?;
        (state == LISTEN).then_some((parse_address(address)?, port))
    })
}

fn parse_address(hex: &str) -> Option<IpAddr> {
    if !hex.is_ascii() {
        return None;
    }
    let word = |at: usize| u32::from_str_radix(hex.get(at..at + 8)?, 16).ok().map(u32::to_le_bytes);
    match hex.len() {
        8 => Some(IpAddr::V4(Ipv4Addr::from(word(0)?))),
        32 => {
            let mut bytes = [0; 16];
            for (part, at) in bytes.chunks_exact_mut(4).zip([0, 8, 16, 24]) {
                part.copy_from_slice(&word(at)?);
            }
            Some(IpAddr::V6(Ipv6Addr::from(bytes)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TCP: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0BB8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
   2: 3500007F:0035 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3 1 0 100 0 0 10 0
   3: 0100007F:0BB8 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 4 1 0 100 0 0 10 0
   4: 02FF1FAC:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5 1 0 100 0 0 10 0
";
    const TCP6: &str = "\
  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000000000000000000001000000:1435 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 0000000000000000FFFF00000100007F:1436 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
";

    #[test]
    fn the_kernels_tables_are_read() {
        let read =
            |text| listeners(text).map(|(address, port)| format!("{address} {port}")).collect::<Vec<_>>();
        assert_eq!(read(TCP), ["127.0.0.1 3000", "0.0.0.0 22", "127.0.0.53 53", "172.31.255.2 8080"]);
        assert_eq!(read(TCP6), [":: 80", "::1 5173", "::ffff:127.0.0.1 5174"]);
    }

    #[test]
    fn only_what_a_forward_reaches_counts() {
        let reached = ["127.0.0.1", "::1", "172.31.255.2"].map(|text| text.parse().unwrap());
        let counted = |address: &str| is_reached(address.parse().unwrap(), &reached);
        for yes in ["0.0.0.0", "::", "127.0.0.1", "::1", "172.31.255.2", "::ffff:127.0.0.1"] {
            assert!(counted(yes), "{yes}");
        }
        for no in ["127.0.0.53", "10.0.0.1", "fe80::1"] {
            assert!(!counted(no), "{no}");
        }
    }

    #[test]
    fn a_real_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(ports().ports.contains(&port));
    }

    proptest! {
        #[test]
        fn no_table_panics(text in any::<String>(), hex in "[0-9A-F]{8,32}(:[0-9A-F]{0,5})?") {
            let _ = listeners(&format!("head\n{text}\n0: {hex} x 0A\n")).count();
        }
    }
}
