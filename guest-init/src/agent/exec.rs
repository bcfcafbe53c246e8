//! From a request to a running program: checks, user, environment, pipes or a terminal.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use nix::{fcntl::OFlag, libc, pty::Winsize, unistd::pipe2};
use pandastack_protocol::{Code, Defaults, Exec, Failure, Window};

use super::{
    cgroup::{Cgroups, Group},
    spawn::{self, Child, Program, SpawnError, Stdio},
    users::{self, User},
};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that runs, with our ends of its pipes; these do not block.
#[derive(Debug)]
pub struct Running {
    /// The first process.
    pub child: Child,
    /// Everything that descends from it.
    pub group: Group,
    /// Where its input goes, if it was asked for.
    pub stdin: Option<OwnedFd>,
    /// Its output, or its terminal.
    pub stdout: OwnedFd,
    /// Its errors; absent with a terminal.
    pub stderr: Option<OwnedFd>,
}

/// What became of a request.
#[derive(Debug)]
pub enum Start {
    /// It runs.
    Running(Running),
    /// There is no program to run: the code and the line that a shell would answer.
    NotRun(i32, String),
}

/// Starts what `exec` says. Blocks; see [`spawn::spawn`].
pub fn start(exec: &Exec, defaults: &Defaults, cgroups: &std::sync::Arc<Cgroups>) -> Result<Start, Failure> {
    let user = users::find(&exec.user)?;
    let program = program(exec, defaults, &user)?;
    let cgroup = cgroups.take().map_err(|error| match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ENOMEM | libc::ENOSPC) => busy(&error),
        _ => Failure { code: Code::Internal, message: format!("making a cgroup: {error}") },
    })?;
    let internal =
        |error: io::Error| Failure { code: Code::Internal, message: format!("making pipes: {error}") };
    let ends = match exec.tty {
        Some(window) => Ends::terminal(window, &user),
        None => Ends::pipes(exec.stdin),
    }
    .map_err(internal)?;
    let stdio = Stdio {
        fds: [ends.theirs[0].as_fd(), ends.theirs[1].as_fd(), ends.theirs[2].as_fd()],
        terminal: exec.tty.is_some(),
    };
    let child = match spawn::spawn(&program, stdio, cgroup.as_ref().map(|cgroup| cgroup.directory())) {
        Ok(child) => child,
        Err(error) => {
            if let Some(cgroup) = cgroup {
                cgroups.release(cgroup);
            }
            return not_started(&exec.argv[0], error);
        }
    };
    let group = Group::new(cgroups.clone(), cgroup, child.pid);
    let Ends { stdin, stdout, stderr, .. } = ends;
    Ok(Start::Running(Running { child, group, stdin, stdout, stderr }))
}

fn not_started(name: &str, error: SpawnError) -> Result<Start, Failure> {
    let name: String = name.chars().take(200).collect();
    match error {
        SpawnError::Exec(error) => match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Ok(Start::NotRun(127, format!("{name}: not found\n"))),
            Some(libc::E2BIG) => Err(invalid("the command is longer than the kernel takes")),
            Some(libc::ENOMEM | libc::EAGAIN) => Err(busy(&error)),
            _ => Ok(Start::NotRun(126, format!("{name}: cannot execute: {error}\n"))),
        },
        SpawnError::Clone(error) => Err(busy(&error)),
        SpawnError::Directory(error) => Err(Failure {
            code: Code::Invalid,
            message: format!("the working directory cannot be entered: {error}"),
        }),
        SpawnError::Prepare(_) => Err(Failure { code: Code::Internal, message: error.to_string() }),
    }
}

fn busy(error: &io::Error) -> Failure {
    Failure { code: Code::Busy, message: format!("no process can be made: {error}") }
}

fn invalid(message: &str) -> Failure {
    Failure { code: Code::Invalid, message: message.to_owned() }
}

