//! The measurements of `docs/benchmarks.md`, taken inside the appliance, side by side in one run.
//!
//! `bench TOKEN TEMPLATE SMALL ROUNDS` prints one JSON object. Every round takes one of each kind, so that a drift of the
//! machine's speed meets all of them alike. SMALL is a template like TEMPLATE with less memory.
//!
//! ```text
//!   basic   bare restore, create, exec, delete
//!   state   fork, fork-tree, wake
//!   pause   how long a parent stands still while it is forked
//!   memory  what one more sandbox or fork takes
//!   burst   many creates at once
//!   cells   code interpreter sessions
//!   reach   previews
//!   reads   cheap requests
//!   tools   what they share: calls, slots, gauges
//! ```

mod basic;
mod burst;
mod cells;
mod memory;
mod pause;
mod reach;
mod reads;
mod state;
mod tools;

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use qemu_tests_inside::stats::{Row, row};

use tools::Api;

/// The table so far.
#[derive(Debug, Default)]
struct Table(BTreeMap<&'static str, Row>);

impl Table {
    /// Adds a series, against the median of one that is there already; nothing measured is no row.
    fn put(&mut self, name: &'static str, unit: &str, series: Vec<f64>, against: Option<&'static str>) {
        let base = against.and_then(|other| Some((other, self.0.get(other)?.p50)));
        if let Some(made) = row(unit, series, base) {
            self.0.insert(name, made);
        }
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next = |what: &str| {
        arguments.next().with_context(|| format!("usage: bench TOKEN TEMPLATE SMALL ROUNDS ({what})"))
    };
    let (token, template, small) = (next("token")?, next("template")?, next("small")?);
    let rounds = next("rounds")?.parse::<usize>()?;
    let mut api = Api::connect(token).await?;
    let mut table = Table::default();
    basic::measure(&mut api, &template, rounds, &mut table).await.context("creates and execs")?;
    state::measure(&mut api, &template, rounds, &mut table).await.context("forks and wakes")?;
    pause::measure(&mut api, &template, &small, &mut table).await.context("pauses")?;
    memory::measure(&mut api, &template, &mut table).await.context("memory")?;
    burst::measure(&mut api, &template, &mut table).await.context("a burst")?;
    reach::measure(&mut api, &template, rounds, &mut table).await.context("previews")?;
    reads::measure(&mut api, &template, rounds, &mut table).await.context("reads")?;
    cells::measure(&mut api, rounds, &mut table).await.context("cells")?;
    println!("{}", serde_json::to_string(&table.0)?);
    Ok(())
}
