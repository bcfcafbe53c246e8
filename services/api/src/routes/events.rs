//! What happened to sandboxes: a list, or a stream that begins where one says.
//!
//! A stream reads on at a position of vmm's history, and hints only say when: replay and live cannot have a gap or an overlap,
//! because they are the same reading.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use http::StatusCode;
use pandastack_bus::vmm::{HistoryPage, HistoryQuery, HistoryRow};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{
    Answer, Pieces, event_stream,
    exec::{KEEP_ALIVE_EVERY, STALLED_FOR},
    finish, input, json, pieces,
};
use crate::{
    app::App,
    bus::again,
    input::{Input, count, flag, moment},
    output::{self, ascii_object},
    problem::{Effect, Problem},
    wire::{Error, rfc3339},
};

/// Events of a list.
const TAIL: usize = 50;
/// Events that can be asked for.
const TAIL_LIMIT: usize = 1000;
/// Events read at once.
const BATCH: u32 = 200;
/// How long vmm may be away before it is asked again.
const AGAIN_IN: Duration = Duration::from_secs(1);

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let one = warp::path!("v1" / "sandboxes" / String / "events")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(of_sandbox(a, id, i)));
    let all = warp::path!("v1" / "events")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(of_workspace(a, i)));
    one.or(all).unify().boxed()
}

/// Something that happened.
#[derive(Debug, Serialize, ToSchema)]
pub struct Event {
    /// Its place: of two, the later one's number is larger. Also the event's id in a stream.
    pub seq: u64,
    /// RFC 3339.
    pub time: String,
    /// The sandbox.
    pub sandbox_id: String,
    /// For example `sandbox.running`, `sandbox.paused`, `sandbox.hibernated`, `sandbox.woken`, `sandbox.forked`,
    /// `sandbox.deleted`, `fork.completed`, `vm.died`, `recover.cold_boot`.
    #[serde(rename = "type")]
    pub kind: String,
    /// More about it.
    pub payload: BTreeMap<String, String>,
}

/// Events, oldest first.
#[derive(Debug, Serialize, ToSchema)]
pub struct Events {
    /// These.
    pub events: Vec<Event>,
}

impl From<HistoryRow> for Event {
    fn from(row: HistoryRow) -> Self {
        Self {
            seq: row.seq,
            time: rfc3339(row.unix_ms),
            sandbox_id: row.sandbox,
            kind: row.kind,
            payload: row.payload,
        }
    }
}

/// Which events.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// The newest so many; 50 when absent. With `since` or `Last-Event-ID` everything from there on when absent.
    #[param(required = false, minimum = 0, maximum = 1000)]
    pub tail: Option<u32>,
    /// Only what happened then or later: RFC 3339 or Unix seconds.
    #[param(required = false)]
    pub since: Option<String>,
    /// Whether to go on with what is yet to happen, as events. The header `Last-Event-ID` goes on behind that event.
    #[param(required = false)]
    pub follow: Option<bool>,
    /// The same as the header, for who cannot send it.
    #[param(required = false)]
    pub last_event_id: Option<u64>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Wish {
    tail: Option<usize>,
    since_ms: Option<u64>,
    follow: bool,
    after: Option<u64>,
}

fn wishes(input: &Input) -> Result<Wish, Problem> {
    let mut wish = Wish::default();
    let place = |value: &str| {
        let bad = || Problem::invalid("`Last-Event-ID` must be the id of an event");
        value.trim().parse().map(Some).map_err(|_| bad())
    };
    for (key, value) in input.pairs()? {
        match key.as_str() {
            "tail" => wish.tail = Some(count(&key, &value, 0..=TAIL_LIMIT)?),
            "since" => wish.since_ms = Some(moment(&key, &value)?),
            "follow" => wish.follow = flag(&key, &value)?,
            "last_event_id" => wish.after = place(&value)?,
            _ => {}
        }
    }
    if let Some(value) = input.headers.get("last-event-id") {
        wish.after = place(value.to_str().unwrap_or_default())?;
    }
    Ok(wish)
}

impl Wish {
    /// The first look.
    fn query(&self, workspace: &str, sandbox: &str) -> HistoryQuery {
        let from_somewhere = self.after.is_some() || self.since_ms.is_some();
        let limit = self.tail.unwrap_or(if from_somewhere { TAIL_LIMIT } else { TAIL });
        HistoryQuery {
            workspace: workspace.to_owned(),
            sandbox: sandbox.to_owned(),
            kinds: Vec::new(),
            after: self.after.unwrap_or(0),
            since_unix_ms: self.since_ms.unwrap_or(0),
            limit: limit as u32,
            // From a place on, what comes first comes first, and a stream brings the rest.
            newest: self.tail.is_some() || !from_somewhere,
        }
    }
}

async fn look(app: &App, query: &HistoryQuery) -> Result<HistoryPage, Problem> {
    let page = again(|| app.vmm.history(query.clone())).await;
    page.map_err(|error| Problem::from_bus(&error, Effect::None))
}

/// What happened to a sandbox. Neither wakes it nor counts as use.
///
/// With `follow` each event is one of `event: event`, with its number as `id`; a client that comes back with `Last-Event-ID` misses
/// nothing and gets nothing twice. The stream ends with the sandbox.
#[utoipa::path(operation_id = "sandbox_events", get, path = "/v1/sandboxes/{id}/events", tag = "observe",
    params(("id" = String, Path, description = "sandbox id"), EventQuery),
    responses((status = 200, body = Events), (status = 404, body = Error)))]
