//! The life of one sandbox as a pure function: state and event in, state and effects out.
//!
//! Owns: which step may follow which, and what must be done for it. Refuses to know: how anything is done, time, ids.
//!
//! ```text
//!   New ─Begin─► Preparing ─Done─► Ready ─Take─► Creating ─Done─► Running ─Died/Lost─► Failed
//!                    │            ▲ │ │              │             │   ▲                │
//!                    │      Dressing◄Dress           │             │   │                │
//!                    │              │ └─Bake─► Baking│          Lost (persistent)       │
//!                    │              │            │   │             ▼   │Boot, Done      │
//!                    │              │            │   │          Recovering ─Fault─► Failed   (Setback: stays)
//!                    └──Fault/Died/Delete/Lost───┴───┴──Delete─────┴──────────Delete────┘
//!                                   ▼
//!                               Stopping ─Done─► Gone
//! ```
//!
//! The states up to `Creating`, and `Baking`, were never acknowledged to anybody: on disk they stay the slot that was being
//! prepared, and after a crash they are taken down. A create ends with `Commit`, as the verbs below: a sandbox that runs is
//! on disk as one that runs. What was acknowledged (`Running`, `Paused`, `Hibernated`, `Failed`) is
//! kept until it is deleted.
//!
//! ```text
//!   Running ─Pause─► Pausing ─Done─► Paused            Paused ─Resume─► Resuming ─Done─► Running
//!   Running, Paused ─Hibernate─► Hibernating ─Done─► Hibernated ─Wake─► Waking ─Done─► Running
//! ```
//!
//! The four in the middle are never on disk: `Commit` makes durable what follows them, in one write. Before it a `Fault`
//! leads back to where they came from, and a crash finds the record of before; after it nothing can fail any more. A
//! hibernated sandbox has no machine; a woken one has another one than before. A capture is no state: it happens in
//! `Running` or `Paused`, and is undone there after a crash.

use serde::{Deserialize, Serialize};

/// Where a sandbox is, in more detail than the API tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing was done yet, nothing is on disk.
    New,
    /// A slot that is being made.
    Preparing,
    /// A slot, waiting for a request: an empty Firecracker process with a network, or dressed for a template.
    Ready,
    /// A slot that is being dressed: a template's snapshot is restored in it and made unique, then its processors are stopped.
    Dressing,
    /// A slot that was given to a request and becomes a sandbox.
    Creating,
    /// A slot that was given to a template and becomes its snapshot.
    Baking,
    /// The guest answers.
    Running,
    /// Its processors are being stopped. Never on disk.
    #[serde(skip)]
    Pausing,
    /// Its processors stand still, its machine is there.
    Paused,
    /// Its processors are being started again. Never on disk.
    #[serde(skip)]
    Resuming,
    /// It is being captured to be taken down. Never on disk.
    #[serde(skip)]
    Hibernating {
        /// Its processors stood still before.
        paused: bool,
    },
    /// It consists of its record and a capture; its last machine is gone, or going.
    Hibernated,
    /// It is being restored into a slot. Never on disk.
    #[serde(skip)]
    Waking,
    /// A persistent sandbox that is booted again from its disk.
    Recovering,
    /// The machine is gone for good; disk and record are kept until deletion.
    Failed,
    /// Being taken down.
    Stopping,
    /// Nothing is left.
    Gone,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A slot is wanted.
    Begin,
    /// A request took an empty slot.
    Take,
    /// A request took a slot that is dressed for its template.
    TakeDressed,
    /// An empty slot is dressed for the template that is likely to be asked for.
    Dress,
    /// A template took the slot.
    Bake,
    /// Every effect of the last step succeeded.
    Done,
    /// An effect of the last step failed, or was given up.
    Fault,
    /// An effect of the last step failed, and it is tried again later.
    Setback,
    /// The process ended by itself.
    Died,
    /// Its processors shall stand still.
    Pause,
    /// Its processors shall go on.
    Resume,
    /// It shall be put onto storage.
    Hibernate,
    /// It shall be brought back from storage.
    Wake,
    /// Somebody wants it gone; also repeats a teardown that failed.
    Delete,
    /// It is the turn of one that waits to be booted again.
    Boot,
    /// At start-up: the machine is not there any more, and is to be booted again or not.
    Lost {
        /// Whether its disk is to be booted again.
        recover: bool,
    },
    /// At start-up: what is on record is there.
    Adopt,
}

