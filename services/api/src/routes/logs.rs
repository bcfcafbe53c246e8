//! What the programs of a sandbox wrote, and its serial console: as text, or as events while it is written.
//!
//! The log of the programs is kept by the guest. A plain read wakes a hibernated sandbox unless it says `wake=false`; who
//! follows wakes nobody and waits.

use std::{os::fd::OwnedFd, sync::Arc};

use bytes::Bytes;
use http::StatusCode;
use pandastack_bus::{SandboxId, vmm::State};
use pandastack_protocol::{CHUNK, Code, LogPage, LogPart, LogStream};
use serde::Deserialize;
use tokio::{io::AsyncReadExt, net::unix::pipe};
use utoipa::IntoParams;
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, UNREAD_FOR,
    command::refuse,
    event_stream,
    exec::STALLED_FOR,
    finish, input,
    log_lines::{Render, Told, before},
    pieces, streamed,
};
use crate::{
    app::App,
    bus::again,
    guest::{GuestError, LogReader, Wake},
    input::{Input, count, flag, moment},
    lines::{Line, Lines, Tail},
    output::line_event,
    problem::{Effect, Problem},
    wire::Error,
};

/// Lines of the past that can be asked for.
const TAIL_LIMIT: usize = 10_000;
/// Lines of a console when none are asked for.
const CONSOLE_TAIL: usize = 1000;
/// Pages of one log at most: many more than there can be, unless a guest makes them up.
const PAGES: usize = 256;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    let with = warp::any().map(move || Arc::clone(&app));
    warp::path!("v1" / "sandboxes" / String / "logs")
        .and(warp::get())
        .and(with)
        .and(input())
        .then(|id, a, i| finish(read(a, id, i)))
        .boxed()
}

/// What is wanted of it.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// `stdout`, `stderr`, `both` (when absent) or `console`.
    #[param(required = false)]
    pub stream: Option<String>,
    /// Whether to go on with what is yet to be written, as events.
    #[param(required = false)]
    pub follow: Option<bool>,
    /// Only the last so many lines; all that are kept when absent (of the console 1000).
    #[param(required = false, minimum = 0, maximum = 10000)]
    pub tail: Option<u32>,
    /// Only what was written since: RFC 3339 or Unix seconds, on the guest's clock.
    #[param(required = false)]
    pub since: Option<String>,
    /// Only what this exec session wrote.
    #[param(required = false)]
    pub session: Option<String>,
    /// Whether a hibernated sandbox is woken for it; true when absent. Following never wakes.
    #[param(required = false)]
    pub wake: Option<bool>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Wish {
    console: bool,
    stream: Option<LogStream>,
    follow: bool,
    tail: Option<usize>,
    since_ms: u64,
    session: String,
    asleep: bool,
}

fn wishes(input: &Input) -> Result<Wish, Problem> {
    let mut wish = Wish::default();
    for (key, value) in input.pairs()? {
        match key.as_str() {
            "stream" => {
                (wish.console, wish.stream) = match value.as_str() {
                    "stdout" => (false, Some(LogStream::Stdout)),
                    "stderr" => (false, Some(LogStream::Stderr)),
                    "both" => (false, None),
                    "console" => (true, None),
                    _ => {
                        let sentence =
                            "query parameter `stream` must be `stdout`, `stderr`, `both` or `console`";
                        return Err(Problem::invalid(sentence));
                    }
                };
            }
            "follow" => wish.follow = flag(&key, &value)?,
            "tail" => wish.tail = Some(count(&key, &value, 0..=TAIL_LIMIT)?),
            "since" => wish.since_ms = moment(&key, &value)?,
            "session" => {
                let id: SandboxId = value
                    .parse()
                    .map_err(|_| Problem::invalid("query parameter `session` is not the id of a session"))?;
                wish.session = id.to_string();
            }
            "wake" => wish.asleep = !flag(&key, &value)?,
            _ => {}
        }
    }
    Ok(wish)
}

/// What the programs of a sandbox wrote, or its console.
///
/// Without `follow` the text as it is kept (the last MiB over all programs), standard output and standard error as asked for. With
/// `follow` an event `line` with `{line}` for each line, first those that are there, for as long as the sandbox lives: across
/// captures, hibernation and wake. Terminals are not in it. The console is that of the machine that runs the sandbox or ran it
/// last; following it ends with that machine.
#[utoipa::path(operation_id = "read_logs", get, path = "/v1/sandboxes/{id}/logs", tag = "observe",
    params(("id" = String, Path, description = "sandbox id"), LogQuery),
    responses((status = 200, description = "text, or events with `follow`", content_type = "text/plain", body = String),
        (status = 404, body = Error),
        (status = 409, description = "paused, hibernated with `wake=false`, or of an age before logs", body = Error)))]
