//! Typed client of Firecracker's HTTP API (1.12) over its unix socket.
//!
//! Owns: the requests we make, byte for byte, and the limits of their answers. Refuses to know: when a request makes
//! sense. The process behind the socket runs a hostile guest: answers are bounded in size and time.

use std::{future::Future, io, time::Duration};

use bytes::Bytes;
use http::{Method, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use pandastack_bus::{Error, Result as BusResult, SandboxId, storage::CaptureKind};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    ports::{Hypervisor, Machine, Memory},
    socket::{API, Sockets},
};

/// Largest answer that is read, bytes.
const ANSWER_LIMIT: usize = 64 << 10;
/// For requests that only change settings.
const SHORT: Duration = Duration::from_secs(5);
/// Restoring maps memory and reads the state; slow disks and emulation are slow.
const LOAD: Duration = Duration::from_secs(15);
/// A capture writes what is dirty.
const CAPTURE: Duration = Duration::from_secs(180);
/// From the start of the process to its first answer.
const APPEAR: Duration = Duration::from_secs(15);
/// Kernel command line of every guest. A guest may stand still for long while its clocks go on: watchdogs for stuck processors would take that for a fault.
pub const BOOT_ARGS: &str = "console=ttyS0 quiet reboot=k panic=1 pci=off nosoftlockup \
                             rcupdate.rcu_cpu_stall_suppress=1 panda.addr=172.31.255.2/30 panda.gw=172.31.255.1 \
                             panda.mtu=1450 root=/dev/vda";
/// Name of the root drive.
pub const ROOT: &str = "root";
/// Volumes of a kind that a guest can have: so many placeholder drives are in every snapshot.
pub const VOLUMES: usize = 4;

