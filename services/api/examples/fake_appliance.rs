//! The HTTP API over fakes, to try a client against: `cargo run -p pandastack-api --example fake_appliance [address]`.
//!
//! There is no virtual machine behind it: commands and files are those of THIS machine and this user. `FAKE_CONNECTOR` and
//! `FAKE_STARTER` are shell commands by which the kernels of a code interpreter are asked and started.

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use pandastack_api::routes::kernels::Kernels;

#[tokio::main]
async fn main() {
    let address = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:8099".into());
    let mut kernels = Kernels::default();
    for (name, command) in
        [("FAKE_CONNECTOR", &mut kernels.connector), ("FAKE_STARTER", &mut kernels.starter)]
    {
        if let Ok(given) = std::env::var(name) {
            *command = vec!["/bin/sh".into(), "-c".into(), given];
        }
    }
    let appliance = common::Appliance::start_at(&address, kernels).await;
    let (foreign, _) = appliance.other_workspace().await;
    println!("export PANDASTACK_API=http://{} PANDASTACK_API_KEY={}", appliance.address, common::TOKEN);
    println!("export PANDASTACK_FOREIGN_KEY={foreign}");
    std::future::pending::<()>().await;
}
