//! A command in a guest: started once, followed across lost connections, killed when nobody wants it any more.
//!
//! ```text
//!   start, follow ──► attached ──► exit
//!                       │  ▲
//!                  lost ▼  │ attach at the offset, for at most 20 s of the guest's time; never started again
//!                     detached ── somebody else follows it: over
//! ```
//!
//! A sandbox that stands still is waited for, however long, and never woken for this.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use pandastack_bus::{Error as BusError, SandboxId, vmm::State};
use pandastack_protocol::{ClientError, Exec, ExecEvent, ExecStream, REPLAY_BYTES, Request, Started, Window};
use tokio::time::Instant;

use super::{
    ANSWER, ATTEMPTS, AgentStream, GuestError, Guests, Pulse, Wake, followers::Follower, stdin::Stdin,
};
use pandastack_proxy::touch::Activity;

/// How long a guest that runs may be out of reach.
pub const REATTACH_FOR: Duration = Duration::from_secs(20);
/// How often it is tried.
pub const REATTACH_EVERY: Duration = Duration::from_millis(200);
/// The longest pause between two looks at a sandbox that stands still; usually a signal comes first.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Output of a detached command that is left to the guest for the next reader.
const KEEP: u64 = REPLAY_BYTES as u64 / 2;
const KILL_ATTEMPTS: usize = 5;

/// A command that was started. Dropping it before its exit kills it, unless it is detached.
#[derive(Debug)]
pub struct Session {
    guests: Arc<Guests>,
    sandbox: String,
    id: String,
    detach: bool,
    keep: u64,
    attached: Option<(ExecStream<AgentStream>, Pulse)>,
    started: Option<Started>,
    offset: u64,
    lost_since: Option<Instant>,
    stdin: Option<Stdin>,
    window: Option<Window>,
    ended: bool,
    still_before: Duration,
    follower: Follower,
    _activity: Activity,
}

impl Session {
    /// Starts a command. `exec.session` is chosen here; without `stdin` its standard input is empty.
    pub async fn start(
        guests: &Arc<Guests>,
        sandbox: &str,
        mut exec: Exec,
        stdin: Option<Stdin>,
        activity: Activity,
    ) -> Result<Self, GuestError> {
        exec.session = SandboxId::random().to_string();
        exec.stdin = stdin.is_some();
        let mut session = Self::new(guests, sandbox, &exec.session, exec.detach, activity);
        session.stdin = stdin;
        session.window = exec.tty;
        if exec.detach || exec.tty.is_some() {
            session.keep = KEEP;
        }
        let mut last = String::new();
        for attempt in 0..ATTEMPTS {
            let connected = match attempt {
                0 => guests.connect(sandbox, Wake::Yes).await,
                // A capture cuts all connections at once, and none of the idle ones shows it.
                _ => guests.renew(sandbox).await,
            };
            let greeted = match connected {
                Ok(greeted) => greeted,
                Err(error) if attempt == 0 => return Err(error),
                // It may have been started by the attempt before.
                Err(error) => return Err(GuestError::Lost(error.to_string())),
            };
            let pulse = greeted.pulse;
            session.ended = false;
            match greeted.client.exec(exec.clone(), ANSWER).await {
                Ok(stream) => {
                    session.hold(stream, pulse);
                    return Ok(session);
                }
                Err((client, ClientError::Guest(failure))) => {
                    session.ended = true;
                    if let Some(client) = client {
                        guests.put(sandbox, client, pulse);
                    }
                    return Err(GuestError::Refused(failure));
                }
                // The same id again is an attach, never a second start.
                Err((_, error)) => last = error.to_string(),
            }
        }
        Err(GuestError::Lost(last))
    }

    /// Follows a command that runs or ran, from an offset of its output on. Whoever followed it does so no longer. Never
    /// kills it, and leaves what the guest can keep of its output for the next one.
    pub async fn follow(
        guests: &Arc<Guests>,
        sandbox: &str,
        id: &str,
        offset: u64,
        activity: Activity,
    ) -> Result<Self, GuestError> {
        let mut session = Self::new(guests, sandbox, id, true, activity);
        session.keep = KEEP;
        let mut last = String::new();
        for attempt in 0..ATTEMPTS {
            let greeted = match attempt {
                0 => guests.connect(sandbox, Wake::Yes).await?,
                _ => guests.renew(sandbox).await?,
            };
            let pulse = greeted.pulse;
            match greeted.client.attach(id, offset, ANSWER).await {
                Ok(stream) => {
                    session.ended = false;
                    session.hold(stream, pulse);
                    return Ok(session);
                }
                Err((client, ClientError::Guest(failure))) => {
                    if let Some(client) = client {
                        guests.put(sandbox, client, pulse);
                    }
                    return Err(GuestError::Refused(failure));
                }
                Err((_, error)) => last = error.to_string(),
            }
        }
        Err(GuestError::Lost(last))
    }

