//! How long a parent's processors stand still while it is forked, as the answer says (`paused_us`).

use anyhow::{Context, Result};
use serde_json::json;

use crate::{
    Table,
    tools::{Api, children},
};

const ROUNDS: usize = 6;
/// Rounds with a dirty disk: writing half a GiB takes long under emulation.
const DISK_ROUNDS: usize = 2;
/// 20 MiB of memory that is written anew.
const DIRTY_MEMORY: &str = "dd if=/dev/zero bs=1M count=20 2>/dev/null | tr '\\0' x > /dev/shm/dirty";
/// 512 MiB on the disk, past the guest's page cache, which the guest does not flush: they are dirty on the host.
const DIRTY_DISK: &str =
    "dd if=/dev/zero of=/root/dirty bs=4M count=128 oflag=direct conv=notrunc 2>/dev/null";

/// `fork_pause_256m`, `fork_pause_2g_over_256m`, `fork_pause_512m_disk_over_2g`.
pub async fn measure(api: &mut Api, template: &str, small: &str, table: &mut Table) -> Result<()> {
    let (little, _, _) = api.create(small).await?;
    let (large, _, _) = api.create(template).await?;
    let (mut littles, mut larges, mut disks) = (vec![], vec![], vec![]);
    // The first capture of each is not counted: what a guest touches soon after its restore is in it.
    for round in 0..=ROUNDS {
        for (id, series) in [(&little, &mut littles), (&large, &mut larges)] {
            let paused = fork(api, id, DIRTY_MEMORY).await?;
            if round > 0 {
                series.push(paused);
            }
        }
    }
    for _ in 0..DISK_ROUNDS {
        disks.push(fork(api, &large, &format!("{DIRTY_MEMORY} && {DIRTY_DISK}")).await?);
    }
    for id in [little, large] {
        api.delete(&id).await?;
    }

    table.put("fork_pause_256m", "us", littles, None);
    table.put("fork_pause_2g_over_256m", "us", larges, Some("fork_pause_256m"));
    table.put("fork_pause_512m_disk_over_2g", "us", disks, Some("fork_pause_2g_over_256m"));
    Ok(())
}

/// Makes a parent dirty and forks it; microseconds that it stood still.
async fn fork(api: &mut Api, id: &str, dirty: &str) -> Result<f64> {
    api.exec(id, dirty).await?;
    api.slots_full().await?;
    let (answer, _) = api.verb(id, "fork", Some(&json!({}))).await?;
    for child in children(&answer) {
        api.delete(&child).await?;
    }
    answer["paused_us"].as_f64().with_context(|| format!("no paused_us: {answer}"))
}
