//! All sessions: starting each id once, finding, forgetting.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use pandastack_protocol::{Code, Defaults, Exec, Exit, Failure, SessionInfo};
use tokio::{sync::watch, time::Instant};

use super::{
    budget::Budget,
    cgroup::Cgroups,
    driver,
    exec::{self, Start},
    log::{Log, Writer},
    replay::Stream,
    session::Session,
};

/// Sessions that run at once.
const RUNNING: usize = 512;
/// Sessions that are remembered, ended ones included.
const REMEMBERED: usize = 1024;
/// How long an ended session is remembered.
const KEEP: Duration = Duration::from_secs(60);
/// The same for a detached one.
const KEEP_DETACHED: Duration = Duration::from_secs(3600);

/// The table of sessions.
#[derive(Debug)]
pub struct Sessions {
    cgroups: Arc<Cgroups>,
    budget: Arc<Budget>,
    log: Arc<Log>,
    table: Mutex<HashMap<String, Slot>>,
}

#[derive(Debug, Clone)]
enum Slot {
    /// On its way.
    Starting {
        /// Closed when it is decided.
        decided: watch::Receiver<()>,
        /// The guest became another one meanwhile.
        abandoned: bool,
    },
    There(Arc<Session>),
}

impl Sessions {
    /// No sessions yet, cgroups below `cgroups`. What they write goes into `log`, too.
    pub fn new(cgroups: Option<PathBuf>, log: Arc<Log>) -> Self {
        Self { cgroups: Cgroups::new(cgroups), budget: Arc::default(), log, table: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a session, or finds the one of that id: a command never runs twice.
    pub async fn start(&self, exec: Exec, defaults: Arc<Defaults>) -> Result<Arc<Session>, Failure> {
        let id = exec.session.clone();
        if id.len() != 20 || !id.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit()) {
            return Err(failure(Code::Invalid, "a session id is 20 characters of a-z and 0-9"));
        }
        let decided = loop {
            let mut starting = {
                let mut table = self.lock();
                match table.get(&id) {
                    Some(Slot::There(session)) => return Ok(session.clone()),
                    Some(Slot::Starting { decided, .. }) => decided.clone(),
                    None => {
                        sweep(&mut table);
                        let running = table.values().filter(|slot| slot.runs()).count();
                        if running >= RUNNING || table.len() >= REMEMBERED {
                            return Err(failure(Code::Busy, "too many sessions"));
                        }
                        let (decided, starting) = watch::channel(());
                        let slot = Slot::Starting { decided: starting, abandoned: false };
                        table.insert(id.clone(), slot);
                        break Decided { sessions: self, id: &id, _decided: decided };
                    }
                }
            };
            // An error means that the other has decided.
            let _ = starting.changed().await;
        };
        let session = self.run(exec, defaults).await?;
        let reserved = self.lock().insert(id.clone(), Slot::There(session.clone()));
        if matches!(reserved, Some(Slot::Starting { abandoned: true, .. })) {
            session.abandon();
        }
        drop(decided);
        Ok(session)
    }

    async fn run(&self, exec: Exec, defaults: Arc<Defaults>) -> Result<Arc<Session>, Failure> {
        let cgroups = self.cgroups.clone();
        let task = tokio::task::spawn_blocking(move || {
            let start = exec::start(&exec, &defaults, &cgroups);
            (exec, start)
        });
        let (exec, start) =
            task.await.map_err(|error| failure(Code::Internal, &format!("starting a program: {error}")))?;
        // A terminal's output is for who sits at it: full of sequences, and of what is typed.
        let logged = exec.tty.is_none() && !exec.unlogged;
        let writer = logged.then(|| Arc::new(Writer::new(self.log.clone(), &exec.session)));
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        match start? {
            Start::NotRun(code, line) => {
                let session = Session::new(&exec, 0, None, self.budget.clone(), writer, unix);
                session.output(Stream::Stderr, line.as_bytes());
                session.finish(Exit { code, ..Exit::default() });
                Ok(session)
            }
            Start::Running(running) => {
                let (driver, group, pid) = driver::prepare(running, exec.tty.is_some())
                    .map_err(|error| failure(Code::Internal, &format!("watching a program: {error}")))?;
                let session = Session::new(&exec, pid, Some(group), self.budget.clone(), writer, unix);
                if let Some(group) = session.group() {
                    let timeout = Duration::from_millis(exec.timeout_ms);
                    tokio::spawn(driver.run(session.clone(), group, timeout));
                }
                Ok(session)
            }
        }
    }

    /// The session of an id.
    pub fn find(&self, id: &str) -> Result<Arc<Session>, Failure> {
        match self.lock().get(id) {
            Some(Slot::There(session)) => Ok(session.clone()),
            _ => Err(failure(Code::NotFound, "there is no such session")),
        }
    }

    /// All sessions, oldest first.
    pub fn list(&self) -> Vec<SessionInfo> {
        let mut table = self.lock();
        sweep(&mut table);
        let mut list: Vec<SessionInfo> =
            table.values().filter_map(Slot::session).map(|session| session.info()).collect();
        list.sort_by(|a, b| (a.started, &a.session).cmp(&(b.started, &b.session)));
        list
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.lock().values().filter(|slot| slot.runs()).count()
    }

    /// The guest is a copy of another one: what runs here was somebody else's, and runs on detached.
    pub fn abandon(&self) {
        for slot in self.lock().values_mut() {
            match slot {
                Slot::Starting { abandoned, .. } => *abandoned = true,
                Slot::There(session) => session.abandon(),
            }
        }
    }

    /// The guest slept, and is still itself: hosts get time to come back for what runs.
    pub fn renew_grace(&self) {
        self.lock().values().filter_map(Slot::session).for_each(|session| session.renew_grace());
    }

    /// Forgets what ended long ago.
    pub fn sweep(&self) {
        sweep(&mut self.lock());
    }
}

impl Slot {
    fn session(&self) -> Option<&Arc<Session>> {
        match self {
            Self::Starting { .. } => None,
            Self::There(session) => Some(session),
        }
    }

    fn runs(&self) -> bool {
        self.session().is_none_or(|session| session.exit().is_none())
    }
}

/// Takes a reservation back, unless a session has replaced it; tells who waits.
struct Decided<'a> {
    sessions: &'a Sessions,
    id: &'a str,
    _decided: watch::Sender<()>,
}

impl Drop for Decided<'_> {
    fn drop(&mut self) {
        let mut table = self.sessions.lock();
        if matches!(table.get(self.id), Some(Slot::Starting { .. })) {
            table.remove(self.id);
        }
    }
}

/// Removes ended sessions whose time is up and, where there are too many, those that ended first.
fn sweep(table: &mut HashMap<String, Slot>) {
    let now = Instant::now();
    table.retain(|_, slot| match slot.session().and_then(|session| Some((session, session.exit()?.1))) {
        Some((session, ended)) => now < ended + if session.is_detached() { KEEP_DETACHED } else { KEEP },
        None => true,
    });
    while table.len() >= REMEMBERED {
        let ended = |slot: &Slot| slot.session().and_then(|session| session.exit()).map(|(_, at)| at);
        let Some((_, id)) = table.iter().filter_map(|(id, slot)| Some((ended(slot)?, id.clone()))).min()
        else {
            return;
        };
        table.remove(&id);
    }
}

fn failure(code: Code, message: &str) -> Failure {
    Failure { code, message: message.to_owned() }
}
