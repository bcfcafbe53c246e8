//! What needs both ends: the API and a look into the appliance.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use crate::fixture::Fixture;

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