    fn new(guests: &Arc<Guests>, sandbox: &str, id: &str, detach: bool, activity: Activity) -> Self {
        Self {
            guests: Arc::clone(guests),
            sandbox: sandbox.to_owned(),
            id: id.to_owned(),
            detach,
            keep: 0,
            attached: None,
            started: None,
            offset: 0,
            lost_since: None,
            stdin: None,
            window: None,
            // Until the request is on its way there is nothing to kill.
            ended: true,
            still_before: guests.still.total(sandbox),
            follower: guests.followers.take(sandbox, id),
            _activity: activity,
        }
    }

    /// The sandbox it runs in.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// The session's id in the guest.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether it goes on when nobody follows it.
    pub fn is_detached(&self) -> bool {
        self.detach
    }

    /// What the guest said when it was attached to last: process id, where output began, what was dropped before.
    pub fn started(&self) -> Option<&Started> {
        self.started.as_ref()
    }

    /// Offset of the byte of output that comes next.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Takes a terminal over that [`Session::follow`] found: input goes on behind what the guest has, and unless it is a
    /// detached one, dropping this kills it.
    pub fn take_over(&mut self, detached: bool) {
        self.detach = detached;
        self.stdin = Some(Stdin::open(self.started.as_ref().map_or(0, |started| started.stdin)));
    }

    /// More standard input. It travels while [`Session::next`] is waited for.
    pub fn write(&mut self, bytes: &[u8]) {
        let Some(stdin) = &mut self.stdin else { return };
        stdin.push(bytes);
        if let Some((stream, _)) = &mut self.attached {
            stream.stdin(bytes);
        }
    }

    /// Bytes of standard input that the program did not take yet.
    pub fn input_waiting(&mut self) -> usize {
        let Some(stdin) = &mut self.stdin else { return 0 };
        if let Some((stream, _)) = &self.attached {
            stdin.confirm(stream.stdin_taken());
        }
        stdin.waiting()
    }

    /// The terminal has another size. Remembered for the next connection.
    pub fn resize(&mut self, window: Window) {
        self.window = Some(window);
        if let Some((stream, _)) = &mut self.attached {
            stream.resize(window);
        }
    }

    /// A signal to all its processes; one that meets a lost connection is lost.
    pub fn signal(&mut self, signal: u32) {
        if let Some((stream, _)) = &mut self.attached {
            stream.signal(signal);
        }
    }

    /// Ends this without killing the command: somebody may come back to it for as long as the agent keeps orphans.
    pub fn leave(mut self) {
        self.ended = true;
    }

    /// For how long its sandbox has stood still since this began.
    pub fn stood_still(&self) -> Duration {
        self.guests.still.total(&self.sandbox).saturating_sub(self.still_before)
    }

    /// Whether its sandbox stands still now; asks vmm.
    pub async fn stands_still(&self) -> bool {
        matches!(self.guests.look(&self.sandbox).await, Ok(State::Paused | State::Hibernated))
    }

    /// What comes next; after the exit nothing does. Cancel-safe.
    pub async fn next(&mut self) -> Result<ExecEvent, GuestError> {
        loop {
            if self.attached.is_none() {
                self.attach().await?;
            }
            let Some((stream, _)) = self.attached.as_mut() else { continue };
            match stream.next().await {
                Ok(event) => {
                    let end = stream.offset();
                    let event = match event {
                        ExecEvent::Stdout(bytes) => unseen(bytes, end, self.offset).map(ExecEvent::Stdout),
                        ExecEvent::Stderr(bytes) => unseen(bytes, end, self.offset).map(ExecEvent::Stderr),
                        exit => Some(exit),
                    };
                    self.offset = self.offset.max(end);
                    let Some(event) = event else { continue };
                    if matches!(event, ExecEvent::Exit(_)) {
                        self.ended = true;
                        if let Some((stream, pulse)) = self.attached.take()
                            && let Some(client) = stream.into_client()
                        {
                            self.guests.put(&self.sandbox, client, pulse);
                        }
                    }
                    return Ok(event);
                }
                Err(ClientError::Lost(error)) => {
                    self.attached = None;
                    tracing::info!(sandbox = %self.sandbox, %error, "session lost its connection; attaching again");
                    self.lost_since = Some(Instant::now());
                }
                Err(ClientError::Guest(failure)) => {
                    self.attached = None;
                    return Err(GuestError::Lost(failure.message));
                }
                Err(error) => {
                    self.attached = None;
                    return Err(GuestError::Lost(error.to_string()));
                }
            }
        }
    }

