//! What the JSON frames say. A `Done` or `Ready` for which no type is named here carries JSON `null`; ignore it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// First frame in each direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's newest version; the lower of both is spoken.
    pub proto: u16,
    /// Chosen by the host at random, echoed by the guest: an answer from before a restore cannot be mistaken for one
    /// of now.
    pub nonce: u64,
    /// Version of the agent; empty from the host.
    #[serde(default)]
    pub agent: String,
}

/// What the host asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Makes a restored guest unique (create, fork) or only fresh (wake). Answer: `Done`.
    Identity(Identity),
    /// Starts a session. Answer: `Started`, output, `Exit`.
    Exec(Exec),
    /// Goes on with a session. Answer: `Started`, output from `offset` on, `Exit`.
    Attach {
        /// Session id.
        session: String,
        /// First byte of output wanted. Bytes no longer kept are skipped; `Started` says where output begins.
        offset: u64,
    },
    /// All sessions. Answer: `Done` with [`Sessions`].
    Sessions {},
    /// Kills the cgroup of a session. Answer: `Done`; `Error` `not_found`.
    Kill {
        /// Session id.
        session: String,
    },
    /// What the programs of all sessions wrote, a page of it. Answer: `Data`… ([`crate::log_payload`]), `Done` with a
    /// [`LogEnd`].
    Log {
        /// First byte wanted; bytes no longer kept are skipped.
        position: u64,
        /// The life of the log that the position belongs to: in another one, reading begins at its start.
        #[serde(default)]
        life: u64,
        /// Only this session's; empty means all.
        #[serde(default)]
        session: String,
        /// Milliseconds to wait while there is nothing, at most [`crate::LOG_WAIT_MS`].
        #[serde(default)]
        wait_ms: u64,
    },
    /// Answer: `Ready` with an [`Entry`], `Data`…, `Done`.
    ReadFile {
        /// Absolute path.
        path: String,
    },
    /// Answer: `Ready` once the space is there, then the host sends `Data`… `DataEnd`, then `Done` with [`Written`].
    /// Parents are made; the file appears whole or not at all.
    WriteFile {
        /// Absolute path.
        path: String,
        /// Bytes to come, exactly.
        size: u64,
        /// Permission bits of a new file; an existing file keeps its own.
        mode: u32,
    },
    /// Answer: `Data` frames, each a JSON array of [`Entry`], then `Done`.
    List {
        /// Absolute path of a directory.
        path: String,
    },
    /// Answer: `Done` with an [`Entry`] (symbolic links are not followed).
    Stat {
        /// Absolute path.
        path: String,
    },
    /// Deletes a file, or a directory with everything in it. Answer: `Done`.
    Delete {
        /// Absolute path.
        path: String,
    },
    /// Connects to a TCP port of the guest's loopback. Answer: `Ready`, then raw bytes in both directions.
    Forward {
        /// TCP port.
        port: u16,
    },
    /// TCP ports that [`Request::Forward`] would find somebody on. Answer: `Done` with [`Ports`]; `Error` `unsupported` from agents
    /// that are older than it.
    Ports {},
    /// Writes everything dirty to the disks. Answer: `Done`; `Error` `busy` after 50 seconds.
    Sync {},
    /// Grows the root file system to its disk. Answer: `Done`.
    GrowRoot {},
    /// Mounts volumes, whose drives the host has just put in place. Answer: `Done` once all are mounted; those that are
    /// already are left alone.
    Mount {
        /// What and where.
        mounts: Vec<Mount>,
    },
    /// Answer: `Done` with a [`Health`].
    Health {},
    /// Syncs and powers off. Answer: `Done`, then the guest is gone.
    Shutdown {},
}

/// A volume to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Name of the block device, for example `vdb`.
    pub device: String,
    /// Absolute path of the mount point; made if it is missing.
    pub path: String,
    /// The host refuses writes.
    #[serde(default)]
    pub read_only: bool,
}

/// What makes a guest itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Wall clock, nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Hexadecimal random bytes for the kernel's pool, 32 to 512 bytes.
    pub entropy: String,
    /// Absent on a wake, where identity stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unique: Option<Unique>,
    /// Environment, working directory of every exec from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<Defaults>,
}

/// Identity that no other guest has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unique {
    /// Sandbox id.
    pub sandbox: String,
    /// 32 hexadecimal digits.
    pub machine_id: String,
    /// UUID with dashes.
    pub boot_id: String,
    /// Host name, a DNS label.
    pub hostname: String,
}

/// What every exec starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defaults {
    /// Image environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working directory; empty means the user's home.
    #[serde(default)]
    pub workdir: String,
}

