//! A build and its life, as a pure function: stage and event in, stage out.
//!
//! Owns: which step follows which, what a build says of itself on disk. Refuses to know how anything is done.
//!
//! ```text
//!   Queued ─Go─► Making ─Step─► Building ─Step─► Adopting ─Step─► Baking ─Step─► Publishing ─Step─► Done
//!     ▲             │               │                │               │               │
//!     └──Restart────┴───────────────┴────────────────┘               └─Fault, Cancel─┴─► Failing ─Step─► Failed
//! ```
//!
//! Each stage is durable before it begins. Until there is a template, a restart begins anew, because nothing but the upload
//! is needed for that; but not for ever: a build that takes the daemon down with it is given up. After it the restart goes on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Starts of one build; one more restart gives it up.
pub const ATTEMPTS: u32 = 2;

/// What a template is built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// An archive: of files, or of an image.
    Rootfs,
    /// A Dockerfile with its context.
    Dockerfile,
    /// An image in a registry.
    Reference,
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// It waits for its turn.
    Queued,
    /// Volumes and machine are made, the upload goes into it.
    Making,
    /// The program runs.
    Building,
    /// The machine goes, its volume becomes a template.
    Adopting,
    /// vmm bakes the template.
    Baking,
    /// The template becomes its workspace's.
    Publishing,
    /// The template is there.
    Done,
    /// What was made is removed; `error` says why.
    Failing,
    /// Nothing is left of it.
    Failed,
}

/// What happened to a build.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It is its turn.
    Go,
    /// What its stage is about was done.
    Step,
    /// It was not done.
    Fault,
    /// Its owner does not want it any more.
    Cancel,
    /// The daemon started; it was started so often before.
    Restart(u32),
}

/// A build, as its record says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Build {
    /// 16 hexadecimal digits.
    pub id: String,
    /// Owner.
    pub workspace: String,
    /// What the template shall be called.
    pub name: String,
    /// What it is built from.
    pub kind: Kind,
    /// Root disk in MiB, at least.
    pub size_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Reference to an image, with its registry; empty otherwise.
    #[serde(default)]
    pub image_ref: String,
    /// Takes the place of the template of that name.
    pub replace: bool,
    /// Id of the template that it makes.
    pub template: String,
    /// How far it is.
    pub stage: Stage,
    /// Its owner does not want it any more.
    #[serde(default)]
    pub cancelled: bool,
    /// Why it failed, one sentence; empty otherwise.
    #[serde(default)]
    pub error: String,
    /// How often it was started.
    #[serde(default)]
    pub attempts: u32,
    /// Bytes of files in its template.
    #[serde(default)]
    pub bytes: u64,
    /// Environment that the program found for its template.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// The same for the directory where an exec starts.
    #[serde(default)]
    pub workdir: String,
    /// When it was asked for, Unix milliseconds.
    pub created_unix_ms: u64,
    /// When it ended, Unix milliseconds; 0 until then.
    #[serde(default)]
    pub ended_unix_ms: u64,
}

impl Stage {
    /// The stage that follows; `None` when this event has no business here.
    pub fn on(self, event: Event) -> Option<Self> {
        Some(match (self, event) {
            (Self::Queued, Event::Go) => Self::Making,
            (Self::Making, Event::Step) => Self::Building,
            (Self::Building, Event::Step) => Self::Adopting,
            (Self::Adopting, Event::Step) => Self::Baking,
            (Self::Baking, Event::Step) => Self::Publishing,
            (Self::Publishing, Event::Step) => Self::Done,
            (Self::Failing, Event::Step) => Self::Failed,
            (Self::Making | Self::Building | Self::Adopting, Event::Restart(attempts)) => {
                if attempts < ATTEMPTS { Self::Queued } else { Self::Failing }
            }
            (Self::Publishing, Event::Cancel) => return None,
            (Self::Done | Self::Failing | Self::Failed, _)
            | (_, Event::Restart(_) | Event::Go | Event::Step) => {
                return None;
            }
            (_, Event::Fault | Event::Cancel) => Self::Failing,
        })
    }

    /// Whether nothing will change any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed)
    }

    /// Whether its outcome is known to its owner.
    pub fn is_decided(self) -> bool {
        self.is_over() || self == Self::Failing
    }

    /// Whether its upload is still needed.
    pub fn needs_upload(self) -> bool {
        matches!(self, Self::Queued | Self::Making | Self::Building | Self::Adopting)
    }

    /// Whether its template may be there.
    pub fn has_template(self) -> bool {
        matches!(self, Self::Adopting | Self::Baking | Self::Publishing)
    }

    /// The API's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Making | Self::Building => "running",
            Self::Adopting => "uploading",
            Self::Baking | Self::Publishing => "baking",
            Self::Done => "done",
            Self::Failing | Self::Failed => "failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: [Stage; 9] = [
        Stage::Queued,
        Stage::Making,
        Stage::Building,
        Stage::Adopting,
        Stage::Baking,
        Stage::Publishing,
        Stage::Done,
        Stage::Failing,
        Stage::Failed,
    ];

    #[test]
    fn a_build_that_nothing_disturbs_is_done() {
        let mut stage = Stage::Queued.on(Event::Go).unwrap();
        let mut words = vec![stage.as_str()];
        while let Some(next) = stage.on(Event::Step) {
            stage = next;
            words.push(stage.as_str());
        }
        assert_eq!(stage, Stage::Done);
        assert_eq!(words, ["running", "running", "uploading", "baking", "baking", "done"]);
    }

    proptest! {
        #[test]
        fn every_life_ends_and_what_is_decided_stays(
            events in prop::collection::vec(0..5_u8, 0..60),
        ) {
            let (mut stage, mut attempts) = (Stage::Queued, 0);
            for event in events {
                let event = [Event::Go, Event::Step, Event::Fault, Event::Cancel, Event::Restart(attempts)][usize::from(event)];
                let Some(next) = stage.on(event) else { continue };
                attempts += u32::from(next == Stage::Making);
                prop_assert!(attempts <= ATTEMPTS);
                prop_assert!(!stage.is_over());
                prop_assert!(!stage.is_decided() || next == Stage::Failed);
                // A failure is never without its clean-up.
                prop_assert!(next != Stage::Failed || stage == Stage::Failing);
                stage = next;
            }
            let mut steps = 0;
            while !stage.is_over() {
                stage = stage.on(if stage == Stage::Queued { Event::Go } else { Event::Step }).unwrap();
                steps += 1;
                prop_assert!(steps < 10);
            }
        }
    }

    #[test]
    fn a_template_that_is_there_is_waited_for_after_a_restart() {
        for stage in ALL {
            let after = stage.on(Event::Restart(0)).unwrap_or(stage);
            let again = matches!(stage, Stage::Making | Stage::Building | Stage::Adopting);
            assert_eq!(after, if again { Stage::Queued } else { stage });
        }
    }
}
