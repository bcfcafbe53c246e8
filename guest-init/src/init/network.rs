//! `lo` and `eth0`, by ioctl: an address, a gateway, an MTU, nothing else.

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    libc,
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

use super::cmdline::Network;

const LINK: &str = "eth0";

/// Sets up both links; a guest without `eth0` has only `lo`.
pub(super) fn set_up(network: &Network) -> io::Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    up(&socket, "lo")?;
    let Some((address, prefix)) = network.address else { return Ok(()) };
    if !fs::exists(format!("/sys/class/net/{LINK}"))? {
        return Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no {LINK}")));
    }
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{LINK}/disable_ipv6"), "1");
    if let Some(mtu) = network.mtu {
        let mut request = named(LINK);
        request.ifr_ifru.ifru_mtu = i32::try_from(mtu).map_err(io::Error::other)?;
        call(&socket, libc::SIOCSIFMTU, &mut request)?;
    }
    let mut request = named(LINK);
    request.ifr_ifru.ifru_addr = internet(address);
    call(&socket, libc::SIOCSIFADDR, &mut request)?;
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
    request.ifr_ifru.ifru_addr = internet(Ipv4Addr::from_bits(mask));
    call(&socket, libc::SIOCSIFNETMASK, &mut request)?;
    up(&socket, LINK)?;
    if let Some(gateway) = network.gateway {
        // SAFETY: all zeroes is a valid rtentry: integers, and null for the device's name.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = internet(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = internet(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = internet(gateway);
        route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
        call(&socket, libc::SIOCADDRT, &mut route)?;
    }
    Ok(())
}

fn up(socket: &OwnedFd, link: &str) -> io::Result<()> {
    let mut request = named(link);
    call(socket, libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the kernel has just filled in the flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as i16;
    call(socket, libc::SIOCSIFFLAGS, &mut request)
}

fn named(link: &str) -> libc::ifreq {
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(link.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request
}

fn internet(address: Ipv4Addr) -> libc::sockaddr {
    // SAFETY: all zeroes is a valid sockaddr.
    let mut socket: libc::sockaddr = unsafe { std::mem::zeroed() };
    socket.sa_family = libc::AF_INET as libc::sa_family_t;
    for (to, from) in socket.sa_data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    socket
}

fn call<T>(socket: &OwnedFd, request: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request of this file is called with the structure that the kernel expects for it, which outlives
    // the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
