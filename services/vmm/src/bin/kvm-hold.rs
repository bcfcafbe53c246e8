//! Holds one machine that never runs, for as long as the appliance is up.
//!
//! KVM patches its own code when the first machine with a not yet enabled interrupt controller appears, and back when the
//! last one is gone (the static key behind `apic_enabled`). Every restore would do that twice: an interruption of all
//! processors each time, and, under an emulator that runs processors side by side, a rare crash of the kernel, when one
//! processor still executes the breakpoint of a patch that is already done. One such machine that stays keeps the code as
//! it is. It has no memory and its processor is never started.
//!
//! It knows nothing of sandboxes and nobody talks to it.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    process::ExitCode,
};

/// `_IO(KVMIO, n)` of Linux' `linux/kvm.h`.
const fn kvm(number: u64) -> u64 {
    (0xae << 8) | number
}

const KVM_CREATE_VM: u64 = kvm(0x01);
const KVM_CREATE_VCPU: u64 = kvm(0x41);
const KVM_CREATE_IRQCHIP: u64 = kvm(0x60);

fn main() -> ExitCode {
    match hold() {
        Ok(held) => loop {
            // Until PID 1 ends us; signals interrupt the wait and end the process.
            std::thread::park();
            std::hint::black_box(&held);
        },
        Err(error) => {
            eprintln!("no machine can be held: {error}");
            ExitCode::FAILURE
        }
    }
}

fn hold() -> io::Result<(File, OwnedFd, OwnedFd)> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let machine = owned(call(&kvm, KVM_CREATE_VM)?);
    call(&machine, KVM_CREATE_IRQCHIP)?;
    let processor = owned(call(&machine, KVM_CREATE_VCPU)?);
    Ok((kvm, machine, processor))
}

fn call(file: &impl AsRawFd, request: u64) -> io::Result<i32> {
    // SAFETY: each of the three requests takes a plain number, here 0, and touches no memory of ours.
    let answer = unsafe { nix::libc::ioctl(file.as_raw_fd(), request, 0) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

fn owned(number: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this descriptor for us alone.
    unsafe { OwnedFd::from_raw_fd(number) }
}
