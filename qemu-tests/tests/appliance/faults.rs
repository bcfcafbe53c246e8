//! Killed processes: sandboxes keep running, nothing acknowledged is lost, nothing is left over.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use serde_json::json;

use qemu_tests::api::Api;

use crate::fixture::Fixture;

const DAEMONS: [&str; 5] = ["vmm", "storage", "network", "api", "edge"];

/// What callers were told.
#[derive(Debug, Default)]
pub struct Told {
    /// Answered with 201 and not deleted since.
    pub there: Vec<String>,
    /// Answered with 204.
    pub gone: Vec<String>,
    /// A delete of these was sent and not answered.
    pub unknown: Vec<String>,
    /// Answers of every kind.
    pub answers: u64,
}

/// Creates, runs and deletes until `stop`, noting what it was told.
pub fn load(api: &Api, stop: &AtomicBool, told: &Mutex<Told>) {
    while !stop.load(Ordering::Relaxed) {
        let note = |change: &dyn Fn(&mut Told)| change(&mut told.lock().expect("no one panics with it"));
        let Ok(answer) =
            api.call("POST", "/v1/sandboxes", Some(&json!({"template": "base", "metadata": {"load": "1"}})))
        else {
            thread::sleep(Duration::from_millis(300));
            continue;
        };
        note(&|told| told.answers += 1);
        let Some(id) = answer.body["id"].as_str().filter(|_| answer.status == 201) else {
            thread::sleep(Duration::from_millis(500));
            continue;
        };
        note(&|told| told.there.push(id.to_owned()));
        let _ = api.call(
            "POST",
            &format!("/v1/sandboxes/{id}/exec"),
            Some(&json!({"cmd": "true", "timeout_seconds": 10})),
        );
        if id.as_bytes()[0] % 3 == 0 {
            continue;
        }
        note(&|told| {
            told.there.retain(|other| other != id);
            told.unknown.push(id.to_owned());
        });
        if let Ok(answer) = api.delete(id)
            && (answer.status == 204 || answer.status == 404)
        {
            note(&|told| {
                told.unknown.retain(|other| other != id);
                told.gone.push(id.to_owned());
            });
        }
        if told.lock().expect("no one panics with it").there.len() > 6 {
            thread::sleep(Duration::from_secs(2));
        }
    }
}

pub fn killed_daemons_lose_and_leak_nothing(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    api.delete_all()?;
    let steady = api.create_base()?;
    api.exec(&steady, "setsid sh -c 'i=0; while :; do i=$((i+1)); echo $i > /root/beat; sleep 0.2; done' >/dev/null 2>&1 < /dev/null &")?;
    let process = fixture.ssh(&format!("systemctl show -P MainPID pandastack-sandbox@{steady}.service"))?;
    let (stop, told) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Told::default())));
    let callers: Vec<_> = (0..2)
        .map(|_| {
            let (api, stop, told) = (api.clone(), Arc::clone(&stop), Arc::clone(&told));
            thread::spawn(move || load(&api, &stop, &told))
        })
        .collect();

    for round in 0..2 {
        for daemon in DAEMONS {
            thread::sleep(Duration::from_secs(3 + round));
            fixture.ssh(&format!("systemctl kill -s KILL pandastack-{daemon}.service"))?;
            wait_active(fixture, daemon)?;
        }
    }
    // All of them at once: each ends with its connection. So does who listens to the power button.
    fixture.ssh("systemctl kill -s KILL dbus-broker.service")?;
    thread::sleep(Duration::from_secs(1));
    for daemon in DAEMONS {
        wait_active(fixture, daemon)?;
    }
    let seats = fixture.ssh("timeout 10 loginctl --no-legend list-seats")?;
    ensure!(seats.contains("seat0"), "logind is not on the new bus: {seats:?}");
    thread::sleep(Duration::from_secs(5));
    stop.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.join().map_err(|_| anyhow::anyhow!("a caller panicked"))?;
    }

    let told = told.lock().expect("no one panics with it");
    eprintln!(
        "  told: {} there, {} gone, {} unknown, {} answers",
        told.there.len(),
        told.gone.len(),
        told.unknown.len(),
        told.answers
    );
    ensure!(told.answers > 5, "the load did nothing");
    let listed: Vec<String> =
        api.list()?.iter().filter_map(|one| Some(one["id"].as_str()?.to_owned())).collect();
    for id in &told.there {
        ensure!(listed.contains(id), "acknowledged {id} is lost");
        ensure!(api.exec(id, "echo alive")? == "alive\n", "{id} does not answer");
    }
    for id in &told.gone {
        ensure!(!listed.contains(id), "deleted {id} is back");
    }
    ensure!(
        fixture.ssh(&format!("systemctl show -P MainPID pandastack-sandbox@{steady}.service"))? == process,
        "the steady sandbox was restarted"
    );
    let beat = |wait| -> Result<u64> {
        thread::sleep(Duration::from_secs(wait));
        Ok(api.exec(&steady, "cat /root/beat")?.trim().parse()?)
    };
    ensure!(beat(0)? < beat(2)?, "the steady sandbox stands still");
    fixture.assert_nothing_leaks()?;
    drop(told);
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

/// Deleting every index loses nothing: the files beside it are the truth.
pub fn an_index_that_is_gone_is_rebuilt(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let id = api.create(&json!({"template": "base", "metadata": {"keep": "me"}}))?;

    let removed = fixture.ssh(
        "systemctl stop pandastack-api pandastack-edge pandastack-vmm pandastack-network pandastack-storage; n=$(find /var/lib/pandastack -name .index | wc -l); find /var/lib/pandastack -name .index -prune -exec rm -rf {} +; systemctl start pandastack.target; echo $n",
    )?;
    for daemon in DAEMONS {
        wait_active(fixture, daemon)?;
    }

    ensure!(removed.trim().parse::<u32>()? >= 3, "there were {removed} indexes");
    let deadline = Instant::now() + Duration::from_secs(30);
    while api.get(&id).map_or(0, |answer| answer.status) != 200 && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(500));
    }
    ensure!(api.get(&id)?.body["metadata"]["keep"] == "me", "its record is lost");
    ensure!(api.exec(&id, "echo on")? == "on\n", "it does not answer");
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

/// Waits until a daemon is up again.
pub fn wait_active(fixture: &Fixture, daemon: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let state = fixture.ssh(&format!("systemctl is-active pandastack-{daemon}.service || true"))?;
        if state.trim() == "active" {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{daemon} is {}", state.trim());
        thread::sleep(Duration::from_millis(500));
    }
}