/// What must be done, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Make the record durable. Nothing after it is done if it fails (but see [`Effect::is_dispensable`]).
    Save,
    /// Set limits and fill the directory for a restore.
    Furnish,
    /// Tell listeners.
    Announce,
    /// Make the directory.
    Prepare,
    /// Link kernel and initrd into the directory.
    EnsureKernel,
    /// Set the limits that it will probably need; the right ones are set when it is known what it becomes.
    LimitExpected,
    /// Start the unit and watch its process.
    StartUnit,
    /// Watch the process of a unit that runs already.
    Watch,
    /// Stop the processors, if they run.
    Halt,
    /// Let the processors go on, if they stand still.
    Resume,
    /// Remove what an unfinished capture left.
    AbortCapture,
    /// Capture it, and leave its processors standing still.
    CaptureImage,
    /// Make durable what it is once this step is done. The step's last effect.
    Commit,
    /// Take a slot, for as long as this step lasts.
    Borrow,
    /// Set limits and fill the borrowed slot from the capture that the sandbox consists of.
    FurnishImage,
    /// Take the borrowed slot down.
    GiveBack,
    /// Attach the process to the network.
    Attach,
    /// Wait until Firecracker takes orders.
    AwaitApi,
    /// Set limits and fill the directory for a template's first boot.
    FurnishPristine,
    /// Set limits; the disk is there.
    Limit,
    /// Load the snapshot and let it run.
    Load,
    /// Let the processors of a dressed slot go on, which stand still for sure.
    Unpause,
    /// Greet a guest that is unique already and give it the time and fresh entropy.
    Freshen,
    /// Boot the disk.
    Boot,
    /// Greet the guest and make it unique.
    Identify,
    /// Let the guest use a disk that is larger than the snapshot's.
    GrowDisk,
    /// Let the guest see and mount its volumes.
    Mount,
    /// Run the template's warm-up command.
    WarmUp,
    /// Take the snapshot.
    Capture,
    /// Make the snapshot the template's. The process must be gone.
    Seal,
    /// Stop the unit.
    StopUnit,
    /// Take the network away.
    Detach,
    /// Remove the directory. Only when the process is gone.
    Release,
    /// Its volumes are free for others. Only when the process is gone.
    DropVolumes,
    /// Remove the capture that it consisted of, or was to consist of.
    DropImage,
    /// Remove the record. Only when nothing else is left.
    Forget,
}

use Effect as E;

const PREPARE: &[Effect] = &[E::Save, E::Prepare, E::LimitExpected, E::StartUnit, E::Attach, E::AwaitApi];
const DRESS: &[Effect] = &[E::Furnish, E::Load, E::Identify, E::Halt];
const CREATE: &[Effect] = &[E::Furnish, E::Announce, E::Load, E::Identify, E::GrowDisk, E::Mount, E::Commit];
const CREATE_DRESSED: &[Effect] = &[E::Announce, E::Unpause, E::Freshen, E::Commit];
const BAKE: &[Effect] =
    &[E::Save, E::FurnishPristine, E::Boot, E::Identify, E::WarmUp, E::Capture, E::StopUnit, E::Seal];
const RECOVER: &[Effect] = &[
    E::StopUnit,
    E::Prepare,
    E::EnsureKernel,
    E::StartUnit,
    E::Attach,
    E::AwaitApi,
    E::Limit,
    E::Boot,
    E::Identify,
    E::Mount,
];
const PAUSE: &[Effect] = &[E::Halt, E::Commit];
const RESUME: &[Effect] = &[E::Resume, E::Commit];
const HIBERNATE: &[Effect] = &[E::CaptureImage, E::Commit];
/// The capture is what counts from now on.
const SLEEP: &[Effect] = &[E::Announce, E::StopUnit, E::Detach, E::Release];
const CLEAR: &[Effect] = &[E::StopUnit, E::Detach, E::Release];
const WAKE: &[Effect] = &[E::Borrow, E::FurnishImage, E::Load, E::Freshen, E::Commit];
const SETTLE: &[Effect] = &[E::Save, E::Announce];
/// A power cut may have left a capture half made.
const FAIL: &[Effect] = &[E::Save, E::Announce, E::StopUnit, E::Detach, E::AbortCapture];
const QUIET: &[Effect] = &[E::StopUnit, E::Detach, E::AbortCapture];
/// What was never acknowledged: the record on disk already says that it is to be taken down.
const DISCARD: &[Effect] = &[E::Announce, E::StopUnit, E::Detach, E::Release, E::DropVolumes, E::Forget];
/// What was acknowledged: first it must be durable that it is not wanted any more.
const DELETE: &[Effect] =
    &[E::Save, E::Announce, E::StopUnit, E::Detach, E::Release, E::DropVolumes, E::DropImage, E::Forget];

