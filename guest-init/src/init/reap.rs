//! For ever: reaping orphans, keeping an agent alive, and the end on SIGTERM.

use std::{
    convert::Infallible,
    ffi::CString,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    sys::{
        signal::{SigSet, Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::{ForkResult, Pid, fork},
};

use crate::layout::{AGENT_CGROUP, AGENT_NAME};

/// An agent that lived shorter than this is not started again at once.
const SHORT_LIFE: Duration = Duration::from_secs(2);
/// How long processes may take to end after TERM when the machine goes down.
const GRACE: Duration = Duration::from_secs(2);

pub(super) fn run() -> ! {
    let mut awaited = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        awaited.add(signal);
    }
    if let Err(error) = awaited.thread_block() {
        super::say(&format!("blocking signals: {error}"));
    }
    let mut started = Instant::now();
    let mut agent = start_agent();
    loop {
        if awaited.wait() == Ok(Signal::SIGTERM) {
            shut_down();
        }
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(status) if status.pid() == agent => {
                    super::say(&format!("the agent ended: {status:?}"));
                    if started.elapsed() < SHORT_LIFE {
                        std::thread::sleep(SHORT_LIFE / 2);
                    }
                    started = Instant::now();
                    agent = start_agent();
                }
                Ok(_) | Err(_) => {}
            }
        }
        if agent.is_none() {
            std::thread::sleep(SHORT_LIFE / 2);
            agent = start_agent();
        }
    }
}

fn start_agent() -> Option<Pid> {
    // SAFETY: this process has one thread, so the child may do what it likes.
    match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => Some(child),
        Ok(ForkResult::Child) => {
            let error = become_agent();
            super::say(&format!("starting the agent: {error:?}"));
            std::process::exit(1);
        }
        Err(error) => {
            super::say(&format!("fork: {error}"));
            None
        }
    }
}

fn become_agent() -> Result<Infallible, Errno> {
    SigSet::all().thread_unblock()?;
    nix::unistd::setsid()?;
    for (path, value) in
        [(Path::new(AGENT_CGROUP).join("cgroup.procs"), "0"), ("/proc/self/oom_score_adj".into(), "-1000")]
    {
        if let Err(error) = fs::write(&path, value) {
            super::say(&format!("{}: {error}", path.display()));
        }
    }
    let name = CString::new(AGENT_NAME).map_err(|_| Errno::EINVAL)?;
    let environment = [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"];
    nix::unistd::execve(c"/proc/self/exe", &[name], &environment)
}

/// TERM to everybody, a while, KILL, disks, end.
fn shut_down() -> ! {
    let _ = kill(Pid::from_raw(-1), Signal::SIGTERM);
    reap_until(Instant::now() + GRACE);
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    reap_until(Instant::now() + GRACE);
    super::end()
}

/// Reaps until nobody is left or the time is up.
fn reap_until(deadline: Instant) {
    while Instant::now() < deadline {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Err(Errno::ECHILD) => return,
            Ok(WaitStatus::StillAlive) | Err(_) => std::thread::sleep(Duration::from_millis(5)),
            Ok(_) => {}
        }
    }
}
