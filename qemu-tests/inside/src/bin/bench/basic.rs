//! Creates beside bare restores, execs beside bare round trips.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use pandastack_protocol::{Exec, ExecEvent};
use qemu_tests_inside::bare;

use crate::{
    Table,
    tools::{Api, STORAGE},
};

/// Rounds of what is made without slots.
const WITHOUT_SLOTS: usize = 4;
/// Sandboxes that are made at most to use all slots up, of which an appliance of three processors has 24.
const MOST_TAKEN: usize = 48;

/// `bare_*`, `create_*`, `agent_round_trip`, `exec_over_agent`, `delete_over_bare`.
pub async fn measure(api: &mut Api, template: &str, rounds: usize, table: &mut Table) -> Result<()> {
    let scratch = Path::new(STORAGE).join("bench");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    let (bake, firecracker) = (newest_bake(template)?, PathBuf::from("/usr/lib/pandastack/firecracker"));
    warm(&bake.join("mem"))?;

    let (mut bares, mut spawns, mut loads, mut hellos) = (vec![], vec![], vec![], vec![]);
    let (mut creates, mut boots) = (vec![], vec![]);
    let (mut agents, mut execs, mut deletes) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        api.slots_full().await?;
        let (guest, timing) = bare::restore(&bake, &firecracker, &scratch, &format!("r{round}")).await?;
        drop(guest);
        bares.push(timing.total());
        spawns.push(timing.spawn);
        loads.push(timing.load);
        hellos.push(timing.hello);

        let (id, micros, made) = api.create(template).await?;
        creates.push(micros);
        boots.push(made["boot_ms"].as_f64().context("no boot_ms")? * 1000.0);
        api.slots_full().await?;
        round_trips(api, &id, &mut agents, &mut execs).await?;
        deletes.push(api.delete(&id).await?);
    }
    let cold_creates = without_slots(api, template, rounds.min(WITHOUT_SLOTS)).await?;
    let _ = fs::remove_dir_all(&scratch);

    table.put("bare_restore", "us", bares, None);
    table.put("bare_spawn", "us", spawns, None);
    table.put("bare_load", "us", loads, None);
    table.put("bare_hello", "us", hellos, None);
    table.put("create_over_bare", "us", creates, Some("bare_restore"));
    table.put("create_without_slots_over_bare", "us", cold_creates, Some("bare_restore"));
    table.put("create_boot_ms_over_bare", "us", boots, Some("bare_restore"));
    table.put("agent_round_trip", "us", agents, None);
    table.put("exec_over_agent", "us", execs, Some("agent_round_trip"));
    table.put("delete_over_bare", "us", deletes, Some("bare_restore"));
    Ok(())
}

/// Takes all slots that are there; then the next create makes everything on the spot.
async fn without_slots(api: &mut Api, template: &str, rounds: usize) -> Result<Vec<f64>> {
    let (mut series, mut taken) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        while api.slots().await? > 0 && taken.len() < MOST_TAKEN {
            taken.push(api.create(template).await?.0);
        }
        let (id, micros, _) = api.create(template).await?;
        series.push(micros);
        taken.push(id);
    }
    for id in taken {
        api.delete(&id).await?;
    }
    Ok(series)
}

/// Takes turns, so that a freshly restored guest's first touches of its memory and the work of others meet both alike.
async fn round_trips(api: &mut Api, id: &str, agents: &mut Vec<f64>, execs: &mut Vec<f64>) -> Result<()> {
    let socket = Path::new(STORAGE).join("sandboxes").join(id).join("s/v.sock");
    let mut client = bare::greet(&socket).await?;
    for turn in 0..12 {
        let session = format!("bench{turn:0>15}");
        let exec =
            Exec { session, argv: ["/bin/sh", "-c", "true"].map(String::from).to_vec(), ..Exec::default() };
        let before = Instant::now();
        let mut running = client.exec(exec, Duration::from_secs(10)).await.map_err(|(_, error)| error)?;
        while !matches!(running.next().await?, ExecEvent::Exit(_)) {}
        let agent = before.elapsed().as_secs_f64() * 1e6;
        client = running.into_client().context("the stream was not given back")?;

        let exec = api.exec(id, "true").await?;
        if turn >= 2 {
            agents.push(agent);
            execs.push(exec);
        }
    }
    Ok(())
}

fn newest_bake(template: &str) -> Result<PathBuf> {
    let bakes = Path::new(STORAGE).join("templates").join(template).join("bakes");
    let mut all: Vec<_> = fs::read_dir(&bakes)
        .with_context(|| bakes.display().to_string())?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join("manifest.json").exists())
        .collect();
    all.sort_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok());
    all.pop().context("the template is not baked")
}

fn warm(file: &Path) -> Result<()> {
    std::io::copy(&mut fs::File::open(file)?, &mut std::io::sink())?;
    Ok(())
}
