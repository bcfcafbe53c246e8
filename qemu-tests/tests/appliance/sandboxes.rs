//! What needs both ends: the API and a look into the appliance.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::{faults::wait_active, fixture::Fixture};

/// Before the bake is done a create waits a while, then says when to come again, and leaves nothing.
pub fn an_early_create(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let before = api.list()?.len();

    let answer = api.call("POST", "/v1/sandboxes", Some(&json!({"template": "code-interpreter"})))?;

    match answer.status {
        201 => {
            api.delete_all()?;
            Ok(())
        }
        503 => {
            ensure!(answer.retry_after.is_some() && answer.body["error"].is_string(), "{answer:?}");
            ensure!(api.list()?.len() == before, "something was created");
            Ok(())
        }
        _ => bail!("{answer:?}"),
    }
}

pub fn templates_are_baked(fixture: &Fixture) -> Result<()> {
    fixture.wait_baked(Duration::from_secs(900))
}

/// Killing Firecracker behind everybody's back shows as `failed` with a reason, and a delete clears it away.
pub fn a_dead_firecracker(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let id = api.create_base()?;

    fixture.ssh(&format!("systemctl kill -s KILL pandastack-sandbox@{id}.service"))?;

    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let answer = api.get(&id)?;
        if answer.body["status"] == "failed" {
            break;
        }
        ensure!(Instant::now() < deadline, "{answer:?}");
        std::thread::sleep(Duration::from_secs(1));
    }
    let answer = api.call("POST", &format!("/v1/sandboxes/{id}/exec"), Some(&json!({"cmd": "true"})))?;
    ensure!((400..500).contains(&answer.status), "{answer:?}");
    ensure!(api.delete(&id)?.status == 204, "a failed sandbox cannot be deleted");
    fixture.assert_nothing_leaks()
}

/// A persistent sandbox that nobody uses is put to sleep, and its next request wakes it; the operator sets after how long.
pub fn an_idle_persistent_sandbox(fixture: &Fixture) -> Result<()> {
    let drop_in = "/run/systemd/system/pandastack-vmm.service.d";
    let restart = |line: &str| {
        fixture.ssh(&format!("{line}; systemctl daemon-reload; systemctl restart pandastack-vmm"))?;
        wait_active(fixture, "vmm")
    };
    let api = fixture.api()?;
    let idle = api.create(&json!({"template": "base", "persistent": true}))?;
    let other = api.create_base()?;
    api.exec(&idle, "echo kept > /dev/shm/kept")?;

    restart(&format!(
        "mkdir -p {drop_in}; printf '[Service]\\nEnvironment=PANDASTACK_IDLE_HIBERNATE_SECONDS=5\\n' > {drop_in}/suite.conf"
    ))?;
    let status = |id: &str| -> Result<String> {
        let listed = api.list()?;
        let found = listed.iter().find(|one| one["id"] == id).context("it is gone")?;
        Ok(found["status"].as_str().unwrap_or_default().to_owned())
    };
    let deadline = Instant::now() + Duration::from_secs(90);
    while status(&idle)? != "hibernated" && Instant::now() < deadline {
        std::thread::sleep(Duration::from_secs(2));
    }
    let (slept, ran) = (status(&idle)?, status(&other)?);
    restart(&format!("rm -r {drop_in}"))?;

    ensure!(slept == "hibernated", "nobody uses it, and it is {slept}");
    ensure!(ran == "running", "one that is not persistent is {ran}");
    ensure!(api.exec(&idle, "cat /dev/shm/kept")? == "kept\n", "its memory is lost");
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}