pub async fn read(app: Arc<App>, id: String, input: Input) -> Answer {
    let wish = wishes(&input)?;
    app.own(&input.caller, &id).await?;
    if wish.console { console(&app, &id, &wish).await } else { programs(&app, &id, wish).await }
}

async fn programs(app: &Arc<App>, id: &str, wish: Wish) -> Answer {
    let mut reader = LogReader::new(&app.guests, id, &wish.session);
    let (patience, render): (_, Render) = match wish.follow {
        true => (STALLED_FOR, line_event),
        false => (UNREAD_FOR, |line, out| out.push_str(line)),
    };
    let (to, arriving) = pieces(patience);
    if wish.follow {
        // It begins with a use; going on is none, or nobody who is watched would ever sleep.
        app.touch.used(id);
        match app.guests.look(id).await {
            Ok(State::Failed) => {
                return Err(Problem::new(
                    StatusCode::CONFLICT,
                    "failed",
                    "the sandbox failed, and its log with it",
                ));
            }
            // What it will never do is said at once; whatever else is wrong may pass.
            Ok(State::Running) => match reader.page(Wake::No).await {
                Err(error @ GuestError::Refused(_)) => return Err(refuse_log(app, id, error, false)),
                _ => reader.rewind(),
            },
            Ok(_) => {}
            Err(error) => return Err(refuse(app, id, GuestError::Bus(error))),
        }
        let told = Told::new(to, render);
        tokio::spawn(follow(reader, wish, told));
        return Ok(event_stream(arriving));
    }
    let activity = app.touch.in_use(id);
    let wake = if wish.asleep { Wake::No } else { Wake::Yes };
    let refused = |error| refuse_log(app, id, error, wish.asleep);
    let mut first = reader.page(wake).await.map_err(refused)?;
    let until = first.end.end;
    let mut from = 0;
    if let Some(tail) = wish.tail {
        from = last_lines(&mut reader, first, &wish, tail, until, wake).await.map_err(refused)?;
        reader.rewind();
        first = reader.page(wake).await.map_err(refused)?;
    }
    let mut told = Told::new(to, render);
    tokio::spawn(async move {
        let _activity = activity;
        let mut lines = Lines::default();
        let mut page = first;
        for _ in 0..PAGES {
            let next = page.end.next;
            if told.page(&mut lines, page, until, |line| wish.takes(line) && line.end >= from).await.is_none()
            {
                return;
            }
            if next >= until {
                break;
            }
            page = match reader.page(wake).await {
                Ok(page) => page,
                Err(_) => return told.to.cut(),
            };
        }
        while let Some(line) = lines.rest() {
            if wish.takes(&line) && line.end >= from {
                told.line(&line);
            }
        }
        told.flush().await;
    });
    Ok(streamed(arriving, "text/plain; charset=utf-8"))
}

impl Wish {
    fn takes(&self, line: &Line) -> bool {
        line.unix_ms >= self.since_ms && self.stream.is_none_or(|stream| stream == line.stream)
    }
}

/// Reads what there is up to `until` and answers where the first of the last `tail` lines ends.
async fn last_lines(
    reader: &mut LogReader,
    mut page: LogPage,
    wish: &Wish,
    tail: usize,
    until: u64,
    wake: Wake,
) -> Result<u64, GuestError> {
    let (mut lines, mut last) = (Lines::default(), Tail::new(tail));
    for _ in 0..PAGES {
        let next = page.end.next;
        for mut part in page.parts.into_iter().filter_map(|part| before(part, until)) {
            while let Some(line) = lines.next(&mut part) {
                if wish.takes(&line) {
                    last.seen(line.end);
                }
            }
        }
        if next >= until {
            break;
        }
        page = reader.page(wake).await?;
    }
    while let Some(line) = lines.rest() {
        if wish.takes(&line) {
            last.seen(line.end);
        }
    }
    Ok(last.first().unwrap_or(until.saturating_add(1)))
}