    async fn attach(&mut self) -> Result<(), GuestError> {
        let mut pause = REATTACH_EVERY;
        loop {
            if !self.follower.is_last() {
                // It is the other's now, to kill, too.
                self.ended = true;
                return Err(GuestError::TakenOver);
            }
            let error = match self.guests.open(&self.sandbox, Wake::No).await {
                Ok(greeted) => {
                    let pulse = greeted.pulse;
                    // What lies before was received; what is kept for others comes again and is passed over.
                    let from = self.offset.saturating_sub(self.keep);
                    match greeted.client.attach(&self.id, from, ANSWER).await {
                        Ok(stream) => {
                            self.hold(stream, pulse);
                            self.lost_since = None;
                            return Ok(());
                        }
                        Err((_, ClientError::Guest(failure))) => {
                            self.ended = true;
                            return Err(GuestError::Lost(failure.message));
                        }
                        Err((_, error)) => error.to_string(),
                    }
                }
                Err(GuestError::Bus(BusError::NotFound(text))) => {
                    self.ended = true;
                    return Err(GuestError::Lost(text));
                }
                Err(error) if self.guests.waits(&self.sandbox, &error).await => {
                    self.lost_since = None;
                    self.guests.still.moved(&self.sandbox, pause).await;
                    pause = (pause * 2).min(LOOK_EVERY);
                    continue;
                }
                Err(error) => error.to_string(),
            };
            let since = *self.lost_since.get_or_insert_with(Instant::now);
            if since.elapsed() > REATTACH_FOR {
                return Err(GuestError::Lost(error));
            }
            tokio::time::sleep(REATTACH_EVERY).await;
        }
    }

    /// Goes on with a stream: standard input from where the guest has it (its end may come twice), output behind.
    fn hold(&mut self, mut stream: ExecStream<AgentStream>, pulse: Pulse) {
        stream.keep(self.keep);
        if let Some(window) = self.window {
            stream.resize(window);
        }
        if let Some(stdin) = &mut self.stdin {
            stdin.confirm(stream.started.stdin);
            stream.stdin(stdin.after(stream.started.stdin));
            if stdin.is_ended() {
                stream.stdin_end();
            }
        }
        self.offset = self.offset.max(stream.offset());
        self.started = Some(stream.started.clone());
        self.attached = Some((stream, pulse));
    }
}

/// The part of output ending at `end` that lies at or behind `from`.
fn unseen(mut bytes: Bytes, end: u64, from: u64) -> Option<Bytes> {
    let new = usize::try_from(end.saturating_sub(from)).unwrap_or(usize::MAX).min(bytes.len());
    (new > 0).then(|| bytes.split_off(bytes.len() - new))
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.ended || self.detach {
            return;
        }
        self.attached = None;
        let (guests, sandbox, session) = (Arc::clone(&self.guests), self.sandbox.clone(), self.id.clone());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            for attempt in 1..=KILL_ATTEMPTS {
                let request = Request::Kill { session: session.clone() };
                match guests.call::<serde::de::IgnoredAny>(&sandbox, &request, Wake::No).await {
                    Ok(_) | Err((GuestError::Refused(_), _)) => return,
                    Err((GuestError::Bus(BusError::NotFound(_)), _)) => return,
                    // The agent ends orphans by itself, in a minute of its own time.
                    Err((GuestError::Paused | GuestError::Asleep(_), _)) => return,
                    Err((error, _)) if attempt == KILL_ATTEMPTS => {
                        tracing::warn!(sandbox, %error, "an abandoned session could not be killed");
                    }
                    Err(_) => tokio::time::sleep(REATTACH_EVERY * attempt as u32).await,
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_that_comes_again_is_passed_over() {
        let part = |end, from| unseen(Bytes::from_static(b"abcd"), end, from);
        assert_eq!(part(4, 0).unwrap(), "abcd");
        assert_eq!(part(14, 10).unwrap(), "abcd");
        assert_eq!(part(14, 13).unwrap(), "d");
        assert_eq!(part(14, 14), None);
        assert_eq!(part(14, 99), None);
        assert_eq!(part(u64::MAX, 0).unwrap(), "abcd");
    }
}
