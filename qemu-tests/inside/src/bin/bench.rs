//! The measurements of `docs/benchmarks.md`, taken inside the appliance, side by side in one run.
//!
//! `bench TOKEN TEMPLATE ROUNDS` prints one JSON object. Every round takes one of each kind, so that a drift of the
//! machine's speed meets all of them alike.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use pandastack_protocol::{Exec, ExecEvent};
use qemu_tests_inside::{
    bare,
    http::Connection,
    stats::{Row, row},
};
use serde_json::json;
use tokio::net::TcpStream;

const STORAGE: &str = "/var/lib/pandastack/storage";
/// Idle sandboxes over which memory is averaged.
const IDLE: usize = 6;

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut next =
        |what: &str| arguments.next().with_context(|| format!("usage: bench TOKEN TEMPLATE ROUNDS ({what})"));
    let (token, template, rounds) = (next("token")?, next("template")?, next("rounds")?.parse::<usize>()?);
    let table = measure(&token, &template, rounds).await?;
    println!("{}", serde_json::to_string(&table)?);
    Ok(())
}

async fn measure(token: &str, template: &str, rounds: usize) -> Result<BTreeMap<&'static str, Row>> {
    let scratch = Path::new(STORAGE).join("bench");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch)?;
    let (bake, firecracker) = (newest_bake(template)?, PathBuf::from("/usr/lib/pandastack/firecracker"));
    warm(&bake.join("mem"))?;
    let mut api = Connection::over(TcpStream::connect("127.0.0.1:8080").await?).await?;

    let (mut bares, mut spawns, mut loads, mut hellos) = (vec![], vec![], vec![], vec![]);
    let (mut creates, mut cold_creates, mut boots) = (vec![], vec![], vec![]);
    let (mut agents, mut execs, mut deletes) = (vec![], vec![], vec![]);
    for round in 0..rounds {
        slots_full(&mut api).await?;
        let (guest, timing) = bare::restore(&bake, &firecracker, &scratch, &format!("r{round}")).await?;
        drop(guest);
        bares.push(timing.total());
        spawns.push(timing.spawn);
        loads.push(timing.load);
        hellos.push(timing.hello);

        let (id, micros, boot_ms) = create(&mut api, token, template).await?;
        creates.push(micros);
        boots.push(boot_ms * 1000.0);
        slots_full(&mut api).await?;
        round_trips(&mut api, token, &id, &mut agents, &mut execs).await?;
        deletes.push(delete(&mut api, token, &id).await?);
    }
    // Without slots: take all that are there, then the next create makes everything on the spot.
    let mut taken = Vec::new();
    for _ in 0..rounds.min(4) {
        while slots(&mut api).await? > 0 && taken.len() < 16 {
            taken.push(create(&mut api, token, template).await?.0);
        }
        let (id, micros, _) = create(&mut api, token, template).await?;
        cold_creates.push(micros);
        taken.push(id);
    }
    for id in taken {
        delete(&mut api, token, &id).await?;
    }
    let memory = memory_per_sandbox(&mut api, token, template).await?;
    let _ = fs::remove_dir_all(&scratch);

    let median = |series: &[f64]| row("us", series.to_vec(), None).map_or(f64::NAN, |row| row.p50);
    let (bare_p50, agent_p50) = (median(&bares), median(&agents));
    let mut table = BTreeMap::new();
    let mut put = |name, made: Option<Row>| made.map(|made| table.insert(name, made));
    put("bare_restore", row("us", bares, None));
    put("bare_spawn", row("us", spawns, None));
    put("bare_load", row("us", loads, None));
    put("bare_hello", row("us", hellos, None));
    put("create_over_bare", row("us", creates, Some(("bare_restore", bare_p50))));
    put("create_without_slots_over_bare", row("us", cold_creates, Some(("bare_restore", bare_p50))));
    put("create_boot_ms_over_bare", row("us", boots, Some(("bare_restore", bare_p50))));
    put("agent_round_trip", row("us", agents, None));
    put("exec_over_agent", row("us", execs, Some(("agent_round_trip", agent_p50))));
    put("delete_over_bare", row("us", deletes, Some(("bare_restore", bare_p50))));
    put("memory_per_sandbox", row("KiB", memory, None));
    Ok(table)
}

