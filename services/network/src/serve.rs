//! The daemon's life: from its records to answering on the bus, until it is stopped.
//!
//! Owns: the order of the start. Refuses to know: everything that happens after it.

use std::sync::Arc;

use nix::unistd::Group;
use pandastack_bus::{
    network::{NAME, Network, PATH},
    zbus,
};
use pandastack_daemon::{Context, chain, records::until_poisoned};

use crate::{
    dns::{self, Forwarder},
    error::Error,
    manager::{Config, Manager},
};

/// Group that every sandbox's Firecracker is in.
const TAP_GROUP: &str = "pandastack-sandbox";
/// Where Debian has it.
const NFT: &str = "/usr/sbin/nft";

/// Why the daemon ended by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The host's side could not be set up.
    #[error("the network cannot be set up")]
    Network(#[from] Error),
    /// The bus refused our name or object.
    #[error("the bus")]
    Bus(#[from] zbus::Error),
    /// The group of the sandboxes is not there.
    #[error("there is no group {TAP_GROUP}")]
    NoGroup,
    /// The part that changes rules, or the forwarder of names, has ended.
    #[error("a part of the daemon has ended")]
    PartEnded,
    /// A record could not be made durable; the next run goes on from what the disk holds.
    #[error("a record could not be made durable")]
    Poisoned,
}

/// Runs until the daemon is asked to stop.
///
/// # Errors
/// See [`ServeError`]; PID 1 starts it again.
pub async fn serve(context: Context) -> Result<(), ServeError> {
    let group = Group::from_name(TAP_GROUP).ok().flatten().ok_or(ServeError::NoGroup)?;
    let config = Config {
        records: context.state_dir().join("owners"),
        nft: NFT.into(),
        tap_group: Some(group.gid.as_raw()),
    };
    let manager = Manager::start(config).await?;
    let forwarder = tokio::spawn(Forwarder::bind(dns::Config::default()).await?.serve());

    context.bus.object_server().at(PATH, Network(Arc::new(manager.clone()))).await?;
    context.bus.request_name(NAME).await?;
    context.ready(&format!("{} addresses given", manager.owners().len()));

    let pinged = manager.clone();
    context.watchdog(move || {
        let manager = pinged.clone();
        async move {
            // When that part has ended there is nothing to wait for any more, and nothing must pet the watchdog.
            if manager.ping().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    });
    tokio::spawn(reload_on_request(context.clone(), manager.clone()));
    tokio::select! {
        () = context.stopped() => Ok(()),
        () = until_poisoned(|| manager.is_poisoned()) => Err(ServeError::Poisoned),
        _ = forwarder => Err(ServeError::PartEnded),
    }
}

/// `systemctl reload` puts the rules back that somebody may have changed.
async fn reload_on_request(context: Context, manager: Manager) {
    let mut reloads = context.reloads();
    while reloads.changed().await.is_ok() {
        match manager.reload().await {
            Ok(()) => tracing::info!("the rules were loaded again"),
            Err(error) => tracing::error!("the rules were not loaded again: {}", chain(&error)),
        }
    }
}
