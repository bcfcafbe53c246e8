//! The serial consoles of sandboxes, as the journal of their namespace has them.
//!
//! Owns: which lines a machine's own are, how many read at once, and that a reader ends. The lines go from journalctl to whoever
//! asked, through a pipe; nothing of them passes this daemon. Refuses to know: who may read.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use pandastack_bus::{Error, Result, SandboxId};
use tokio::process::{Child, Command};

/// Lines of the past at most.
pub const LINES: u32 = 10_000;
/// Readers at once, of one workspace and of all: each is a process.
const READERS_EACH: usize = 4;
const READERS: usize = 32;
/// Where the units' `LogNamespace=` puts what they write.
const NAMESPACE: &str = "sandboxes";
const JOURNALCTL: &str = "/usr/bin/journalctl";
/// How long reading the past may take.
const PAST: Duration = Duration::from_secs(60);
/// How long the last lines of a machine that has ended may take.
const LAST: Duration = Duration::from_secs(2);

/// What is wanted of a console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// The last so many lines.
    pub lines: u32,
    /// Not older than this, Unix seconds.
    pub since: u64,
    /// What comes, too.
    pub follow: bool,
}

/// Who reads at the moment.
#[derive(Debug, Default)]
pub struct Consoles(Arc<Mutex<HashMap<String, usize>>>);

/// A place among the readers.
#[derive(Debug)]
pub struct Place {
    readers: Arc<Mutex<HashMap<String, usize>>>,
    workspace: String,
}

impl Consoles {
    /// A place for one more reader.
    ///
    /// # Errors
    /// [`Error::NoCapacity`].
    pub fn enter(&self, workspace: &str) -> Result<Place> {
        let mut readers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = readers.values().sum();
        let own = readers.get(workspace).copied().unwrap_or_default();
        if own >= READERS_EACH || all >= READERS {
            return Err(Error::NoCapacity("too many consoles are read at once".into()));
        }
        readers.insert(workspace.to_owned(), own + 1);
        Ok(Place { readers: Arc::clone(&self.0), workspace: workspace.to_owned() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = readers.get_mut(&self.workspace) {
            *count -= 1;
            if *count == 0 {
                readers.remove(&self.workspace);
            }
        }
    }
}

/// Starts to read the console of a unit. The fields that are matched are the journal's own: no process can set them.
///
/// # Errors
/// The reader does not start.
pub fn read(unit: &str, id: &SandboxId, wanted: Wanted) -> Result<(OwnedFd, Child)> {
    let failed = |error: std::io::Error| Error::Internal(format!("the console cannot be read: {error}"));
    let (reader, writer) = std::io::pipe().map_err(failed)?;
    let child = Command::new(JOURNALCTL)
        .args(arguments(unit, id, wanted))
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    Ok((reader.into(), child))
}

fn arguments(unit: &str, id: &SandboxId, wanted: Wanted) -> Vec<String> {
    let mut arguments = vec![
        format!("--namespace={NAMESPACE}"),
        "--output=cat".into(),
        "--quiet".into(),
        "--no-pager".into(),
        format!("--lines={}", wanted.lines),
    ];
    if wanted.since > 0 {
        arguments.push(format!("--since=@{}", wanted.since));
    }
    if wanted.follow {
        arguments.push("--follow".into());
    }
    arguments.push(format!("_SYSTEMD_UNIT={unit}"));
    arguments.push(format!("SYSLOG_IDENTIFIER=sandbox-{id}"));
    arguments
}

/// Stays with a reader to its end: by itself, because nobody listens any more, or because `machine` has ended.
pub async fn attend(mut child: Child, wanted: Wanted, machine: impl Future<Output = ()>) {
    let over = async {
        if wanted.follow {
            machine.await;
            tokio::time::sleep(LAST).await;
        } else {
            tokio::time::sleep(PAST).await;
        }
    };
    tokio::select! {
        _ = child.wait() => {}
        () = over => {
            // It cannot fail to be killed; not being there any more is as good.
            let _ = child.kill().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_units_own_lines_are_read() {
        let id: SandboxId = "a".repeat(20).parse().unwrap_or_else(|_| SandboxId::random());
        let unit = crate::unit::unit_name(&id);
        let text = arguments(&unit, &id, Wanted { lines: 7, since: 5, follow: true }).join(" ");
        assert_eq!(
            text,
            format!(
                "--namespace=sandboxes --output=cat --quiet --no-pager --lines=7 --since=@5 --follow \
                 _SYSTEMD_UNIT=pandastack-sandbox@{id}.service SYSLOG_IDENTIFIER=sandbox-{id}"
            )
        );
        let plain = arguments(&unit, &id, Wanted { lines: 7, since: 0, follow: false }).join(" ");
        assert!(!plain.contains("since") && !plain.contains("follow"), "{plain}");
    }

    #[test]
    fn nobody_takes_all_places() {
        let consoles = Consoles::default();
        let mut places: Vec<Place> =
            (0..READERS_EACH).map(|_| consoles.enter("greedy")).collect::<Result<_>>().unwrap_or_default();
        assert_eq!(places.len(), READERS_EACH);
        assert!(matches!(consoles.enter("greedy"), Err(Error::NoCapacity(_))));
        places.extend(consoles.enter("other"));
        places.drain(..2);
        assert!(consoles.enter("greedy").is_ok());
        places.clear();
        assert!(consoles.0.lock().is_ok_and(|readers| readers.is_empty()));
    }

    #[tokio::test]
    async fn a_reader_ends_with_its_machine() {
        let start = std::time::Instant::now();
        let Ok(child) = Command::new("/bin/sleep").arg("100").kill_on_drop(true).spawn() else { return };
        attend(child, Wanted { lines: 1, since: 0, follow: true }, std::future::ready(())).await;
        assert!(start.elapsed() < Duration::from_secs(30));
    }
}