async fn create(api: &mut Connection, token: &str, template: &str) -> Result<(String, f64, f64)> {
    let before = Instant::now();
    let made = api.call("POST", "/v1/sandboxes", Some(token), Some(&json!({"template": template}))).await?;
    let micros = before.elapsed().as_secs_f64() * 1e6;
    let id = made["id"].as_str().context("no id")?.to_owned();
    Ok((id, micros, made["boot_ms"].as_f64().context("no boot_ms")?))
}

async fn delete(api: &mut Connection, token: &str, id: &str) -> Result<f64> {
    let before = Instant::now();
    api.call("DELETE", &format!("/v1/sandboxes/{id}"), Some(token), None).await?;
    Ok(before.elapsed().as_secs_f64() * 1e6)
}

/// Takes turns, so that a freshly restored guest's first touches of its memory and the work of others meet both alike.
async fn round_trips(
    api: &mut Connection,
    token: &str,
    id: &str,
    agents: &mut Vec<f64>,
    execs: &mut Vec<f64>,
) -> Result<()> {
    let socket = Path::new(STORAGE).join("sandboxes").join(id).join("s/v.sock");
    let mut client = bare::greet(&socket).await?;
    let path = format!("/v1/sandboxes/{id}/exec");
    for turn in 0..12 {
        let session = format!("bench{turn:0>15}");
        let exec =
            Exec { session, argv: ["/bin/sh", "-c", "true"].map(String::from).to_vec(), ..Exec::default() };
        let before = Instant::now();
        let mut running = client.exec(exec, Duration::from_secs(10)).await.map_err(|(_, error)| error)?;
        while !matches!(running.next().await?, ExecEvent::Exit(_)) {}
        let agent = before.elapsed().as_secs_f64() * 1e6;
        client = running.into_client().context("the stream was not given back")?;

        let before = Instant::now();
        let answer = api.call("POST", &path, Some(token), Some(&json!({"cmd": "true"}))).await?;
        anyhow::ensure!(answer["exit_code"] == 0, "exec failed: {answer}");
        if turn >= 2 {
            agents.push(agent);
            execs.push(before.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(())
}

/// Host memory that one more idle sandbox takes away from what is available, KiB, one figure per batch.
async fn memory_per_sandbox(api: &mut Connection, token: &str, template: &str) -> Result<Vec<f64>> {
    let mut series = Vec::new();
    for _ in 0..3 {
        slots_full(api).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = available_kib()?;
        let mut made = Vec::new();
        for _ in 0..IDLE {
            made.push(create(api, token, template).await?.0);
        }
        slots_full(api).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        series.push((before - available_kib()?) / IDLE as f64);
        for id in made {
            delete(api, token, &id).await?;
        }
    }
    Ok(series)
}

fn available_kib() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:")).context("MemAvailable")?;
    Ok(line.split_whitespace().nth(1).context("a number")?.parse()?)
}

async fn slots(api: &mut Connection) -> Result<u64> {
    Ok(gauge(api, "pandastack_slots_ready").await? as u64)
}

/// Waits until the refill of slots has come to rest.
async fn slots_full(api: &mut Connection) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let wanted = gauge(api, "pandastack_slots_wanted").await? as u64;
    while slots(api).await? < wanted {
        anyhow::ensure!(Instant::now() < deadline, "the slots do not fill up");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

async fn gauge(api: &mut Connection, name: &str) -> Result<f64> {
    let text = api.text("/metrics").await?;
    let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
    Ok(line.and_then(|line| line.rsplit(' ').next()).with_context(|| format!("no metric {name}"))?.parse()?)
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
