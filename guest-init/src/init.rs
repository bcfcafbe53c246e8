//! PID 1 of the guest.
//!
//! Owns the way from the initramfs to a running agent, reaping, and the end. Refuses to know the protocol, sessions and
//! users. One thread, no runtime: nothing here can be starved or poisoned by what the agent does.
//!
//! ```text
//! initramfs: proc, sys, dev → modules → root disk → switch root
//! root:      dev/pts, shm, run, cgroups → sysctls → network → identity → fork agent → reap … → sync, read-only, reboot
//! ```

mod cgroups;
mod cmdline;
mod mounts;
mod network;
mod reap;

use std::{fs, io, path::Path, time::Duration};

use nix::sys::reboot::{RebootMode, reboot};

/// A step of the way up that cannot be done without.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
pub struct BootError {
    step: &'static str,
    source: io::Error,
}

/// Boots the guest and never returns. A guest that cannot boot ends, so that the host sees it at once.
pub fn main() -> ! {
    if let Err(error) = boot() {
        say(&format!("cannot boot: {error}"));
        end();
    }
    reap::run()
}

fn boot() -> Result<(), BootError> {
    mounts::early().map_err(|source| BootError { step: "mounting proc, sys and dev", source })?;
    for (module, error) in load_modules() {
        say(&format!("module {module}: {error}"));
    }
    let cmdline = fs::read_to_string("/proc/cmdline")
        .map_err(|source| BootError { step: "reading the kernel command line", source })?;
    let settings = cmdline::parse(&cmdline);
    mounts::root(&settings.root, Duration::from_secs(10))
        .map_err(|source| BootError { step: "mounting the root disk", source })?;
    mounts::switch_root().map_err(|source| BootError { step: "switching to the root disk", source })?;
    // From here on a guest with something missing is of more use than none.
    report("mounts", mounts::late());
    report("cgroups", cgroups::set_up());
    sysctls();
    report("network", network::set_up(&settings.network));
    report("resolver", resolver(settings.network.gateway));
    report("identity files", crate::identity_files::install());
    report("limits", limits());
    Ok(())
}

/// Loads what `/modules/order` names; says which could not be loaded.
fn load_modules() -> Vec<(String, io::Error)> {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    let load = |name: &str| -> io::Result<()> {
        let file = fs::File::open(Path::new("/modules").join(name))?;
        match nix::kmod::finit_module(&file, c"", nix::kmod::ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    };
    let names = order.lines().map(str::trim).filter(|name| !name.is_empty());
    names.filter_map(|name| load(name).err().map(|error| (name.to_owned(), error))).collect()
}

fn sysctls() {
    const SYSCTLS: [(&str, &str); 13] = [
        // The console goes to the host: warnings and worse are not worth it, a user's oops is not worth a flood.
        ("kernel/printk", "3 4 1 3"),
        ("kernel/sysrq", "0"),
        ("kernel/panic_on_oops", "1"),
        ("net/ipv6/conf/all/disable_ipv6", "1"),
        ("net/ipv6/conf/default/disable_ipv6", "1"),
        ("net/ipv4/ping_group_range", "0 2147483647"),
        ("net/ipv4/ip_unprivileged_port_start", "0"),
        ("fs/protected_symlinks", "1"),
        ("fs/protected_hardlinks", "1"),
        ("fs/inotify/max_user_watches", "524288"),
        ("fs/inotify/max_user_instances", "1024"),
        ("vm/max_map_count", "1048576"),
        ("vm/swappiness", "10"),
    ];
    for (name, value) in SYSCTLS {
        // A kernel without one of these has nothing to set.
        let _ = fs::write(Path::new("/proc/sys").join(name), value);
    }
}

/// Names the gateway as resolver where the template names none.
fn resolver(gateway: Option<std::net::Ipv4Addr>) -> io::Result<()> {
    let path = Path::new("/etc/resolv.conf");
    let Some(gateway) = gateway else { return Ok(()) };
    let named = fs::read_to_string(path)
        .is_ok_and(|text| text.lines().any(|line| line.split_whitespace().next() == Some("nameserver")));
    if named {
        return Ok(());
    }
    if path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink()) {
        // A link to a service that does not run here.
        fs::remove_file(path)?;
    }
    fs::write(path, format!("nameserver {gateway}\n"))
}

fn limits() -> io::Result<()> {
    use nix::sys::resource::{Resource, setrlimit};
    setrlimit(Resource::RLIMIT_NOFILE, 65_536, 524_288)?;
    setrlimit(Resource::RLIMIT_CORE, 0, nix::sys::resource::RLIM_INFINITY)?;
    // What the kernel derives from memory is less than what the cgroup allows.
    setrlimit(Resource::RLIMIT_NPROC, nix::sys::resource::RLIM_INFINITY, nix::sys::resource::RLIM_INFINITY)?;
    Ok(())
}

fn report(step: &str, result: io::Result<()>) {
    if let Err(error) = result {
        say(&format!("{step}: {error}"));
    }
}

/// One line on the console.
fn say(line: &str) {
    eprintln!("panda-init: {line}");
}

/// Writes everything to the disks and ends the machine.
fn end() -> ! {
    nix::unistd::sync();
    if let Err(error) = mounts::read_only() {
        say(&format!("remounting read-only: {error}"));
    }
    nix::unistd::sync();
    let error = reboot(RebootMode::RB_AUTOBOOT);
    say(&format!("reboot: {error:?}"));
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}
