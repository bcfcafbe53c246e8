//! The log of a build: lines from bytes, a bounded file, and what of it goes to clients.
//!
//! Owns: all three. Refuses to know who writes. The beginning is kept and the rest is cut: it says what was built. Lines of
//! the appliance's own are always written, they are few.

use std::{
    io::{self, SeekFrom},
    path::Path,
};

use tokio::{
    fs::{File, OpenOptions},
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt},
};

use crate::output::Utf8;

/// Bytes of a log.
pub const LIMIT: u64 = 4 << 20;
/// Bytes of a line; what is longer goes on in the next one.
const LINE: usize = 2048;
/// Bytes read at once.
const PAGE: usize = 64 << 10;

/// Makes lines of what a program writes to one of its streams.
#[derive(Debug, Default)]
pub struct Lines {
    text: Utf8,
    line: String,
    /// The last character was a return that ended a line: a line feed behind it belongs to it.
    returned: bool,
}

impl Lines {
    /// The lines that are complete with these bytes.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let text = self.text.push(bytes);
        self.split(&text)
    }

    /// What is left at the end.
    pub fn finish(&mut self) -> Vec<String> {
        let text = self.text.finish();
        let mut lines = self.split(&text);
        if !self.line.is_empty() {
            lines.push(std::mem::take(&mut self.line));
        }
        lines
    }

    fn split(&mut self, text: &str) -> Vec<String> {
        let mut lines = Vec::new();
        for c in text.chars() {
            let returned = std::mem::take(&mut self.returned);
            match c {
                '\n' if returned => {}
                '\n' => lines.push(std::mem::take(&mut self.line)),
                '\r' if self.line.is_empty() => {}
                // Each state of a progress bar is a line.
                '\r' => {
                    self.returned = true;
                    lines.push(std::mem::take(&mut self.line));
                }
                c if c.is_control() && c != '\t' => {}
                c => self.line.push(c),
            }
            if self.line.len() >= LINE {
                lines.push(std::mem::take(&mut self.line));
            }
        }
        lines
    }
}

/// A line as clients may get it. They take some lines for more than text: an object of JSON may be an error, and two texts
/// end the stream.
pub fn harmless(line: &str) -> String {
    let trimmed = line.trim();
    let dangerous = trimmed == "end" || trimmed.starts_with(['{', '[']) || line.contains("event: done");
    if dangerous { format!("| {line}") } else { line.to_owned() }
}

/// A log that is being written.
#[derive(Debug)]
pub struct Writer {
    file: File,
    length: u64,
    cut: bool,
}

impl Writer {
    /// Goes on with the log at `path`, or begins it.
    ///
    /// # Errors
    /// It cannot be opened.
    pub async fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(path).await?;
        let length = file.metadata().await?.len();
        let mut writer = Self { length, cut: length >= LIMIT, file: file.try_clone().await? };
        // A crash may have torn the last line.
        let mut last = [b'\n'];
        if length > 0 {
            file.seek(SeekFrom::Start(length - 1)).await?;
            file.read_exact(&mut last).await?;
        }
        if last != [b'\n'] {
            writer.write("\n").await?;
        }
        Ok(writer)
    }

    /// Adds lines of the program's, as far as there is room.
    ///
    /// # Errors
    /// The disk does not take them.
    pub async fn add(&mut self, lines: &[String]) -> io::Result<()> {
        let mut text = String::new();
        for line in lines {
            if self.cut {
                break;
            }
            if self.length + (text.len() + line.len()) as u64 >= LIMIT {
                self.cut = true;
                text.push_str(&format!("[the log has {} MiB; the rest is left out]\n", LIMIT >> 20));
                break;
            }
            text.push_str(line);
            text.push('\n');
        }
        self.write(&text).await
    }

    /// Adds a line of the appliance's own.
    ///
    /// # Errors
    /// The disk does not take it.
    pub async fn note(&mut self, line: &str) -> io::Result<()> {
        self.write(&format!("==> {}\n", line.replace(['\n', '\r'], " "))).await
    }

    async fn write(&mut self, text: &str) -> io::Result<()> {
        self.file.write_all(text.as_bytes()).await?;
        self.file.flush().await?;
        self.length += text.len() as u64;
        Ok(())
    }
}

