//! Whom the host asks.
//!
//! Owns: reading `resolv.conf`, again when it changes. Refuses to know: how they are asked.

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::Mutex;

use crate::plan;

/// Resolvers that are used of a file, as by everyone else.
const MOST: usize = 3;
/// Largest file that is read, bytes.
const LARGEST: u64 = 64 * 1024;
/// How long what was read is used before the files are looked at again.
const FRESH: Duration = Duration::from_secs(1);

/// The host's resolvers, always as the files say now.
#[derive(Debug)]
pub(super) struct Resolvers {
    files: Vec<PathBuf>,
    port: u16,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    looked: Option<Instant>,
    marks: Vec<Option<(SystemTime, u64)>>,
    list: Vec<SocketAddr>,
}

impl Resolvers {
    pub(super) fn new(files: Vec<PathBuf>, port: u16) -> Self {
        Self { files, port, known: Mutex::default() }
    }

    /// The resolvers of the first file that names any; none at all if there is no such file.
    pub(super) async fn current(&self) -> Vec<SocketAddr> {
        let mut known = self.known.lock().await;
        if known.looked.is_none_or(|looked| looked.elapsed() >= FRESH) {
            let marks = self.marks().await;
            if known.looked.is_none() || marks != known.marks {
                known.list = self.read().await;
                known.marks = marks;
                tracing::info!(resolvers = known.list.len(), "the host's resolvers were read");
            }
            known.looked = Some(Instant::now());
        }
        known.list.clone()
    }

    async fn marks(&self) -> Vec<Option<(SystemTime, u64)>> {
        let mut marks = Vec::new();
        for file in &self.files {
            let data = tokio::fs::metadata(file).await.ok();
            marks.push(data.and_then(|data| Some((data.modified().ok()?, data.len()))));
        }
        marks
    }

    async fn read(&self) -> Vec<SocketAddr> {
        for file in &self.files {
            let small = tokio::fs::metadata(file).await.is_ok_and(|data| data.len() <= LARGEST);
            let text =
                if small { tokio::fs::read_to_string(file).await.unwrap_or_default() } else { String::new() };
            let list = parse(&text);
            if !list.is_empty() {
                return list.into_iter().map(|address| SocketAddr::new(address, self.port)).collect();
            }
        }
        Vec::new()
    }
}

/// The addresses of the `nameserver` lines. Our own is none: it would ask itself.
fn parse(text: &str) -> Vec<IpAddr> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next()).flatten()
        })
        .filter_map(|word| word.parse().ok())
        .filter(|address| *address != IpAddr::V4(plan::HOST))
        .take(MOST)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_that_name_a_resolver_count() {
        let text = "# nameserver 1.1.1.1\nsearch test\nnameserver 192.0.2.1\nnameserver 10.200.0.1\nnameserver nonsense\n\
                    nameserver\n  nameserver\t2001:db8::1 # two\nnameserver 192.0.2.3\nnameserver 192.0.2.4\n";

        let expected: Vec<IpAddr> =
            ["192.0.2.1", "2001:db8::1", "192.0.2.3"].map(|word| word.parse().expect("an address")).to_vec();
        assert_eq!(parse(text), expected);
    }

    #[tokio::test]
    async fn a_change_of_the_file_is_seen() {
        let directory = tempfile::tempdir().expect("a directory");
        let (first, second) = (directory.path().join("first"), directory.path().join("second"));
        std::fs::write(&second, "nameserver 192.0.2.2\n").expect("written");
        let resolvers = Resolvers::new(vec![first.clone(), second], 53);
        assert_eq!(resolvers.current().await, [SocketAddr::from(([192, 0, 2, 2], 53))]);

        std::fs::write(&first, "nameserver 192.0.2.11\n").expect("written");
        tokio::time::sleep(FRESH + Duration::from_millis(50)).await;

        assert_eq!(resolvers.current().await, [SocketAddr::from(([192, 0, 2, 11], 53))]);
    }
}