fn program(exec: &Exec, defaults: &Defaults, user: &User) -> Result<Program, Failure> {
    let Some(name) = exec.argv.first().filter(|name| !name.is_empty()) else {
        return Err(invalid("there is no command"));
    };
    let (cwd, cwd_fallback) = match (exec.cwd.as_str(), defaults.workdir.as_str()) {
        ("", "") => (user.home.as_str(), Some(CString::from(c"/"))),
        ("", workdir) => (workdir, Some(CString::from(c"/"))),
        (cwd, _) => (cwd, None),
    };
    if !cwd.starts_with('/') {
        return Err(invalid("the working directory must be an absolute path"));
    }
    let env = environment(exec, defaults, user)?;
    let nul = |_| invalid("a command, path or variable must not contain NUL");
    let path = env.get("PATH").map_or(PATH, String::as_str);
    Ok(Program {
        candidates: spawn::candidates(name, path).map_err(nul)?,
        argv: exec
            .argv
            .iter()
            .map(|argument| CString::new(argument.as_str()))
            .collect::<Result<_, _>>()
            .map_err(nul)?,
        env: env
            .iter()
            .map(|(key, value)| CString::new(format!("{key}={value}")))
            .collect::<Result<_, _>>()
            .map_err(nul)?,
        cwd: spawn::c_path(cwd).map_err(nul)?,
        cwd_fallback,
        uid: user.uid,
        gid: user.gid,
        groups: user.groups.clone(),
    })
}

/// The user's own variables, over them the image's, over them the request's. The image's `HOME` is root's.
fn environment(exec: &Exec, defaults: &Defaults, user: &User) -> Result<BTreeMap<String, String>, Failure> {
    let mut env: BTreeMap<String, String> = [
        ("PATH", PATH),
        ("HOME", &user.home),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    if exec.tty.is_some() {
        env.insert("TERM".into(), "xterm-256color".into());
    }
    const OWN: [&str; 3] = ["HOME", "USER", "LOGNAME"];
    let image = defaults.env.iter().filter(|(key, _)| user.uid == 0 || !OWN.contains(&key.as_str()));
    for (key, value) in image.chain(&exec.env) {
        if key.is_empty() || key.contains('=') {
            return Err(invalid("the name of a variable must not be empty or contain '='"));
        }
        env.insert(key.clone(), value.clone());
    }
    Ok(env)
}

struct Ends {
    theirs: [OwnedFd; 3],
    stdin: Option<OwnedFd>,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
}

impl Ends {
    fn pipes(stdin: bool) -> io::Result<Self> {
        let (ours, theirs) = if stdin {
            let (theirs, ours) = pipe2(OFlag::O_CLOEXEC)?;
            do_not_block(&ours)?;
            (Some(ours), theirs)
        } else {
            (None, File::open("/dev/null")?.into())
        };
        let (stdout, their_stdout) = pipe2(OFlag::O_CLOEXEC)?;
        let (stderr, their_stderr) = pipe2(OFlag::O_CLOEXEC)?;
        do_not_block(&stdout)?;
        do_not_block(&stderr)?;
        Ok(Self { theirs: [theirs, their_stdout, their_stderr], stdin: ours, stdout, stderr: Some(stderr) })
    }

    fn terminal(window: Window, user: &User) -> io::Result<Self> {
        let (master, slave) = open_terminal()?;
        resize(&master, window)?;
        std::os::unix::fs::fchown(&slave, Some(user.uid), None)?;
        let theirs = [slave.try_clone()?, slave.try_clone()?, slave];
        Ok(Self { theirs, stdin: Some(master.try_clone()?), stdout: master, stderr: None })
    }
}

/// Both ends of a new terminal; never open in a program that another thread starts meanwhile, hence not `openpty`.
fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = nix::fcntl::open("/dev/ptmx", flags | OFlag::O_NONBLOCK, nix::sys::stat::Mode::empty())?;
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int, which outlives the call; TIOCGPTPEER takes flags and makes a descriptor for us.
    unsafe {
        if libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &unlocked) < 0 {
            return Err(io::Error::last_os_error());
        }
        let slave = libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits());
        if slave < 0 { Err(io::Error::last_os_error()) } else { Ok((master, OwnedFd::from_raw_fd(slave))) }
    }
}

/// Tells a terminal its size.
pub fn resize(terminal: &OwnedFd, window: Window) -> io::Result<()> {
    let size = winsize(window);
    // SAFETY: TIOCSWINSZ reads a winsize, which outlives the call.
    let result = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn winsize(window: Window) -> Winsize {
    Winsize { ws_row: window.rows.max(1), ws_col: window.cols.max(1), ws_xpixel: 0, ws_ypixel: 0 }
}

fn do_not_block(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
