//! The part of PID 1's interface (`org.freedesktop.systemd1`, systemd 257) that vmm uses.

use zbus::{OwnedObjectPath, OwnedVariant, Variant, proxy};

/// A row of `ListUnitsByPatterns`: name, description, load state, active state, sub state, follower, object path, job
/// id, job type, job path.
pub type UnitRow =
    (String, String, String, String, String, String, OwnedObjectPath, u32, String, OwnedObjectPath);

/// `org.freedesktop.systemd1.Manager`.
#[proxy(
    interface = "org.freedesktop.systemd1.Manager",
    default_service = "org.freedesktop.systemd1",
    default_path = "/org/freedesktop/systemd1"
)]
pub trait Manager {
    /// Asks for signals; without it `JobRemoved` does not arrive.
    fn subscribe(&self) -> zbus::Result<()>;
    /// Queues a start job.
    fn start_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    /// Queues a stop job.
    fn stop_unit(&self, name: &str, mode: &str) -> zbus::Result<OwnedObjectPath>;
    /// Forgets a failure.
    fn reset_failed_unit(&self, name: &str) -> zbus::Result<()>;
    /// Loads a unit if it is not, and answers its object path.
    fn load_unit(&self, name: &str) -> zbus::Result<OwnedObjectPath>;
    /// Sets limits at run time.
    fn set_unit_properties(
        &self,
        name: &str,
        runtime: bool,
        properties: &[(&str, Variant<'_>)],
    ) -> zbus::Result<()>;
    /// Units whose name matches, in any of the given active states (all when empty).
    fn list_units_by_patterns(&self, states: &[&str], patterns: &[&str]) -> zbus::Result<Vec<UnitRow>>;

    /// A job ended: `done`, `failed`, `canceled`, `timeout`, `dependency` or `skipped`.
    #[zbus(signal)]
    fn job_removed(&self, id: u32, job: OwnedObjectPath, unit: &str, result: &str) -> zbus::Result<()>;
    /// A unit is no longer loaded.
    #[zbus(signal)]
    fn unit_removed(&self, id: &str, unit: OwnedObjectPath) -> zbus::Result<()>;
}

/// `org.freedesktop.systemd1.Service`, on a unit's object.
#[proxy(interface = "org.freedesktop.systemd1.Service", default_service = "org.freedesktop.systemd1")]
pub trait Service {
    /// Process id of the main process; 0 when there is none.
    #[zbus(property(emits_changed_signal = "false"), name = "MainPID")]
    fn main_pid(&self) -> zbus::Result<u32>;
    /// How the service ended: `success`, `signal`, `exit-code`, `oom-kill`, …
    #[zbus(property(emits_changed_signal = "false"))]
    fn result(&self) -> zbus::Result<String>;
}

/// `org.freedesktop.DBus.Properties` of units is where their changes of state are announced.
pub const UNIT_INTERFACE: &str = "org.freedesktop.systemd1.Unit";

/// Keeps the value type in the public interface of this crate.
pub type Property = OwnedVariant;
