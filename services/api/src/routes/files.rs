//! Files of a guest, streamed in both directions.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use http::{HeaderMap, StatusCode, header};
use pandastack_protocol::{CHUNK, ClientError, Code, Entry, Failure, Request};
use pandastack_proxy::touch::Activity;
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, Reply, filters::BoxedFilter, reply::Response};

use super::{Answer, Pieces, UNREAD_FOR, finish, input, json, no_content, pieces, streamed};
use crate::{
    app::App,
    guest::{Greeted, GuestError, PART, Wake},
    input::{Input, linger},
    problem::Problem,
    wire::Error,
};

const NEW_FILE_MODE: u32 = 0o644;
/// How long a client may pause within an upload.
const CLIENT_PAUSE: Duration = Duration::from_secs(60);
/// How long the guest may take to bring a file onto its disk.
const FLUSH: Duration = Duration::from_secs(120);
/// Entries of a listing; more end it as an error.
const ENTRIES_LIMIT: usize = 1_000_000;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let fs = warp::path!("v1" / "sandboxes" / String / "fs");
    let read = fs.and(warp::get()).and(with(app)).and(input()).then(|id, a, i| finish(read(a, id, i)));
    let write = fs.and(warp::put()).and(with(app)).and(input()).then(|id, a, i| finish(write(a, id, i)));
    let delete = fs.and(warp::delete()).and(with(app)).and(input()).then(|id, a, i| finish(delete(a, id, i)));
    let dir = warp::path!("v1" / "sandboxes" / String / "fs" / "dir")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(dir(a, id, i)));
    let stat = warp::path!("v1" / "sandboxes" / String / "fs" / "stat")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(stat(a, id, i)));
    read.or(write).unify().or(dir).unify().or(stat).unify().or(delete).unify().boxed()
}

/// A file, directory or other node.
#[derive(Debug, Serialize, ToSchema)]
pub struct FileInfo {
    /// One path component; `/` for the root.
    pub name: String,
    /// Its whole path.
    pub path: String,
    /// Whether it is a directory; symbolic links are not followed.
    pub is_dir: bool,
    /// Bytes.
    pub size: u64,
    /// `f` file, `d` directory, `l` link, `p` pipe, `s` socket, `c` or `b` device.
    pub mode: String,
    /// Permission bits, four octal digits.
    pub permissions: String,
    /// Unix seconds.
    pub mtime: i64,
}

/// A directory.
#[derive(Debug, Serialize, ToSchema)]
pub struct Listing {
    /// Its path.
    pub path: String,
    /// What is in it.
    pub entries: Vec<FileInfo>,
}

/// A file that was written.
#[derive(Debug, Serialize, ToSchema)]
pub struct WrittenFile {
    /// Its path.
    pub path: String,
    /// Bytes written.
    pub bytes: u64,
}

/// Which file.
#[derive(Debug, serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PathQuery {
    /// Absolute path in the guest, without `..`.
    #[param(min_length = 1, max_length = 4096, pattern = "^/")]
    pub path: String,
}

/// Which directory.
#[derive(Debug, serde::Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DirQuery {
    /// Absolute path in the guest, without `..`; `/` when absent.
    #[param(required = false, min_length = 1, max_length = 4096, pattern = "^/")]
    pub path: Option<String>,
}

fn file_info(path: String, entry: Entry) -> FileInfo {
    FileInfo {
        name: entry.name,
        path,
        is_dir: entry.kind == 'd',
        size: entry.size,
        mode: entry.kind.to_string(),
        permissions: format!("{:04o}", entry.mode & 0o7777),
        mtime: entry.mtime,
    }
}

/// The last component of a path, `/` for the root.
fn last_component(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("/")
}

/// Path and owner of a request about a file; its sandbox counts as in use from here on.
async fn about(
    app: &Arc<App>,
    id: &str,
    input: &mut Input,
    default: Option<&str>,
) -> Result<(String, Activity), Problem> {
    let path = input.path(default)?;
    app.own(&input.caller, id).await?;
    Ok((path, app.touch.in_use(id)))
}

/// A guest's error as a problem; a sandbox that is gone is forgotten on the way.
fn refuse(app: &App, id: &str, error: GuestError, changing: bool) -> Problem {
    if matches!(&error, GuestError::Bus(pandastack_bus::Error::NotFound(_))) {
        app.forget(id);
        return Problem::no_sandbox(id);
    }
    if changing { error.changing(id) } else { error.reading(id) }
}

