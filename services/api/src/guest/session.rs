//! A command in a guest: started once, followed across lost connections, killed when nobody wants it any more.
//!
//! ```text
//!   start ──► attached ──► exit
//!               │  ▲
//!          lost ▼  │ attach at the offset, for at most 20 s; never started again
//!             detached
//! ```

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use pandastack_bus::SandboxId;
use pandastack_protocol::{ClientError, Exec, ExecEvent, ExecStream, Request};

use super::{ANSWER, AgentStream, GuestError, Guests, Pulse};
use crate::touch::Activity;

const REATTACH_FOR: Duration = Duration::from_secs(20);
const REATTACH_EVERY: Duration = Duration::from_millis(200);
const KILL_ATTEMPTS: usize = 5;

/// A command that was started. Dropping it before its exit kills it, unless it is detached.
#[derive(Debug)]
pub struct Session {
    guests: Arc<Guests>,
    sandbox: String,
    id: String,
    detach: bool,
    attached: Option<(ExecStream<AgentStream>, Pulse)>,
    offset: u64,
    lost_since: Option<Instant>,
    stdin: Option<Bytes>,
    ended: bool,
    _activity: Activity,
}

impl Session {
    /// Starts a command. `exec.session` is chosen here; `stdin` is all of its standard input.
    pub async fn start(
        guests: &Arc<Guests>,
        sandbox: &str,
        mut exec: Exec,
        stdin: Option<Bytes>,
        activity: Activity,
    ) -> Result<Self, GuestError> {
        exec.session = SandboxId::random().to_string();
        exec.stdin = stdin.is_some();
        let mut session = Self {
            guests: Arc::clone(guests),
            sandbox: sandbox.to_owned(),
            id: exec.session.clone(),
            detach: exec.detach,
            attached: None,
            offset: 0,
            lost_since: None,
            stdin,
            // Until the request is on its way there is nothing to kill.
            ended: true,
            _activity: activity,
        };
        let mut last = String::new();
        for attempt in 0..3 {
            let greeted = match guests.connect(sandbox).await {
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

    /// The sandbox it runs in.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// The session's id in the guest.
    pub fn id(&self) -> &str {
        &self.id
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
                    self.offset = stream.offset();
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
        let since = *self.lost_since.get_or_insert_with(Instant::now);
        loop {
            let error = match self.guests.open(&self.sandbox).await {
                Ok(greeted) => {
                    let pulse = greeted.pulse;
                    match greeted.client.attach(&self.id, self.offset, ANSWER).await {
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
                Err(GuestError::Bus(pandastack_bus::Error::NotFound(text))) => {
                    self.ended = true;
                    return Err(GuestError::Lost(text));
                }
                Err(error) => error.to_string(),
            };
            if since.elapsed() > REATTACH_FOR {
                return Err(GuestError::Lost(error));
            }
            tokio::time::sleep(REATTACH_EVERY).await;
        }
    }

    /// Goes on with a stream: standard input from where the guest has it (its end may come twice), output behind.
    fn hold(&mut self, mut stream: ExecStream<AgentStream>, pulse: Pulse) {
        if let Some(stdin) = &self.stdin {
            let from = usize::try_from(stream.started.stdin).unwrap_or(usize::MAX).min(stdin.len());
            stream.stdin(&stdin[from..]);
            stream.stdin_end();
        }
        self.offset = stream.offset();
        self.attached = Some((stream, pulse));
    }
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
                match guests.call::<serde::de::IgnoredAny>(&sandbox, &request).await {
                    Ok(_) | Err((GuestError::Refused(_), _)) => return,
                    Err((GuestError::Bus(pandastack_bus::Error::NotFound(_)), _)) => return,
                    Err((error, _)) if attempt == KILL_ATTEMPTS => {
                        // The agent ends orphans by itself after a while.
                        tracing::warn!(sandbox, %error, "an abandoned session could not be killed");
                    }
                    Err(_) => tokio::time::sleep(REATTACH_EVERY * attempt as u32).await,
                }
            }
        });
    }
}
