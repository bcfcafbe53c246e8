//! What we must know of ext4: how large a file system says it is, and how to grow a mounted one.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt},
    },
    path::Path,
};

use nix::libc;

/// Bytes of a block device.
pub fn device_bytes(device: &File) -> io::Result<u64> {
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut bytes: u64 = 0;
    // SAFETY: BLKGETSIZE64 writes a u64, which outlives the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), BLKGETSIZE64, &mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes) }
}

/// Bytes that the file system on a device or in a file claims; `None` if it is none of ours.
pub fn claimed_bytes(device: &File) -> io::Result<Option<u64>> {
    let mut superblock = [0; 1024];
    match device.read_exact_at(&mut superblock, 1024) {
        Ok(()) => Ok(parse(&superblock)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(superblock: &[u8; 1024]) -> Option<u64> {
    const MAGIC: u32 = 0xef53;
    const LARGEST_BLOCK: u32 = 6;
    const INCOMPAT_64BIT: u32 = 0x80;
    let number =
        |at: usize| superblock[at..at + 4].iter().rev().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
    let shift = number(24);
    if number(56) & 0xffff != MAGIC || shift > LARGEST_BLOCK {
        return None;
    }
    let high = if number(96) & INCOMPAT_64BIT == 0 { 0 } else { number(336) };
    let blocks = u64::from(high) << 32 | u64::from(number(4));
    blocks.checked_mul(1024 << shift)
}

/// Grows a mounted file system to the size of its block device.
pub fn grow(mount_point: &Path) -> io::Result<()> {
    const EXT4_IOC_RESIZE_FS: libc::c_ulong = 0x4008_6610;
    let root = File::open(mount_point)?;
    let metadata = root.metadata()?;
    let (major, minor) = (libc::major(metadata.dev()), libc::minor(metadata.dev()));
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::other("the disk has no name"))?;
    let bytes = device_bytes(&File::open(Path::new("/dev").join(name))?)?;
    let blocks = bytes / metadata.blksize().max(1024);
    // SAFETY: EXT4_IOC_RESIZE_FS reads a u64, which outlives the call.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), EXT4_IOC_RESIZE_FS, &blocks) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn superblock(low: u32, shift: u32, incompatible: u32, high: u32) -> [u8; 1024] {
        let mut superblock = [0xa5; 1024];
        for (at, value) in [(4, low), (24, shift), (96, incompatible), (336, high)] {
            superblock[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        superblock[56..58].copy_from_slice(&[0x53, 0xef]);
        superblock
    }

    #[test]
    fn sizes_are_read_from_the_superblock() {
        assert_eq!(parse(&superblock(8192, 0, 0, 7)), Some(8 << 20));
        assert_eq!(parse(&superblock(1, 2, 0x80, 1)), Some((1 << 44) + 4096));
        assert_eq!(parse(&[0; 1024]), None);
        assert_eq!(parse(&superblock(1, 7, 0, 0)), None);
        assert_eq!(parse(&superblock(0, 6, 0x80, u32::MAX)), None);
    }

    proptest! {
        #[test]
        fn any_superblock_is_read_without_a_panic(fields in any::<(u32, u32, u32, u32)>()) {
            let (low, shift, incompatible, high) = fields;
            prop_assert_eq!(parse(&superblock(low, shift, incompatible, high)).is_some() && shift > 6, false);
        }
    }
}