/// The whole lines of a log from `position` on, some of them, and where they end. None when there is no log.
///
/// # Errors
/// It cannot be read.
pub async fn read(path: &Path, position: u64) -> io::Result<(Vec<String>, u64)> {
    let mut file = match File::open(path).await {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), position)),
        Err(error) => return Err(error),
    };
    file.seek(SeekFrom::Start(position)).await?;
    let mut bytes = Vec::with_capacity(PAGE);
    file.take(PAGE as u64).read_to_end(&mut bytes).await?;
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let text = String::from_utf8_lossy(&bytes[..whole]);
    Ok((text.lines().map(str::to_owned).collect(), position + whole as u64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(parts: &[&[u8]]) -> Vec<String> {
        let mut splitter = Lines::default();
        let mut all: Vec<String> = parts.iter().flat_map(|part| splitter.push(part)).collect();
        all.extend(splitter.finish());
        all
    }

    #[test]
    fn lines_end_where_programs_end_them() {
        assert_eq!(lines(&[b"a\nb\r\nc\rd"]), ["a", "b", "c", "d"]);
        assert_eq!(lines(&[b"\xc3", b"\xa9\x00\x1b[0m\t!\n", b"\xff"]), ["é[0m\t!", "\u{FFFD}"]);
        assert_eq!(
            lines(&[&[b'x'; LINE * 2 + 1]]).iter().map(String::len).collect::<Vec<_>>(),
            [LINE, LINE, 1]
        );
        assert!(lines(&[b""]).is_empty());
    }

    #[test]
    fn what_clients_take_for_more_than_text_is_marked() {
        for (line, shown) in [
            ("end", "| end"),
            (" end\t", "|  end\t"),
            ("{\"error\":\"x\"}", "| {\"error\":\"x\"}"),
            ("say event: done", "| say event: done"),
            ("the end", "the end"),
            ("", ""),
        ] {
            assert_eq!(harmless(line), shown);
        }
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_bytes_come(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0..200_usize) {
            let at = at.min(bytes.len());
            prop_assert_eq!(lines(&[&bytes]), lines(&[&bytes[..at], &bytes[at..]]));
            for line in lines(&[&bytes]) {
                prop_assert!(line.len() < LINE + 4 && !line.contains(['\n', '\r', '\0']));
            }
        }
    }

    #[tokio::test]
    async fn a_log_keeps_its_beginning_and_is_read_in_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        assert_eq!(read(&path, 0).await.unwrap(), (Vec::new(), 0));
        let mut log = Writer::open(&path).await.unwrap();
        log.note("begins").await.unwrap();
        log.add(&vec!["x".repeat(1000); 5000]).await.unwrap();
        log.add(&["more".into()]).await.unwrap();
        log.note("ends").await.unwrap();
        drop(log);

        let (mut all, mut position) = (Vec::new(), 0);
        loop {
            let (some, next) = read(&path, position).await.unwrap();
            if some.is_empty() {
                break;
            }
            all.extend(some);
            position = next;
        }
        assert!(std::fs::metadata(&path).unwrap().len() < LIMIT + 1000);
        assert_eq!(all.first().unwrap(), "==> begins");
        assert!(all[all.len() - 2].contains("4 MiB"), "{:?}", all[all.len() - 2]);
        assert_eq!(all.last().unwrap(), "==> ends");

        std::fs::write(&path, "one\ntorn").unwrap();
        assert_eq!(read(&path, 0).await.unwrap(), (vec!["one".to_owned()], 4));
        Writer::open(&path).await.unwrap().note("two").await.unwrap();
        assert_eq!(read(&path, 4).await.unwrap().0, ["torn", "==> two"]);
    }
}
