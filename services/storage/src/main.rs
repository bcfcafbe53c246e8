//! The storage daemon (`ai.pandastack.storage1`): templates, sandbox directories, disks and captures.

use std::process::ExitCode;

use nix::unistd::Group;
use pandastack_storage::{Config, StorageError, layout::Sources, serve};

/// Group shared by vmm, storage and every sandbox unit.
const GROUP: &str = "pandastack-sandbox";
/// A tmpfs of its own (`run-pandastack-differences.mount`).
const DIFFERENCES: &str = "/run/pandastack/differences";

fn main() -> ExitCode {
    pandastack_daemon::run("storage", |ctx| async move {
        let group = Group::from_name(GROUP).ok().flatten();
        let group = group.ok_or_else(|| StorageError::NotFound(format!("there is no group {GROUP}")))?.gid;
        let config = Config {
            state: ctx.state_dir().to_owned(),
            differences: DIFFERENCES.into(),
            sources: Sources::default(),
            group: Some(group),
        };
        serve(ctx, config).await
    })
}