/// Reads a file.
#[utoipa::path(operation_id = "read_file", get, path = "/v1/sandboxes/{id}/fs", tag = "files",
    params(("id" = String, Path, description = "sandbox id"), PathQuery),
    responses((status = 200, content_type = "application/octet-stream", body = [u8]),
        (status = 404, description = "no such sandbox or file", body = Error), (status = 409, body = Error)))]
pub async fn read(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let (path, activity) = about(&app, &id, &mut input, None).await?;
    let (mut greeted, entry) =
        app.guests.read_file(&id, &path).await.map_err(|error| refuse(&app, &id, error, false))?;
    // The first bytes are looked at before the answer begins: files of /proc have no size and yet contents.
    let first = match greeted.client.read_chunk(PART).await {
        Ok(first) => first,
        Err(ClientError::Guest(failure)) => {
            app.guests.put(&id, greeted.client, greeted.pulse);
            return Err(Problem::from_file_failure(&failure));
        }
        Err(error) => return Err(refuse(&app, &id, GuestError::Lost(error.to_string()), false)),
    };
    let Some(first) = first else {
        app.guests.put(&id, greeted.client, greeted.pulse);
        let octets = header::HeaderValue::from_static("application/octet-stream");
        let mut response = Vec::<u8>::new().into_response();
        response.headers_mut().insert(header::CONTENT_TYPE, octets);
        return Ok(response);
    };
    let size = (entry.size > 0).then_some(entry.size);
    let (sender, parts) = pieces(UNREAD_FOR);
    tokio::spawn(download(app, id, greeted, first, size, sender, activity));
    let mut response = streamed(parts, "application/octet-stream");
    if let Some(size) = size {
        response.headers_mut().insert(header::CONTENT_LENGTH, size.into());
    }
    Ok(response)
}

async fn download(
    app: Arc<App>,
    id: String,
    mut greeted: Greeted,
    first: Bytes,
    size: Option<u64>,
    to: Pieces,
    _activity: Activity,
) {
    let mut left = size.unwrap_or(u64::MAX);
    let mut next = Some(first);
    loop {
        let Some(mut part) = next else { break };
        // A file that grew meanwhile ends where it was announced to end.
        part.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        left -= part.len() as u64;
        if !part.is_empty() && to.send(part).await.is_none() {
            return;
        }
        if left == 0 {
            // The rest is not wanted, so the conversation cannot go on, unless this was the end anyway.
            if matches!(greeted.client.read_chunk(PART).await, Ok(None)) {
                app.guests.put(&id, greeted.client, greeted.pulse);
            }
            return;
        }
        next = tokio::select! {
            part = greeted.client.read_chunk(PART) => match part {
                Ok(part) => part,
                Err(error) => {
                    tracing::info!(sandbox = %id, %error, "a download broke off");
                    to.cut();
                    return;
                }
            },
            () = to.closed() => return,
        };
    }
    if size.is_some() && left > 0 {
        // The file became shorter while it was read.
        to.cut();
    }
    app.guests.put(&id, greeted.client, greeted.pulse);
}

/// Writes a file whole or not at all; parents are made. The answer comes when it is on the guest's disk.
#[utoipa::path(operation_id = "write_file", put, path = "/v1/sandboxes/{id}/fs", tag = "files",
    params(("id" = String, Path, description = "sandbox id"), PathQuery),
    request_body(content = [u8], content_type = "application/octet-stream"),
    responses((status = 200, body = WrittenFile), (status = 404, body = Error), (status = 409, body = Error),
        (status = 411, description = "no Content-Length", body = Error),
        (status = 413, description = "larger than the space left; nothing was read", body = Error),
        (status = 507, description = "the disk became full", body = Error)))]
pub async fn write(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let outcome = upload(&app, &id, &mut input).await;
    if outcome.is_err() {
        linger(std::mem::replace(&mut input.body, Box::pin(futures_util::stream::empty())));
    }
    outcome
}

/// The length of the body, known before any of it is read. Neither a length nor chunks means that there is none.
fn announced(headers: &HeaderMap) -> Result<u64, Problem> {
    let length = match headers.get(header::CONTENT_LENGTH) {
        Some(value) => value.to_str().ok().and_then(|value| value.trim().parse().ok()),
        None if headers.contains_key(header::TRANSFER_ENCODING) => None,
        None => Some(0),
    };
    length.ok_or_else(|| {
        Problem::new(StatusCode::LENGTH_REQUIRED, "length_required", "Content-Length is required")
    })
}

