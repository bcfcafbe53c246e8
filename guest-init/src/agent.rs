//! The agent: serves the host over vsock.
//!
//! Owns sessions, files and the guest's identity. Refuses to know who asks and why: the host is the only peer, and what
//! it says is done. One thread runs everything; what blocks goes to a few helpers.

mod budget;
mod cgroup;
mod connection;
mod delete;
mod disks;
mod driver;
mod exec;
mod ext4;
mod files;
mod forward;
mod listening;
mod log;
pub mod machine;
mod replay;
mod session;
mod sessions;
mod spawn;
mod transfer;
mod users;
mod volumes;
mod vsock;
mod wire;
mod write;

use std::{
    io,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

pub use connection::serve;
use disks::Disks;
use log::Log;
use machine::{Guest, Machine};
use pandastack_protocol::{Defaults, Failure, Identity, PORT};
use sessions::Sessions;
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener};

use crate::layout::USER_CGROUP;

/// Connections served at once.
const CONNECTIONS: usize = 512;

/// Everything that all connections share.
pub struct Agent {
    machine: Box<dyn Machine>,
    sessions: Sessions,
    log: Arc<Log>,
    disks: Disks,
    defaults: Mutex<Arc<Defaults>>,
}

impl Agent {
    /// An agent for `machine`, with sessions in cgroups below `cgroups`, or in process groups where that is `None`.
    pub fn new(machine: impl Machine, cgroups: Option<PathBuf>) -> Arc<Self> {
        let defaults = Mutex::new(Arc::new(machine.remembered_defaults()));
        let log = Arc::<Log>::default();
        Arc::new(Self {
            machine: Box::new(machine),
            sessions: Sessions::new(cgroups, Arc::clone(&log)),
            log,
            disks: Disks::default(),
            defaults,
        })
    }

    fn defaults(&self) -> Arc<Defaults> {
        self.defaults.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn identify(&self, identity: Identity) -> Result<(), Failure> {
        self.machine.identify(&identity)?;
        match identity.unique {
            Some(_) => self.sessions.abandon(),
            None => self.sessions.renew_grace(),
        }
        if let Some(defaults) = identity.defaults {
            let mut current = self.defaults.lock().unwrap_or_else(PoisonError::into_inner);
            // A sandbox has those of its template, nearly always.
            if **current != defaults {
                self.machine.remember_defaults(&defaults);
                *current = Arc::new(defaults);
            }
        }
        Ok(())
    }
}

/// Runs until the machine ends.
pub fn main() -> ExitCode {
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o022));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(64)
        // A thread that is there already makes the next exec faster.
        .thread_keep_alive(Duration::from_secs(3600))
        .build();
    let result = runtime.and_then(|runtime| runtime.block_on(listen()));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("panda-agent: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn listen() -> io::Result<()> {
    let cgroups = PathBuf::from(USER_CGROUP);
    let cgroups = cgroups.join("cgroup.kill").exists().then_some(cgroups);
    if cgroups.is_none() {
        eprintln!("panda-agent: no cgroups: sessions are process groups");
    }
    let agent = Agent::new(Guest::open()?, cgroups);
    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, PORT))?;
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut sweep = tokio::time::interval(Duration::from_secs(30));
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = sweep.tick() => {
                agent.sessions.sweep();
                continue;
            }
        };
        match accepted {
            // Only the host: a process in the guest has no business here.
            Ok((stream, address)) if address.cid() == VMADDR_CID_HOST => {
                let Ok(place) = places.clone().try_acquire_owned() else { continue };
                let agent = agent.clone();
                tokio::spawn(async move {
                    // Its end is the host's doing, or a restore's; there is nothing to say about it.
                    let _ = serve(vsock::Pieces(stream), agent).await;
                    drop(place);
                });
            }
            Ok(_) => {}
            Err(error) => {
                eprintln!("panda-agent: accept: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}
