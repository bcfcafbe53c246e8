//! Whether one more sandbox fits: a pure function of what the host has.
//!
//! Owns: the reserve that is kept for the host, and what a new guest is expected to take soon. Memory is judged by what is
//! available, not by what guests were promised: restored guests share most of theirs. Refuses to know: where the numbers
//! come from.

use pandastack_bus::Error;

const GIB: u64 = 1024;
/// Below it a disk of a new sandbox could not even start to differ, bytes.
const DISK_NEED: u64 = 64 << 20;

/// What the host has now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// Memory in all, MiB.
    pub memory_total_mib: u64,
    /// `MemAvailable`, MiB.
    pub memory_available_mib: u64,
    /// What creates under way are expected to take, MiB.
    pub memory_pending_mib: u64,
    /// Free on the data partition, bytes; `None` while unknown.
    pub disk_free_bytes: Option<u64>,
    /// Kept back there, bytes.
    pub disk_reserve_bytes: u64,
}

/// Memory kept for the host, MiB: a sixteenth, at least 256 MiB and at most 4 GiB.
pub fn reserve_mib(total_mib: u64) -> u64 {
    (total_mib / 16).clamp(GIB / 4, 4 * GIB)
}

/// What a guest of this size is expected to take within its first seconds, MiB: a quarter, and Firecracker itself.
pub fn need_mib(guest_mib: u64) -> u64 {
    guest_mib / 4 + 32
}

/// Whether a guest of `guest_mib` fits, whose disk was asked to have `disk_mib` (0: no matter).
///
/// # Errors
/// [`Error::NoCapacity`] or [`Error::NoSpace`].
pub fn admit(host: &Host, guest_mib: u64, disk_mib: u64) -> Result<(), Error> {
    let wanted = reserve_mib(host.memory_total_mib)
        .saturating_add(host.memory_pending_mib)
        .saturating_add(need_mib(guest_mib));
    if host.memory_available_mib < wanted {
        return Err(Error::NoCapacity(format!(
            "no memory to spare: {} MiB available, {wanted} MiB needed with the host's reserve",
            host.memory_available_mib
        )));
    }
    let floor = host.disk_reserve_bytes.saturating_add(DISK_NEED.max(disk_mib.saturating_mul(1 << 20)));
    match host.disk_free_bytes {
        Some(free) if free < floor => Err(Error::NoSpace(format!(
            "no storage to spare: {} MiB free, {} MiB needed with the reserve",
            free >> 20,
            floor >> 20
        ))),
        _ => Ok(()),
    }
}

/// `MemTotal` and `MemAvailable` of `/proc/meminfo`, MiB.
pub fn parse_meminfo(text: &str) -> Option<(u64, u64)> {
    let field = |name: &str| -> Option<u64> {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
    };
    Some((field("MemTotal")?, field("MemAvailable")?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host() -> impl Strategy<Value = Host> {
        (0..1u64 << 22, 0..1u64 << 22, 0..1u64 << 20, proptest::option::of(0..1u64 << 40), 0..1u64 << 36)
            .prop_map(|(total, available, pending, free, reserve)| Host {
                memory_total_mib: total,
                memory_available_mib: available,
                memory_pending_mib: pending,
                disk_free_bytes: free,
                disk_reserve_bytes: reserve,
            })
    }

    proptest! {
        #[test]
        fn more_of_anything_never_refuses_what_less_admitted(host in host(), guest in 0u64..1 << 20, disk in 0u64..1 << 30, more in 0u64..1 << 20) {
            if admit(&host, guest, disk).is_ok() {
                let richer = Host {
                    memory_available_mib: host.memory_available_mib + more,
                    disk_free_bytes: host.disk_free_bytes.map(|free| free + more),
                    ..host
                };
                prop_assert_eq!(admit(&richer, guest, disk), Ok(()));
                prop_assert_eq!(admit(&host, guest.saturating_sub(more), disk.saturating_sub(more)), Ok(()));
            }
        }

        #[test]
        fn what_is_admitted_leaves_the_reserve(host in host(), guest in 0u64..1 << 20, disk in 0u64..1 << 20) {
            if admit(&host, guest, disk).is_ok() {
                let left = host.memory_available_mib - host.memory_pending_mib - need_mib(guest);
                prop_assert!(left >= reserve_mib(host.memory_total_mib));
                prop_assert!(host.disk_free_bytes.is_none_or(|free| free > host.disk_reserve_bytes && free - host.disk_reserve_bytes >= disk << 20));
            }
        }
    }

    #[test]
    fn meminfo_is_read_in_mib() {
        let text = "MemTotal:        4028000 kB\nMemFree:  1 kB\nMemAvailable:    2048000 kB\n";

        assert_eq!(parse_meminfo(text), Some((3933, 2000)));
        assert_eq!(parse_meminfo("MemTotal: x kB"), None);
    }
}