async fn upload(app: &Arc<App>, id: &str, input: &mut Input) -> Answer {
    let size = announced(&input.headers)?;
    let (path, _activity) = about(app, id, input, None).await?;
    if path.ends_with('/') {
        return Err(Problem::invalid("`path` must name a file"));
    }
    let (mut greeted, ()) =
        app.guests.write_file(id, &path, size, NEW_FILE_MODE).await.map_err(|error| match error {
            GuestError::Refused(Failure { code: Code::NoSpace, message }) => {
                Problem::too_large(format!("{size} bytes do not fit: {message}"))
            }
            other => refuse(app, id, other, true),
        })?;
    let lost = |error: ClientError| match error {
        ClientError::Guest(failure) => Problem::from_file_failure(&failure),
        other => refuse(app, id, GuestError::Lost(other.to_string()), true),
    };
    let mut sent = 0u64;
    while sent < size {
        let part = match tokio::time::timeout(CLIENT_PAUSE, input.body.next()).await {
            Ok(Some(Ok(part))) => part,
            Ok(_) => return Err(Problem::invalid("the upload ended before its announced length")),
            Err(_) => {
                return Err(Problem::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "slow_upload",
                    "the upload paused too long",
                ));
            }
        };
        sent += part.len() as u64;
        if sent > size {
            return Err(Problem::invalid("the upload is longer than announced"));
        }
        greeted.client.write_chunk(&part, PART).await.map_err(lost)?;
    }
    let written = match greeted.client.write_end(FLUSH).await {
        Ok(written) => written,
        Err(ClientError::Guest(failure)) => {
            app.guests.put(id, greeted.client, greeted.pulse);
            return Err(Problem::from_file_failure(&failure));
        }
        Err(error) => return Err(lost(error)),
    };
    app.guests.put(id, greeted.client, greeted.pulse);
    Ok(json(StatusCode::OK, &WrittenFile { path, bytes: written.bytes }))
}

/// Deletes a file, or a directory with everything in it.
#[utoipa::path(operation_id = "delete_file", delete, path = "/v1/sandboxes/{id}/fs", tag = "files",
    params(("id" = String, Path, description = "sandbox id"), PathQuery),
    responses((status = 204), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn delete(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let (path, _activity) = about(&app, &id, &mut input, None).await?;
    if last_component(&path) == "/" {
        return Err(Problem::invalid("the root directory cannot be deleted"));
    }
    match app.guests.call::<serde::de::IgnoredAny>(&id, &Request::Delete { path }, Wake::Yes).await {
        Ok(_) => Ok(no_content()),
        // An attempt before this one was lost after it had done its work.
        Err((GuestError::Refused(Failure { code: Code::NotFound, .. }), true)) => Ok(no_content()),
        Err((error, _)) => Err(refuse(&app, &id, error, true)),
    }
}

/// What a path is.
#[utoipa::path(operation_id = "stat_file", get, path = "/v1/sandboxes/{id}/fs/stat", tag = "files",
    params(("id" = String, Path, description = "sandbox id"), PathQuery),
    responses((status = 200, body = FileInfo), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn stat(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let (path, _activity) = about(&app, &id, &mut input, None).await?;
    let (mut entry, _) = app
        .guests
        .call::<Entry>(&id, &Request::Stat { path: path.clone() }, Wake::Yes)
        .await
        .map_err(|(error, _)| refuse(&app, &id, error, false))?;
    last_component(&path).clone_into(&mut entry.name);
    Ok(json(StatusCode::OK, &file_info(path, entry)))
}

/// What is in a directory.
#[utoipa::path(operation_id = "list_directory", get, path = "/v1/sandboxes/{id}/fs/dir", tag = "files",
    params(("id" = String, Path, description = "sandbox id"), DirQuery),
    responses((status = 200, body = Listing), (status = 404, body = Error), (status = 409, body = Error)))]
pub async fn dir(app: Arc<App>, id: String, mut input: Input) -> Answer {
    let (path, activity) = about(&app, &id, &mut input, Some("/")).await?;
    // The first part decides the status; the rest is streamed.
    let (greeted, first) =
        app.guests.list(&id, &path).await.map_err(|error| refuse(&app, &id, error, false))?;
    let (sender, parts) = pieces(UNREAD_FOR);
    tokio::spawn(listing(app, id, greeted, path, first, sender, activity));
    Ok(streamed(parts, "application/json"))
}

