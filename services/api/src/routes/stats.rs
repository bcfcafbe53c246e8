//! How long sandboxes took until they were there, from the events that say so.

use std::{collections::BTreeMap, sync::Arc};

use http::StatusCode;
use pandastack_bus::vmm::{HistoryQuery, HistoryRow};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use warp::{Filter, filters::BoxedFilter, reply::Response};

use super::{Answer, finish, input, json};
use crate::{
    app::App,
    bus::again,
    input::{Input, count},
    problem::{Effect, Problem},
    tenancy::now_ms,
    wire::rfc3339,
};

const RECENT: usize = 50;
/// Starts that are looked at.
const SAMPLES: usize = 500;

/// The routes of this file.
pub fn routes(app: &Arc<App>) -> BoxedFilter<(Response,)> {
    let app = Arc::clone(app);
    let with = warp::any().map(move || Arc::clone(&app));
    warp::path!("v1" / "stats" / "boot")
        .and(warp::get())
        .and(with)
        .and(input())
        .then(|a, i| finish(boot(a, i)))
        .boxed()
}

/// One start.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct BootSample {
    /// The sandbox, which may be gone.
    pub sandbox_id: String,
    /// Its template.
    pub template: String,
    /// `snapshot`, `fork` or `wake`.
    pub boot_mode: String,
    /// Milliseconds from the request to the guest's first answer.
    pub boot_ms: u64,
    /// RFC 3339.
    pub ts: String,
    #[serde(skip)]
    unix_ms: u64,
}

/// Some starts in numbers; all 0 of none.
#[derive(Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct BootBucket {
    /// How many.
    pub count: u64,
    /// The fastest.
    pub min_ms: u64,
    /// The slowest.
    pub max_ms: u64,
    /// Their mean.
    pub mean_ms: f64,
    /// Half of them were as fast or faster.
    pub p50_ms: u64,
    /// Nine of ten were.
    pub p90_ms: u64,
    /// 99 of a hundred were.
    pub p99_ms: u64,
}

/// How the last starts of the workspace went.
#[derive(Debug, Serialize, ToSchema)]
pub struct BootStats {
    /// How many were looked at: the last 500 at most.
    pub total_samples: u64,
    /// Since the first of them.
    pub window_seconds: u64,
    /// All of them.
    pub overall: BootBucket,
    /// By `boot_mode`.
    pub by_mode: BTreeMap<String, BootBucket>,
    /// By template.
    pub by_template: BTreeMap<String, BootBucket>,
    /// The last ones, the newest first.
    pub recent: Vec<BootSample>,
}

/// How many.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct BootQuery {
    /// Length of `recent`; 50 when absent.
    #[param(required = false, minimum = 1, maximum = 500)]
    pub limit: Option<u32>,
}

/// How long the last sandboxes of the workspace took to be made, forked or woken.
#[utoipa::path(operation_id = "boot_stats", get, path = "/v1/stats/boot", tag = "observe", params(BootQuery),
    responses((status = 200, body = BootStats)))]
pub async fn boot(app: Arc<App>, input: Input) -> Answer {
    let mut recent = RECENT;
    for (key, value) in input.pairs()? {
        if key == "limit" {
            recent = count(&key, &value, 1..=SAMPLES)?;
        }
    }
    let query = HistoryQuery {
        workspace: input.caller.workspace.clone(),
        kinds: vec!["sandbox.running".into(), "sandbox.woken".into()],
        limit: SAMPLES as u32,
        newest: true,
        ..HistoryQuery::default()
    };
    let page = again(|| app.vmm.history(query.clone())).await;
    let page = page.map_err(|error| Problem::from_bus(&error, Effect::None))?;
    let samples: Vec<BootSample> = page.rows.into_iter().filter_map(sample).collect();
    Ok(json(StatusCode::OK, &stats(&samples, recent, now_ms())))
}

/// The start that an event tells of. A cold boot's has no time in it.
fn sample(mut row: HistoryRow) -> Option<BootSample> {
    Some(BootSample {
        boot_ms: row.payload.get("boot_ms")?.parse().ok()?,
        template: row.payload.remove("template").unwrap_or_default(),
        boot_mode: row.payload.remove("boot_mode").unwrap_or_default(),
        sandbox_id: row.sandbox,
        ts: rfc3339(row.unix_ms),
        unix_ms: row.unix_ms,
    })
}

