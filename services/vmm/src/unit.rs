//! `pandastack-sandbox@<id>.service` at PID 1: start, stop, limit, list.
//!
//! Owns: the names of the units, jobs and how they end. Refuses to know: what runs in a unit.

use std::{
    collections::{HashMap, VecDeque},
    os::fd::OwnedFd,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use pandastack_bus::{
    Error, Result, SandboxId,
    systemd::{ManagerProxy, ServiceProxy, UnitRow},
    zbus::{self, Connection, OwnedObjectPath, Variant},
};
use tokio::{sync::oneshot, time::timeout};

use crate::{
    console::{self, Place, Wanted},
    meter::Usage,
    ports::{Limits, Process, UnitState, Units},
    socket::Sockets,
};

const PREFIX: &str = "pandastack-sandbox@";
const SUFFIX: &str = ".service";
/// Longer than the unit's own limits for starting and stopping.
const JOB: Duration = Duration::from_secs(25);
/// Where PID 1 keeps the units of `pandastack-sandboxes.slice`.
const CGROUPS: &str = "/sys/fs/cgroup/pandastack.slice/pandastack-sandboxes.slice";
/// How often a followed console's machine is looked for.
const CONSOLE_LOOK: Duration = Duration::from_secs(5);
/// Ended jobs that nobody has asked for yet; a reply follows its job's end within a few messages.
const ENDED_KEPT: usize = 1024;

/// The units of all sandboxes.
#[derive(Debug, Clone)]
pub struct SystemdUnits {
    bus: Connection,
    manager: ManagerProxy<'static>,
    jobs: Arc<Jobs>,
    sockets: Sockets,
}

impl SystemdUnits {
    /// Subscribes to the ends of jobs; every call after this sees the end of its own job.
    ///
    /// # Errors
    /// PID 1 cannot be reached.
    pub async fn connect(bus: &Connection, sockets: Sockets) -> zbus::Result<Self> {
        let manager = ManagerProxy::new(bus).await?;
        let mut removed = manager.receive_job_removed().await?;
        manager.subscribe().await?;
        let jobs = Arc::new(Jobs::default());
        let into = Arc::clone(&jobs);
        // It does nothing but pass on: a full queue would stop the whole connection.
        tokio::spawn(async move {
            while let Some(signal) = removed.next().await {
                if let Ok(end) = signal.args() {
                    into.ended(end.job().as_str(), end.result());
                }
            }
            tracing::error!("no more news of jobs from PID 1");
        });
        Ok(Self { bus: bus.clone(), manager, jobs, sockets })
    }

    async fn service(&self, id: &SandboxId) -> zbus::Result<ServiceProxy<'static>> {
        ServiceProxy::builder(&self.bus)
            .path(object_path(id))
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await
    }

    async fn main_pid(&self, id: &SandboxId) -> zbus::Result<u32> {
        self.service(id).await?.main_pid().await
    }

    /// Waits for the end of a job.
    async fn job(&self, path: &OwnedObjectPath) -> Result<String> {
        let end = self.jobs.wait(path.as_str());
        match timeout(JOB, end).await {
            Ok(Ok(result)) => Ok(result),
            _ => {
                self.jobs.forget(path.as_str());
                Err(Error::Timeout("PID 1 did not finish a job in time".into()))
            }
        }
    }
}

impl Units for SystemdUnits {
    async fn start(&self, id: &SandboxId) -> Result<Process> {
        // Firecracker refuses to start over the sockets of its predecessor.
        self.sockets
            .clear(id)
            .map_err(|error| Error::Internal(format!("its old sockets cannot be removed: {error}")))?;
        let job = self.manager.start_unit(&unit_name(id), "fail").await?;
        match self.job(&job).await?.as_str() {
            "done" => {}
            other => {
                let why = self.obituary(id).await;
                return Err(Error::Internal(format!("its unit did not start ({other}): {why}")));
            }
        }
        self.process(id)
            .await?
            .ok_or_else(|| Error::Internal("its process ended as soon as it had started".into()))
    }