/// A command to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Session id chosen by the host, 20 characters of `[a-z0-9]`. A second `Exec` with an id that exists is an `Attach`
    /// at 0: the command is never run twice.
    pub session: String,
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Absolute working directory; empty means the default.
    #[serde(default)]
    pub cwd: String,
    /// Added to the default environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// User name or number; empty means root.
    #[serde(default)]
    pub user: String,
    /// Milliseconds after which the session's cgroup gets TERM, then KILL; 0 means never.
    #[serde(default)]
    pub timeout_ms: u64,
    /// Whether the host will send `Stdin`; otherwise stdin is empty.
    #[serde(default)]
    pub stdin: bool,
    /// Runs on without a host for as long as it likes.
    #[serde(default)]
    pub detach: bool,
    /// A terminal instead of three pipes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Window>,
    /// Stays out of the log: nobody's who reads it later.
    #[serde(default, skip_serializing_if = "is_false")]
    pub unlogged: bool,
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Lines.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// Payload of `Started`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Session id.
    pub session: String,
    /// Process id in the guest.
    pub pid: u32,
    /// Offset at which output begins here.
    pub offset: u64,
    /// Bytes of output dropped so far because nobody was attached.
    pub dropped: u64,
    /// Bytes of standard input received so far: after an `Attach` the host goes on there.
    #[serde(default)]
    pub stdin: u64,
}

/// Payload of `Exit`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0–125 the program's own, 126 not executable, 127 not found, 128+N killed by signal N.
    pub code: i32,
    /// The signal that killed it; 0 for none.
    #[serde(default)]
    pub signal: i32,
    /// Ended because `timeout_ms` had passed.
    #[serde(default)]
    pub timed_out: bool,
    /// The kernel killed something of it for lack of memory.
    #[serde(default)]
    pub oom: bool,
    /// Milliseconds from start to end, guest time.
    #[serde(default)]
    pub duration_ms: u64,
    /// Bytes of output in all.
    #[serde(default)]
    pub output_bytes: u64,
    /// Bytes of output dropped because nobody was attached.
    #[serde(default)]
    pub dropped: u64,
}

/// Payload of `Done` for `Sessions`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sessions {
    /// Oldest first.
    pub sessions: Vec<SessionInfo>,
}

/// A session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionInfo {
    /// Its id.
    pub session: String,
    /// Its command line, shortened to 256 characters.
    pub command: String,
    /// Process id.
    pub pid: u32,
    /// Unix seconds.
    pub started: u64,
    /// Runs on without a host.
    pub detached: bool,
    /// How it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// Bytes of output so far.
    pub output_bytes: u64,
}

/// Payload of `Done` for `Log`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEnd {
    /// Names this life of the log: another one begins when the guest is booted again. Never 0.
    pub life: u64,
    /// Position of the oldest byte kept.
    pub start: u64,
    /// Where to go on reading.
    pub next: u64,
    /// Bytes written in all.
    pub end: u64,
}

/// A file, directory or other node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// One path component.
    pub name: String,
    /// `f`, `d`, `l`, `p`, `s`, `c` or `b`.
    pub kind: char,
    /// Bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Unix seconds.
    pub mtime: i64,
}

/// Payload of `Done` for `WriteFile`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Bytes written.
    pub bytes: u64,
}

/// Payload of `Done` for `Ports`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    /// In ascending order.
    pub ports: Vec<u16>,
}

/// Payload of `Done` for `Health`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// Wall clock, nanoseconds since 1970.
    pub unix_nanos: u64,
    /// Memory available, KiB.
    pub memory_available_kib: u64,
    /// Free space of the root file system, bytes.
    pub disk_free_bytes: u64,
    /// Running sessions.
    pub sessions: u32,
}

/// Payload of `Error`: a terminal frame. Nothing of the request remains.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// What the caller may do about it.
    pub code: Code,
    /// One sentence, at most 1 KiB.
    pub message: String,
}

/// Kinds of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// No such file, session or user.
    NotFound,
    /// A directory was needed.
    NotADirectory,
    /// A directory is there.
    IsADirectory,
    /// Not allowed (a read-only mount, an immutable file).
    Denied,
    /// The disk is too full.
    NoSpace,
    /// The request makes no sense.
    Invalid,
    /// Too many sessions or connections.
    Busy,
    /// Nobody listens on that port.
    Refused,
    /// Not known to this agent.
    Unsupported,
    /// The agent's own fault; also what an unknown code of a newer agent becomes.
    #[serde(other)]
    Internal,
}
