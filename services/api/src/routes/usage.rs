//! What sandboxes take of the host, as series over time.

use std::sync::Arc;

use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    bus::again,
    input::{Input, moment},
    problem::{Effect, Problem},
    tenancy::now_ms,
    wire::{Error, rfc3339},
};

const HOUR: u64 = 3600;
const LONGEST: u64 = 30 * 24 * HOUR;
/// Steps by name.
const STEPS: [(&str, u32); 4] = [("15s", 15), ("1m", 60), ("5m", 300), ("1h", 3600)];

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let with = |app: &Arc<App>| {
        let app = Arc::clone(app);
        warp::any().map(move || Arc::clone(&app))
    };
    let one = warp::path!("v1" / "metrics" / "sandbox" / String)
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|id, a, i| finish(of_sandbox(a, id, i)));
    let all = warp::path!("v1" / "metrics" / "overview")
        .and(warp::get())
        .and(with(app))
        .and(input())
        .then(|a, i| finish(overview(a, i)));
    one.or(all).unify().boxed()
}

/// From when to when, and how fine.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct SpanQuery {
    /// RFC 3339 or Unix seconds; an hour before `to` when absent.
    #[param(required = false)]
    pub from: Option<String>,
    /// RFC 3339 or Unix seconds; now when absent.
    #[param(required = false)]
    pub to: Option<String>,
    /// `15s`, `1m`, `5m` or `1h`; what suits the span when absent.
    #[param(required = false)]
    pub step: Option<String>,
}

/// A series of numbers.
#[derive(Debug, Serialize, ToSchema)]
pub struct UsageSeries {
    /// `cpu_percent` (100 is one processor), `memory_bytes`, `disk_read_bytes_per_second`, `disk_write_bytes_per_second`.
    pub name: String,
    /// Unix seconds, and the mean of the step that begins there. Steps without a measurement are left out.
    pub points: Vec<(u64, f64)>,
}

/// Series over one span.
#[derive(Debug, Serialize, ToSchema)]
pub struct Usage {
    /// All of them.
    pub series: Vec<UsageSeries>,
    /// RFC 3339.
    pub from: String,
    /// RFC 3339.
    pub to: String,
    /// `15s`, `1m`, `5m` or `1h`.
    pub step: String,
}

#[derive(Debug, PartialEq, Eq)]
struct Span {
    from_ms: u64,
    to_ms: u64,
    step: (&'static str, u32),
}

fn span(input: &Input, now_ms: u64) -> Result<Span, Problem> {
    let (mut from, mut to, mut step) = (None, now_ms, None);
    for (key, value) in input.pairs()? {
        match key.as_str() {
            "from" => from = Some(moment(&key, &value)?),
            "to" => to = moment(&key, &value)?,
            "step" => {
                let known = STEPS.into_iter().find(|(name, _)| *name == value);
                step = Some(known.ok_or_else(|| {
                    Problem::invalid("query parameter `step` must be `15s`, `1m`, `5m` or `1h`")
                })?);
            }
            _ => {}
        }
    }
    let from = from.unwrap_or(to.saturating_sub(HOUR * 1000));
    let length = to.checked_sub(from).ok_or_else(|| Problem::invalid("`from` is later than `to`"))?;
    if length > LONGEST * 1000 {
        return Err(Problem::invalid("`from` and `to` are more than 30 days apart"));
    }
    let suits = match length / 1000 {
        0..=HOUR => STEPS[0],
        seconds if seconds <= 6 * HOUR => STEPS[1],
        seconds if seconds <= 24 * HOUR => STEPS[2],
        _ => STEPS[3],
    };
    Ok(Span { from_ms: from, to_ms: to, step: step.unwrap_or(suits) })
}

/// What a sandbox takes of the host: every 15 seconds for an hour, every minute for six, every five for a day. While it is
/// hibernated it takes nothing and has no points.
#[utoipa::path(operation_id = "sandbox_metrics", get, path = "/v1/metrics/sandbox/{id}", tag = "observe",
    params(("id" = String, Path, description = "sandbox id"), SpanQuery),
    responses((status = 200, body = Usage), (status = 404, body = Error)))]
pub async fn of_sandbox(app: Arc<App>, id: String, input: Input) -> Answer {
    let span = span(&input, now_ms())?;
    app.get_own(&input.caller, &id).await?;
    answer(&app, span, &input.caller.workspace, &id).await
}

/// What all sandboxes of the workspace take together.
#[utoipa::path(operation_id = "overview_metrics", get, path = "/v1/metrics/overview", tag = "observe", params(SpanQuery),
    responses((status = 200, body = Usage)))]
pub async fn overview(app: Arc<App>, input: Input) -> Answer {
    let span = span(&input, now_ms())?;
    answer(&app, span, &input.caller.workspace, "").await
}

async fn answer(app: &App, span: Span, workspace: &str, sandbox: &str) -> Answer {
    let (from, to, step) = (span.from_ms / 1000, span.to_ms / 1000, span.step.1);
    let series = again(|| app.vmm.metrics(workspace.to_owned(), sandbox.to_owned(), from, to, step)).await;
    let series = series.map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let series = series.into_iter().map(|one| UsageSeries { name: one.name, points: one.points });
    let usage = Usage {
        series: series.collect(),
        from: rfc3339(span.from_ms),
        to: rfc3339(span.to_ms),
        step: span.step.0.to_owned(),
    };
    Ok(json(StatusCode::OK, &usage))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(query: &str) -> Result<Span, Problem> {
        let input = Input {
            caller: crate::auth::Caller::default(),
            request_id: String::new(),
            query: query.into(),
            headers: http::HeaderMap::new(),
            body: Box::pin(futures_util::stream::empty()),
        };
        span(&input, 10_000_000_000)
    }

    #[test]
    fn a_span_is_an_hour_unless_it_says_otherwise() {
        let span = asked("").unwrap();
        assert_eq!((span.from_ms, span.to_ms, span.step), (9_996_400_000, 10_000_000_000, ("15s", 15)));
        assert_eq!(asked("from=0&to=7200").unwrap().step, ("1m", 60));
        assert_eq!(asked("from=0&to=86400&step=15s").unwrap().step, ("15s", 15));
        assert_eq!(asked("from=0&to=2592000").unwrap().step, ("1h", 3600));
        for bad in ["from=5&to=4", "from=0&to=2592001", "step=2m", "step=", "from=x", "to=x"] {
            assert_eq!(asked(bad).unwrap_err().status.as_u16(), 400, "{bad}");
        }
    }
}
