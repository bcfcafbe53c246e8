//! Tap and tun devices: the one thing about links that is not netlink.
//!
//! Owns: `/dev/net/tun`. Refuses to know: addresses, namespaces, who opens the device later.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::AsRawFd,
};

use nix::libc;

use crate::error::{Error, Result};

/// What kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ethernet frames, as Firecracker opens it.
    Tap,
    /// IP packets.
    Tun,
}

/// The numbers of linux/if_tun.h.
mod ioctl {
    use nix::{ioctl_write_int_bad, ioctl_write_ptr_bad, libc, request_code_write};

    ioctl_write_ptr_bad! {
        /// Makes or opens a device.
        set_iff, request_code_write!(b'T', 202, size_of::<libc::c_int>()), libc::ifreq
    }
    ioctl_write_int_bad! {
        /// Keeps the device when its last file is closed.
        set_persist, request_code_write!(b'T', 203, size_of::<libc::c_int>())
    }
    ioctl_write_int_bad! {
        /// Says who may open the device without any right.
        set_group, request_code_write!(b'T', 206, size_of::<libc::c_int>())
    }
}

/// Opens the device `name` in the namespace of the calling thread; it is made if it is absent, and then goes with the
/// file unless it is made persistent.
///
/// # Errors
/// The name is too long, the device is in use or may not be opened.
pub fn open(name: &str, kind: Kind) -> Result<File> {
    let make = Error::system("opening a tap");
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").map_err(&make)?;
    // SAFETY: `ifreq` is plain old data for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(make(io::Error::from(io::ErrorKind::InvalidInput)));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = match kind {
        Kind::Tap => libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
        Kind::Tun => libc::IFF_TUN | libc::IFF_NO_PI,
    };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the descriptor is open and `request` is an `ifreq` that lives through the call.
    unsafe { ioctl::set_iff(file.as_raw_fd(), &raw const request) }.map_err(|errno| make(errno.into()))?;
    Ok(file)
}

/// Makes the device `name` in the namespace of the calling thread, for whoever is in `group` to open, and leaves it
/// there. A device that is there already was finished when it was made, so this is not called for it.
///
/// # Errors
/// See [`open`].
pub fn make(name: &str, kind: Kind, group: Option<u32>) -> Result<()> {
    let file = open(name, kind)?;
    let keep = Error::system("making a tap");
    if let Some(group) = group {
        let group = i32::try_from(group).map_err(|_| keep(io::Error::from(io::ErrorKind::InvalidInput)))?;
        // SAFETY: the descriptor is open; the argument is a number.
        unsafe { ioctl::set_group(file.as_raw_fd(), group) }.map_err(|errno| keep(errno.into()))?;
    }
    // SAFETY: the descriptor is open; the argument is a number.
    unsafe { ioctl::set_persist(file.as_raw_fd(), 1) }.map_err(|errno| keep(errno.into()))?;
    Ok(())
}