    async fn process(&self, id: &SandboxId) -> Result<Option<Process>> {
        let pid = self.main_pid(id).await?;
        let Some(number) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
            return Ok(None);
        };
        let flags = rustix::process::PidfdFlags::NONBLOCK;
        let process: OwnedFd = match rustix::process::pidfd_open(number, flags) {
            Ok(process) => process,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(Error::Internal(format!("no handle on process {pid}: {error}"))),
        };
        // The number could have passed to another process before it was opened. It did not, if PID 1 still means it.
        Ok((self.main_pid(id).await? == pid).then(|| Arc::new(process)))
    }

    async fn stop(&self, id: &SandboxId) -> Result<bool> {
        let name = unit_name(id);
        let job = match self.manager.stop_unit(&name, "replace").await {
            Ok(job) => job,
            Err(error) if is_not_loaded(&error) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let result = self.job(&job).await?;
        let left = self.manager.list_units_by_patterns(&[], &[&name]).await?;
        if left.iter().filter_map(unit_state).any(|unit| unit.alive) {
            return Err(Error::Internal(format!("its unit does not stop ({result})")));
        }
        if left.iter().any(|row| row.3 == "failed") {
            // Forgotten by itself, as the unit collects itself; asked for in case it does not.
            let _ = self.manager.reset_failed_unit(&name).await;
        }
        Ok(true)
    }

    async fn limit(&self, id: &SandboxId, limits: Limits) -> Result<()> {
        let properties = [
            ("MemoryMax", Variant::from(limits.memory_bytes)),
            ("CPUQuotaPerSecUSec", Variant::from(limits.cpu_usec_per_sec)),
        ];
        self.manager.set_unit_properties(&unit_name(id), true, &properties).await?;
        Ok(())
    }

    async fn list(&self) -> Result<Vec<UnitState>> {
        let rows = self.manager.list_units_by_patterns(&[], &[&format!("{PREFIX}*{SUFFIX}")]).await?;
        Ok(rows.iter().filter_map(unit_state).collect())
    }

    async fn usage(&self, id: &SandboxId) -> Option<Usage> {
        let directory = Path::new(CGROUPS).join(unit_name(id));
        let read = tokio::task::spawn_blocking(move || {
            let file = |name: &str| std::fs::read_to_string(directory.join(name));
            // Without disk there is no such file, or an empty one.
            Some(Usage::parse(
                &file("cpu.stat").ok()?,
                &file("memory.current").ok()?,
                &file("io.stat").unwrap_or_default(),
            ))
        });
        read.await.ok().flatten()
    }

    async fn anonymous(&self, id: &SandboxId) -> Option<u64> {
        let path = Path::new(CGROUPS).join(unit_name(id)).join("memory.stat");
        let text = tokio::task::spawn_blocking(move || std::fs::read_to_string(path)).await.ok()?.ok()?;
        text.lines().find_map(|line| line.strip_prefix("anon ")?.trim().parse().ok())
    }

    async fn console(&self, id: &SandboxId, wanted: Wanted, place: Place) -> Result<OwnedFd> {
        let (reader, child) = console::read(&unit_name(id), id, wanted)?;
        let (units, id) = (self.clone(), id.clone());
        tokio::spawn(async move {
            let ended = async {
                while units.main_pid(&id).await.is_ok_and(|pid| pid != 0) {
                    tokio::time::sleep(CONSOLE_LOOK).await;
                }
            };
            console::attend(child, wanted, ended).await;
            drop(place);
        });
        Ok(reader)
    }

    async fn obituary(&self, id: &SandboxId) -> String {
        let result = match self.service(id).await {
            Ok(service) => service.result().await.unwrap_or_default(),
            Err(_) => String::new(),
        };
        match result.as_str() {
            "oom-kill" => "the host killed it for using more memory than it may".into(),
            "exit-code" | "core-dump" | "signal" => format!("its machine ended abnormally ({result})"),
            "success" => "the guest switched itself off".into(),
            "" => "its machine ended".into(),
            other => format!("its machine ended ({other})"),
        }
    }
}

/// Name of the unit instance of a sandbox.
pub fn unit_name(id: &SandboxId) -> String {
    format!("{PREFIX}{id}{SUFFIX}")
}

/// PID 1's object for it: every byte that is no letter or digit is `_` and its hexadecimal number; ids have none.
fn object_path(id: &SandboxId) -> String {
    format!("/org/freedesktop/systemd1/unit/pandastack_2dsandbox_40{id}_2eservice")
}

fn unit_state(row: &UnitRow) -> Option<UnitState> {
    let id = row.0.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?.parse().ok()?;
    Some(UnitState { id, alive: !matches!(row.3.as_str(), "inactive" | "failed") })
}

fn is_not_loaded(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::MethodError(name, ..) if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit")
}

/// Ends of jobs, whichever comes first: the signal or the wish to know.
#[derive(Debug, Default)]
struct Jobs(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    waiting: HashMap<String, oneshot::Sender<String>>,
    ended: VecDeque<(String, String)>,
}

impl Jobs {
    fn ended(&self, job: &str, result: &str) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(waiting) = known.waiting.remove(job) {
            let _ = waiting.send(result.to_owned());
            return;
        }
        known.ended.push_back((job.to_owned(), result.to_owned()));
        if known.ended.len() > ENDED_KEPT {
            known.ended.pop_front();
        }
    }

    fn wait(&self, job: &str) -> oneshot::Receiver<String> {
        let (tell, told) = oneshot::channel();
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match known.ended.iter().position(|(path, _)| path == job) {
            Some(at) => {
                let result = known.ended.remove(at).map(|(_, result)| result).unwrap_or_default();
                let _ = tell.send(result);
            }
            None => drop(known.waiting.insert(job.to_owned(), tell)),
        }
        told
    }

    fn forget(&self, job: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).waiting.remove(job);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_a_job_is_told_whichever_comes_first() {
        let jobs = Jobs::default();
        jobs.ended("/job/1", "done");
        let late = jobs.wait("/job/1");
        let early = jobs.wait("/job/2");
        jobs.ended("/job/2", "failed");

        assert_eq!((late.await.unwrap(), early.await.unwrap()), ("done".into(), "failed".into()));
    }

    #[test]
    fn strange_ends_do_not_pile_up() {
        let jobs = Jobs::default();
        for number in 0..10 * ENDED_KEPT {
            jobs.ended(&format!("/job/{number}"), "done");
        }

        assert_eq!(jobs.0.lock().unwrap().ended.len(), ENDED_KEPT);
    }

    #[test]
    fn only_units_of_ours_are_read() {
        let path = || OwnedObjectPath::try_from("/x").unwrap();
        let row = |name: &str, active: &str| -> UnitRow {
            let text = String::new;
            (name.into(), text(), text(), active.into(), text(), text(), path(), 0, text(), path())
        };
        let id = SandboxId::random();

        let found = unit_state(&row(&unit_name(&id), "deactivating"));

        assert_eq!(found, Some(UnitState { id: id.clone(), alive: true }));
        assert_eq!(unit_state(&row(&unit_name(&id), "failed")), Some(UnitState { id, alive: false }));
        assert_eq!(unit_state(&row("pandastack-sandbox@x.service", "active")), None);
        assert_eq!(unit_state(&row("ssh.service", "active")), None);
    }
}
