//! Starting a program: `clone3` into its cgroup, sharing memory until `execve`, as `posix_spawn` does.
//!
//! Owns everything between "these are the arguments" and "it runs"; refuses to know sessions. The child shares the
//! agent's memory with other threads running, so it makes only system calls on what was prepared before, and reports
//! where it failed by writing to that memory: no pipe, no copying of page tables.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    ptr,
    sync::atomic::{AtomicI32, Ordering},
};

use nix::libc;

/// What is started.
#[derive(Debug)]
pub struct Program {
    /// Files to try, in this order: more than one when the name was looked up in `PATH`.
    pub candidates: Vec<CString>,
    /// Arguments, the program's name first.
    pub argv: Vec<CString>,
    /// `NAME=value`.
    pub env: Vec<CString>,
    /// Working directory, and what to use where that cannot be entered.
    pub cwd: CString,
    /// Absent: failing to enter `cwd` is an error.
    pub cwd_fallback: Option<CString>,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
}

/// What the program's descriptors 0, 1 and 2 are.
#[derive(Debug, Clone, Copy)]
pub struct Stdio<'a> {
    /// 0, 1, 2.
    pub fds: [BorrowedFd<'a>; 3],
    /// Whether descriptor 0 is a terminal, to become the controlling one.
    pub terminal: bool,
}

/// A running child.
#[derive(Debug)]
pub struct Child {
    /// Its process id.
    pub pid: u32,
    /// Readable once it has ended.
    pub pidfd: OwnedFd,
}

/// Why a program did not start.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// No process could be made: too many, or no memory.
    #[error("no process can be made: {0}")]
    Clone(#[source] io::Error),
    /// The working directory cannot be entered.
    #[error("the working directory cannot be entered: {0}")]
    Directory(#[source] io::Error),
    /// The program cannot be executed.
    #[error("{0}")]
    Exec(#[source] io::Error),
    /// Anything else on the way.
    #[error("preparing the process: {0}")]
    Prepare(#[source] io::Error),
}

const STAGE_PREPARE: i32 = 1;
const STAGE_DIRECTORY: i32 = 2;
const STAGE_EXEC: i32 = 3;

/// What the child reads and writes; everything it points at outlives the child's time in our memory.
struct Plan {
    candidates: Vec<*const libc::c_char>,
    argv: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
    cwd: *const libc::c_char,
    cwd_fallback: *const libc::c_char,
    uid: u32,
    gid: u32,
    groups: *const u32,
    group_count: usize,
    fds: [i32; 3],
    terminal: bool,
    stage: AtomicI32,
    errno: AtomicI32,
}

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const STACK: usize = 64 << 10;

/// Starts a program, in `cgroup` from its first moment. Blocks until `execve` is done, so call it where that is allowed:
/// a directory on a dead network mount takes its time.
pub fn spawn(
    program: &Program,
    stdio: Stdio<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Child, SpawnError> {
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|item| item.as_ptr()).chain([ptr::null()]).collect()
    };
    let plan = Plan {
        candidates: pointers(&program.candidates),
        argv: pointers(&program.argv),
        env: pointers(&program.env),
        cwd: program.cwd.as_ptr(),
        cwd_fallback: program.cwd_fallback.as_ref().map_or(ptr::null(), |path| path.as_ptr()),
        uid: program.uid,
        gid: program.gid,
        groups: program.groups.as_ptr(),
        group_count: program.groups.len(),
        fds: stdio.fds.map(|fd| fd.as_raw_fd()),
        terminal: stdio.terminal,
        stage: AtomicI32::new(0),
        errno: AtomicI32::new(0),
    };
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let mut pidfd: i32 = -1;
    let mut arguments = CloneArgs {
        flags: (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PIDFD) as u64,
        pidfd: ptr::from_mut(&mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // A signal handler must not run on the child's stack in our memory.
    let old = block_signals();
    // SAFETY: the child runs `child` on a stack of its own and ends in execve or _exit; CLONE_VFORK keeps this thread,
    // and with it `plan`, `stack` and `program`, where they are until then.
    let result = unsafe { clone3(&arguments, &plan) };
    restore_signals(&old);
    if result < 0 {
        return Err(SpawnError::Clone(io::Error::from_raw_os_error(-result as i32)));
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    let stage = plan.stage.load(Ordering::Acquire);
    if stage != 0 {
        let error = io::Error::from_raw_os_error(plan.errno.load(Ordering::Acquire));
        reap(&pidfd);
        return Err(match stage {
            STAGE_DIRECTORY => SpawnError::Directory(error),
            STAGE_EXEC => SpawnError::Exec(error),
            _ => SpawnError::Prepare(error),
        });
    }
    Ok(Child { pid: result as u32, pidfd })
}

/// How a child ended: its exit code or its signal. `None` while it runs.
pub fn wait(pidfd: &OwnedFd) -> Option<Result<i32, i32>> {
    // SAFETY: all zeroes is a valid siginfo_t; waitid fills it in.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` outlives the call.
    let result = unsafe {
        libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, libc::WEXITED | libc::WNOHANG)
    };
    if result < 0 {
        // Not our child any more: nothing is known of its end.
        return Some(Err(libc::SIGKILL));
    }
    // SAFETY: waitid has filled in the fields of a child's end, or left all of it zero.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    match (pid, info.si_code) {
        (0, _) => None,
        (_, libc::CLD_EXITED) => Some(Ok(status)),
        _ => Some(Err(status)),
    }
}

/// Files to try for a program's name, as a shell would: those in `path` unless there is a slash in it.
pub fn candidates(name: &str, path: &str) -> Result<Vec<CString>, std::ffi::NulError> {
    if name.contains('/') {
        return Ok(vec![CString::new(name)?]);
    }
    path.split(':')
        .map(|directory| if directory.is_empty() { "." } else { directory })
        .map(|directory| CString::new(format!("{directory}/{name}")))
        .collect()
}

/// A C string of a path.
pub fn c_path(path: impl AsRef<OsStr>) -> Result<CString, std::ffi::NulError> {
    CString::new(path.as_ref().as_bytes())
}

fn reap(pidfd: &OwnedFd) {
    // SAFETY: as in `wait`; this child has called _exit.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        libc::waitid(libc::P_PIDFD, pidfd.as_raw_fd() as u32, &mut info, libc::WEXITED);
    }
}

fn block_signals() -> libc::sigset_t {
    // SAFETY: both sets are ours and are filled in by the calls.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut old: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut old);
        old
    }
}

fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: `old` is a set from `block_signals`.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, old, ptr::null_mut());
    }
}

