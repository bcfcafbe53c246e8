//! The form that asks for a build: read within bounds, made exact or refused with a sentence.
//!
//! Owns: what the clients' forms mean, limits of number, size and time, names of context files. Refuses to know whose the
//! template is and whether there is room. multer takes the multipart form apart; what it may hold of it is bounded here.

use std::{
    collections::{BTreeMap, BTreeSet},
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::Stream;
use http::{StatusCode, header};
use multer::{Field, Multipart};
use tokio::time::{Instant, timeout_at};

use super::{
    record::Kind,
    registry::{Reference, reference},
    spool::{Incoming, Part, Upload},
};
use crate::{
    input::{BodyStream, Input, flag, linger, pairs},
    problem::Problem,
    routes::templates::is_name,
};

/// Bytes of all files of a context together.
pub const CONTEXT: u64 = 50 << 20;
/// Largest root disk in MiB, and thereby largest archive.
pub const SIZE_MAX: u64 = 16384;
const SIZE_MIN: u64 = 32;
/// Files of a context, and bytes of all their names.
const FILES: usize = 2000;
const NAMES: usize = 512 << 10;
/// Bytes of a path in a context, and directories it may be deep.
const PATH: usize = 1024;
const DEPTH: usize = 64;
/// Fields that are no files.
const FIELDS: usize = 32;
/// Bytes of one of them; of a Dockerfile.
const FIELD: usize = 4 << 10;
const DOCKERFILE: usize = 256 << 10;
/// Bytes of a form that is no multipart one.
const URLENCODED: usize = 1 << 20;
/// Bytes that may be read ahead without anything coming of them: headers of a part, a piece of a file.
const AHEAD: usize = 2 << 20;
/// How long a client may pause, and take for all of it.
const PAUSE: Duration = Duration::from_secs(60);
const WHOLE: Duration = Duration::from_secs(3600);
/// Names that are paths of the API's own.
const RESERVED: [&str; 2] = ["build", "builds"];

/// What shall be built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wish {
    /// What the template shall be called.
    pub name: String,
    /// What it is built from.
    pub kind: Kind,
    /// Root disk in MiB.
    pub size_mib: u64,
    /// Virtual processors.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Takes the place of one that is there.
    pub replace: bool,
    /// The image, if it is built from one.
    pub image: Option<Reference>,
}

/// A form, taken apart.
#[derive(Debug, Default)]
struct Form {
    fields: BTreeMap<String, String>,
    parts: Vec<Part>,
    /// Text of a file called `dockerfile`: one client lets it take the place of its field of that name.
    file: Option<String>,
}

/// Reads a request for a build; files go into `incoming`.
///
/// # Errors
/// 400, 408 or 413, or 507 when the disk is full.
pub async fn read(mut input: Input, incoming: &mut Incoming) -> Result<(Wish, Upload), Problem> {
    let content_type = input.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.unwrap_or_default().to_owned();
    let query = input.pairs()?;
    let mut form = if let Ok(boundary) = multer::parse_boundary(&content_type) {
        let body = std::mem::replace(&mut input.body, Box::pin(futures_util::stream::empty()));
        multipart(body, boundary, incoming).await?
    } else if content_type.to_ascii_lowercase().starts_with("application/x-www-form-urlencoded") {
        let bytes = input.bytes(URLENCODED).await?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Problem::invalid("the form is not UTF-8"))?;
        let mut form = Form::default();
        for (name, value) in pairs(text)? {
            form.field(name, value)?;
        }
        form
    } else {
        return Err(Problem::invalid(
            "the body must be a form: multipart/form-data or application/x-www-form-urlencoded",
        ));
    };
    if let Some((_, value)) = query.into_iter().find(|(key, _)| key == "replace") {
        form.fields.insert("replace".into(), value);
    }
    form.understand()
}

async fn multipart(body: BodyStream, boundary: String, incoming: &mut Incoming) -> Result<Form, Problem> {
    let ahead = Arc::new(AtomicUsize::new(0));
    let body = Arc::new(Mutex::new(body));
    let paced = Paced { body: Arc::clone(&body), ahead: Arc::clone(&ahead), resting: false };
    let outcome = {
        let mut reader = Reader { ahead, end: Instant::now() + WHOLE, form: Form::default() };
        let read = reader.read(Multipart::new(paced, boundary), incoming).await;
        read.map(|()| reader.form)
    };
    if outcome.is_err() {
        let mut rest = body.lock().unwrap_or_else(PoisonError::into_inner);
        linger(std::mem::replace(&mut *rest, Box::pin(futures_util::stream::empty())));
    }
    outcome
}

struct Reader {
    ahead: Arc<AtomicUsize>,
    end: Instant,
    form: Form,
}

