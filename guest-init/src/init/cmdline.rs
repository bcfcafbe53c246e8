//! What the kernel command line tells us: pure parsing.

use std::net::Ipv4Addr;

/// Everything init is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Settings {
    /// Device of the root file system.
    pub root: String,
    pub network: Network,
}

/// How `eth0` is set up; nothing is done without an address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Network {
    pub address: Option<(Ipv4Addr, u8)>,
    pub gateway: Option<Ipv4Addr>,
    pub mtu: Option<u32>,
}

/// Reads what is there; what does not parse counts as absent. The last mention wins, as in the kernel.
pub(super) fn parse(cmdline: &str) -> Settings {
    let mut settings = Settings { root: "/dev/vda".into(), network: Network::default() };
    for word in cmdline.split_whitespace() {
        let Some((key, value)) = word.split_once('=') else { continue };
        match key {
            "root" => settings.root = value.to_owned(),
            "panda.addr" => settings.network.address = address(value),
            "panda.gw" => settings.network.gateway = value.parse().ok(),
            "panda.mtu" => settings.network.mtu = value.parse().ok(),
            _ => {}
        }
    }
    settings
}

fn address(value: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = value.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
    Some((address.parse().ok()?, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_command_line_of_a_sandbox() {
        let settings = parse(
            "console=ttyS0 quiet reboot=k panic=1 pci=off panda.addr=172.31.255.2/30 panda.gw=172.31.255.1 panda.mtu=1450 root=/dev/vda\n",
        );
        assert_eq!(settings.root, "/dev/vda");
        assert_eq!(settings.network.address, Some((Ipv4Addr::new(172, 31, 255, 2), 30)));
        assert_eq!(settings.network.gateway, Some(Ipv4Addr::new(172, 31, 255, 1)));
        assert_eq!(settings.network.mtu, Some(1450));
    }

    #[test]
    fn nonsense_counts_as_absent() {
        let settings = parse("panda.addr=1.2.3.4/33 panda.gw=x panda.mtu=-1 root");
        assert_eq!(settings, Settings { root: "/dev/vda".into(), network: Network::default() });
    }
}