fn stats(samples: &[BootSample], recent: usize, now_ms: u64) -> BootStats {
    let (mut modes, mut templates) =
        (BTreeMap::<String, Vec<u64>>::new(), BTreeMap::<String, Vec<u64>>::new());
    for sample in samples {
        modes.entry(sample.boot_mode.clone()).or_default().push(sample.boot_ms);
        templates.entry(sample.template.clone()).or_default().push(sample.boot_ms);
    }
    let each = |all: BTreeMap<String, Vec<u64>>| {
        all.into_iter().map(|(name, times)| (name, bucket(times))).collect()
    };
    let first = samples.iter().map(|sample| sample.unix_ms).min().unwrap_or(now_ms);
    BootStats {
        total_samples: samples.len() as u64,
        window_seconds: now_ms.saturating_sub(first) / 1000,
        overall: bucket(samples.iter().map(|sample| sample.boot_ms).collect()),
        by_mode: each(modes),
        by_template: each(templates),
        recent: samples.iter().rev().take(recent).cloned().collect(),
    }
}

fn bucket(mut times: Vec<u64>) -> BootBucket {
    times.sort_unstable();
    let (Some(min), Some(max)) = (times.first(), times.last()) else { return BootBucket::default() };
    // The nearest rank: always a time that was measured.
    let rank = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
    BootBucket {
        count: times.len() as u64,
        min_ms: *min,
        max_ms: *max,
        mean_ms: times.iter().sum::<u64>() as f64 / times.len() as f64,
        p50_ms: rank(50),
        p90_ms: rank(90),
        p99_ms: rank(99),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row(seq: u64, payload: &[(&str, &str)]) -> HistoryRow {
        HistoryRow {
            seq,
            unix_ms: 1000 * seq,
            sandbox: format!("s{seq}"),
            payload: payload.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            ..HistoryRow::default()
        }
    }

    #[test]
    fn starts_are_counted_by_mode_and_template() {
        let start = |seq, ms: &str, mode: &str, template: &str| {
            sample(row(seq, &[("boot_ms", ms), ("boot_mode", mode), ("template", template)]))
        };
        let samples: Vec<_> = [
            start(1, "10", "snapshot", "base"),
            start(2, "30", "wake", "base"),
            start(3, "20", "snapshot", "agent"),
            sample(row(4, &[])),
            sample(row(5, &[("boot_ms", "x")])),
        ]
        .into_iter()
        .flatten()
        .collect();
        let stats = stats(&samples, 2, 11_000);
        assert_eq!((stats.total_samples, stats.window_seconds), (3, 10));
        assert_eq!((stats.overall.count, stats.overall.p50_ms, stats.overall.p99_ms), (3, 20, 30));
        assert_eq!((stats.by_mode["snapshot"].count, stats.by_mode["wake"].min_ms), (2, 30));
        assert_eq!(stats.by_template["base"].mean_ms, 20.0);
        let recent: Vec<_> = stats.recent.iter().map(|sample| &*sample.sandbox_id).collect();
        assert_eq!(recent, ["s3", "s2"]);
        assert_eq!(super::stats(&[], 9, 5).overall, BootBucket::default());
    }

    proptest! {
        #[test]
        fn percentiles_are_measured_times_in_order(times in prop::collection::vec(0u64..10_000, 1..200)) {
            let bucket = bucket(times.clone());
            let p = [bucket.min_ms, bucket.p50_ms, bucket.p90_ms, bucket.p99_ms, bucket.max_ms];
            prop_assert!(p.windows(2).all(|pair| pair[0] <= pair[1]) && p.iter().all(|time| times.contains(time)));
            let at_most = |limit: u64| times.iter().filter(|time| **time <= limit).count() * 100;
            prop_assert!(at_most(bucket.p50_ms) >= 50 * times.len() && at_most(bucket.p90_ms) >= 90 * times.len());
        }
    }
}