impl Reader {
    async fn read(&mut self, mut form: Multipart<'_>, incoming: &mut Incoming) -> Result<(), Problem> {
        while let Some(mut field) = self.within(form.next_field()).await? {
            let name = field.name().unwrap_or_default().to_owned();
            if field.file_name().is_some() {
                self.file(name, &mut field, incoming).await?;
            } else {
                let limit = if name == "dockerfile" { DOCKERFILE } else { FIELD };
                let mut bytes = Vec::new();
                while let Some(chunk) = self.within(field.chunk()).await? {
                    if bytes.len() + chunk.len() > limit {
                        return Err(too_long(&name, limit));
                    }
                    bytes.extend_from_slice(&chunk);
                }
                let text = String::from_utf8(bytes)
                    .map_err(|_| Problem::invalid(format!("field `{}` is not UTF-8", shown(&name))))?;
                self.form.field(name, text)?;
            }
        }
        Ok(())
    }

    async fn file(
        &mut self,
        name: String,
        field: &mut Field<'_>,
        incoming: &mut Incoming,
    ) -> Result<(), Problem> {
        let path = self.form.path(&name)?;
        let offset = incoming.length();
        let is_archive = path == "rootfs" && !self.form.fields.contains_key("dockerfile");
        let most = match is_archive {
            true => offset + (self.form.size()?.unwrap_or(SIZE_MAX) << 20),
            false => CONTEXT,
        };
        let mut text = Vec::new();
        while let Some(chunk) = self.within(field.chunk()).await? {
            if incoming.length() + chunk.len() as u64 > most {
                return Err(Problem::too_large(match is_archive {
                    true => "the archive is larger than `size_mb`".to_owned(),
                    false => format!("the context is over {} MiB", CONTEXT >> 20),
                }));
            }
            if path == "dockerfile" && text.len() <= DOCKERFILE {
                text.extend_from_slice(&chunk);
            }
            incoming.write(&chunk).await.map_err(|error| unwritten(&error))?;
        }
        if path == "dockerfile" && text.len() <= DOCKERFILE {
            self.form.file = String::from_utf8(text).ok();
        }
        self.form.parts.push(Part { path, offset, size: incoming.length() - offset });
        Ok(())
    }

    async fn within<T>(&self, work: impl Future<Output = multer::Result<T>>) -> Result<T, Problem> {
        let by = self.end.min(Instant::now() + PAUSE);
        match timeout_at(by, work).await {
            Ok(Ok(value)) => {
                self.ahead.store(0, Ordering::Relaxed);
                Ok(value)
            }
            Ok(Err(error)) => Err(Problem::invalid(format!("the form cannot be read: {error}"))),
            Err(_) => {
                let text = "the request body came too slowly";
                Err(Problem::new(StatusCode::REQUEST_TIMEOUT, "slow_upload", text))
            }
        }
    }
}

/// A body that gives one piece at a time and not more than something comes of: multer takes what it can get.
struct Paced {
    body: Arc<Mutex<BodyStream>>,
    ahead: Arc<AtomicUsize>,
    resting: bool,
}

impl Stream for Paced {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.resting) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let polled = self.body.lock().unwrap_or_else(PoisonError::into_inner).as_mut().poll_next(context);
        polled.map(|piece| {
            let piece = piece?.map_err(|_| std::io::Error::other("the request body ended early"));
            if let Ok(piece) = &piece {
                self.resting = true;
                if self.ahead.fetch_add(piece.len(), Ordering::Relaxed) > AHEAD {
                    return Some(Err(std::io::Error::other("a part's header is too long")));
                }
            }
            Some(piece)
        })
    }
}

impl Form {
    fn field(&mut self, name: String, value: String) -> Result<(), Problem> {
        let limit = if name == "dockerfile" { DOCKERFILE } else { FIELD };
        if name.len() > FIELD || value.len() > limit {
            return Err(too_long(&name, limit));
        }
        if self.fields.len() == FIELDS {
            return Err(Problem::invalid(format!("the form has over {FIELDS} fields")));
        }
        if self.fields.contains_key(&name) {
            return Err(Problem::invalid(format!("field `{}` is given twice", shown(&name))));
        }
        self.fields.insert(name, value);
        Ok(())
    }

    /// The name of a file as a path of the context.
    fn path(&self, name: &str) -> Result<String, Problem> {
        if self.parts.len() == FILES {
            return Err(Problem::too_large(format!("the context has over {FILES} files")));
        }
        let path = relative(name).map_err(|why| {
            Problem::invalid(format!("the file name {:?} {why}", shown(name))).with("field", shown(name))
        })?;
        let names: usize = self.parts.iter().map(|part| part.path.len()).sum();
        if names + path.len() > NAMES {
            return Err(Problem::too_large("the names of the context's files are too long together"));
        }
        Ok(path)
    }

    fn number(&self, field: &str, least: u64, most: u64) -> Result<Option<u64>, Problem> {
        let Some(text) = self.fields.get(field).map(|text| text.trim()).filter(|text| !text.is_empty())
        else {
            return Ok(None);
        };
        let digits = text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse().ok().filter(|number| digits && (least..=most).contains(number));
        number.map(Some).ok_or_else(|| {
            let sentence = format!("field `{field}` must be a whole number from {least} to {most}");
            Problem::invalid(sentence).with("field", field)
        })
    }

