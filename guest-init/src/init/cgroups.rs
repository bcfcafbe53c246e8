//! The two halves of the guest: the agent's cgroup and everybody else's, so that no user process can starve, out-fork or
//! out-eat the agent.

use std::{fs, io, path::Path};

use crate::layout::{AGENT_CGROUP, CGROUPS, RESERVED_MEMORY, USER_CGROUP};

/// Makes both cgroups. Goes on after a failure and reports the first.
pub(super) fn set_up() -> io::Result<()> {
    let mut results = Vec::new();
    for controller in ["+memory", "+pids", "+cpu", "+io", "+cpuset"] {
        let result = fs::write(Path::new(CGROUPS).join("cgroup.subtree_control"), controller);
        if controller == "+memory" || controller == "+pids" {
            results.push(result);
        }
    }
    let memory = total_memory()?;
    let threads = number("/proc/sys/kernel/threads-max")?.min(number("/proc/sys/kernel/pid_max")?);
    for directory in [AGENT_CGROUP, USER_CGROUP] {
        if !Path::new(directory).is_dir() {
            results.push(fs::create_dir(directory));
        }
    }
    let mut set = |directory: &str, name: &str, value: String| {
        results.push(fs::write(Path::new(directory).join(name), value));
    };
    set(AGENT_CGROUP, "memory.min", (RESERVED_MEMORY / 2).to_string());
    set(AGENT_CGROUP, "cpu.weight", "5000".into());
    set(USER_CGROUP, "memory.max", user_memory(memory).to_string());
    set(USER_CGROUP, "pids.max", user_threads(threads).to_string());
    // Sessions account memory and processes each; what else they want, a user may enable.
    set(USER_CGROUP, "cgroup.subtree_control", "+memory +pids".into());
    results.into_iter().collect()
}

/// What users' processes may use together: all but the reserve, and never less than three quarters.
fn user_memory(total: u64) -> u64 {
    total.saturating_sub(RESERVED_MEMORY).max(total / 4 * 3)
}

/// Threads that users may have together.
fn user_threads(limit: u64) -> u64 {
    limit / 10 * 9
}

fn total_memory() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    kib.map(|kib: u64| kib << 10).ok_or_else(|| io::Error::other("no MemTotal in /proc/meminfo"))
}

fn number(path: &str) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_bounded_on_small_guests() {
        assert_eq!(user_memory(128 << 20), 96 << 20);
        assert_eq!(user_memory(256 << 20), 192 << 20);
        assert_eq!(user_memory(4 << 30), (4 << 30) - RESERVED_MEMORY);
        assert_eq!(user_threads(1000), 900);
    }
}
