//! What is on disk about one sandbox, and what callers are told about it.
//!
//! Owns: the durable form of a sandbox and of a finished request, the events of its life. Refuses to know: files, time,
//! what a step does.

use pandastack_bus::{
    SandboxId,
    storage::{SnapshotInfo, TemplateInfo, VolumeUse},
    vmm::{self, SandboxInfo, SandboxSpec},
};
use serde::{Deserialize, Serialize};

use crate::machine::State;

/// Events kept per sandbox; the oldest go first.
pub const EVENTS_KEPT: usize = 100;
/// Milliseconds for which a request remembers its sandbox after the sandbox is gone.
pub const REQUEST_KEPT_MS: u64 = 24 * 3600 * 1000;

/// A sandbox, a slot or a bake: everything that has a directory, a unit or an address has one of these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Its id.
    pub id: SandboxId,
    /// Where it is in its life.
    pub state: State,
    /// What it is for.
    pub purpose: Purpose,
    /// Unit instance, directory and attachment that it has, or had last; its own id if absent. See [`Record::machine`].
    #[serde(default)]
    pub machine: Option<SandboxId>,
    /// Outside IPv4 address; empty while it has none.
    #[serde(default)]
    pub address: String,
    /// Unix milliseconds.
    pub created_unix_ms: u64,
    /// Counts every change.
    pub generation: u64,
    /// One sentence on why it failed; empty otherwise.
    #[serde(default)]
    pub reason: String,
    /// What happened, oldest first.
    #[serde(default)]
    pub events: Vec<vmm::Event>,
    /// How many events there were in all.
    #[serde(default)]
    noted: u64,
}

/// What a record is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Purpose {
    /// Waits to be given away.
    Slot,
    /// Waits to be given to a request for this template: its snapshot is restored, and stands still.
    Dressed {
        /// What it is made of.
        shape: Shape,
        /// 32 hexadecimal digits: the guest is unique already.
        machine_id: String,
    },
    /// Becomes the snapshot of this template.
    Bake(Shape),
    /// Belongs to somebody.
    Sandbox(Box<Sandbox>),
}

/// What a machine is made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Template.
    pub template: String,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Root disk in MiB.
    pub disk_mib: u64,
    /// Whether the disk is larger than the one in the snapshot.
    #[serde(default)]
    pub disk_grown: bool,
    /// Image environment of every exec.
    #[serde(default)]
    pub env: std::collections::BTreeMap<String, String>,
    /// Where an exec starts; empty: at home.
    #[serde(default)]
    pub workdir: String,
    /// Command run before a capture.
    #[serde(default)]
    pub warmup: String,
}

/// The part of a record that only a sandbox has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sandbox {
    /// The caller's name for the wish that made it; may be empty.
    #[serde(default)]
    pub request: String,
    /// Digest of what was asked for, before any setting was changed; see [`Sandbox::asked`].
    #[serde(default)]
    pub fingerprint: String,
    /// What was asked for, with the settings as they are now.
    pub spec: SandboxSpec,
    /// What it is made of.
    pub shape: Shape,
    /// 32 hexadecimal digits, kept for life.
    pub machine_id: String,
    /// `snapshot`, `fork`, `wake` or `cold`.
    pub boot_mode: String,
    /// Milliseconds from the request to the first answer; 0 until then.
    #[serde(default)]
    pub boot_ms: u64,
    /// Whether its creation was ever finished.
    #[serde(default)]
    pub born: bool,
    /// Snapshot that its directory is filled from; empty: its template.
    #[serde(default)]
    pub source: String,
    /// Volumes that are its own clones, in the order of their devices; those of `spec` belong to its workspace.
    #[serde(default)]
    pub clones: Vec<VolumeUse>,
    /// The fork that made it.
    #[serde(default)]
    pub forked: Option<Forked>,
    /// Capture that it consists of while it is hibernated; empty otherwise.
    #[serde(default)]
    pub image: String,
}

/// The fork that made a sandbox, and its place in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forked {
    /// Sandbox that was captured.
    pub parent: String,
    /// The capture.
    pub snapshot: String,
    /// When that was, Unix milliseconds.
    pub unix_ms: u64,
    /// How long the parent's processors stood still, microseconds.
    pub paused_us: u64,
    /// Which of the children it is, counted from 0.
    pub index: usize,
    /// How many were asked for.
    pub count: usize,
}

/// What is left of a request after its sandbox is gone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The caller's name for the wish.
    pub request: String,
    /// Digest of the specification.
    pub fingerprint: String,
    /// The sandbox that it made.
    pub id: SandboxId,
    /// Unix milliseconds after which it is forgotten.
    pub until_unix_ms: u64,
    /// What was answered, if it was a fork.
    #[serde(default)]
    pub fork: Option<vmm::Fork>,
}

