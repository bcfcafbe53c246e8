//! Reading the log that a guest keeps of what its programs wrote.
//!
//! Owns: the position in it, across lost connections and however long the sandbox stands still. Refuses to know: lines, who
//! reads it.

use std::{sync::Arc, time::Duration};

use pandastack_bus::Error as BusError;
use pandastack_protocol::{ClientError, LogPage, Request};
use tokio::time::Instant;

use super::{
    ATTEMPTS, Greeted, GuestError, Guests, Wake,
    session::{LOOK_EVERY, REATTACH_EVERY, REATTACH_FOR},
};

/// How long a guest may take for a page.
const PAGE: Duration = Duration::from_secs(9);
/// How long a guest is asked to wait for something new. Short, because a capture cuts connections without a sign: each
/// question is a probe, too.
const WAIT: Duration = Duration::from_secs(2);
/// How much longer than that its answer may take; a position makes asking again free.
const LATE: Duration = Duration::from_secs(4);

/// A reader of one guest's log.
#[derive(Debug)]
pub struct LogReader {
    guests: Arc<Guests>,
    sandbox: String,
    session: String,
    life: u64,
    position: u64,
    held: Option<Greeted>,
}

impl LogReader {
    /// At the oldest byte kept, of all sessions or (not empty) one.
    pub fn new(guests: &Arc<Guests>, sandbox: &str, session: &str) -> Self {
        Self {
            guests: Arc::clone(guests),
            sandbox: sandbox.to_owned(),
            session: session.to_owned(),
            life: 0,
            position: 0,
            held: None,
        }
    }

    /// Goes back to the oldest byte kept.
    pub fn rewind(&mut self) {
        (self.life, self.position) = (0, 0);
    }

    /// The next page of what is there, perhaps empty.
    pub async fn page(&mut self, wake: Wake) -> Result<LogPage, GuestError> {
        self.ask(wake, Duration::ZERO, PAGE).await
    }

    /// The next page once there is something new; sometimes an empty one before. Wakes nobody: a guest that stands still is
    /// waited for. An error is final.
    pub async fn follow(&mut self) -> Result<LogPage, GuestError> {
        let (mut lost_since, mut pause) = (None, REATTACH_EVERY);
        loop {
            let asked = Instant::now();
            let error = match self.ask(Wake::No, WAIT, WAIT + LATE).await {
                Ok(page) => {
                    // A guest that does not wait does not make us run in circles.
                    if page.parts.is_empty() {
                        tokio::time::sleep_until(asked + WAIT).await;
                    }
                    return Ok(page);
                }
                Err(error) => error,
            };
            match error {
                GuestError::Refused(_) | GuestError::Bus(BusError::NotFound(_)) => return Err(error),
                error if self.guests.waits(&self.sandbox, &error).await => {
                    lost_since = None;
                    self.guests.still.moved(&self.sandbox, pause).await;
                    pause = (pause * 2).min(LOOK_EVERY);
                }
                // It is on its way out.
                GuestError::Bus(BusError::WrongState(_)) => return Err(error),
                error => {
                    let since = *lost_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > REATTACH_FOR {
                        return Err(error);
                    }
                    tokio::time::sleep(REATTACH_EVERY).await;
                }
            }
        }
    }

    async fn ask(&mut self, wake: Wake, wait: Duration, limit: Duration) -> Result<LogPage, GuestError> {
        let request = Request::Log {
            position: self.position,
            life: self.life,
            session: self.session.clone(),
            wait_ms: wait.as_millis() as u64,
        };
        let mut last = String::new();
        for attempt in 0..ATTEMPTS {
            let mut greeted = match self.held.take() {
                Some(greeted) => greeted,
                None if attempt == 0 => self.guests.connect(&self.sandbox, wake).await?,
                None => {
                    self.guests.drop_idle(&self.sandbox);
                    self.guests.open(&self.sandbox, wake).await?
                }
            };
            match greeted.client.log(&request, limit).await {
                Ok(page) => {
                    self.held = Some(greeted);
                    (self.life, self.position) = (page.end.life, page.end.next);
                    return Ok(page);
                }
                Err(ClientError::Guest(failure)) => {
                    self.guests.put(&self.sandbox, greeted.client, greeted.pulse);
                    return Err(GuestError::Refused(failure));
                }
                Err(error) => last = error.to_string(),
            }
        }
        Err(GuestError::Lost(last))
    }
}

impl Drop for LogReader {
    fn drop(&mut self) {
        if let Some(greeted) = self.held.take() {
            self.guests.put(&self.sandbox, greeted.client, greeted.pulse);
        }
    }
}
