//! The manager on the bus.

use std::sync::Arc;

use pandastack_bus::storage::{NAME, PATH, Storage, StorageBackend};
use pandastack_daemon::Context;
use tokio::sync::broadcast::error::RecvError;

use crate::{
    error::{Result, StorageError},
    manager::{Config, Manager},
    progress::state_name,
};

/// Opens, serves until asked to stop.
///
/// # Errors
/// See [`Manager::open`]; or the bus refuses the name.
pub async fn serve(ctx: Context, config: Config) -> Result<()> {
    ctx.status("importing what the image brings");
    let manager =
        tokio::task::spawn_blocking(|| Manager::open(config)).await.map_err(StorageError::Task)??;
    let server = ctx.bus.object_server();
    server.at(PATH, Storage(Arc::new(manager.clone()))).await.map_err(StorageError::Bus)?;
    ctx.bus.request_name(NAME).await.map_err(StorageError::Bus)?;
    ctx.ready(&manager.summary());

    let pinged = manager.clone();
    ctx.watchdog(move || {
        let manager = pinged.clone();
        async move {
            // Through a blocking task and the data partition: where this daemon could be stuck.
            if let Err(error) = manager.usage().await {
                tracing::error!("the data partition does not answer: {error}");
            }
        }
    });
    let announced = tokio::spawn(announce(ctx.clone(), manager.clone()));
    let hashing = manager.clone();
    let hashed = tokio::spawn(async move { hashing.keep_hashed().await });
    let imported = tokio::spawn(async move { manager.import_all().await });
    ctx.stopped().await;
    announced.abort();
    imported.abort();
    hashed.abort();
    Ok(())
}

/// Turns changes into signals, and into the line for `systemctl status`.
async fn announce(ctx: Context, manager: Manager) {
    let mut changes = manager.changes();
    let interface = match ctx.bus.object_server().interface::<_, Storage<Manager>>(PATH).await {
        Ok(interface) => interface,
        Err(error) => return tracing::error!("no signals: {error}"),
    };
    loop {
        match changes.recv().await {
            Ok((name, state)) => {
                let emitter = interface.signal_emitter();
                let sent =
                    Storage::<Manager>::template_changed(emitter, name.as_str(), state_name(state)).await;
                if let Err(error) = sent {
                    tracing::error!(template = %name, "signal: {error}");
                }
            }
            // A listener asks for the state anyway; only the hint is lost.
            Err(RecvError::Lagged(lost)) => tracing::warn!("{lost} changes were not announced"),
            Err(RecvError::Closed) => return,
        }
        ctx.status(&manager.summary());
    }
}
