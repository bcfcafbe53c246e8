//! A session: one program, its output, its end. Lives without any connection.
//!
//! Owns what is kept of a running or ended program and who is attached to it; the work is done by its driver
//! ([`super::driver`]). Refuses to know frames.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use pandastack_protocol::{Exec, Exit, ORPHAN_SECONDS, STDIN_WINDOW, SessionInfo, Window};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

use super::{
    budget::Budget,
    cgroup::Group,
    log::Writer,
    replay::{Replay, Stream},
};

/// What the host asked of a running program, for its driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// A signal for every process.
    Signal(i32),
    /// The terminal's size.
    Resize(Window),
}

/// A session.
#[derive(Debug)]
pub struct Session {
    /// Its id.
    pub id: String,
    /// Process id, 0 for a program that could not be run.
    pub pid: u32,
    command: String,
    started_unix: u64,
    started: Instant,
    budget: Arc<Budget>,
    log: Option<Arc<Writer>>,
    state: Mutex<State>,
    changed: watch::Sender<()>,
    wake: Notify,
}

#[derive(Debug)]
struct State {
    replay: Replay,
    exit: Option<(Exit, Instant)>,
    group: Option<Arc<Group>>,
    attachment: u64,
    /// Runs on without a host.
    detached: bool,
    /// Since when nobody is attached.
    orphaned: Option<Instant>,
    stdin: Stdin,
    orders: VecDeque<Order>,
}

#[derive(Debug, Default)]
struct Stdin {
    queue: VecDeque<Bytes>,
    end: bool,
    closed: bool,
    received: u64,
    taken: u64,
}

/// The host sent more standard input than the window allows.
#[derive(Debug, PartialEq, Eq)]
pub struct WindowExceeded;

/// What an attached connection has to send next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Output from an offset on.
    Output(u64, Stream, Vec<u8>),
    /// How much input was taken.
    StdinTaken(u64),
    /// The end; nothing follows.
    Exit(Exit),
    /// Nothing until the session changes.
    Nothing,
    /// Somebody else is attached now.
    TakenOver,
}