impl State {
    /// The next state and what must be done for it; `None` when this event has no business here.
    pub fn on(self, event: Event) -> Option<(State, &'static [Effect])> {
        use Event as V;
        use State as S;
        Some(match (self, event) {
            (S::New, V::Begin) => (S::Preparing, PREPARE),
            (S::Preparing | S::Dressing, V::Done) => (S::Ready, &[]),
            (S::Ready, V::Dress) => (S::Dressing, DRESS),
            (S::Ready, V::Take) => (S::Creating, CREATE),
            (S::Ready, V::TakeDressed) => (S::Creating, CREATE_DRESSED),
            (S::Ready, V::Bake) => (S::Baking, BAKE),
            (S::Recovering, V::Done) => (S::Running, SETTLE),
            (S::Baking, V::Done) => (S::Stopping, DISCARD),

            (
                S::Preparing | S::Dressing | S::Creating | S::Baking,
                V::Fault | V::Died | V::Delete | V::Lost { .. },
            )
            | (S::Ready, V::Died | V::Delete | V::Lost { .. }) => (S::Stopping, DISCARD),

            (S::Running, V::Pause) => (S::Pausing, PAUSE),
            (S::Pausing, V::Done) => (S::Paused, &[E::Announce]),
            (S::Pausing, V::Fault) => (S::Running, &[E::Resume]),
            (S::Paused, V::Resume) => (S::Resuming, RESUME),
            (S::Creating | S::Resuming | S::Waking, V::Done) => (S::Running, &[E::Announce]),
            (S::Resuming, V::Fault) => (S::Paused, &[E::Halt]),
            (S::Running, V::Hibernate) => (S::Hibernating { paused: false }, HIBERNATE),
            (S::Paused, V::Hibernate) => (S::Hibernating { paused: true }, HIBERNATE),
            (S::Hibernating { .. }, V::Done) => (S::Hibernated, SLEEP),
            (S::Hibernating { paused: false }, V::Fault) => (S::Running, &[E::DropImage, E::Resume]),
            (S::Hibernating { paused: true }, V::Fault) => (S::Paused, &[E::DropImage]),
            (S::Hibernated, V::Wake) => (S::Waking, WAKE),
            (S::Waking, V::Fault) => (S::Hibernated, &[E::GiveBack]),
            // What is asked for is so already.
            (S::Running, V::Resume | V::Wake) => (S::Running, &[]),
            (S::Paused, V::Pause) => (S::Paused, &[]),
            (S::Hibernated, V::Hibernate) => (S::Hibernated, &[]),

            (S::Running, V::Adopt) => (S::Running, &[E::Watch, E::Resume, E::AbortCapture]),
            (S::Paused, V::Adopt) => (S::Paused, &[E::Watch, E::Halt, E::AbortCapture]),
            (S::Hibernated, V::Adopt) => (S::Hibernated, CLEAR),
            (S::Running | S::Paused | S::Recovering, V::Lost { recover: true }) => (S::Recovering, SETTLE),
            (S::Recovering, V::Boot) => (S::Recovering, RECOVER),
            (S::Recovering, V::Setback) => (S::Recovering, QUIET),
            (S::Running | S::Paused | S::Recovering, V::Died | V::Lost { recover: false })
            | (S::Recovering, V::Fault) => (S::Failed, FAIL),
            // The last record could not be saved, or a machine not taken down; whoever waits is told.
            (S::Running, V::Fault) => (S::Running, &[]),
            (S::Paused, V::Fault) => (S::Paused, &[]),
            (S::Hibernated, V::Died | V::Fault | V::Lost { .. }) => (S::Hibernated, &[]),

            (S::Running | S::Paused | S::Hibernated | S::Recovering | S::Failed, V::Delete) => {
                (S::Stopping, DELETE)
            }
            (S::Failed, V::Adopt) => (S::Failed, QUIET),
            (S::Failed, V::Died | V::Fault | V::Lost { .. }) => (S::Failed, &[]),

            (S::Stopping, V::Done) => (S::Gone, &[E::Announce]),
            (S::Stopping, V::Fault | V::Died) => (S::Stopping, &[]),
            (S::Stopping, V::Delete | V::Lost { .. }) => (S::Stopping, DELETE),
            (S::Gone, V::Died | V::Delete | V::Fault) => (S::Gone, &[]),
            _ => return None,
        })
    }

    /// Whether effects done in this state, after this event, lead on to another one by `Done`. (No effects, no `Done`.)
    pub fn is_working(self, event: Event) -> bool {
        match self {
            Self::Preparing | Self::Dressing | Self::Creating | Self::Baking | Self::Stopping => true,
            Self::Pausing | Self::Resuming | Self::Hibernating { .. } | Self::Waking => true,
            Self::Recovering => event == Event::Boot,
            _ => false,
        }
    }

    /// Whether a delete may cut the work short (between effects).
    pub fn is_abortable(self) -> bool {
        matches!(
            self,
            Self::Preparing
                | Self::Dressing
                | Self::Creating
                | Self::Baking
                | Self::Waking
                | Self::Recovering
        )
    }
}

impl Effect {
    /// Whether this state goes on without it on a full disk: a teardown makes room, and needs none for the removal of the
    /// record at its end, and a lost machine is found to be lost again. Until it succeeds the old record stands.
    pub fn is_dispensable(self, state: State) -> bool {
        self == Self::Save && matches!(state, State::Stopping | State::Failed | State::Recovering)
    }

    /// Whether the effects after this one are tried even if it fails.
    pub fn is_teardown(self) -> bool {
        matches!(
            self,
            E::Announce
                | E::StopUnit
                | E::Detach
                | E::AbortCapture
                | E::Release
                | E::DropVolumes
                | E::DropImage
        )
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
