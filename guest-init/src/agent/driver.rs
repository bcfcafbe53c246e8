//! What moves a session: its pipes, its time limits, its end.
//!
//! One task per running program. Output goes into the replay buffer, input comes from the queue; nothing here waits for a
//! connection. When the first process has ended, what it had written is read, the end is recorded, and what it left
//! running in the background is only watched: its pipes stay open and are emptied slowly into the log, so that it does not die
//! of them.

use std::{cell::RefCell, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use nix::sys::signal::Signal;
use pandastack_protocol::{CHUNK, Exit};
use tokio::{
    io::{Interest, unix::AsyncFd},
    time::{Instant, sleep, sleep_until},
};

use super::{
    cgroup::Group,
    exec::{self, Running},
    log::Writer,
    replay::Stream,
    session::{Order, Session},
    spawn,
};

/// From TERM to KILL after a timeout.
const TERM_GRACE: Duration = Duration::from_secs(2);
/// How long the kernel may take to end a killed process before it is given up.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// A terminal that says nothing for this long after its program's end has said everything.
const TERMINAL_SILENCE: Duration = Duration::from_millis(20);
/// What of a terminal's output is read after that at most.
const TERMINAL_REST: usize = 1 << 20;

/// Registers the descriptors of a program with the runtime.
pub fn prepare(running: Running, terminal: bool) -> io::Result<(Driver, Group, u32)> {
    let Running { child, group, stdin, stdout, stderr } = running;
    let stdin = stdin.map(|fd| register(fd, Interest::WRITABLE)).transpose()?;
    let outputs = [Some((Stream::Stdout, stdout)), stderr.map(|fd| (Stream::Stderr, fd))];
    let mut registered = Vec::with_capacity(2);
    for (stream, fd) in outputs.into_iter().flatten() {
        registered.push(Output { stream, fd: register(fd, Interest::READABLE)?, open: true });
    }
    let pidfd = register(child.pidfd, Interest::READABLE)?;
    let driver = Driver { pidfd, stdin, outputs: registered, terminal };
    Ok((driver, group, child.pid))
}

fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the AsyncFd owns the descriptor from here on, and nobody replaces an OwnedFd inside it.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(|error| error.into_parts().1)
}

/// The descriptors of a running program.
#[derive(Debug)]
pub struct Driver {
    pidfd: AsyncFd<OwnedFd>,
    stdin: Option<AsyncFd<OwnedFd>>,
    outputs: Vec<Output>,
    terminal: bool,
}

#[derive(Debug)]
struct Output {
    stream: Stream,
    fd: AsyncFd<OwnedFd>,
    open: bool,
}

/// Where a program is between its time limit and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// TERM was sent.
    Asked,
    /// KILL was sent.
    Killed,
}

impl Driver {
    /// Runs until nothing of the session runs any more. `timeout` of zero is none.
    pub async fn run(mut self, session: Arc<Session>, group: Arc<Group>, timeout: Duration) {
        let limit = (!timeout.is_zero()).then(|| Instant::now() + timeout);
        let mut timed_out = false;
        let mut phase = Phase::Running;
        let mut deadline = limit;
        let end = loop {
            let wanted = session.wanted();
            let orphaned = session.orphan_deadline().filter(|_| phase == Phase::Running);
            let alarm = [deadline, orphaned].into_iter().flatten().min();
            let input = session.input();
            let Self { pidfd, stdin, outputs, terminal } = &mut self;
            if stdin.is_some() && input.is_none() && session.input_ended() && !*terminal {
                *stdin = None;
            }
            let (first, second) = match outputs.as_mut_slice() {
                [first, second] => (Some(first), Some(second)),
                [first] => (Some(first), None),
                _ => (None, None),
            };
            // Without an order of preference: a program that writes without end must not hide its time limit.
            tokio::select! {
                () = session.woken() => {
                    while let Some(order) = session.next_order() {
                        self.obey(&order, &group);
                    }
                }
                () = absorb(first, &session, wanted) => {}
                () = absorb(second, &session, wanted) => {}
                end = ended(pidfd) => break end,
                result = write(stdin.as_ref(), input.as_deref()) => match result {
                    Ok(count) => session.input_taken(count),
                    Err(_) => { *stdin = None; session.input_closed(); }
                },
                () = at(alarm) => {
                    let is_orphan = deadline.is_none_or(|deadline| deadline > Instant::now());
                    match phase {
                        Phase::Running if is_orphan => {
                            group.kill();
                            (phase, deadline) = (Phase::Killed, Some(Instant::now() + KILL_GRACE));
                        }
                        Phase::Running => {
                            timed_out = true;
                            group.signal(Signal::SIGTERM);
                            (phase, deadline) = (Phase::Asked, Some(Instant::now() + TERM_GRACE));
                        }
                        Phase::Asked => {
                            group.kill();
                            (phase, deadline) = (Phase::Killed, Some(Instant::now() + KILL_GRACE));
                        }
                        // It hangs in the kernel. Nobody has to wait for that.
                        Phase::Killed => break Err(Signal::SIGKILL as i32),
                    }
                }
            }
        };
        if timed_out {
            end_the_rest(&group, deadline.filter(|_| phase == Phase::Asked)).await;
        }
        self.drain(&session).await;
        session.finish(exit(end, timed_out, group.had_oom()));
        // Nothing of the session's output is kept for the sake of its background.
        let log = session.log();
        let session = Arc::downgrade(&session);
        self.linger(&group, log.as_deref()).await;
        if let Some(log) = log {
            log.finish();
        }
        if let Some(session) = session.upgrade() {
            session.forget_group();
        }
    }

