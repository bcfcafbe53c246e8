//! The booted appliance: the disk image in QEMU, for the tests and for `make run`.
//!
//! This crate owns the emulated machine (accelerator, disk, network, console, power) and the ways into it that an
//! operator has: HTTP, SSH, the serial log. Those modules refuse to know what the appliance does: no sandbox, no route, no
//! D-Bus name. Seven know it, because the test suite and the `appliance` command share them: [`api`] (a small client),
//! [`audit`] (who owns what), [`beat`] (a guest that compares its memory with its disk), [`soak`] (random state changes
//! against a model), [`fuzz`], [`download`] (a preview under load) and [`bench`]; and `make run` asks the API when it is ready. Everything is blocking; a test that has a runtime calls it from a blocking task.

pub mod accel;
pub mod api;
pub mod appliance;
pub mod audit;
pub mod beat;
pub mod bench;
pub mod clients;
pub mod console;
pub mod disk;
pub mod download;
pub mod fuzz;
pub mod http;
pub mod image;
pub mod machine;
pub mod qmp;
pub mod running;
pub mod soak;
pub mod ssh;
pub mod templates;
pub mod workbench;
pub mod writelog;

pub use appliance::Appliance;
pub use running::Running;
