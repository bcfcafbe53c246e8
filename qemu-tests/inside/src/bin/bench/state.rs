//! Forks and wakes beside creates.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::json;

use crate::{
    Table,
    tools::{Api, STORAGE, children},
};

/// Children of the large tree.
const TREE: usize = 10;
/// Rounds of what takes long.
const FEW: usize = 6;

/// `create_beside_state`, `fork_over_create`, `wake_over_create`, `wake_cold_over_create`, `hibernate_over_create`,
/// `tree10_over_fork`.
pub async fn measure(api: &mut Api, template: &str, rounds: usize, table: &mut Table) -> Result<()> {
    let (mut creates, mut forks, mut trees) = (vec![], vec![], vec![]);
    let (mut wakes, mut cold_wakes, mut hibernations) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        api.slots_full().await?;
        let (id, micros, _) = api.create(template).await?;
        creates.push(micros);
        api.slots_full().await?;
        let (answer, micros) = api.verb(&id, "fork", Some(&json!({}))).await?;
        forks.push(micros);
        for child in children(&answer) {
            api.delete(&child).await?;
        }
        for (cold, series) in [(false, &mut wakes), (true, &mut cold_wakes)] {
            let had = captures()?;
            hibernations.push(api.verb(&id, "hibernate", None).await?.1);
            api.slots_full().await?;
            if cold {
                evict(captures()?.into_iter().filter(|path| !had.contains(path)))?;
            }
            series.push(api.verb(&id, "wake", None).await?.1);
            api.exec(&id, "true").await?;
        }
        if round < FEW {
            api.slots_full().await?;
            let (answer, micros) = api.verb(&id, "fork-tree", Some(&json!({"count": TREE}))).await?;
            let made = children(&answer);
            ensure!(made.len() == TREE, "{} of {TREE} children were made: {answer}", made.len());
            trees.push(micros);
            for child in made {
                api.delete(&child).await?;
            }
        }
        api.delete(&id).await?;
    }

    table.put("create_beside_state", "us", creates, None);
    table.put("fork_over_create", "us", forks, Some("create_beside_state"));
    table.put("tree10_over_fork", "us", trees, Some("fork_over_create"));
    table.put("wake_over_create", "us", wakes, Some("create_beside_state"));
    table.put("wake_cold_over_create", "us", cold_wakes, Some("create_beside_state"));
    table.put("hibernate_over_create", "us", hibernations, Some("create_beside_state"));
    Ok(())
}

fn captures() -> Result<Vec<PathBuf>> {
    let directory = Path::new(STORAGE).join("snapshots");
    let all = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    all.map(|entry| Ok(entry?.path())).collect()
}

/// Takes the files of a capture out of the page cache. Nothing maps them while the sandbox sleeps.
fn evict(captures: impl Iterator<Item = PathBuf>) -> Result<()> {
    let mut files = 0;
    for capture in captures {
        for entry in fs::read_dir(&capture)? {
            let file = fs::File::open(entry?.path())?;
            file.sync_all()?;
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
            files += 1;
        }
    }
    ensure!(files > 0, "the hibernation left no files");
    Ok(())
}
