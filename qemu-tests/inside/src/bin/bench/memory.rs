//! What one more sandbox takes from the host's available memory, Firecracker included.

use std::{fs, time::Duration};

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    Table,
    tools::{Api, children},
};

/// Idle ones over which memory is averaged.
const IDLE: usize = 6;
const BATCHES: usize = 3;

/// `memory_per_sandbox`, `memory_per_fork`.
pub async fn measure(api: &mut Api, template: &str, table: &mut Table) -> Result<()> {
    let (mut sandboxes, mut forks) = (vec![], vec![]);
    let (parent, _, _) = api.create(template).await?;
    for _ in 0..BATCHES {
        let before = available(api).await?;
        let mut made = Vec::new();
        for _ in 0..IDLE {
            made.push(api.create(template).await?.0);
        }
        sandboxes.push((before - available(api).await?) / IDLE as f64);
        clear(api, made).await?;

        let before = available(api).await?;
        let mut made = Vec::new();
        for _ in 0..IDLE {
            made.extend(children(&api.verb(&parent, "fork", Some(&json!({}))).await?.0));
        }
        forks.push((before - available(api).await?) / IDLE as f64);
        clear(api, made).await?;
    }
    api.delete(&parent).await?;

    table.put("memory_per_sandbox", "KiB", sandboxes, None);
    table.put("memory_per_fork", "KiB", forks, Some("memory_per_sandbox"));
    Ok(())
}

async fn clear(api: &mut Api, made: Vec<String>) -> Result<()> {
    for id in made {
        api.delete(&id).await?;
    }
    Ok(())
}

/// KiB, once things have come to rest.
async fn available(api: &mut Api) -> Result<f64> {
    api.slots_full().await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).context("MemAvailable")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}
