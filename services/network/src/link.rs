//! Links, addresses, routes and neighbours of one namespace.
//!
//! Owns: the netlink messages. Refuses to know: which links there should be, and where.

use std::{
    io,
    net::{IpAddr, Ipv4Addr},
    os::fd::RawFd,
    time::Duration,
};

use futures_util::TryStreamExt;
use nix::libc;
use rtnetlink::{
    Handle, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        link::{
            AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoVeth,
            LinkAttribute, LinkMessage, State,
        },
        route::{RouteMessage, RouteScope},
    },
};
use tokio::task::AbortHandle;

use crate::error::{Error, Result};

/// How long a link may take until packets pass.
const PATIENCE: Duration = Duration::from_secs(2);

/// A netlink socket in the namespace that it was opened in.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    connection: AbortHandle,
}

/// One link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The number of its other end, in that end's namespace.
    pub peer: Option<u32>,
    /// Its interface group.
    pub group: u32,
    /// The text an administrator attached.
    pub alias: Option<String>,
    /// Whether packets pass: it is switched on, so is its other end, and the kernel has noticed both.
    pub runs: bool,
}

/// One end of a new link.
#[derive(Debug, Clone, Copy)]
pub struct End<'a> {
    /// Name of the interface.
    pub name: &'a str,
    /// Its MAC address.
    pub mac: [u8; 6],
    /// Its interface group.
    pub group: u32,
}

impl Netlink {
    /// Opens a socket in the namespace of the calling thread; to be used on the calling runtime.
    ///
    /// # Errors
    /// The kernel gives no socket.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(Error::system("a netlink socket"))?;
        Ok(Self { handle, connection: tokio::spawn(connection).abort_handle() })
    }

    /// The link of that name, if there is one.
    pub async fn find(&self, name: &str) -> Result<Option<Link>> {
        let found = self.handle.link().get().match_name(name).execute().try_next().await;
        match found.map_err(refused("finding a link")) {
            Ok(message) => Ok(message.map(Link::from)),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The number of the link of that name, which must be there.
    pub async fn index(&self, name: &str) -> Result<u32> {
        let missing =
            || Error::Netlink { what: "finding a link", source: io::Error::from_raw_os_error(libc::ENODEV) };
        Ok(self.find(name).await?.ok_or_else(missing)?.index)
    }

    /// Waits until packets pass a link. The kernel gets to that some time after both ends were switched on, and loses
    /// what is sent before; a first packet lost costs whoever sent it a second.
    ///
    /// # Errors
    /// It took longer than two seconds.
    pub async fn running(&self, name: &str) -> Result<()> {
        let running = async {
            while !self.find(name).await?.is_some_and(|link| link.runs) {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, running).await.map_err(|_| Error::Timeout(PATIENCE))?
    }

    /// Every link of an interface group.
    pub async fn in_group(&self, group: u32) -> Result<Vec<Link>> {
        let all: Vec<LinkMessage> =
            self.handle.link().get().execute().try_collect().await.map_err(refused("listing links"))?;
        Ok(all.into_iter().map(Link::from).filter(|link| link.group == group).collect())
    }

    /// Makes a pair of linked interfaces: `here` in this namespace, `there` in the one of `namespace`. Both are down.
    pub async fn add_pair(&self, here: End<'_>, there: End<'_>, namespace: RawFd, mtu: u32) -> Result<()> {
        let far = LinkUnspec::new_with_name(there.name)
            .mtu(mtu)
            .address(there.mac.to_vec())
            .link_group(there.group)
            .setns_by_fd(namespace)
            .build();
        let pair = LinkVeth::new(here.name, there.name)
            .mtu(mtu)
            .address(here.mac.to_vec())
            .link_group(here.group)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(far)))
            .build();
        self.handle.link().add(pair).execute().await.map_err(refused("making a link"))
    }

    /// Removes a link, and with it its other end; answers whether it was there.
    pub async fn remove(&self, index: u32) -> Result<bool> {
        match self.handle.link().del(index).execute().await.map_err(refused("removing a link")) {
            Ok(()) => Ok(true),
            Err(error) if error.errno() == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Lets a link forward IPv4 and have no IPv6 address. This way works where `/proc/sys` is read-only.
    pub async fn forward_ipv4_only(&self, index: u32) -> Result<()> {
        let mut conf = InetDevConf::default();
        conf.forwarding = 1;
        let ipv4 = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)]);
        self.set_family(index, ipv4).await.map_err(refused("forwarding on a link"))?;
        let ipv6 = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        match self.set_family(index, ipv6).await.map_err(refused("no IPv6 on a link")) {
            // A kernel without IPv6 has nothing to switch off.
            Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => Ok(()),
            other => other,
        }
    }

    /// Sets MAC address and MTU of a link.
    pub async fn shape(&self, index: u32, mac: [u8; 6], mtu: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).address(mac.to_vec()).mtu(mtu).build();
        self.handle.link().set(message).execute().await.map_err(refused("shaping a link"))
    }

    /// Switches a link on.
    pub async fn up(&self, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(message).execute().await.map_err(refused("switching a link on"))
    }

    /// Attaches a text to a link.
    pub async fn alias(&self, index: u32, text: &str) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).alias(text).build();
        self.handle.link().set(message).execute().await.map_err(refused("describing a link"))
    }

    /// Gives a link an address; it may have it already.
    pub async fn address(&self, index: u32, address: Ipv4Addr, prefix: u8) -> Result<()> {
        let request = self.handle.address().add(index, IpAddr::V4(address), prefix).replace();
        request.execute().await.map_err(refused("giving a link its address"))
    }

    /// Routes one address to a link, with the source address that the host itself uses on it.
    pub async fn route_to(&self, index: u32, address: Ipv4Addr, source: Ipv4Addr) -> Result<()> {
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .pref_source(source)
            .build();
        self.route(route).await
    }

    /// Routes everything to a neighbour on a link that no prefix says is there.
    pub async fn default_route(&self, index: u32, gateway: Ipv4Addr) -> Result<()> {
        let route =
            RouteMessageBuilder::<Ipv4Addr>::new().gateway(gateway).output_interface(index).onlink().build();
        self.route(route).await
    }

    /// Tells a link who has an address, once and for all: nothing to ask, nothing to expire, nothing to forge.
    pub async fn neighbour(&self, index: u32, address: Ipv4Addr, mac: [u8; 6]) -> Result<()> {
        let request =
            self.handle.neighbours().add(index, IpAddr::V4(address)).link_layer_address(&mac).replace();
        request.execute().await.map_err(refused("naming a neighbour"))
    }

    async fn route(&self, route: RouteMessage) -> Result<()> {
        self.handle.route().add(route).replace().execute().await.map_err(refused("making a route"))
    }

    async fn set_family(
        &self,
        index: u32,
        family: AfSpecUnspec,
    ) -> std::result::Result<(), rtnetlink::Error> {
        let attribute = LinkAttribute::AfSpecUnspec(vec![family]);
        let message = LinkUnspec::new_with_index(index).append_extra_attribute(attribute).build();
        self.handle.link().set(message).execute().await
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            peer: None,
            group: 0,
            alias: None,
            runs: false,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Link(peer) => link.peer = Some(peer),
                LinkAttribute::Group(group) => link.group = group,
                LinkAttribute::OperState(state) => link.runs = state == State::Up,
                _ => {}
            }
        }
        link
    }
}

fn refused(what: &'static str) -> impl Fn(rtnetlink::Error) -> Error {
    move |error| {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        };
        Error::Netlink { what, source }
    }
}
