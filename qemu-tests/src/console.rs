//! The appliance's serial console, which QEMU writes into a file.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A console log on disk.
#[derive(Debug, Clone)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    /// The log at this path, which need not exist yet.
    #[must_use]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Everything printed so far, without colours.
    #[must_use]
    pub fn text(&self) -> String {
        plain(&std::fs::read(&self.path).unwrap_or_default())
    }

    /// The last line with text on it, at most `width` characters of it.
    #[must_use]
    pub fn last_line(&self, width: usize) -> String {
        let tail = self.tail(4096).unwrap_or_default();
        let text = plain(&tail);
        let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
        line.chars().take(width).collect()
    }

    /// What a kernel that gave up printed after the first `skip` bytes of [`Self::text`], from its first complaint on, at most
    /// `most` lines of it; nothing while no panic is there whole.
    #[must_use]
    pub fn panic(&self, skip: usize, most: usize) -> Option<String> {
        panic_in(self.text().get(skip..)?, most)
    }

    /// Waits until the log contains a text.
    ///
    /// # Errors
    /// At the deadline, with the last line that was printed.
    pub fn wait_for(&self, text: &str, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        while !self.text().contains(text) {
            if Instant::now() >= deadline {
                bail!(
                    "the console never showed {text:?} in {within:?}; last line: {:?}",
                    self.last_line(200)
                );
            }
            sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Copies the log to `sink` as it grows, until `alive` says no.
    ///
    /// # Errors
    /// When the log cannot be read or the sink cannot be written.
    pub fn follow(&self, sink: &mut impl std::io::Write, alive: impl Fn() -> bool) -> Result<()> {
        let mut file = File::open(&self.path)?;
        loop {
            // Asked before the read: what was printed up to the end is shown, too.
            let last_round = !alive();
            std::io::copy(&mut file, sink)?;
            sink.flush()?;
            if last_round {
                return Ok(());
            }
            sleep(Duration::from_millis(200));
        }
    }

    fn tail(&self, bytes: u64) -> Result<Vec<u8>> {
        let mut file = File::open(&self.path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut tail = Vec::new();
        file.take(bytes).read_to_end(&mut tail)?;
        Ok(tail)
    }
}

/// How Linux begins to say what is wrong; the rest is its report.
const COMPLAINTS: [&str; 6] =
    ["BUG: ", "Oops: ", "general protection fault", "divide error", "stack segment", "Kernel panic"];
/// The last line of a panic: where the kernel restarts, and where it does not.
const PANIC_ENDS: [&str; 2] = ["Rebooting in ", "---[ end Kernel panic"];

fn panic_in(text: &str, most: usize) -> Option<String> {
    let lines: Vec<&str> = text.lines().collect();
    let end = lines.iter().position(|line| PANIC_ENDS.iter().any(|end| line.contains(end)))?;
    let start = lines[..=end]
        .iter()
        .position(|line| COMPLAINTS.iter().any(|complaint| line.contains(complaint)))
        .unwrap_or(end);
    Some(lines[start..=end].iter().take(most).copied().collect::<Vec<_>>().join("\n"))
}

/// Text without terminal escape sequences and carriage returns.
fn plain(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out = String::with_capacity(text.len());
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        match c {
            '\u{1b}' => {
                // CSI: ESC [ parameters, then one final letter. Anything else: ESC and one character.
                if characters.next() == Some('[') {
                    for c in characters.by_ref() {
                        if ('@'..='~').contains(&c) {
                            break;
                        }
                    }
                }
            }
            '\r' => {}
            c if c.is_control() && c != '\n' && c != '\t' => {}
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_go() {
        assert_eq!(
            plain(b"[\x1b[0;32m  OK  \x1b[0m] Started \x1b[0;1;39mx\x1b[0m\r\n\x07"),
            "[  OK  ] Started x\n"
        );
        assert_eq!(plain(b"\x1b"), "");
        assert_eq!(plain(b"\x1b[1;2"), "");
    }

    #[test]
    fn a_panic_is_told_from_its_first_complaint() {
        let report = "fine\n[5.1] BUG: unable to handle page fault\n[5.2] RIP: here\n[5.3] Kernel panic - not syncing: Fatal exception in interrupt\n";
        assert_eq!(panic_in(report, 9), None, "not printed to its end yet");
        for end in ["Rebooting in 10 seconds..", "---[ end Kernel panic - not syncing: Fatal exception ]---"]
        {
            let whole = format!("{report}[5.4] {end}\nafter\n");
            assert_eq!(panic_in(&whole, 9).map(|told| told.lines().count()), Some(4));
            assert_eq!(panic_in(&whole, 1).as_deref(), Some("[5.1] BUG: unable to handle page fault"));
        }
    }

    #[test]
    fn last_line_and_wait() {
        let directory = tempfile::tempdir().expect("directory");
        let console = Console::at(directory.path().join("log"));
        assert_eq!(console.last_line(10), "");
        std::fs::write(directory.path().join("log"), "one\ntwo three\r\n\n").expect("write");
        assert_eq!(console.last_line(5), "two t");
        console.wait_for("three", Duration::ZERO).expect("there");
        assert!(console.wait_for("four", Duration::from_millis(10)).is_err());
    }
}
