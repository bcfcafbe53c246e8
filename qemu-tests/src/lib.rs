//! The booted appliance: the disk image in QEMU, for the tests and for `make run`.
//!
//! This crate owns the emulated machine (accelerator, disk, network, console, power) and the ways into it that an
//! operator has: HTTP, SSH, the serial log. It refuses to know what the appliance does, beyond what says that it is ready. Everything is blocking; a test that has a runtime calls it from a blocking task.

pub mod accel;
pub mod appliance;
pub mod bench;
pub mod console;
pub mod disk;
pub mod http;
pub mod image;
pub mod machine;
pub mod qmp;
pub mod ssh;
pub mod workbench;
pub mod writelog;

pub use appliance::{Appliance, Running};
