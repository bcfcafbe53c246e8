//! From a description of the machine to QEMU's command line. Pure: starts nothing, opens nothing.

use std::path::PathBuf;

use serde_json::{Value, json};

use crate::accel::Accelerator;
use crate::disk::Disk;

/// Everything QEMU is told.
#[derive(Debug, Clone)]
pub struct Machine {
    /// How processors are executed.
    pub accelerator: Accelerator,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Number of processors.
    pub cpus: u32,
    /// The firmware's identity of the machine; the appliance derives its machine-id from it.
    pub uuid: String,
    /// How it boots.
    pub boot: Boot,
    /// The one disk.
    pub disk: Disk,
    /// When set, every write and flush of the disk goes into this file, too, in the format of the kernel's dm-log-writes.
    pub log_writes: Option<PathBuf>,
    /// Host ports that lead into the appliance.
    pub forwards: Vec<Forward>,
    /// Whether the appliance is cut off from everything but the forwarded ports.
    pub restricted: bool,
    /// Raw entries for QEMU's user network, for example `guestfwd=…`.
    pub network_extra: Vec<String>,
    /// Files that each hold one SMBIOS string (`io.systemd.credential.binary:NAME=BASE64`): a command line is public.
    pub smbios_files: Vec<PathBuf>,
    /// Where the serial console is written.
    pub console: PathBuf,
    /// The monitor's socket.
    pub qmp: PathBuf,
    /// Start from this snapshot in the disk instead of booting.
    pub load_snapshot: Option<String>,
    /// Appended as they are.
    pub extra: Vec<String>,
}

/// How the machine gets its kernel.
#[derive(Debug, Clone)]
pub enum Boot {
    /// QEMU loads kernel and initrd itself. Spares the minute that UEFI takes under emulation.
    Direct {
        /// The kernel.
        kernel: PathBuf,
        /// The initrd.
        initrd: PathBuf,
        /// The kernel command line.
        command_line: String,
    },
    /// As on real hardware: firmware, boot loader, unified kernel image from the disk.
    Uefi {
        /// OVMF.
        code: PathBuf,
        /// The writable copy of its variables.
        variables: PathBuf,
    },
}

/// A TCP port of this host's loopback that leads to a port of the appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// Port on 127.0.0.1.
    pub host: u16,
    /// Port in the appliance.
    pub guest: u16,
}

impl Machine {
    /// QEMU's arguments.
    #[must_use]
    pub fn arguments(&self) -> Vec<String> {
        let mut a: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| a.extend(words.iter().map(|word| (*word).to_owned()));
        add(&["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,sata=off,smbus=off"]);
        add(self.accelerator.arguments());
        add(&["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string(), "-uuid", &self.uuid]);
        add(&["-rtc", "base=utc,clock=host", "-device", "virtio-rng-pci"]);
        match &self.boot {
            Boot::Direct { kernel, initrd, command_line } => {
                add(&["-kernel", &text(kernel), "-initrd", &text(initrd), "-append", command_line]);
            }
            Boot::Uefi { code, variables } => {
                for (unit, path, read_only) in [(0, code, "on"), (1, variables, "off")] {
                    let path = escape(&text(path));
                    add(&[
                        "-drive",
                        &format!("if=pflash,unit={unit},format=raw,readonly={read_only},file={path}"),
                    ]);
                }
            }
        }
        for node in self.block_nodes() {
            add(&["-blockdev", &node.to_string()]);
        }
        // A log would hold each discarded range as so many zeroes: the first boot alone discards the whole disk.
        let discard = if self.log_writes.is_some() { "discard=off,write-zeroes=off" } else { "discard=on" };
        add(&["-device", &format!("virtio-blk-pci,drive=disk,{discard},bootindex=1")]);
        add(&["-netdev", &self.network(), "-device", "virtio-net-pci,netdev=net,romfile="]);
        add(&["-chardev", &format!("file,id=console,path={},append=on", escape(&text(&self.console)))]);
        add(&["-serial", "chardev:console"]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", escape(&text(&self.qmp)))]);
        for path in &self.smbios_files {
            add(&["-smbios", &format!("type=11,path={}", escape(&text(path)))]);
        }
        if let Some(name) = &self.load_snapshot {
            add(&["-loadvm", name]);
        }
        a.extend(self.extra.iter().cloned());
        a
    }

    fn block_nodes(&self) -> Vec<Value> {
        let file = |node: &str, path: &str| json!({"driver": "file", "node-name": node, "filename": path, "discard": "unmap"});
        let name = if self.log_writes.is_some() { "unlogged" } else { "disk" };
        let mut nodes = vec![
            file("image", &text(&self.disk.path)),
            json!({"driver": self.disk.format, "node-name": name, "file": "image", "discard": "unmap"}),
        ];
        if let Some(log) = &self.log_writes {
            nodes.push(file("log", &text(log)));
            nodes.push(
                json!({"driver": "blklogwrites", "node-name": "disk", "file": "unlogged", "log": "log",
                "log-sector-size": 512, "discard": "unmap"}),
            );
        }
        nodes
    }

    fn network(&self) -> String {
        let mut net = String::from("user,id=net,ipv6=off");
        if self.restricted {
            net.push_str(",restrict=on");
        }
        for Forward { host, guest } in &self.forwards {
            net.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
        }
        for extra in &self.network_extra {
            net.push(',');
            net.push_str(extra);
        }
        net
    }
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

/// QEMU's option syntax: a comma inside a value is doubled.
fn escape(value: &str) -> String {
    value.replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            accelerator: Accelerator::Tcg,
            memory_mib: 2048,
            cpus: 2,
            uuid: "u".into(),
            boot: Boot::Direct { kernel: "/k".into(), initrd: "/i".into(), command_line: "ro quiet".into() },
            disk: Disk { path: "/d,1.qcow2".into(), format: "qcow2" },
            log_writes: None,
            forwards: vec![Forward { host: 8081, guest: 8080 }],
            restricted: true,
            network_extra: vec![],
            smbios_files: vec!["/c,d/token".into()],
            console: "/run/console".into(),
            qmp: "/run/qmp".into(),
            load_snapshot: None,
            extra: vec![],
        }
    }

    fn value<'a>(arguments: &'a [String], option: &str) -> Vec<&'a str> {
        arguments.windows(2).filter(|pair| pair[0] == option).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn a_restricted_machine_says_so() {
        let mut machine = machine();
        let a = machine.arguments();
        assert_eq!(
            value(&a, "-netdev"),
            ["user,id=net,ipv6=off,restrict=on,hostfwd=tcp:127.0.0.1:8081-:8080"]
        );
        assert_eq!(value(&a, "-smbios"), ["type=11,path=/c,,d/token"]);
        machine.restricted = false;
        assert!(!machine.arguments().iter().any(|word| word.contains("restrict")));
    }

    #[test]
    fn a_write_log_sits_between_device_and_disk() {
        let mut machine = machine();
        machine.log_writes = Some("/log".into());
        let a = machine.arguments();
        let nodes: Vec<Value> =
            value(&a, "-blockdev").iter().map(|node| serde_json::from_str(node).expect("json")).collect();
        assert_eq!(nodes.last().expect("node")["node-name"], "disk");
        assert_eq!(nodes.last().expect("node")["driver"], "blklogwrites");
        assert_eq!(nodes[1]["node-name"], "unlogged");
        assert!(
            value(&a, "-device")
                .iter()
                .any(|device| device.contains("drive=disk,discard=off,write-zeroes=off"))
        );
        assert_eq!(nodes[0]["filename"], "/d,1.qcow2", "JSON needs no doubled comma");
    }
}