impl Session {
    /// A session of a program that runs, with nobody attached yet.
    pub fn new(
        exec: &Exec,
        pid: u32,
        group: Option<Group>,
        budget: Arc<Budget>,
        log: Option<Arc<Writer>>,
        unix: u64,
    ) -> Arc<Self> {
        let command: String = exec.argv.join(" ").chars().take(256).collect();
        let state = State {
            replay: Replay::new(budget.capacity(0)),
            exit: None,
            group: group.map(Arc::new),
            attachment: 0,
            detached: exec.detach,
            orphaned: Some(Instant::now()),
            stdin: Stdin::default(),
            orders: VecDeque::new(),
        };
        Arc::new(Self {
            id: exec.session.clone(),
            pid,
            command,
            started_unix: unix,
            started: Instant::now(),
            budget,
            log,
            state: Mutex::new(state),
            changed: watch::channel(()).0,
            wake: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks, changes the replay buffer and keeps the common budget right.
    fn with_replay<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let before = state.replay.weight();
        state.replay.set_capacity(self.budget.capacity(before));
        let result = change(&mut state);
        self.budget.change(before, state.replay.weight());
        result
    }

    // What a connection does.

    /// Attaches; whoever was attached is no longer. Everything below `offset` was received. Answers the attachment, the
    /// offset where output begins, the bytes dropped so far and the bytes of input received.
    pub fn attach(&self, offset: u64) -> (u64, u64, u64, u64) {
        let attached = self.with_replay(|state| {
            state.replay.ack(offset);
            state.attachment += 1;
            state.orphaned = None;
            let start = state.replay.start().max(offset.min(state.replay.end()));
            (state.attachment, start, state.replay.dropped(), state.stdin.received)
        });
        self.changed.send_replace(());
        self.wake.notify_one();
        attached
    }

    /// Ends an attachment, unless somebody took over.
    pub fn detach(&self, attachment: u64) {
        let mut state = self.lock();
        if state.attachment == attachment {
            state.orphaned = Some(Instant::now());
            drop(state);
            self.wake.notify_one();
        }
    }

    /// The guest is a copy, and no host comes back for this session here: if it runs, it runs on as a detached one, and
    /// whoever seemed to be attached holds up its output no longer.
    pub fn abandon(&self) {
        let mut state = self.lock();
        if state.exit.is_some() {
            return;
        }
        state.detached = true;
        state.attachment += 1;
        state.orphaned = Some(Instant::now());
        drop(state);
        self.changed.send_replace(());
        self.wake.notify_one();
    }

    /// The guest slept: a host that had lost its session before gets the whole grace again, because it may have tried
    /// for all that time.
    pub fn renew_grace(&self) {
        if let Some(since) = &mut self.lock().orphaned {
            *since = Instant::now();
        }
        self.wake.notify_one();
    }

    /// Whether it runs on without a host.
    pub fn is_detached(&self) -> bool {
        self.lock().detached
    }

    /// Changes from now on.
    pub fn watch(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// What an attachment that has sent everything below `offset`, and `taken`, sends next.
    pub fn next(&self, attachment: u64, offset: u64, taken: u64, limit: usize) -> Next {
        let state = self.lock();
        if state.attachment != attachment {
            return Next::TakenOver;
        }
        if let Some((at, stream, bytes)) = state.replay.read(offset, limit) {
            return Next::Output(at, stream, bytes);
        }
        if let Some((exit, _)) = state.exit {
            return Next::Exit(exit);
        }
        if state.stdin.taken > taken {
            return Next::StdinTaken(state.stdin.taken);
        }
        Next::Nothing
    }

    /// The host has everything below `offset`.
    pub fn ack(&self, offset: u64) {
        self.with_replay(|state| state.replay.ack(offset));
        self.wake.notify_one();
    }

    /// Input for the program.
    pub fn stdin(&self, bytes: &[u8]) -> Result<(), WindowExceeded> {
        let mut state = self.lock();
        let stdin = &mut state.stdin;
        stdin.received += bytes.len() as u64;
        if stdin.closed || stdin.end {
            stdin.taken = stdin.received;
            drop(state);
            self.changed.send_replace(());
            return Ok(());
        }
        // Twice the window: what was on its way when a connection broke comes again.
        if stdin.received - stdin.taken > 2 * STDIN_WINDOW {
            return Err(WindowExceeded);
        }
        if !bytes.is_empty() {
            stdin.queue.push_back(Bytes::copy_from_slice(bytes));
        }
        drop(state);
        self.wake.notify_one();
        Ok(())
    }

    /// No more input after what was given.
    pub fn stdin_end(&self) {
        self.lock().stdin.end = true;
        self.wake.notify_one();
    }

    /// Something for the driver to do; a flood of orders is cut.
    pub fn order(&self, order: Order) {
        const ORDERS: usize = 64;
        let mut state = self.lock();
        if state.orders.len() < ORDERS && state.exit.is_none() {
            state.orders.push_back(order);
            drop(state);
            self.wake.notify_one();
        }
    }

    /// Kills everything that the session started and that still runs.
    pub fn kill(&self) {
        let group = self.lock().group.clone();
        if let Some(group) = group {
            group.kill();
        }
    }

    /// How it ended, and when.
    pub fn exit(&self) -> Option<(Exit, Instant)> {
        self.lock().exit
    }

    /// A line about it.
    pub fn info(&self) -> SessionInfo {
        let state = self.lock();
        SessionInfo {
            session: self.id.clone(),
            command: self.command.clone(),
            pid: self.pid,
            started: self.started_unix,
            detached: state.detached,
            exit: state.exit.map(|(exit, _)| exit),
            output_bytes: state.replay.end(),
        }
    }

    // What the driver does.

    /// Completes when the driver has something to look at.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    /// How many bytes of output to read now; 0 while the buffer is full and a host is attached.
    pub fn wanted(&self) -> usize {
        self.with_replay(|state| state.replay.wanted(state.orphaned.is_none()))
    }

    /// Adds output.
    pub fn output(&self, stream: Stream, bytes: &[u8]) {
        self.with_replay(|state| state.replay.push(stream, bytes));
        self.changed.send_replace(());
        if let Some(log) = &self.log {
            log.write(stream, bytes);
        }
    }

    /// Where what it writes is kept, if it is.
    pub fn log(&self) -> Option<Arc<Writer>> {
        self.log.clone()
    }

    /// The next order.
    pub fn next_order(&self) -> Option<Order> {
        self.lock().orders.pop_front()
    }

    /// Input to write; `None` when there is none now.
    pub fn input(&self) -> Option<Bytes> {
        self.lock().stdin.queue.front().cloned()
    }

    /// Whether all input was taken and no more will come.
    pub fn input_ended(&self) -> bool {
        let state = self.lock();
        state.stdin.end && state.stdin.queue.is_empty()
    }

    /// The program took this much of [`Session::input`].
    pub fn input_taken(&self, count: usize) {
        let mut state = self.lock();
        let stdin = &mut state.stdin;
        stdin.taken += count as u64;
        if let Some(front) = stdin.queue.front_mut() {
            if count >= front.len() {
                stdin.queue.pop_front();
            } else {
                let _ = front.split_to(count);
            }
        }
        drop(state);
        self.changed.send_replace(());
    }

    /// The program takes no more input: what comes is thrown away.
    pub fn input_closed(&self) {
        let mut state = self.lock();
        state.stdin.closed = true;
        state.stdin.taken = state.stdin.received;
        state.stdin.queue.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// When a session that nobody is attached to, and that is not detached, is to be killed.
    ///
    /// A capture breaks every connection, and the guest learns of it when it runs again: where it was captured right
    /// after the pause, where it was hibernated after the wake. Its monotonic clock stands still in between, so however
    /// long it slept, the grace begins when a host can come back at the earliest, and is whole.
    pub fn orphan_deadline(&self) -> Option<Instant> {
        let state = self.lock();
        let since = state.orphaned.filter(|_| !state.detached && state.exit.is_none())?;
        Some(since + Duration::from_secs(ORPHAN_SECONDS))
    }

    /// The group, until [`Session::forget_group`].
    pub fn group(&self) -> Option<Arc<Group>> {
        self.lock().group.clone()
    }

    /// The end. The driver fills in how; length and sums are added here.
    pub fn finish(&self, exit: Exit) {
        if let Some(log) = &self.log {
            log.finish();
        }
        let mut state = self.lock();
        let exit = Exit {
            duration_ms: self.started.elapsed().as_millis() as u64,
            output_bytes: state.replay.end(),
            dropped: state.replay.dropped(),
            ..exit
        };
        state.exit = Some((exit, Instant::now()));
        state.stdin.closed = true;
        state.stdin.taken = state.stdin.received;
        state.stdin.queue.clear();
        drop(state);
        self.changed.send_replace(());
    }

    /// Nothing of it runs any more.
    pub fn forget_group(&self) {
        self.lock().group = None;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let weight = self.lock().replay.weight();
        self.budget.change(weight, 0);
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