/// Why Firecracker did not do it.
#[derive(Debug, thiserror::Error)]
pub enum FirecrackerError {
    /// The socket cannot be reached: the process is not there (yet, or any more).
    #[error("Firecracker cannot be reached")]
    Unreachable(#[source] io::Error),
    /// It refused; the machine is as before.
    #[error("Firecracker answers {path} with {status}: {message}")]
    Refused {
        /// What was asked.
        path: String,
        /// HTTP status.
        status: u16,
        /// Its sentence, shortened.
        message: String,
    },
    /// What came back is no HTTP, or too much. The process is not to be trusted any more.
    #[error("Firecracker's answer to {path} makes no sense: {reason}")]
    Nonsense {
        /// What was asked.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No answer in time. Whether it had an effect is unknown.
    #[error("Firecracker did not answer {0} in time")]
    Late(String),
}

impl From<FirecrackerError> for Error {
    fn from(error: FirecrackerError) -> Self {
        match error {
            FirecrackerError::Late(_) => Self::Timeout(pandastack_daemon::chain(&error)),
            _ => Self::Internal(pandastack_daemon::chain(&error)),
        }
    }
}

/// The client. One connection per request: they are rare, and nothing is held across a restore.
#[derive(Debug, Clone)]
pub struct Firecracker {
    sockets: Sockets,
}

impl Firecracker {
    /// A client for the sockets of all sandboxes.
    pub fn new(sockets: Sockets) -> Self {
        Self { sockets }
    }

    async fn put(&self, id: &SandboxId, path: &str, body: &Value) -> Result<(), FirecrackerError> {
        self.request(id, Method::PUT, path, Some(body), SHORT).await.map(drop)
    }

    async fn request(
        &self,
        id: &SandboxId,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: Duration,
    ) -> Result<Bytes, FirecrackerError> {
        timeout(limit, self.exchange(id, method, path, body))
            .await
            .unwrap_or_else(|_| Err(FirecrackerError::Late(path.to_owned())))
    }

    async fn exchange(
        &self,
        id: &SandboxId,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Bytes, FirecrackerError> {
        let nonsense = |reason: String| FirecrackerError::Nonsense { path: path.to_owned(), reason };
        let stream = self.sockets.connect(id, API).await.map_err(FirecrackerError::Unreachable)?;
        let (mut sender, connection) = hyper::client::conn::http1::Builder::new()
            .max_buf_size(ANSWER_LIMIT)
            .handshake::<_, Full<Bytes>>(TokioIo::new(stream))
            .await
            .map_err(|error| nonsense(error.to_string()))?;
        let text = body.map(Value::to_string).unwrap_or_default();
        let mut request = http::Request::builder().method(method).uri(path).header(header::HOST, "localhost");
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let request =
            request.body(Full::new(Bytes::from(text))).map_err(|error| nonsense(error.to_string()))?;
        let talk = async {
            let answer = sender.send_request(request).await.map_err(|error| nonsense(error.to_string()))?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_LIMIT)
                .collect()
                .await
                .map_err(|error| nonsense(error.to_string()))?
                .to_bytes();
            Ok((status, body))
        };
        let (status, body) = tokio::select! {
            answer = talk => answer?,
            // The connection must be driven, but its end says nothing: the answer may have been read already.
            never = drive(connection) => match never {},
        };
        if status.is_success() {
            return Ok(body);
        }
        Err(refused(path, status, &body))
    }
}

impl Hypervisor for Firecracker {
    async fn await_api(&self, id: &SandboxId) -> BusResult<()> {
        let deadline = Instant::now() + APPEAR;
        let mut pause = Duration::from_millis(1);
        loop {
            match self.request(id, Method::GET, "/", None, SHORT).await {
                Ok(_) => return Ok(()),
                Err(FirecrackerError::Unreachable(_)) if Instant::now() < deadline => {}
                Err(error) => return Err(error.into()),
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    async fn load(&self, id: &SandboxId) -> BusResult<()> {
        let body = json!({
            "snapshot_path": "/vm/state",
            "mem_backend": { "backend_path": "/vm/mem", "backend_type": "File" },
            "enable_diff_snapshots": true,
            "resume_vm": true,
        });
        self.request(id, Method::PUT, "/snapshot/load", Some(&body), LOAD).await?;
        Ok(())
    }

    async fn boot(&self, id: &SandboxId, machine: Machine) -> BusResult<()> {
        for (path, body) in configuration(machine) {
            self.put(id, &path, &body).await?;
        }
        let start = json!({ "action_type": "InstanceStart" });
        self.request(id, Method::PUT, "/actions", Some(&start), LOAD).await?;
        Ok(())
    }

    async fn capture(&self, id: &SandboxId) -> BusResult<()> {
        self.turn(id, "Paused").await?;
        self.write(id, CaptureKind::Diff, "/vm/state", "/vm/mem").await
    }

    async fn renew_drive(&self, id: &SandboxId, drive: &str) -> BusResult<()> {
        let body = json!({ "drive_id": drive, "path_on_host": format!("/vm/{drive}.img") });
        self.request(id, Method::PATCH, &format!("/drives/{drive}"), Some(&body), SHORT).await?;
        Ok(())
    }

    async fn is_paused(&self, id: &SandboxId) -> BusResult<bool> {
        let answer = self.request(id, Method::GET, "/", None, SHORT).await?;
        let state = serde_json::from_slice::<Value>(&answer).ok();
        let state = state.as_ref().and_then(|value| value.get("state")?.as_str());
        match state {
            Some("Paused") => Ok(true),
            Some("Running") => Ok(false),
            _ => {
                let reason = "it names no state of a machine".to_owned();
                Err(FirecrackerError::Nonsense { path: "/".into(), reason }.into())
            }
        }
    }

    async fn pause(&self, id: &SandboxId) -> BusResult<()> {
        self.turn(id, "Paused").await
    }

    async fn resume(&self, id: &SandboxId) -> BusResult<()> {
        self.turn(id, "Resumed").await
    }

    async fn write_capture(&self, id: &SandboxId, kind: CaptureKind, memory: Memory) -> BusResult<()> {
        let memory = match memory {
            Memory::Stored => "/vm/c.mem",
            Memory::Held => "/vm/d/mem",
        };
        self.write(id, kind, "/vm/c.state", memory).await
    }
}

impl Firecracker {
    async fn turn(&self, id: &SandboxId, state: &str) -> BusResult<()> {
        self.request(id, Method::PATCH, "/vm", Some(&json!({ "state": state })), LOAD).await?;
        Ok(())
    }

    async fn write(&self, id: &SandboxId, kind: CaptureKind, state: &str, memory: &str) -> BusResult<()> {
        let kind = match kind {
            CaptureKind::Diff => "Diff",
            CaptureKind::Full => "Full",
        };
        let body = json!({ "snapshot_type": kind, "snapshot_path": state, "mem_file_path": memory });
        self.request(id, Method::PUT, "/snapshot/create", Some(&body), CAPTURE).await?;
        Ok(())
    }
}

/// Everything a machine is told before it boots, in order. All of it is in every snapshot made from it.
fn configuration(machine: Machine) -> Vec<(String, Value)> {
    // Token buckets: `size` per `refill_time` milliseconds, after a burst that a fresh guest may spend at once. They keep
    // one guest from filling the disk's or the link's queue; a guest alone hardly notices them.
    let bytes = |per_second: u64, burst: u64| json!({ "size": per_second, "one_time_burst": burst, "refill_time": 1000 });
    let operations =
        |per_second: u64| json!({ "size": per_second, "one_time_burst": per_second, "refill_time": 1000 });
    let drive = |name: &str, read_only: bool| {
        let body = json!({
            "drive_id": name,
            "path_on_host": format!("/vm/{name}.img"),
            // The command line names the root; `true` would add a second `root=`.
            "is_root_device": false,
            "is_read_only": read_only,
            // Cannot be changed later: without it a guest's flush does nothing.
            "cache_type": "Writeback",
            "io_engine": "Sync",
            "rate_limiter": { "bandwidth": bytes(512 << 20, 2 << 30), "ops": operations(50_000) },
        });
        (format!("/drives/{name}"), body)
    };
    let link = json!({ "bandwidth": bytes(128 << 20, 256 << 20), "ops": operations(100_000) });
    let mut all = vec![
        (
            "/machine-config".to_owned(),
            json!({
                "vcpu_count": machine.vcpus,
                "mem_size_mib": machine.memory_mib,
                "smt": false,
                "track_dirty_pages": true,
            }),
        ),
        (
            "/boot-source".to_owned(),
            json!({
                "kernel_image_path": "/vm/vmlinux",
                "initrd_path": "/vm/initrd.img",
                "boot_args": BOOT_ARGS,
            }),
        ),
        drive(ROOT, false),
    ];
    // Placeholders: volumes take their place after a restore. The guest names drives by their order.
    all.extend((0..VOLUMES).map(|number| drive(&format!("w{number}"), false)));
    all.extend((0..VOLUMES).map(|number| drive(&format!("r{number}"), true)));
    all.extend([
        (
            "/network-interfaces/eth0".to_owned(),
            json!({
                "iface_id": "eth0",
                "guest_mac": "06:00:ac:1f:ff:02",
                "host_dev_name": "tap0",
                "rx_rate_limiter": link,
                "tx_rate_limiter": link,
            }),
        ),
        ("/vsock".to_owned(), json!({ "guest_cid": 3, "uds_path": "/vm/s/v.sock" })),
        ("/entropy".to_owned(), json!({ "rate_limiter": { "bandwidth": bytes(1 << 20, 1 << 20) } })),
    ]);
    all
}

async fn drive(connection: impl Future) -> std::convert::Infallible {
    connection.await;
    std::future::pending().await
}

fn refused(path: &str, status: StatusCode, body: &[u8]) -> FirecrackerError {
    let fault = serde_json::from_slice::<Value>(body).ok();
    let message = fault
        .as_ref()
        .and_then(|value| value.get("fault_message")?.as_str().map(str::to_owned))
        .unwrap_or_else(|| String::from_utf8_lossy(body).into_owned());
    let message = message.chars().take(400).collect();
    FirecrackerError::Refused { path: path.to_owned(), status: status.as_u16(), message }
}

#[cfg(test)]
#[path = "firecracker_tests.rs"]
mod tests;
