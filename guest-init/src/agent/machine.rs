//! What the agent does to the machine as a whole, behind a trait: tests have no business setting clocks.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

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
use crate::identity_files::{self, Copies, Names};

/// Effects on the whole machine.
pub trait Machine: Send + Sync + 'static {
    /// Makes the guest what `identity` says, defaults excepted. An error means that it must not be handed out. Short: it
    /// runs on the agent's own thread, because another one costs a restored guest more than all of this. If a user has
    /// made it hang, the guest is not handed out either.
    fn identify(&self, identity: &Identity) -> Result<(), Failure>;
    /// Keeps defaults for an agent that is started again. Short, too.
    fn remember_defaults(&self, defaults: &Defaults);
    /// The defaults that were kept last.
    fn remembered_defaults(&self) -> Defaults;
    /// Grows the root file system to its disk. Blocks.
    fn grow_root(&self) -> Result<(), Failure>;
    /// Mounts volumes, all or none. Blocks.
    fn mount(&self, mounts: &[Mount]) -> Result<(), Failure>;
    /// Asks init to end the machine.
    fn shut_down(&self) -> Result<(), Failure>;
}

/// The guest that this process is the agent of, with everything open that an identity needs.
#[derive(Debug)]
pub struct Guest {
    random: File,
    /// Absent until they are mended, where init could not make them.
    copies: Mutex<Option<Copies>>,
}

impl Guest {
    /// Opens the random device, which every guest has, and the identity files.
    pub fn open() -> io::Result<Self> {
        let copies = Copies::open().inspect_err(|error| eprintln!("panda-agent: identity files: {error}"));
        Ok(Self { random: File::open("/dev/urandom")?, copies: Mutex::new(copies.ok()) })
    }

    /// Writes every identity file and makes sure that programs see it. What a user unmounted, filled or removed is
    /// mounted afresh once.
    fn become_unique(&self, unique: &Unique) -> io::Result<()> {
        let Unique { machine_id, boot_id, hostname, .. } = unique;
        let names = Names { machine_id, boot_id, hostname };
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if copies.as_mut().is_some_and(|copies| copies.write(names).is_ok()) {
            return Ok(());
        }
        identity_files::install()?;
        copies.insert(Copies::open()?).write(names)
    }
}

impl Machine for Guest {
    fn identify(&self, identity: &Identity) -> Result<(), Failure> {
        let pool = Pool::parse(&identity.entropy)?;
        if let Some(unique) = &identity.unique {
            check(unique)?;
        }
        // The pool comes first, so that nothing random is made of what another guest has, too.
        pool.add_to(&self.random).map_err(step("adding entropy"))?;
        set_clock(identity.unix_nanos).map_err(step("setting the clock"))?;
        if let Some(unique) = &identity.unique {
            nix::unistd::sethostname(&unique.hostname)
                .map_err(io::Error::from)
                .map_err(step("setting the host name"))?;
            self.become_unique(unique).map_err(step("writing the identity files"))?;
        }
        Ok(())
    }

    fn remember_defaults(&self, defaults: &Defaults) {
        let kept = serde_json::to_vec(defaults)
            .map_err(io::Error::from)
            .and_then(|text| identity_files::remember_defaults(&text));
        if let Err(error) = kept {
            eprintln!("panda-agent: keeping the defaults: {error}");
        }
    }

    fn remembered_defaults(&self) -> Defaults {
        let text = identity_files::remembered_defaults();
        text.ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
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
}

/// A machine that stays as it is: for an agent that runs in the process of a host's test.
#[cfg(feature = "inert-machine")]
#[derive(Debug, Clone, Copy)]
pub struct Inert;

#[cfg(feature = "inert-machine")]
impl Machine for Inert {
    fn identify(&self, _: &Identity) -> Result<(), Failure> {
        Ok(())
    }

    fn remember_defaults(&self, _: &Defaults) {}

    fn remembered_defaults(&self) -> Defaults {
        Defaults::default()
    }

    fn grow_root(&self) -> Result<(), Failure> {
        Ok(())
    }

    fn mount(&self, _: &[Mount]) -> Result<(), Failure> {
        Ok(())
    }

    fn shut_down(&self) -> Result<(), Failure> {
        Ok(())
    }
}

fn step(what: &'static str) -> impl Fn(io::Error) -> Failure {
    move |error| Failure { code: Code::Internal, message: format!("{what}: {error}") }
}

fn invalid(message: &str) -> Failure {
    Failure { code: Code::Invalid, message: message.to_owned() }
}

/// The kernel's `rand_pool_info`: random bytes, and how many bits of them count.
#[repr(C)]
#[derive(Debug)]
struct Pool {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; 512],
}

impl Pool {
    /// Reads 32 to 512 bytes of hexadecimal text.
    fn parse(text: &str) -> Result<Self, Failure> {
        let refused = || invalid("entropy is 32 to 512 bytes in hexadecimal");
        if !text.len().is_multiple_of(2) || !(64..=1024).contains(&text.len()) {
            return Err(refused());
        }
        let size = text.len() as libc::c_int / 2;
        let mut pool = Self { bits: size * 8, size, bytes: [0; 512] };
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or_else(refused);
        for (byte, pair) in pool.bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Ok(pool)
    }

    /// Makes everything that the kernel draws from now on depend on it.
    fn add_to(&self, random: &File) -> io::Result<()> {
        const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
        const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
        // SAFETY: RNDADDENTROPY reads a rand_pool_info with `size` bytes, and `self` is one with room for 512.
        if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, self) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: RNDRESEEDCRNG takes no argument.
        let reseeded = unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) };
        if reseeded < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

fn check(unique: &Unique) -> Result<(), Failure> {
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if unique.machine_id.len() != 32 || !unique.machine_id.bytes().all(hex) {
        return Err(invalid("a machine id is 32 hexadecimal digits"));
    }
    let uuid = |(at, byte)| if matches!(at, 8 | 13 | 18 | 23) { byte == b'-' } else { hex(byte) };
    if unique.boot_id.len() != 36 || !unique.boot_id.bytes().enumerate().all(uuid) {
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

fn set_clock(unix_nanos: u64) -> io::Result<()> {
    let time = TimeSpec::from_duration(Duration::from_nanos(unix_nanos));
    Ok(clock_settime(ClockId::CLOCK_REALTIME, time)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_is_hexadecimal_and_bounded() {
        let pool = Pool::parse(&"0fA0".repeat(16)).expect("32 bytes");
        assert_eq!((pool.bits, pool.size), (256, 32));
        assert_eq!((&pool.bytes[..32], &pool.bytes[32..]), (&[0x0f, 0xa0].repeat(16)[..], &[0; 480][..]));
        assert_eq!(Pool::parse(&"ff".repeat(512)).expect("512 bytes").bytes, [0xff; 512]);
        for bad in ["", "00", &"0".repeat(65), &"xy".repeat(32), &"é".repeat(64), &"00".repeat(513)] {
            assert_eq!(Pool::parse(bad).expect_err(bad).code, Code::Invalid);
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
