//! The lines of a log on their way to a client.
//!
//! Owns: the size of pieces, signs of life. Refuses to know: which lines are wanted.

use bytes::Bytes;
use pandastack_protocol::{LogPage, LogPart};
use tokio::time::Instant;

use super::{Pieces, exec::KEEP_ALIVE_EVERY};
use crate::{
    guest::{GuestError, LogReader},
    lines::{Line, Lines},
    output,
};

/// Text is sent in pieces of about this size.
const PIECE: usize = 32 << 10;

/// The piece of a part that lies before a position.
pub fn before(mut part: LogPart, until: u64) -> Option<LogPart> {
    let room = usize::try_from(until.saturating_sub(part.position)).unwrap_or(usize::MAX);
    part.bytes.truncate(room);
    (!part.bytes.is_empty()).then_some(part)
}

/// How a line is shown.
pub type Render = fn(&str, &mut String);

/// The near end of an answer.
#[derive(Debug)]
pub struct Told {
    /// Where it goes.
    pub to: Pieces,
    render: Render,
    buffer: String,
    said: Instant,
}

impl Told {
    /// Nothing is told yet.
    pub fn new(to: Pieces, render: Render) -> Self {
        Self { to, render, buffer: String::new(), said: Instant::now() }
    }

    /// Whether it was silent for long.
    pub fn is_silent(&self) -> bool {
        self.said.elapsed() > KEEP_ALIVE_EVERY
    }

    /// Gathers a line.
    pub fn line(&mut self, line: &Line) {
        (self.render)(&line.text, &mut self.buffer);
    }

    /// Sends what was gathered; `None` when nobody reads.
    pub async fn flush(&mut self) -> Option<()> {
        if !self.buffer.is_empty() {
            self.to.send(Bytes::from(std::mem::take(&mut self.buffer))).await?;
            self.said = Instant::now();
        }
        Some(())
    }

    /// Tells the lines of a page that lie before a position, as far as they are wanted; `None` when nobody reads.
    pub async fn page(
        &mut self,
        lines: &mut Lines,
        page: LogPage,
        until: u64,
        takes: impl Fn(&Line) -> bool,
    ) -> Option<()> {
        for mut part in page.parts.into_iter().filter_map(|part| before(part, until)) {
            while let Some(line) = lines.next(&mut part) {
                if takes(&line) {
                    self.line(&line);
                }
                if self.buffer.len() >= PIECE {
                    self.flush().await?;
                }
            }
        }
        Some(())
    }

    /// The next page, with a sign of life now and then; `None` when nobody listens or nothing comes any more.
    pub async fn await_page(&mut self, reader: &mut LogReader) -> Option<LogPage> {
        let mut page = std::pin::pin!(reader.follow());
        loop {
            let page = tokio::select! {
                page = &mut page => page,
                () = self.alive() => {
                    self.keep_alive().await?;
                    continue;
                }
                () = self.to.closed() => return None,
            };
            return match page {
                Ok(page) => Some(page),
                Err(GuestError::Bus(
                    pandastack_bus::Error::NotFound(_) | pandastack_bus::Error::WrongState(_),
                )) => None,
                // Whoever follows must not take this for the end of the sandbox.
                Err(_) => {
                    self.to.cut();
                    None
                }
            };
        }
    }

    /// Completes when a sign of life is due.
    pub async fn alive(&self) {
        tokio::time::sleep_until(self.said + KEEP_ALIVE_EVERY).await;
    }

    /// A sign of life; `None` when nobody reads.
    pub async fn keep_alive(&mut self) -> Option<()> {
        self.said = Instant::now();
        self.to.send(output::KEEP_ALIVE).await
    }
}

#[cfg(test)]
mod tests {
    use pandastack_protocol::LogStream;

    use super::*;

    #[test]
    fn a_part_ends_where_reading_does() {
        let part = |position| LogPart {
            position,
            unix_ms: 0,
            session: String::new(),
            stream: LogStream::Stdout,
            bytes: Bytes::from_static(b"abc"),
        };
        assert_eq!(before(part(0), 9).unwrap().bytes, "abc");
        assert_eq!(before(part(7), 9).unwrap().bytes, "ab");
        assert_eq!(before(part(9), 9), None);
    }
}
