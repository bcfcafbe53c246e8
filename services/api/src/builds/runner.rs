//! Does what waits, one build at a time, for ever.
//!
//! Owns: the order of record and work: a stage is durable before it begins.

use std::{sync::Arc, time::Duration};

use super::{
    guest::Fault,
    record::{Build, Event, Stage},
    store::BuildsError,
    work::Work,
};
use crate::app::App;

const PAUSE: Duration = Duration::from_secs(5);
/// How often a clean-up is tried before the next build goes on; it begins with another one.
const CLEANUPS: usize = 12;
const CANCELLED: &str = "cancelled";

/// Runs until the runtime ends.
pub async fn run(app: Arc<App>) {
    loop {
        let Some(build) = app.builds.next() else {
            app.builds.work.notified().await;
            continue;
        };
        tracing::info!(build = build.id, workspace = build.workspace, stage = ?build.stage, "build");
        if let Err(error) = attend(&app, build).await {
            tracing::error!("{}", pandastack_daemon::chain(&error));
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// One build, to its end.
async fn attend(app: &Arc<App>, mut build: Build) -> Result<(), BuildsError> {
    let mut work = Work::new(app, &build.id);
    while !build.stage.is_over() {
        let outcome = step(app, &mut work, &build).await;
        if let Err(fault) = &outcome
            && let Err(error) = work.note(&sentence(fault)).await
        {
            // The record tells it, too.
            tracing::warn!(build = build.id, "{}", sentence(&error));
        }
        let (event, error) = match (build.stage, &outcome) {
            (Stage::Queued, Ok(())) => (Event::Go, String::new()),
            // Whatever stays is removed before the next build.
            (Stage::Failing, _) | (_, Ok(())) => (Event::Step, String::new()),
            (_, Err(Fault::Cancelled)) => (Event::Cancel, CANCELLED.to_owned()),
            (_, Err(fault)) => (Event::Fault, sentence(fault)),
        };
        match app.builds.happen(&build.id, event, &error).await? {
            Some(next) => build = next,
            // Its workspace is gone, or it was cancelled while it waited.
            None => match app.builds.get(&build.workspace, &build.id) {
                Some(now) if now.stage != build.stage => build = now,
                _ => return Ok(()),
            },
        }
    }
    tracing::info!(build = build.id, stage = ?build.stage, error = build.error, "build ended");
    Ok(())
}

async fn step(app: &Arc<App>, work: &mut Work, build: &Build) -> Result<(), Fault> {
    if app.builds.is_cancelled(&build.id) && build.stage.on(Event::Cancel).is_some() {
        return Err(Fault::Cancelled);
    }
    match build.stage {
        Stage::Queued => Ok(()),
        Stage::Making => work.make(build).await,
        Stage::Building => {
            let found = work.build(build).await?;
            let keep = |build: &mut Build| {
                (build.env, build.workdir, build.bytes) = (found.env, found.workdir, found.bytes);
                Some(())
            };
            match app.builds.change(&build.id, keep).await {
                Ok(_) => Ok(()),
                Err(error) => Err(Fault::Why(error.to_string())),
            }
        }
        Stage::Adopting => work.adopt(build).await,
        Stage::Baking => work.bake(build).await,
        Stage::Publishing => work.publish(build).await,
        Stage::Failing => {
            for _ in 1..CLEANUPS {
                match work.undo(build).await {
                    Ok(()) => return Ok(()),
                    Err(fault) => {
                        tracing::warn!(build = build.id, "not cleaned up yet: {}", sentence(&fault));
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
            work.undo(build).await
        }
        Stage::Done | Stage::Failed => Ok(()),
    }
}

fn sentence(fault: &Fault) -> String {
    match fault {
        Fault::Why(text) => text.clone(),
        Fault::Cancelled => CANCELLED.to_owned(),
    }
}
