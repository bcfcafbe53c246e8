//! The seams to everything with an effect: what the conductor asks of PID 1, Firecracker and the guest.
//!
//! Storage and network are asked through the same traits that their daemons implement ([`StorageBackend`],
//! [`NetworkBackend`]). Refuses to know: how anything is done. Every method is bounded in time by its implementation and
//! answers with the error that the caller of vmm gets.

use std::{collections::BTreeMap, future::Future, os::fd::OwnedFd, sync::Arc, time::Duration};

use pandastack_bus::{
    Result, SandboxId,
    network::NetworkBackend,
    storage::{CaptureKind, StorageBackend},
};
use pandastack_protocol::Mount;
use tokio::time::Instant;

use crate::{
    console::{Place, Wanted},
    meter::Usage,
};

/// A process, held by a file descriptor that becomes readable when it ends.
pub type Process = Arc<OwnedFd>;

/// Limits of one sandbox's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// `MemoryMax=`, bytes.
    pub memory_bytes: u64,
    /// `CPUQuota=`, microseconds of processor time per second.
    pub cpu_usec_per_sec: u64,
}

/// A unit instance that PID 1 knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnitState {
    /// Whose it is.
    pub id: SandboxId,
    /// Whether its process may be there (active, starting, stopping).
    pub alive: bool,
}

/// What PID 1 does for us.
pub trait Units: Send + Sync + 'static {
    /// Starts the unit; the process is there when it returns.
    fn start(&self, id: &SandboxId) -> impl Future<Output = Result<Process>> + Send;
    /// The process of a unit that runs; `None` when there is none.
    fn process(&self, id: &SandboxId) -> impl Future<Output = Result<Option<Process>>> + Send;
    /// Stops the unit; its process is gone when it returns. Answers whether it was there.
    fn stop(&self, id: &SandboxId) -> impl Future<Output = Result<bool>> + Send;
    /// Sets limits, at once and for as long as the unit lives.
    fn limit(&self, id: &SandboxId, limits: Limits) -> impl Future<Output = Result<()>> + Send;
    /// All instances.
    fn list(&self) -> impl Future<Output = Result<Vec<UnitState>>> + Send;
    /// What the unit has used so far; `None` when it does not run.
    fn usage(&self, id: &SandboxId) -> impl Future<Output = Option<Usage>> + Send;
    /// Bytes of memory that are its own and in no file; `None` when it is not known. Whatever a guest wrote is among it.
    fn anonymous(&self, id: &SandboxId) -> impl Future<Output = Option<u64>> + Send;
    /// What the process wrote, as text to be read from a pipe. The place is kept until that is over.
    fn console(
        &self,
        id: &SandboxId,
        wanted: Wanted,
        place: Place,
    ) -> impl Future<Output = Result<OwnedFd>> + Send;
    /// One sentence on why the process ended, asked just after it did.
    fn obituary(&self, id: &SandboxId) -> impl Future<Output = String> + Send;
}

/// Machine to boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Where the memory of a capture is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// `/vm/c.mem`, on the data partition.
    Stored,
    /// `/vm/d/mem`, in the host's memory: storage lays it over `/vm/c.mem` at the commit.
    Held,
}

/// What Firecracker does for us.
pub trait Hypervisor: Send + Sync + 'static {
    /// Waits until the process takes orders.
    fn await_api(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Restores from `/vm/state` and `/vm/mem` and lets the guest run.
    fn load(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Configures and boots from `/vm/vmlinux`, `/vm/initrd.img`, `/vm/root.img`.
    fn boot(&self, id: &SandboxId, machine: Machine) -> impl Future<Output = Result<()>> + Send;
    /// Stops the processors and writes the difference to an empty memory into `/vm/mem` and `/vm/state`.
    fn capture(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Opens a drive (`root`, `w0`, `r0` …) again, so that the guest sees its present size.
    fn renew_drive(&self, id: &SandboxId, drive: &str) -> impl Future<Output = Result<()>> + Send;
    /// Whether the processors stand still.
    fn is_paused(&self, id: &SandboxId) -> impl Future<Output = Result<bool>> + Send;
    /// Stops the processors.
    fn pause(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Lets the processors go on.
    fn resume(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Writes the memory there and `/vm/c.state`. The processors must stand still.
    fn write_capture(
        &self,
        id: &SandboxId,
        kind: CaptureKind,
        memory: Memory,
    ) -> impl Future<Output = Result<()>> + Send;
}

/// Who a guest shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identification {
    /// 32 hexadecimal digits; `None` for a guest that shall be nobody (a bake), or stay who it is (a wake).
    pub machine_id: Option<String>,
    /// Environment of every exec.
    pub env: BTreeMap<String, String>,
    /// Where an exec starts; empty: at home.
    pub workdir: String,
}

/// What the agent in the guest does for us.
pub trait Guest: Send + Sync + 'static {
    /// Greets the guest, again and again until it answers, and makes it unique; fails closed at `deadline`. Answers when it
    /// answered.
    fn identify(
        &self,
        id: &SandboxId,
        identification: &Identification,
        deadline: Instant,
    ) -> impl Future<Output = Result<Instant>> + Send;
    /// Grows the root file system to its disk.
    fn grow_root(&self, id: &SandboxId) -> impl Future<Output = Result<()>> + Send;
    /// Writes everything dirty to its disks, within `limit`.
    fn sync(&self, id: &SandboxId, limit: Duration) -> impl Future<Output = Result<()>> + Send;
    /// Mounts volumes; those that are mounted already are left alone.
    fn mount(&self, id: &SandboxId, mounts: Vec<Mount>) -> impl Future<Output = Result<()>> + Send;
    /// Runs a shell command to its end; fails when it does. Then leaves the guest quiet: synced, no connection, no session.
    fn warm_up(&self, id: &SandboxId, command: &str) -> impl Future<Output = Result<()>> + Send;
    /// A connected stream to the agent, nothing spoken on it.
    fn open(&self, id: &SandboxId) -> impl Future<Output = Result<OwnedFd>> + Send;
    /// A stream to what listens on a TCP port of the guest, and what that said already.
    fn forward(&self, id: &SandboxId, port: u16) -> impl Future<Output = Result<(OwnedFd, Vec<u8>)>> + Send;
}

/// All of them.
pub trait World: Send + Sync + 'static {
    /// See [`StorageBackend`].
    type Storage: StorageBackend;
    /// See [`NetworkBackend`].
    type Network: NetworkBackend;
    /// See [`Units`].
    type Units: Units;
    /// See [`Hypervisor`].
    type Hypervisor: Hypervisor;
    /// See [`Guest`].
    type Guest: Guest;

    /// Directories, disks, snapshots.
    fn storage(&self) -> &Self::Storage;
    /// Attachments.
    fn network(&self) -> &Self::Network;
    /// Processes.
    fn units(&self) -> &Self::Units;
    /// Machines.
    fn hypervisor(&self) -> &Self::Hypervisor;
    /// Agents.
    fn guest(&self) -> &Self::Guest;
}
