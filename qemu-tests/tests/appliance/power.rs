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
use qemu_tests::{api::Api, beat};
use serde_json::{Value, json};

use crate::{
    faults::{Told, load},
    fixture::Fixture,
    is_long, power_state,
};

/// How a persistent sandbox comes back after the appliance was off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// Booted again from its own disk.
    Cold,
    /// From its hibernation image, its processes included.
    Woken,
    /// Whichever it was.
    Either,
}

/// A persistent sandbox with a file that it has synced; also one on each of the volumes.
pub fn persistent(api: &Api, text: &str, volumes: &[&str]) -> Result<String> {
    let uses: Vec<Value> = volumes.iter().map(|name| json!({"name": name})).collect();
    let id = api.create(
        &json!({"template": "base", "persistent": true, "metadata": {"kept": text}, "volumes": uses}),
    )?;
    let mut places = vec!["/root".to_owned()];
    places.extend(volumes.iter().map(|name| format!("/mnt/{name}")));
    for place in places {
        let wrote = api.exec(&id, &format!("python3 -c \"\nimport os\nf=open('{place}/kept','w'); f.write('{text}'); f.flush(); os.fsync(f.fileno()); d=os.open('{place}',os.O_RDONLY); os.fsync(d); print('synced')\""))?;
        ensure!(wrote == "synced\n", "{wrote}");
    }
    Ok(id)
}

/// Waits until it can be used again, then reads the file back.
pub fn came_back(api: &Api, id: &str, text: &str, how: Return) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(180);
    loop {
        let answer = api.get(id)?;
        ensure!(answer.status == 200, "{id} is lost: {answer:?}");
        match answer.body["status"].as_str().context("no status")? {
            "running" => {
                let cold = answer.body["boot_mode"] == "cold";
                ensure!(how == Return::Either || cold == (how == Return::Cold), "{how:?}: {answer:?}");
                break;
            }
            "hibernated" => {
                ensure!(how != Return::Cold, "{answer:?}");
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
    let (kept, lost) = (persistent(&api, "clean", &[])?, api.create_base()?);
    beat::start(&api, &kept)?;
    let kept_held = beat::ask(&api, &kept, "hold")?;
    // Hibernated long before, and not persistent: nothing runs, so nothing is lost.
    let asleep = api.create_base()?;
    beat::start(&api, &asleep)?;
    let asleep_held = beat::ask(&api, &asleep, "hold")?;
    api.done(&asleep, "hibernate")?;

    fixture.take()?.power_down(Duration::from_secs(240))?;
    fixture.start(|appliance| appliance)?;

    let api = fixture.api()?;
    ensure!(api.status(&asleep)? == "hibernated", "{:?}", api.get(&asleep)?);
    came_back(&api, &kept, "clean", Return::Woken)?;
    for (id, held) in [(&kept, &kept_held), (&asleep, &asleep_held)] {
        beat::whole(&api, id, held).context("its processes go on where they were")?;
    }
    let events = fixture.ssh(&format!(
        "busctl call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Events s {kept}"
    ))?;
    ensure!(!events.contains("recover.cold_boot"), "{events}");
    let answer = api.get(&lost)?;
    ensure!(answer.status == 404 || answer.body["status"] == "failed", "{answer:?}");
    let boots = fixture.ssh("journalctl --list-boots --no-pager | wc -l")?;
    ensure!(boots.trim().parse::<u32>()? >= 2, "the journal of the last boot is lost");
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

pub fn power_cuts_lose_nothing_acknowledged(fixture: &Fixture) -> Result<()> {
    // In the second one the kernel gives up instead; nobody starts the appliance again then.
    let rounds: u64 = if is_long() { 3 } else { 1 };
    for round in 0..rounds {
        let api = fixture.api()?;
        api.delete_all()?;
        let volume = format!("power-{round}");
        let made = api.call("POST", "/v1/volumes", Some(&json!({"name": volume, "size_mb": 64})))?;
        ensure!(made.status == 201, "{made:?}");
        let kept = persistent(&api, &format!("round {round}"), &[&volume])?;
        let changing = power_state::Changing::begin(&api)?;
        let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Told::default())));
        let caller = {
            let (api, stop, told) = (api.clone(), Arc::clone(&stop), Arc::clone(&told));
            thread::spawn(move || load(&api, &stop, &told))
        };
        let changer = {
            let (api, stop) = (api.clone(), Arc::clone(&stop));
            thread::spawn(move || changing.go_on(&api, &stop))
        };
        // A moment that differs from run to run.
        thread::sleep(Duration::from_millis(6000 + u64::from(std::process::id()) * 37 % 4000 + round * 1700));

        // The callers stop first: what is answered after the cut cannot be told apart.
        let panics = round == 1;
        if panics {
            fixture.ssh("(sleep 1; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &")?;
            fixture.wait_for_panic()?;
        } else {
            fixture.take()?.power_cut()?;
        }
        stop.store(true, Ordering::Relaxed);
        if panics {
            fixture.wait_for_boot()?;
        }
        caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))?;
        let changed = changer.join().map_err(|_| anyhow::anyhow!("the changer panicked"))?;
        if !panics {
            fixture.start(|appliance| appliance)?;
        }

        let api = fixture.api()?;
        came_back(&api, &kept, &format!("round {round}"), Return::Cold)?;
        let on_volume = api.exec(&kept, &format!("cat /mnt/{volume}/kept"))?;
        ensure!(on_volume == format!("round {round}"), "the volume has {on_volume:?}");
        changed.is_kept(&api)?;
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
