//! How many cheap reads the API answers in a second.

use std::{process::Command, time::Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;

use crate::{Table, tools::Api};

/// Connections that ask at one time.
const CALLERS: usize = 8;
/// Requests of each in a round.
const EACH: usize = 50;

/// `requests_per_second`.
pub async fn measure(api: &mut Api, template: &str, rounds: usize, table: &mut Table) -> Result<()> {
    let (id, _, _) = api.create(template).await?;
    set_rate("100000 100000 60")?;
    let outcome = rates(api, &format!("/v1/sandboxes/{id}"), rounds).await;
    set_rate("0 0 0")?;
    api.delete(&id).await?;

    table.put("requests_per_second", "1/s", outcome?, None);
    Ok(())
}

async fn rates(api: &Api, path: &str, rounds: usize) -> Result<Vec<f64>> {
    let mut series = Vec::new();
    for _ in 0..rounds {
        let mut all = Vec::new();
        for _ in 0..CALLERS {
            all.push(api.another().await?);
        }
        let before = Instant::now();
        let mut callers = JoinSet::new();
        for mut mine in all {
            let path = path.to_owned();
            callers.spawn(async move {
                for _ in 0..EACH {
                    mine.timed("GET", &path, None).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(outcome) = callers.join_next().await {
            outcome??;
        }
        series.push((CALLERS * EACH) as f64 / before.elapsed().as_secs_f64());
    }
    Ok(series)
}

/// The limit of the default workspace, as an operator sets it; it would be what is measured.
fn set_rate(numbers: &str) -> Result<()> {
    let told = Command::new("busctl")
        .args(["call", "ai.pandastack.api1", "/ai/pandastack/api1", "ai.pandastack.api1.Manager"])
        .args(["SetRate", "suuu", "default"])
        .args(numbers.split(' '))
        .output()?;
    ensure!(told.status.success(), "SetRate: {}", String::from_utf8_lossy(&told.stderr));
    Ok(())
}
