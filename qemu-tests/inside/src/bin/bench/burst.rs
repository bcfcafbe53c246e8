//! Many creates at one moment, several times the slots. None may fail; a refusal for lack of capacity is counted as one.

use anyhow::Result;
use tokio::task::JoinSet;

use crate::{Table, tools::Api};

const BURST: usize = 20;

/// `burst20_create_over_create`, `burst20_failed`.
pub async fn measure(api: &mut Api, template: &str, table: &mut Table) -> Result<()> {
    api.slots_full().await?;
    let mut callers = JoinSet::new();
    for _ in 0..BURST {
        let (mut mine, template) = (api.another().await?, template.to_owned());
        callers.spawn(async move { mine.create(&template).await });
    }
    let (mut series, mut made, mut failed) = (Vec::new(), Vec::new(), 0.0);
    while let Some(outcome) = callers.join_next().await {
        match outcome? {
            Ok((id, micros, _)) => {
                series.push(micros);
                made.push(id);
            }
            Err(error) => {
                eprintln!("a create of the burst failed: {error:#}");
                failed += 1.0;
            }
        }
    }
    for id in made {
        api.delete(&id).await?;
    }

    table.put("burst20_create_over_create", "us", series, Some("create_over_bare"));
    table.put("burst20_failed", "creates", vec![failed], None);
    Ok(())
}
