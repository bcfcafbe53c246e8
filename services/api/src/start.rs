//! From nothing to serving.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    sync::Arc,
};

use pandastack_bus::{
    api::{Api, NAME, PATH},
    zbus,
};
use pandastack_daemon::{
    Context,
    records::{RecordsError, until_poisoned},
};
use tokio::net::TcpListener;

use crate::{
    app::App,
    audit::Audit,
    auth::Token,
    builds::{Builds, Workshop, registry},
    gate::Gate,
    listener,
    operator::Operator,
    routes,
    tenancy::{Tenancy, TenancyError},
};

/// Where HTTP is served when `PANDASTACK_LISTEN` says nothing else.
pub const ADDRESS: &str = "[::]:8080";
const CREDENTIAL: &str = "pandastack.api_token";
const REGISTRIES: &str = "pandastack.registries";
const CONSOLE: &str = "/dev/console";

/// Why the daemon cannot run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory is not usable.
    #[error("the records of workspaces, tokens and builds cannot be opened")]
    Records(#[from] RecordsError),
    /// The state directory is not writable.
    #[error("the first workspace cannot be made")]
    Tenancy(#[from] TenancyError),
    /// Nobody could be held to account.
    #[error("the audit log cannot be opened")]
    Audit(#[source] io::Error),
    /// The credential is there and cannot be read.
    #[error("the credential {CREDENTIAL} cannot be read")]
    Credential(#[source] io::Error),
    /// The credential is there and cannot be read.
    #[error("the credential {REGISTRIES} cannot be read")]
    Registries(#[source] io::Error),
    /// The bus does not let us in.
    #[error("the bus")]
    Bus(#[from] zbus::Error),
    /// A workspace or token could not be made durable; the next run goes on from what the disk holds.
    #[error("a record could not be made durable")]
    Poisoned,
    /// The address is taken.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Runs the daemon until it is told to stop.
pub async fn run(context: Context) -> Result<(), StartError> {
    let state = context.state_dir().to_owned();
    let tenancy = tokio::task::spawn_blocking(move || Tenancy::open(&state))
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    let preset = context.credential(CREDENTIAL).map_err(StartError::Credential)?;
    tenancy.first_boot(preset.and_then(parse_preset), show).await?;

    let audit = Audit::open(&context.state_dir().join("audit")).map_err(StartError::Audit)?;
    let (directory, registries) = (context.state_dir().join("builds"), registries(&context)?);
    let open = move || Builds::open(&directory, registries, Workshop::default());
    let builds = tokio::task::spawn_blocking(open)
        .await
        .unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))?;
    let app = App::new(&context.bus, tenancy.clone(), Arc::new(audit), Arc::clone(&builds)).await?;
    app.start().await?;
    let gate = Gate::new(Arc::clone(&app), routes::all(&app));

    let address = std::env::var("PANDASTACK_LISTEN").unwrap_or_else(|_| ADDRESS.into());
    let socket = TcpListener::bind(&address)
        .await
        .map_err(|source| StartError::Listen { address: address.clone(), source })?;
    let operator = Arc::new(Operator::new(&app));
    context.bus.object_server().at(PATH, Api(operator)).await?;
    context.bus.request_name(NAME).await?;

    let probe = gate.clone();
    context.watchdog(move || {
        let probe = probe.clone();
        async move {
            let request = http::Request::get("/version").body(String::new());
            if let Ok(request) = request {
                probe.answer(request).await;
            }
        }
    });
    context.ready(&format!("serving HTTP on {address}"));
    tracing::info!(%address, "serving");
    let end = async {
        tokio::select! {
            () = context.stopped() => (),
            () = until_poisoned(|| tenancy.is_poisoned() || builds.is_poisoned()) => (),
        }
    };
    listener::serve(socket, gate, end).await;
    if tenancy.is_poisoned() || builds.is_poisoned() { Err(StartError::Poisoned) } else { Ok(()) }
}

/// Registries that images may come from, as the operator lists them.
fn registries(context: &Context) -> Result<Vec<registry::Registry>, StartError> {
    let given = context.credential(REGISTRIES).map_err(StartError::Registries)?;
    let list = match given {
        Some(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        None => std::env::var("PANDASTACK_REGISTRIES").unwrap_or_default(),
    };
    Ok(registry::allowed(&list))
}

fn parse_preset(bytes: Vec<u8>) -> Option<Token> {
    let token = String::from_utf8(bytes).ok().and_then(|text| Token::parse(text.trim()));
    if token.is_none() {
        tracing::error!(
            "the credential {CREDENTIAL} is not a token (pds_ and 32 hexadecimal digits); ignored"
        );
    }
    token
}

/// Writes the first token to the console device, which no journal reads.
fn show(token: &Token) -> io::Result<()> {
    let mut console = OpenOptions::new().write(true).open(CONSOLE)?;
    let text = format!(
        "\r\n  PandaStack API token (shown only now): {}\r\n  workspace: {}\r\n\r\n",
        token.reveal(),
        crate::tenancy::DEFAULT_WORKSPACE
    );
    console.write_all(text.as_bytes())
}
