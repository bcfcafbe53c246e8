//! What the agent does to the machine as a whole, behind a trait: tests have no business setting clocks.

use std::{fs::File, io, os::fd::AsRawFd, path::Path, time::Duration};

use nix::{
    libc,
    sys::{
        signal::{Signal, kill},
        time::TimeSpec,
    },
    time::{ClockId, clock_settime},
    unistd::Pid,
};
use pandastack_protocol::{Code, Defaults, Failure, Identity, Mount, Unique};

use super::{ext4, volumes};

use crate::{identity_files, layout::IDENTITY};

/// Effects on the whole machine. All of them block.
pub trait Machine: Send + Sync + 'static {
    /// Makes the guest what `identity` says. An error means that it must not be handed out.
    fn identify(&self, identity: &Identity) -> Result<(), Failure>;
    /// Grows the root file system to its disk.
    fn grow_root(&self) -> Result<(), Failure>;
    /// Mounts volumes, all or none.
    fn mount(&self, mounts: &[Mount]) -> Result<(), Failure>;
    /// Asks init to end the machine.
    fn shut_down(&self) -> Result<(), Failure>;
    /// The defaults that the last identity brought, from before this agent started.
    fn remembered_defaults(&self) -> Defaults;
}

/// The guest that this process is the agent of.
#[derive(Debug, Default)]
pub struct Guest;

impl Machine for Guest {
    fn identify(&self, identity: &Identity) -> Result<(), Failure> {
        // The pool comes first, so that nothing random is made of what another guest has, too.
        add_entropy(&decode_hex(&identity.entropy)?).map_err(step("adding entropy"))?;
        set_clock(identity.unix_nanos).map_err(step("setting the clock"))?;
        if let Some(unique) = &identity.unique {
            check(unique)?;
            become_unique(unique)?;
        }
        if let Some(defaults) = &identity.defaults {
            let text = serde_json::to_vec(defaults)
                .map_err(io::Error::from)
                .map_err(step("keeping the defaults"))?;
            // Only for an agent that is started again; this one has them in memory.
            let _ = identity_files::write_in_place(&Path::new(IDENTITY).join("defaults"), &text);
        }
        Ok(())
    }

    fn grow_root(&self) -> Result<(), Failure> {
        ext4::grow(Path::new("/")).map_err(step("growing the root file system"))
    }

    fn mount(&self, mounts: &[Mount]) -> Result<(), Failure> {
        volumes::mount_all(mounts)
    }

    fn shut_down(&self) -> Result<(), Failure> {
        kill(Pid::from_raw(1), Signal::SIGTERM).map_err(io::Error::from).map_err(step("asking init"))
    }

    fn remembered_defaults(&self) -> Defaults {
        let text = identity_files::read_bounded(&Path::new(IDENTITY).join("defaults"));
        text.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }
}

fn step(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |error| Failure { code: Code::Internal, message: format!("{what}: {error}") }
}

fn invalid(message: &str) -> Failure {
    Failure { code: Code::Invalid, message: message.to_owned() }
}

