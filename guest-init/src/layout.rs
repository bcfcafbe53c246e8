//! Where things are in the guest: what init makes and the agent relies on.

/// `argv[0]` of the agent.
pub const AGENT_NAME: &str = "panda-agent";
/// The cgroup2 hierarchy.
pub const CGROUPS: &str = "/sys/fs/cgroup";
/// The agent's own cgroup, protected from what users do.
pub const AGENT_CGROUP: &str = "/sys/fs/cgroup/agent";
/// Parent of every session's cgroup; its limits keep the agent alive.
pub const USER_CGROUP: &str = "/sys/fs/cgroup/user";
/// A small tmpfs that holds what makes this guest itself.
pub const IDENTITY: &str = "/run/panda";
/// Memory that users' processes never get, bytes.
pub const RESERVED_MEMORY: u64 = 64 << 20;
