//! The power: switched off, and cut.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    api::Api,
    faults::{Told, load},
    fixture::Fixture,
};

/// A persistent sandbox with a file that it has synced.
pub fn persistent(api: &Api, text: &str) -> Result<String> {
    let id = api.create(&json!({"template": "base", "persistent": true, "metadata": {"kept": text}}))?;
    let wrote = api.exec(&id, &format!("python3 -c \"\nimport os\nf=open('/root/kept','w'); f.write('{text}'); f.flush(); os.fsync(f.fileno()); d=os.open('/root',os.O_RDONLY); os.fsync(d); print('synced')\""))?;
    ensure!(wrote == "synced\n", "{wrote}");
    Ok(id)
}

/// Waits until it runs again, then reads the file back.
pub fn came_back(api: &Api, id: &str, text: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let answer = api.get(id)?;
        ensure!(answer.status == 200, "{id} is lost: {answer:?}");
        match answer.body["status"].as_str().context("no status")? {
            "running" => {
                ensure!(answer.body["boot_mode"] == "cold", "{answer:?}");
                break;
            }
            "failed" => anyhow::bail!("{id} failed: {answer:?}"),
            _ => {}
        }
        ensure!(Instant::now() < deadline, "{id} does not come back: {answer:?}");
        thread::sleep(Duration::from_secs(1));
    }
    ensure!(api.exec(id, "cat /root/kept")? == text, "what the guest had synced is not there");
    Ok(())
}

pub fn a_clean_shutdown_and_boot_keep_the_truth(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    api.delete_all()?;
    let (kept, lost) = (persistent(&api, "clean")?, api.create_base()?);

    fixture.take()?.power_down(Duration::from_secs(120))?;
    fixture.start(|appliance| appliance)?;

    let api = fixture.api()?;
    came_back(&api, &kept, "clean")?;
    let events = fixture.ssh(&format!(
        "busctl call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Events s {kept}"
    ))?;
    ensure!(events.contains("recover.cold_boot"), "{events}");
    let answer = api.get(&lost)?;
    ensure!(answer.status == 404 || answer.body["status"] == "failed", "{answer:?}");
    let boots = fixture.ssh("journalctl --list-boots --no-pager | wc -l")?;
    ensure!(boots.trim().parse::<u32>()? >= 2, "the journal of the last boot is lost");
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

pub fn power_cuts_lose_nothing_acknowledged(fixture: &Fixture) -> Result<()> {
    for round in 0..2u64 {
        let api = fixture.api()?;
        api.delete_all()?;
        let kept = persistent(&api, &format!("round {round}"))?;
        let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Told::default())));
        let caller = {
            let (api, stop, told) = (api.clone(), Arc::clone(&stop), Arc::clone(&told));
            thread::spawn(move || load(&api, &stop, &told))
        };
        // A moment that differs from run to run.
        thread::sleep(Duration::from_millis(6000 + u64::from(std::process::id()) * 37 % 4000 + round * 1700));

        // The callers stop first: what is answered after the cut cannot be told apart.
        let mut running = fixture.take()?;
        running.power_cut()?;
        stop.store(true, Ordering::Relaxed);
        caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))?;
        fixture.start(|appliance| appliance)?;

        let api = fixture.api()?;
        came_back(&api, &kept, &format!("round {round}"))?;
        let told = told.lock().expect("no one panics with it");
        let listed: Vec<_> = api.list()?;
        let status =
            |id: &String| listed.iter().find(|one| one["id"] == id.as_str()).map(|one| one["status"].clone());
        for id in &told.there {
            ensure!(status(id) == Some("failed".into()), "acknowledged {id} is {:?}", status(id));
        }
        for id in &told.gone {
            ensure!(status(id).is_none(), "deleted {id} is back as {:?}", status(id));
        }
        eprintln!("  round {round}: {} there, {} gone", told.there.len(), told.gone.len());
        fixture.assert_nothing_leaks()?;
        let new = api.create_base()?;
        ensure!(api.exec(&new, "echo new")? == "new\n", "a new sandbox does not work");
    }
    fixture.api()?.delete_all()?;
    fixture.assert_nothing_leaks()
}
