//! What was uploaded for builds: one file of bytes for each, and beside it which part of it is what.
//!
//! Owns: `spool/` in the daemon's state. No name of a tenant is a path here: a part is a range of the one file.

use std::{
    io::{self, SeekFrom},
    path::{Path, PathBuf},
};

use pandastack_daemon::files;
use serde::{Deserialize, Serialize};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt, BufWriter},
};

/// Bytes of the list of parts.
const LIST_LIMIT: u64 = 4 << 20;

/// An uploaded file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its name in the form: a relative path of a context, checked.
    pub path: String,
    /// Where it begins.
    pub offset: u64,
    /// Its bytes.
    pub size: u64,
}

/// What a build has to start from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upload {
    /// The Dockerfile, if it is built from one.
    pub dockerfile: Option<String>,
    /// The archive, or the files of the context.
    pub parts: Vec<Part>,
}

/// The folder of all of it.
#[derive(Debug, Clone)]
pub struct Spool(PathBuf);

/// An upload that is being written; removed when it is dropped, unless it was kept.
#[derive(Debug)]
pub struct Incoming {
    spool: Spool,
    id: String,
    file: BufWriter<File>,
    length: u64,
    kept: bool,
}

impl Spool {
    /// In this folder, which is there.
    pub fn new(folder: &Path) -> Self {
        Self(folder.to_owned())
    }

    fn data(&self, id: &str) -> PathBuf {
        self.0.join(format!("{id}.data"))
    }

    fn list(&self, id: &str) -> PathBuf {
        self.0.join(format!("{id}.json"))
    }

    /// Begins an upload.
    ///
    /// # Errors
    /// It cannot be made.
    pub async fn begin(&self, id: &str) -> io::Result<Incoming> {
        let mut options = tokio::fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(self.data(id)).await?;
        let file = BufWriter::with_capacity(256 << 10, file);
        Ok(Incoming { spool: self.clone(), id: id.to_owned(), file, length: 0, kept: false })
    }

    /// What a build has.
    ///
    /// # Errors
    /// It is gone or damaged.
    pub async fn read(&self, id: &str) -> io::Result<Upload> {
        let path = self.list(id);
        let read = move || {
            let bytes = files::read_limited(&path, LIST_LIMIT)?;
            let bytes = bytes.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
            serde_json::from_slice(&bytes).map_err(io::Error::from)
        };
        tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?
    }

    /// The bytes of a part, to be read to their end.
    ///
    /// # Errors
    /// They are gone.
    pub async fn open(&self, id: &str, part: &Part) -> io::Result<tokio::io::Take<File>> {
        let mut file = File::open(self.data(id)).await?;
        file.seek(SeekFrom::Start(part.offset)).await?;
        Ok(file.take(part.size))
    }

    /// Removes what a build had. What stays is removed at the next start.
    pub fn remove(&self, id: &str) {
        for path in [self.list(id), self.data(id)] {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!("{}: {error}", path.display());
                }
                _ => {}
            }
        }
    }

    /// Removes what belongs to none of these builds.
    ///
    /// # Errors
    /// The folder cannot be read.
    pub fn sweep(&self, needed: impl Fn(&str) -> bool) -> io::Result<()> {
        sweep(&self.0, needed)
    }
}

/// Removes the files in a folder whose names, up to their first dot, are not needed.
///
/// # Errors
/// The folder cannot be read.
pub fn sweep(folder: &Path, needed: impl Fn(&str) -> bool) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.split('.').next()).unwrap_or_default();
        if !needed(id) {
            tracing::info!("{}: nobody's, removed", entry.path().display());
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

impl Incoming {
    /// More bytes.
    ///
    /// # Errors
    /// The disk does not take them.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes).await?;
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Makes all of it durable. It is kept from now on.
    ///
    /// # Errors
    /// The disk does not take it; nothing is kept.
    pub async fn finish(mut self, upload: &Upload) -> io::Result<()> {
        self.file.flush().await?;
        self.file.get_ref().sync_all().await?;
        let list = serde_json::to_vec(upload).map_err(io::Error::from)?;
        let path = self.spool.list(&self.id);
        // Its fsync of the folder is for the data's name, too.
        let written = tokio::task::spawn_blocking(move || files::write_atomic(&path, &list, 0o600)).await;
        written.map_err(io::Error::other)??;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.kept {
            self.spool.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn an_upload_is_kept_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::new(dir.path());
        let mut incoming = spool.begin("one").await.unwrap();
        incoming.write(b"torn").await.unwrap();
        drop(incoming);
        assert_eq!(names(dir.path()), [""; 0]);

        let mut incoming = spool.begin("two").await.unwrap();
        incoming.write(b"abcdef").await.unwrap();
        let upload = Upload {
            dockerfile: Some("FROM base".into()),
            parts: vec![Part { path: "a/b".into(), offset: 2, size: 3 }],
        };
        assert_eq!(incoming.length(), 6);
        incoming.finish(&upload).await.unwrap();

        assert_eq!(spool.read("two").await.unwrap(), upload);
        let mut text = String::new();
        spool.open("two", &upload.parts[0]).await.unwrap().read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "cde");
        spool.sweep(|id| id == "two").unwrap();
        assert_eq!(names(dir.path()), ["two.data", "two.json"]);
        spool.sweep(|id| id == "three").unwrap();
        assert_eq!(names(dir.path()), [""; 0]);
        assert!(spool.read("two").await.is_err());
    }
}