/// Follows for as long as there is somebody to tell and something to come.
async fn follow(mut reader: LogReader, wish: Wish, mut told: Told) {
    let mut from = 0;
    let mut life = 0;
    if let Some(tail) = wish.tail {
        let Some(first) = told.await_page(&mut reader).await else { return };
        let until = first.end.end;
        life = first.end.life;
        // Where it was reachable a moment ago; if it is not any more, the whole log is as good.
        if let Ok(end) = last_lines(&mut reader, first, &wish, tail, until, Wake::No).await {
            from = end;
        }
        reader.rewind();
    }
    let mut lines = Lines::default();
    while let Some(page) = told.await_page(&mut reader).await {
        if life != 0 && page.end.life != life {
            // The guest was booted again and counts from 0; what was left unfinished stays so.
            from = 0;
            while let Some(line) = lines.rest() {
                if wish.takes(&line) {
                    told.line(&line);
                }
            }
        }
        life = page.end.life;
        let takes = |line: &Line| wish.takes(line) && line.end >= from;
        if told.page(&mut lines, page, u64::MAX, takes).await.is_none() || told.flush().await.is_none() {
            return;
        }
        // Much may come of which nothing is wanted.
        if told.is_silent() && told.keep_alive().await.is_none() {
            return;
        }
    }
}

fn refuse_log(app: &App, id: &str, error: GuestError, asleep: bool) -> Problem {
    match error {
        GuestError::Refused(failure) if failure.code == Code::Unsupported => Problem::new(
            StatusCode::CONFLICT,
            "unsupported",
            "this sandbox was made before logs were kept; a new one of the same template has them",
        ),
        GuestError::Asleep(_) if asleep => {
            Problem::new(StatusCode::CONFLICT, "hibernated", "the sandbox is hibernated, and its log with it")
        }
        other => refuse(app, id, other),
    }
}

async fn console(app: &Arc<App>, id: &str, wish: &Wish) -> Answer {
    let lines = wish.tail.unwrap_or(CONSOLE_TAIL) as u32;
    let (since, follows) = (wish.since_ms / 1000, wish.follow);
    let opened = again(|| app.vmm.open_console(id.to_owned(), lines, since, follows)).await;
    let fd = opened.map_err(|error| match error {
        pandastack_bus::Error::NotFound(_) => {
            app.forget(id);
            Problem::no_sandbox(id)
        }
        other => Problem::about(id, &other, Effect::None),
    })?;
    let from = pipe::Receiver::from_owned_fd(OwnedFd::from(fd)).map_err(|error| {
        tracing::error!(sandbox = id, %error, "the console is no pipe");
        Problem::internal()
    })?;
    let (patience, render): (_, Render) = match follows {
        true => (STALLED_FOR, line_event),
        false => (UNREAD_FOR, |line, out| out.push_str(line)),
    };
    let (to, arriving) = pieces(patience);
    tokio::spawn(copy_console(from, Told::new(to, render), follows));
    Ok(if follows { event_stream(arriving) } else { streamed(arriving, "text/plain; charset=utf-8") })
}

async fn copy_console(mut from: pipe::Receiver, mut told: Told, follows: bool) {
    let (mut lines, mut position) = (Lines::default(), 0);
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            () = told.alive(), if follows => {
                if told.keep_alive().await.is_none() {
                    return;
                }
                continue;
            }
            () = told.to.closed() => return,
        };
        let Ok(read @ 1..) = read else { break };
        let bytes = Bytes::copy_from_slice(&buffer[..read]);
        let part = LogPart { position, unix_ms: 0, session: String::new(), stream: LogStream::Stdout, bytes };
        position += read as u64;
        let page = LogPage { parts: vec![part], ..LogPage::default() };
        if told.page(&mut lines, page, u64::MAX, |_| true).await.is_none() {
            return;
        }
        if follows && told.flush().await.is_none() {
            return;
        }
    }
    while let Some(line) = lines.rest() {
        told.line(&line);
    }
    told.flush().await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str) -> Result<Wish, Problem> {
        wishes(&Input {
            caller: crate::auth::Caller::default(),
            request_id: String::new(),
            query: query.into(),
            headers: http::HeaderMap::new(),
            body: Box::pin(futures_util::stream::empty()),
        })
    }

    #[test]
    fn what_the_clients_send_is_understood() {
        assert_eq!(asked("").unwrap(), Wish::default());
        for yes in ["true", "1"] {
            let wish = asked(&format!("stream=stdout&follow={yes}")).unwrap();
            assert_eq!((wish.stream, wish.follow), (Some(LogStream::Stdout), true));
        }
        for no in ["false", "0"] {
            assert!(!asked(&format!("stream=both&follow={no}")).unwrap().follow);
        }
        let wish = asked("stream=console&tail=10000&since=5&wake=0&other=x").unwrap();
        assert_eq!((wish.console, wish.tail, wish.since_ms, wish.asleep), (true, Some(10_000), 5000, true));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for bad in [
            "stream=all",
            "stream=",
            "follow=yes",
            "tail=-1",
            "tail=10001",
            "tail=x",
            "since=now",
            "session=",
            "session=../x",
            "wake=2",
        ] {
            assert_eq!(asked(bad).unwrap_err().status.as_u16(), 400, "{bad}");
        }
    }
}