impl Record {
    /// A slot about to be made.
    pub fn slot(id: SandboxId, now_unix_ms: u64) -> Self {
        Self {
            id,
            state: State::New,
            purpose: Purpose::Slot,
            machine: None,
            address: String::new(),
            created_unix_ms: now_unix_ms,
            generation: 0,
            reason: String::new(),
            events: Vec::new(),
            noted: 0,
        }
    }

    /// Unit instance, directory and attachment that it has. A hibernated sandbox has none: what is left of its last one
    /// goes.
    pub fn machine(&self) -> &SandboxId {
        self.machine.as_ref().unwrap_or(&self.id)
    }

    /// The sandbox in it, if it is one.
    pub fn sandbox(&self) -> Option<&Sandbox> {
        match &self.purpose {
            Purpose::Sandbox(sandbox) => Some(sandbox),
            _ => None,
        }
    }

    /// The sandbox in it, if it is one.
    pub fn sandbox_mut(&mut self) -> Option<&mut Sandbox> {
        match &mut self.purpose {
            Purpose::Sandbox(sandbox) => Some(sandbox),
            _ => None,
        }
    }

    /// What its machine is made of; a slot does not know yet.
    pub fn shape(&self) -> Option<&Shape> {
        match &self.purpose {
            Purpose::Slot => None,
            Purpose::Dressed { shape, .. } | Purpose::Bake(shape) => Some(shape),
            Purpose::Sandbox(sandbox) => Some(&sandbox.shape),
        }
    }

    /// Machine id of its guest; a bake's has none, and an empty slot has no guest.
    pub fn machine_id(&self) -> Option<&str> {
        match &self.purpose {
            Purpose::Slot | Purpose::Bake(_) => None,
            Purpose::Dressed { machine_id, .. } => Some(machine_id),
            Purpose::Sandbox(sandbox) => Some(&sandbox.machine_id),
        }
    }

    /// Adds an event; the oldest beyond [`EVENTS_KEPT`] go.
    pub fn note(&mut self, now_unix_ms: u64, kind: &str, detail: &str) {
        let detail = detail.chars().take(500).collect();
        self.noted = self.noted() + 1;
        self.events.push(vmm::Event { unix_ms: now_unix_ms, kind: kind.to_owned(), detail });
        let surplus = self.events.len().saturating_sub(EVENTS_KEPT);
        self.events.drain(..surplus);
    }

    /// How many events there were in all; a record of an older version counts those that it has.
    pub fn noted(&self) -> u64 {
        self.noted.max(self.events.len() as u64)
    }

    /// The event of this number, counted from 1; `None` once it is not kept any more.
    pub fn event(&self, number: u64) -> Option<&vmm::Event> {
        let back = usize::try_from(self.noted().checked_sub(number)?).ok()?;
        self.events.get(self.events.len().checked_sub(back + 1)?)
    }

    /// What the API calls this state; `None` when there is no sandbox to speak of.
    pub fn public_state(&self) -> Option<vmm::State> {
        let sandbox = self.sandbox()?;
        match self.state {
            State::Creating | State::Recovering => Some(vmm::State::Creating),
            // As before until it is done.
            State::Running | State::Pausing | State::Hibernating { paused: false } => {
                Some(vmm::State::Running)
            }
            State::Paused | State::Resuming | State::Hibernating { paused: true } => Some(vmm::State::Paused),
            State::Hibernated | State::Waking => Some(vmm::State::Hibernated),
            State::Failed => Some(vmm::State::Failed),
            // What was never acknowledged is nobody's while it is taken down.
            State::Stopping => sandbox.born.then_some(vmm::State::Stopping),
            State::New | State::Preparing | State::Ready | State::Dressing | State::Baking | State::Gone => {
                None
            }
        }
    }

    /// What callers are told; `None` when there is no sandbox to speak of.
    pub fn info(&self, idle_seconds: u64) -> Option<SandboxInfo> {
        let state = self.public_state()?;
        let sandbox = self.sandbox()?;
        Some(SandboxInfo {
            id: self.id.to_string(),
            workspace: sandbox.spec.workspace.clone(),
            template: sandbox.spec.template.clone(),
            vcpus: sandbox.shape.vcpus,
            memory_mib: sandbox.shape.memory_mib,
            disk_mib: sandbox.shape.disk_mib,
            state,
            reason: self.reason.clone(),
            metadata: sandbox.spec.metadata.clone(),
            ttl_seconds: sandbox.spec.ttl_seconds,
            idle_seconds,
            persistent: sandbox.spec.persistent,
            guest_ip: self.address.clone(),
            boot_mode: sandbox.boot_mode.clone(),
            boot_ms: sandbox.boot_ms,
            created_unix_ms: self.created_unix_ms,
            generation: self.generation,
            snapshot: sandbox.spec.snapshot.clone(),
            parent: sandbox.forked.as_ref().map(|forked| forked.parent.clone()).unwrap_or_default(),
            machine: match state {
                vmm::State::Hibernated => String::new(),
                _ => self.machine().to_string(),
            },
            mounts: sandbox.mounts().map(Mounted::public).collect(),
        })
    }
}