/// The raw call; the C library's `clone` cannot put a child into a cgroup.
///
/// # Safety
/// The stack in `arguments` must be the child's alone, and `plan` must stay valid until its execve or exit.
#[cfg(target_arch = "x86_64")]
unsafe fn clone3(arguments: &CloneArgs, plan: &Plan) -> i64 {
    let result: i64;
    // SAFETY: in the child the kernel has set the stack pointer to the top of its stack (16-byte aligned, as a call
    // wants it before pushing); it calls a function that never returns. In the parent nothing but rax, rcx and r11 changes.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov rdi, {plan}",
            "call {child}",
            "ud2",
            "2:",
            plan = in(reg) ptr::from_ref(plan),
            child = in(reg) child as extern "C" fn(*const Plan) -> !,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") ptr::from_ref(arguments),
            in("rsi") size_of::<CloneArgs>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// The child: system calls only, no allocation, no locks, no library function that knows about threads.
extern "C" fn child(plan: *const Plan) -> ! {
    // SAFETY: see `clone3`; every pointer in the plan was made from memory that its caller holds.
    unsafe {
        let plan = &*plan;
        let errno = run_child(plan);
        plan.errno.store(errno, Ordering::Release);
        libc::syscall(libc::SYS_exit, 127);
    }
    loop {
        std::hint::spin_loop();
    }
}

/// Everything up to `execve`; returns the error number of what failed, with the stage set.
///
/// # Safety
/// Only in the child of [`spawn`].
unsafe fn run_child(plan: &Plan) -> i32 {
    macro_rules! call {
        ($($argument:expr),+) => {
            // SAFETY: the arguments are numbers, or pointers that `spawn` keeps valid.
            unsafe { libc::syscall($($argument),+) }
        };
    }
    // SAFETY: reads this thread's errno, which is the suspended parent's.
    let errno = || unsafe { *libc::__errno_location() };
    macro_rules! must {
        ($($argument:expr),+) => {
            if call!($($argument),+) < 0 { return errno(); }
        };
    }
    plan.stage.store(STAGE_PREPARE, Ordering::Release);
    must!(libc::SYS_setsid);
    for (target, fd) in plan.fds.iter().enumerate() {
        must!(libc::SYS_dup2, *fd, target as i32);
    }
    if plan.terminal {
        must!(libc::SYS_ioctl, 0, libc::TIOCSCTTY, 0);
    }
    // The agent's protection from the OOM killer is not for users.
    let path = c"/proc/self/oom_score_adj".as_ptr();
    let score = call!(libc::SYS_openat, libc::AT_FDCWD, path, libc::O_WRONLY | libc::O_CLOEXEC);
    if score >= 0 {
        call!(libc::SYS_write, score, c"0".as_ptr(), 1);
        call!(libc::SYS_close, score);
    }
    must!(libc::SYS_setgroups, plan.group_count, plan.groups);
    must!(libc::SYS_setresgid, plan.gid, plan.gid, plan.gid);
    must!(libc::SYS_setresuid, plan.uid, plan.uid, plan.uid);
    plan.stage.store(STAGE_DIRECTORY, Ordering::Release);
    if call!(libc::SYS_chdir, plan.cwd) < 0 {
        let error = errno();
        if plan.cwd_fallback.is_null() || call!(libc::SYS_chdir, plan.cwd_fallback) < 0 {
            return error;
        }
    }
    plan.stage.store(STAGE_EXEC, Ordering::Release);
    // SAFETY: resets what Rust's runtime ignores, and what whoever starts an agent in the background does, in this process
    // only, and unblocks the signals `spawn` blocked.
    unsafe {
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for signal in [libc::SIGPIPE, libc::SIGINT, libc::SIGQUIT] {
            libc::sigaction(signal, &default, ptr::null_mut());
        }
        let none: libc::sigset_t = std::mem::zeroed();
        libc::pthread_sigmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
    let mut found = libc::ENOENT;
    plan.stage.store(0, Ordering::Release);
    for candidate in &plan.candidates {
        if candidate.is_null() {
            break;
        }
        call!(libc::SYS_execve, *candidate, plan.argv.as_ptr(), plan.env.as_ptr());
        let error = errno();
        if !matches!(error, libc::ENOENT | libc::ENOTDIR) {
            found = error;
            if error != libc::EACCES {
                break;
            }
        }
    }
    plan.stage.store(STAGE_EXEC, Ordering::Release);
    found
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::AsFd};

    use super::*;

    fn shell(script: &str) -> Program {
        Program {
            candidates: vec![c"/bin/sh".into()],
            argv: vec![c"sh".into(), c"-c".into(), CString::new(script).expect("no NUL")],
            env: vec![c"A=b".into()],
            cwd: c"/".into(),
            cwd_fallback: None,
            uid: 0,
            gid: 0,
            groups: vec![0],
        }
    }

    fn wait_long(child: &Child) -> Result<i32, i32> {
        for _ in 0..500 {
            if let Some(end) = wait(&child.pidfd) {
                return end;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the child does not end");
    }

    fn run(program: &Program) -> (Result<i32, i32>, String) {
        let null = File::open("/dev/null").expect("there is one");
        let (mut read, write) = std::io::pipe().expect("a pipe");
        let stdio = Stdio { fds: [null.as_fd(), write.as_fd(), write.as_fd()], terminal: false };
        let child = spawn(program, stdio, None).expect("it starts");
        drop(write);
        let mut text = String::new();
        read.read_to_string(&mut text).expect("text");
        (wait_long(&child), text)
    }

    #[test]
    fn runs_and_reports_the_end() {
        assert_eq!(run(&shell("echo $A; pwd; exit 7")), (Ok(7), "b\n/\n".into()));
        assert_eq!(run(&shell("kill -15 $$")).0, Err(15));
    }

    #[test]
    fn signals_are_not_blocked_and_what_rust_or_a_background_ignores_is_not_ignored() {
        const SIGPIPE: u64 = 1 << (libc::SIGPIPE - 1);
        const KEYS: u64 = 1 << (libc::SIGINT - 1) | 1 << (libc::SIGQUIT - 1);
        let number = |status: &str, name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
            u64::from_str_radix(line.trim(), 16).expect("a number")
        };
        let own = std::fs::read_to_string("/proc/thread-self/status").expect("there is one");
        assert_ne!(number(&own, "SigIgn:") & SIGPIPE, 0);
        let (_, status) = run(&shell("cat /proc/self/status"));
        assert_eq!(number(&status, "SigBlk:"), 0);
        // Whoever started this test may ignore others.
        assert_eq!(number(&status, "SigIgn:"), number(&own, "SigIgn:") & !SIGPIPE & !KEYS);
    }

    #[test]
    fn no_descriptor_leaks_into_the_program() {
        // Whoever started this test may have left some open; what we open must not show.
        let inherited = |number: &str| {
            let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap_or_default();
            let flags = text.lines().find_map(|line| line.strip_prefix("flags:")).unwrap_or("0");
            !text.is_empty() && i32::from_str_radix(flags.trim(), 8).expect("flags") & libc::O_CLOEXEC == 0
        };
        let _file = File::open("/dev/null").expect("there is one");
        let (_, list) = run(&shell("ls /proc/$$/fd"));
        // 10 is dash's own script descriptor, where there is one.
        let leaked: Vec<&str> = list
            .lines()
            .filter(|number| !["0", "1", "2", "10"].contains(number) && !inherited(number))
            .collect();
        assert_eq!(leaked, Vec::<&str>::new());
    }

    #[test]
    fn says_what_failed() {
        let null = File::open("/dev/null").expect("there is one");
        let stdio = Stdio { fds: [null.as_fd(); 3], terminal: false };
        let missing = Program { candidates: vec![c"/nonexistent".into()], ..shell("") };
        assert!(
            matches!(spawn(&missing, stdio, None), Err(SpawnError::Exec(e)) if e.raw_os_error() == Some(libc::ENOENT))
        );
        let locked = Program { candidates: vec![c"/etc/passwd".into()], ..shell("") };
        assert!(
            matches!(spawn(&locked, stdio, None), Err(SpawnError::Exec(e)) if e.raw_os_error() == Some(libc::EACCES))
        );
        let nowhere = Program { cwd: c"/nonexistent".into(), ..shell("") };
        assert!(matches!(spawn(&nowhere, stdio, None), Err(SpawnError::Directory(_))));
        let back = Program { cwd_fallback: Some(c"/".into()), ..nowhere };
        assert_eq!(run(&back).0, Ok(0));
    }
}