    fn size(&self) -> Result<Option<u64>, Problem> {
        self.number("size_mb", SIZE_MIN, SIZE_MAX)
    }

    /// What the form asks for.
    fn understand(mut self) -> Result<(Wish, Upload), Problem> {
        let (size_mib, cpu) = (self.size()?.unwrap_or(1024), self.number("cpu", 1, 64)?.unwrap_or(2));
        let memory_mib = self.number("memory_mb", 128, 65536)?.unwrap_or(1024);
        let replace = match self.fields.get("replace").map(|text| text.trim()).filter(|text| !text.is_empty())
        {
            Some(text) => flag("replace", text)?,
            None => false,
        };
        let name = self.fields.remove("name").unwrap_or_default();
        if !is_name(&name) || RESERVED.contains(&name.as_str()) {
            let rule = "has 1 to 64 characters of A-Z, a-z, 0-9, `.`, `_` and `-`, and is none of `.`, `..`, `build` and `builds`";
            return Err(
                Problem::invalid(format!("field `name`: a template's name {rule}")).with("field", "name")
            );
        }
        let mut given = |field: &str| self.fields.remove(field).filter(|text| !text.trim().is_empty());
        let (image_ref, mut dockerfile) = (given("image_ref"), given("dockerfile"));
        let is_archive = dockerfile.is_none() && matches!(&*self.parts, [part] if part.path == "rootfs");
        if !is_archive && image_ref.is_none() {
            dockerfile = dockerfile.or(self.file);
        }
        let kind = match (is_archive, &image_ref, &dockerfile) {
            (true, None, None) => Kind::Rootfs,
            (false, None, Some(_)) => Kind::Dockerfile,
            (false, Some(_), None) if self.parts.is_empty() => Kind::Reference,
            (false, None, None) => {
                return Err(Problem::invalid("one of `rootfs`, `dockerfile` and `image_ref` is required"));
            }
            _ => {
                return Err(Problem::invalid(
                    "`rootfs`, `dockerfile` with its context, and `image_ref` exclude each other",
                ));
            }
        };
        let total: u64 = self.parts.iter().map(|part| part.size).sum();
        let most = if kind == Kind::Rootfs { size_mib << 20 } else { CONTEXT };
        if total > most {
            return Err(Problem::too_large(format!("{total} bytes were sent, {most} are allowed")));
        }
        if kind == Kind::Dockerfile {
            distinct(&self.parts)?;
        }
        let image = image_ref.map(|text| reference(text.trim())).transpose();
        let image = image.map_err(|sentence| Problem::invalid(sentence).with("field", "image_ref"))?;
        // A template has 32 at most; the clients call the field obsolete.
        let vcpus = u32::try_from(cpu.min(8)).unwrap_or(8);
        let wish = Wish { name, kind, size_mib, vcpus, memory_mib, replace, image };
        Ok((wish, Upload { dockerfile, parts: self.parts }))
    }
}

/// The name of a context file as a plain relative path.
///
/// # Errors
/// The end of a sentence on what is wrong.
fn relative(name: &str) -> Result<String, &'static str> {
    if name.len() > PATH {
        return Err("is too long");
    }
    if name.chars().any(char::is_control) {
        return Err("has a control character");
    }
    if name.starts_with('/') {
        return Err("is not relative");
    }
    let parts: Vec<&str> = name.split('/').filter(|part| *part != ".").collect();
    if parts.contains(&"..") {
        return Err("has a `..`");
    }
    if parts.is_empty() || parts.contains(&"") {
        return Err("is empty somewhere");
    }
    if parts.len() > DEPTH || parts.iter().any(|part| part.len() > 255) {
        return Err("is too deep or has too long a part");
    }
    Ok(parts.join("/"))
}

/// Refuses two files of one name, and a file that is also a directory.
fn distinct(parts: &[Part]) -> Result<(), Problem> {
    let mut files = BTreeSet::new();
    for part in parts {
        if !files.insert(part.path.as_str()) {
            return Err(Problem::invalid(format!("the file {:?} is given twice", shown(&part.path))));
        }
    }
    for path in &files {
        let above = path.match_indices('/').map(|(at, _)| &path[..at]).find(|above| files.contains(above));
        if let Some(above) = above {
            return Err(Problem::invalid(format!("{:?} is both a file and a directory", shown(above))));
        }
    }
    Ok(())
}

fn shown(name: &str) -> String {
    name.chars().take(100).collect()
}

fn too_long(name: &str, limit: usize) -> Problem {
    Problem::too_large(format!("field `{}` is over {} KiB", shown(name), limit >> 10))
}

/// What could not be kept.
pub fn unwritten(error: &std::io::Error) -> Problem {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            Problem::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", "no space is left for the upload")
        }
        _ => {
            tracing::error!(%error, "an upload could not be kept");
            Problem::internal()
        }
    }
}

#[cfg(test)]
#[path = "form_tests.rs"]
mod tests;
