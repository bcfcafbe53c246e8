//! Plays a registry of images: hands out what is in a folder, as the OCI distribution specification says.
//!
//! `registry ADDRESS:PORT FOLDER` answers for two hours at most. `/v2/NAME/manifests/REFERENCE` is the file
//! `FOLDER/NAME/manifests/REFERENCE`, of the type that it names itself; `/v2/NAME/blobs/DIGEST` is `FOLDER/NAME/blobs/DIGEST`.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};

#[tokio::main]
async fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(at), Some(folder)) = (arguments.next(), arguments.next()) else {
        anyhow::bail!("registry ADDRESS:PORT FOLDER");
    };
    let at: SocketAddr = at.parse().context("the address")?;
    let listener = TcpListener::bind(at).await?;
    println!("listening");
    let serving = serve(listener, Arc::new(folder.into()));
    // Nobody may be there to end it.
    let _ = tokio::time::timeout(Duration::from_secs(7200), serving).await;
    Ok(())
}

async fn serve(listener: TcpListener, folder: Arc<PathBuf>) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(answer(stream, Arc::clone(&folder)));
    }
}

async fn answer(stream: TcpStream, folder: Arc<PathBuf>) {
    let service = service_fn(|request: Request<Incoming>| {
        let found = find(&folder, request.uri().path());
        async move { Ok::<_, Infallible>(found) }
    });
    // Who asks for TLS first gets none, and comes again without.
    if let Err(error) = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await {
        eprintln!("{error}");
    }
}

fn find(folder: &Path, path: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from("{}"));
    let kind = match path.strip_prefix("/v2/") {
        Some("") => Some("application/json".to_owned()),
        Some(below) if below.split('/').all(|part| !matches!(part, "" | "." | "..")) => {
            std::fs::read(folder.join(below)).ok().and_then(|bytes| {
                let kind = if below.contains("/manifests/") { media_type(&bytes)? } else { BLOB.into() };
                *response.body_mut() = bytes.into();
                Some(kind)
            })
        }
        _ => None,
    };
    match kind.and_then(|kind| kind.parse().ok()) {
        Some(kind) => drop(response.headers_mut().insert("content-type", kind)),
        None => *response.status_mut() = StatusCode::NOT_FOUND,
    }
    eprintln!("{path}: {}", response.status());
    response
}

const BLOB: &str = "application/octet-stream";

fn media_type(manifest: &[u8]) -> Option<String> {
    let manifest: Value = serde_json::from_slice(manifest).ok()?;
    Some(manifest["mediaType"].as_str()?.to_owned())
}