async fn listing(
    app: Arc<App>,
    id: String,
    mut greeted: Greeted,
    path: String,
    first: Option<Vec<Entry>>,
    to: Pieces,
    _activity: Activity,
) {
    let mut lister = Lister::new(&path, ENTRIES_LIMIT);
    let mut next = first;
    while let Some(entries) = next {
        if lister.add(entries, &to).await.is_none() {
            return;
        }
        next = match greeted.client.next_entries(PART).await {
            Ok(next) => next,
            Err(error) => {
                tracing::info!(sandbox = %id, %error, "a listing broke off");
                to.cut();
                return;
            }
        };
    }
    app.guests.put(&id, greeted.client, greeted.pulse);
    lister.piece.push_str("]}");
    to.send(lister.piece).await;
}

/// A listing under way: JSON in pieces of about [`CHUNK`], whatever the guest packs into its messages.
struct Lister {
    prefix: String,
    piece: String,
    seen: usize,
    first: bool,
    limit: usize,
}

impl Lister {
    fn new(path: &str, limit: usize) -> Self {
        let piece = format!("{{\"path\":{},\"entries\":[", serde_json::Value::from(path));
        Self { prefix: path.trim_end_matches('/').to_owned(), piece, seen: 0, first: true, limit }
    }

    /// Sends what becomes ready; `None` when the listing is over.
    async fn add(&mut self, entries: Vec<Entry>, to: &Pieces) -> Option<()> {
        // A message without entries counts as well: none of them may go on for ever.
        self.seen += entries.len().max(1);
        if self.seen > self.limit {
            to.cut();
            return None;
        }
        for entry in entries {
            // A guest may say anything; clients join names to paths.
            if entry.name.is_empty() || entry.name.contains('/') || matches!(&*entry.name, "." | "..") {
                continue;
            }
            if !std::mem::take(&mut self.first) {
                self.piece.push(',');
            }
            let whole = format!("{}/{}", self.prefix, entry.name);
            self.piece.push_str(&serde_json::to_string(&file_info(whole, entry)).unwrap_or_default());
            if self.piece.len() >= CHUNK {
                to.send(std::mem::take(&mut self.piece)).await?;
            }
        }
        if self.piece.is_empty() { Some(()) } else { to.send(std::mem::take(&mut self.piece)).await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_has_a_last_component() {
        for (path, name) in [("/", "/"), ("//", "/"), ("/a", "a"), ("/a/b/", "b")] {
            assert_eq!(last_component(path), name);
        }
    }

    #[test]
    fn an_entry_keeps_its_type_and_bits() {
        let entry = Entry { name: "x".into(), kind: 'l', size: 3, mode: 0o120_777, mtime: -1 };
        let info = file_info("/x".into(), entry);
        assert_eq!((info.is_dir, &*info.mode, &*info.permissions, info.mtime), (false, "l", "0777", -1));
    }

    fn tiny(count: usize) -> Vec<Entry> {
        (0..count)
            .map(|i| Entry { name: format!("{i}"), kind: 'f', size: 0, mode: 0o644, mtime: 0 })
            .collect()
    }

    #[tokio::test]
    async fn many_tiny_entries_below_a_long_path_come_in_small_pieces() {
        let path = format!("/{}", "p".repeat(4000));
        let (to, mut arriving) = pieces(UNREAD_FOR);
        let sent = tokio::spawn(async move {
            let mut lister = Lister::new(&path, 2000);
            lister.add(tiny(1000), &to).await.unwrap();
            lister.piece.push_str("]}");
            to.send(lister.piece).await.unwrap();
        });
        let mut whole = Vec::new();
        while let Some(piece) = arriving.pieces.recv().await {
            assert!(piece.len() < CHUNK + 16_000, "{}", piece.len());
            whole.extend_from_slice(&piece);
        }
        sent.await.unwrap();
        let listing: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!(listing["entries"].as_array().unwrap().len(), 1000);
        assert_eq!(listing["entries"][999]["name"], "999");
    }

    #[tokio::test]
    async fn a_listing_without_end_is_cut_and_never_looks_whole() {
        let (to, mut arriving) = pieces(UNREAD_FOR);
        let mut lister = Lister::new("/", 3);
        assert!(lister.add(tiny(2), &to).await.is_some());
        assert!(lister.add(Vec::new(), &to).await.is_some());
        assert!(lister.add(Vec::new(), &to).await.is_none());
        drop(to);
        assert!(std::future::poll_fn(|cx| arriving.poll(cx)).await.unwrap().is_ok());
        assert!(std::future::poll_fn(|cx| arriving.poll(cx)).await.unwrap().is_err());
    }
}