/// A volume that a sandbox has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mounted<'a> {
    /// Its name, and whether it is read only.
    pub volume: &'a VolumeUse,
    /// The sandbox's own clone.
    pub private: bool,
}

impl Mounted<'_> {
    /// Where the guest has it.
    pub fn path(&self) -> String {
        format!("/mnt/{}", self.volume.name)
    }

    fn public(self) -> vmm::Mount {
        vmm::Mount {
            name: self.volume.name.clone(),
            path: self.path(),
            read_only: self.volume.read_only,
            private: self.private,
        }
    }
}

impl Sandbox {
    /// One that is about to be made of a template.
    pub fn new(request: &str, asked: String, spec: SandboxSpec, shape: Shape, boot_mode: &str) -> Self {
        Self {
            request: request.to_owned(),
            fingerprint: asked,
            spec,
            shape,
            machine_id: String::new(),
            boot_mode: boot_mode.to_owned(),
            boot_ms: 0,
            born: false,
            source: String::new(),
            clones: Vec::new(),
            forked: None,
            image: String::new(),
        }
    }

    /// Its volumes, in the order of their devices.
    pub fn mounts(&self) -> impl Iterator<Item = Mounted<'_>> {
        let held = self.spec.volumes.iter().map(|volume| Mounted { volume, private: false });
        held.chain(self.clones.iter().map(|volume| Mounted { volume, private: true }))
    }

    /// Digest of what its request asked for. A record of an older version has none: its settings must do.
    pub fn asked(&self) -> String {
        if self.fingerprint.is_empty() { fingerprint(&self.spec) } else { self.fingerprint.clone() }
    }
}

impl Shape {
    /// A machine of this template with a disk of `disk_mib` MiB (0: the template's).
    pub fn of(template: &TemplateInfo, disk_mib: u64) -> Self {
        let grown = disk_mib > template.disk_mib;
        Self {
            template: template.name.clone(),
            vcpus: template.vcpus.max(1),
            memory_mib: template.memory_mib,
            disk_mib: if grown { disk_mib } else { template.disk_mib },
            disk_grown: grown,
            env: template.env.clone(),
            // Root starts at home anyway, and any other user in a home of its own.
            workdir: if template.workdir == "/root" { String::new() } else { template.workdir.clone() },
            warmup: template.warmup.clone(),
        }
    }

    /// A machine as this snapshot was taken of one.
    pub fn of_snapshot(snapshot: &SnapshotInfo) -> Self {
        let spec = &snapshot.spec;
        Self {
            template: spec.template.clone(),
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk_mib: spec.disk_mib,
            disk_grown: false,
            env: spec.env.clone(),
            workdir: spec.workdir.clone(),
            warmup: String::new(),
        }
    }
}

/// Whether a request's name is nobody's: it is made up for one call (`once-…`), and remembered only while its sandbox lives.
pub fn is_anonymous(request: &str) -> bool {
    request.is_empty() || request.starts_with("once-")
}

/// Digest of what is asked for: two requests of one name must mean the same.
pub fn fingerprint(spec: &impl Serialize) -> String {
    use sha2::{Digest, Sha256};
    let text = serde_json::to_vec(spec).unwrap_or_default();
    hex(&Sha256::digest(text))
}

/// Key of the record of a finished request, whatever characters the request has.
pub fn request_key(request: &str) -> String {
    use sha2::{Digest, Sha256};
    hex(&Sha256::digest(request.as_bytes()))
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_bounded_and_the_newest_stay() {
        let mut record = Record::slot(SandboxId::random(), 1);
        for number in 0..250 {
            record.note(number, "x", "");
        }

        assert_eq!(record.events.len(), EVENTS_KEPT);
        assert_eq!(record.events.last().map(|event| event.unix_ms), Some(249));
        assert_eq!(record.noted(), 250);
        let told = |number| record.event(number).map(|event| event.unix_ms);
        assert_eq!(
            (told(250), told(151), told(150), told(0), told(251)),
            (Some(249), Some(150), None, None, None)
        );
    }

    #[test]
    fn a_slot_is_nobodys_sandbox() {
        let record = Record::slot(SandboxId::random(), 1);

        assert_eq!(record.info(0), None);
    }

    #[test]
    fn hexadecimal_digits_keep_leading_zeros() {
        assert_eq!(hex(&[0, 1, 0xff]), "0001ff");
    }
}