    fn obey(&self, order: &Order, group: &Group) {
        match order {
            Order::Signal(number) => {
                if let Ok(signal) = Signal::try_from(*number) {
                    group.signal(signal);
                }
            }
            Order::Resize(window) if self.terminal => {
                if let Some(output) = self.outputs.first() {
                    // A terminal that is gone has no size.
                    let _ = exec::resize(output.fd.get_ref(), *window);
                }
            }
            Order::Resize(_) => {}
        }
    }

    /// Reads what the program had written by its end, and no more: others may write on for ever.
    async fn drain(&mut self, session: &Session) {
        for output in &mut self.outputs {
            let mut left = if self.terminal { TERMINAL_REST } else { pending(output.fd.get_ref()) };
            while left > 0 && output.open {
                let wanted = session.wanted().min(left);
                if wanted == 0 {
                    session.woken().await;
                    continue;
                }
                // What a terminal was given arrives a little later; in a pipe it is there.
                match tokio::time::timeout(TERMINAL_SILENCE, read(output, session, wanted)).await {
                    Ok(count) => left -= count,
                    Err(_) => break,
                }
            }
        }
    }

    /// Until the last process of the background has ended. What it writes is nobody's but the log's, at most a pipe full each
    /// round.
    async fn linger(&mut self, group: &Group, log: Option<&Writer>) {
        const SHORTEST: Duration = Duration::from_millis(5);
        const LONGEST: Duration = Duration::from_secs(1);
        self.stdin = None;
        let mut pause = SHORTEST;
        while !group.is_empty() {
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST);
            for output in &mut self.outputs {
                if output.open && pending(output.fd.get_ref()) > 0 {
                    log_away(output, log);
                    pause = SHORTEST * 2;
                }
            }
        }
    }
}

/// After a timeout: what is left gets its grace, then KILL.
async fn end_the_rest(group: &Group, grace: Option<Instant>) {
    while let Some(deadline) = grace
        && !group.is_empty()
        && Instant::now() < deadline
    {
        sleep(Duration::from_millis(10)).await;
    }
    if !group.is_empty() {
        group.kill();
    }
    let deadline = Instant::now() + KILL_GRACE;
    while !group.is_empty() && Instant::now() < deadline {
        sleep(Duration::from_millis(2)).await;
    }
}

fn exit(end: Result<i32, i32>, timed_out: bool, oom: bool) -> Exit {
    let (code, signal) = match end {
        Ok(code) => (code, 0),
        Err(signal) => (128 + signal, signal),
    };
    Exit { code, signal, timed_out, oom, ..Exit::default() }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

async fn ended(pidfd: &AsyncFd<OwnedFd>) -> Result<i32, i32> {
    loop {
        let ready = pidfd.readable().await;
        if let Some(end) = spawn::wait(pidfd.get_ref()) {
            return end;
        }
        match ready {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Reads once what an output has; never completes for one that is closed or not wanted.
async fn absorb(output: Option<&mut Output>, session: &Session, wanted: usize) {
    match output {
        Some(output) if output.open && wanted > 0 => {
            read(output, session, wanted).await;
        }
        _ => std::future::pending().await,
    }
}

/// Waits for output and reads at most `wanted` bytes of it into the session; 0 at its end.
async fn read(output: &mut Output, session: &Session, wanted: usize) -> usize {
    loop {
        let Ok(mut ready) = output.fd.readable().await else {
            output.open = false;
            return 0;
        };
        let stream = output.stream;
        let result = ready.try_io(|fd| {
            BUFFER.with_borrow_mut(|buffer| {
                let count = buffer.len().min(wanted);
                let count = nix::unistd::read(fd.get_ref(), &mut buffer[..count])?;
                session.output(stream, &buffer[..count]);
                Ok(count)
            })
        });
        match result {
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => {}
            Ok(Ok(count)) if count > 0 => return count,
            // EIO: the last program has closed the terminal.
            Ok(_) => {
                drop(ready);
                output.open = false;
                return 0;
            }
        }
    }
}

thread_local! {
    /// One for all sessions: it is used only between two awaits.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; CHUNK]);
}

async fn write(stdin: Option<&AsyncFd<OwnedFd>>, input: Option<&[u8]>) -> io::Result<usize> {
    let (Some(stdin), Some(input)) = (stdin, input) else { return std::future::pending().await };
    loop {
        let mut ready = stdin.writable().await?;
        match ready.try_io(|fd| nix::unistd::write(fd.get_ref(), input).map_err(io::Error::from)) {
            Ok(result) => return result,
            Err(_) => continue,
        }
    }
}

fn pending(fd: &OwnedFd) -> usize {
    use std::os::fd::AsRawFd;
    let mut count: nix::libc::c_int = 0;
    // SAFETY: FIONREAD writes an int, which outlives the call.
    let result = unsafe { nix::libc::ioctl(fd.as_raw_fd(), nix::libc::FIONREAD, &mut count) };
    if result < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}

fn log_away(output: &mut Output, log: Option<&Writer>) {
    let mut buffer = [0; 16 << 10];
    for _ in 0..4 {
        match nix::unistd::read(output.fd.get_ref(), &mut buffer) {
            Ok(0) => output.open = false,
            Ok(count) => {
                if let Some(log) = log {
                    log.write(output.stream, &buffer[..count]);
                }
                continue;
            }
            Err(_) => {}
        }
        return;
    }
}