/// Bytes of hexadecimal text, 32 to 512 of them.
fn decode_hex(text: &str) -> Result<Vec<u8>, Failure> {
    let digits: Option<Vec<u8>> =
        text.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0 && (64..=1024).contains(&digits.len()));
    let digits = digits.ok_or_else(|| invalid("entropy is 32 to 512 bytes in hexadecimal"))?;
    Ok(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn check(unique: &Unique) -> Result<(), Failure> {
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if unique.machine_id.len() != 32 || !hex(&unique.machine_id) {
        return Err(invalid("a machine id is 32 hexadecimal digits"));
    }
    let parts: Vec<&str> = unique.boot_id.split('-').collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    if lengths != [8, 4, 4, 4, 12] || !parts.iter().all(|part| hex(part)) {
        return Err(invalid("a boot id is a UUID in lower case"));
    }
    let label = |text: &str| {
        (1..=63).contains(&text.len())
            && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
            && !text.starts_with('-')
            && !text.ends_with('-')
    };
    if !label(&unique.hostname) || !label(&unique.sandbox) {
        return Err(invalid("host name and sandbox id are DNS labels"));
    }
    Ok(())
}

fn add_entropy(bytes: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    #[repr(C)]
    struct Pool {
        bits: libc::c_int,
        size: libc::c_int,
        bytes: [u8; 512],
    }
    let mut pool = Pool { bits: bytes.len() as i32 * 8, size: bytes.len() as i32, bytes: [0; 512] };
    pool.bytes[..bytes.len()].copy_from_slice(bytes);
    let device = File::open("/dev/urandom")?;
    // SAFETY: the first call reads a rand_pool_info with `size` bytes, which `pool` is; the second takes nothing.
    let results = unsafe {
        [
            libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &pool),
            libc::ioctl(device.as_raw_fd(), RNDRESEEDCRNG),
        ]
    };
    if results.contains(&-1) { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_clock(unix_nanos: u64) -> io::Result<()> {
    let time = TimeSpec::from_duration(Duration::from_nanos(unix_nanos));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

/// Writes every identity file and looks at the result where programs look. What a user unmounted, filled or removed is
/// mounted afresh once.
fn become_unique(unique: &Unique) -> Result<(), Failure> {
    nix::unistd::sethostname(&unique.hostname)
        .map_err(io::Error::from)
        .map_err(step("setting the host name"))?;
    let old_hosts = identity_files::read_bounded(Path::new("/etc/hosts")).unwrap_or_default();
    let hosts = identity_files::hosts(&String::from_utf8_lossy(&old_hosts), &unique.hostname);
    let contents = [
        ("machine-id", format!("{}\n", unique.machine_id)),
        ("hostname", format!("{}\n", unique.hostname)),
        ("hosts", hosts),
        ("boot_id", format!("{}\n", unique.boot_id)),
    ];
    let write = || -> io::Result<()> {
        for (bound, (name, content)) in identity_files::BOUND.iter().zip(&contents) {
            debug_assert_eq!(bound.name, *name);
            identity_files::write_in_place(&identity_files::source(bound), content.as_bytes())?;
            if identity_files::read_bounded(Path::new(bound.target))? != content.as_bytes() {
                return Err(io::Error::other(format!("{} is not ours", bound.target)));
            }
        }
        identity_files::write_in_place(&Path::new(IDENTITY).join("sandbox"), unique.sandbox.as_bytes())
    };
    write()
        .or_else(|_| identity_files::install().and_then(|()| write()))
        .map_err(step("writing the identity files"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_hexadecimal_and_bounded() {
        assert_eq!(decode_hex(&"0fA0".repeat(16)).expect("32 bytes"), [0x0f, 0xa0].repeat(16));
        for bad in ["", "00", &"0".repeat(65), &"xy".repeat(32), &"é".repeat(64), &"00".repeat(513)] {
            assert_eq!(decode_hex(bad).expect_err(bad).code, Code::Invalid);
        }
    }

    #[test]
    fn identities_are_checked() {
        let good = Unique {
            sandbox: "abcdefghij0123456789".into(),
            machine_id: "0123456789abcdef".repeat(2),
            boot_id: "01234567-89ab-4cde-8f01-23456789abcd".into(),
            hostname: "sb-1".into(),
        };
        assert_eq!(check(&good), Ok(()));
        for bad in [
            Unique { machine_id: "x".repeat(32), ..good.clone() },
            Unique { boot_id: "01234567-89ab-4cde-8f01-23456789ABCD".into(), ..good.clone() },
            Unique { hostname: "a\n1.2.3.4 evil".into(), ..good.clone() },
            Unique { hostname: "-a".into(), ..good.clone() },
            Unique { sandbox: String::new(), ..good.clone() },
        ] {
            assert_eq!(check(&bad).expect_err("not valid").code, Code::Invalid, "{bad:?}");
        }
    }
}