pub async fn of_sandbox(app: Arc<App>, id: String, input: Input) -> Answer {
    let wish = wishes(&input)?;
    app.get_own(&input.caller, &id).await?;
    answer(&app, wish, &input.caller.workspace, &id).await
}

/// What happened to all sandboxes of the workspace, also to those that are gone. As for one sandbox.
#[utoipa::path(operation_id = "events", get, path = "/v1/events", tag = "observe", params(EventQuery),
    responses((status = 200, body = Events)))]
pub async fn of_workspace(app: Arc<App>, input: Input) -> Answer {
    let wish = wishes(&input)?;
    answer(&app, wish, &input.caller.workspace, "").await
}

async fn answer(app: &Arc<App>, wish: Wish, workspace: &str, sandbox: &str) -> Answer {
    // Before the first look: what happens from here on is hinted at.
    let hints = app.happenings.listen(workspace, sandbox);
    let query = wish.query(workspace, sandbox);
    let first = look(app, &query).await?;
    if !wish.follow {
        let events = first.rows.into_iter().map(Event::from).collect();
        return Ok(json(StatusCode::OK, &Events { events }));
    }
    let (to, arriving) = pieces(STALLED_FOR);
    let app = Arc::clone(app);
    tokio::spawn(async move { tell(&app, query, first, hints, &to).await });
    Ok(event_stream(arriving))
}

/// Tells what there is and what comes, until nobody listens or the one sandbox is gone.
async fn tell(
    app: &App,
    mut query: HistoryQuery,
    mut page: HistoryPage,
    mut hints: crate::happenings::Hints,
    to: &Pieces,
) -> Option<()> {
    query.newest = false;
    query.limit = BATCH;
    let mut said = Instant::now();
    loop {
        let end = !query.sandbox.is_empty() && page.rows.iter().any(|row| row.kind == "sandbox.deleted");
        let moved = query.after != page.position;
        query.after = page.position;
        if !page.rows.is_empty() {
            to.send(framed(std::mem::take(&mut page.rows))).await?;
            said = Instant::now();
        }
        if end {
            return Some(());
        }
        // There may be more of it already; only a look that brought nothing is the end for now.
        if !moved {
            tokio::select! {
                () = hints.next() => {}
                // Also a look: a hint may have been lost with a daemon.
                () = tokio::time::sleep_until(said + KEEP_ALIVE_EVERY) => {
                    to.send(output::KEEP_ALIVE).await?;
                    said = Instant::now();
                }
                () = to.closed() => return None,
            }
        }
        page = match look(app, &query).await {
            Ok(page) => page,
            Err(_) => {
                tokio::time::sleep(AGAIN_IN).await;
                if said.elapsed() > KEEP_ALIVE_EVERY {
                    to.send(output::KEEP_ALIVE).await?;
                    said = Instant::now();
                }
                HistoryPage { rows: Vec::new(), position: query.after }
            }
        };
    }
}

fn framed(rows: Vec<HistoryRow>) -> Bytes {
    let mut out = String::new();
    for row in rows {
        let event = Event::from(row);
        out.push_str(&format!("id: {}\nevent: event\ndata: ", event.seq));
        ascii_object(&event, &mut out);
        out.push_str("\n\n");
    }
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str, header: Option<&str>) -> Result<Wish, Problem> {
        let mut headers = http::HeaderMap::new();
        if let Some(header) = header {
            headers.insert("last-event-id", http::HeaderValue::from_str(header).unwrap());
        }
        wishes(&Input {
            caller: crate::auth::Caller::default(),
            request_id: String::new(),
            query: query.into(),
            headers,
            body: Box::pin(futures_util::stream::empty()),
        })
    }

    #[test]
    fn a_list_has_the_newest_and_from_a_place_on_the_next() {
        let plain = asked("", None).unwrap().query("w", "s");
        assert_eq!((plain.limit, plain.newest, plain.after), (50, true, 0));
        let tail = asked("tail=7&since=5", None).unwrap().query("w", "s");
        assert_eq!((tail.limit, tail.newest, tail.since_unix_ms), (7, true, 5000));
        for resumed in [asked("follow=1", Some("17")), asked("follow=true&last_event_id=17", None)] {
            let query = resumed.unwrap().query("w", "s");
            assert_eq!((query.limit, query.newest, query.after), (1000, false, 17));
        }
        for bad in ["tail=1001", "tail=x", "follow=maybe", "since=x", "last_event_id=x"] {
            assert_eq!(asked(bad, None).unwrap_err().status.as_u16(), 400, "{bad}");
        }
        assert_eq!(asked("", Some("x")).unwrap_err().status.as_u16(), 400);
    }

    #[test]
    fn events_are_these_bytes() {
        let row = HistoryRow {
            seq: 7,
            unix_ms: 1_767_323_045_250,
            workspace: "w".into(),
            sandbox: "s".into(),
            kind: "vm.died".into(),
            payload: BTreeMap::from([("detail".into(), "é\n\"".into())]),
        };
        assert_eq!(
            framed(vec![row]),
            "id: 7\nevent: event\ndata: {\"seq\":7,\"time\":\"2026-01-02T03:04:05.25Z\",\"sandbox_id\":\"s\",\
             \"type\":\"vm.died\",\"payload\":{\"detail\":\"\\u00e9\\n\\\"\"}}\n\n"
        );
    }
}
