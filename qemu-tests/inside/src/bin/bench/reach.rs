//! A program in a sandbox through a signed preview, beside the same over a plain TCP forward: a socket here, its bytes copied to
//! and from the port by the agent, nobody in between who reads HTTP.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use qemu_tests_inside::{bare, http::Connection};
use serde_json::json;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::{
    Table,
    tools::{Api, STORAGE},
};

const PORT: u16 = 3000;
/// Where previews are served.
const EDGE: &str = "127.0.0.1:8081";
/// MiB of a transfer.
const TRANSFER: u64 = 16;
/// Small requests of each kind in a round.
const SMALL: usize = 5;

/// Answers `/N` with N MiB, and a little for 0.
const PROGRAM: &str = r#"cat > /root/served.py <<'END'
import asyncio
PIECE = bytes(1 << 20)
async def serve(reader, writer):
    head = await reader.readuntil(b"\r\n\r\n")
    count = int(head.split(b" ")[1].rsplit(b"/", 1)[1])
    size = count << 20 if count else 2
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
    for _ in range(count):
        writer.write(PIECE)
        await writer.drain()
    if not count:
        writer.write(b"ok")
    await writer.drain()
    writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 3000)
    open("/root/served", "w").close()
    await server.serve_forever()
asyncio.run(main())
END
setsid python3 /root/served.py > /root/served.log 2>&1 < /dev/null &
for i in $(seq 300); do test -e /root/served && exit 0; sleep 0.1; done; cat /root/served.log; exit 1"#;

/// `forward_throughput`, `preview_throughput_over_forward`, `forward_latency`, `preview_latency_over_forward`.
pub async fn measure(api: &mut Api, template: &str, rounds: usize, table: &mut Table) -> Result<()> {
    let (id, _, _) = api.create(template).await?;
    api.exec(&id, PROGRAM).await?;
    let (made, _) = api.verb(&id, "preview-token", Some(&json!({"port": PORT}))).await?;
    let token = made["token"].as_str().context("no token")?;
    let previewed = |count: u64| format!("/v1/p/{token}/{count}");
    let forwarded = |count: u64| format!("/{count}");
    let (forward, relay) = forward(&id).await?;
    let mut rates: [Vec<f64>; 2] = Default::default();
    let mut delays: [Vec<f64>; 2] = Default::default();
    for round in 0..=rounds {
        for (kind, at, path) in
            [(0, forward.as_str(), &forwarded as &dyn Fn(u64) -> String), (1, EDGE, &previewed)]
        {
            let seconds = transfer(at, &path(TRANSFER), TRANSFER << 20).await?;
            let mut small = Vec::new();
            for _ in 0..SMALL {
                small.push(transfer(at, &path(0), 2).await? * 1e6);
            }
            // The first round has what is done once.
            if round > 0 {
                rates[kind].push(TRANSFER as f64 / seconds);
                delays[kind].append(&mut small);
            }
        }
    }
    relay.abort();
    api.delete(&id).await?;

    let [forward_rates, preview_rates] = rates;
    let [forward_delays, preview_delays] = delays;
    table.put("forward_throughput", "MiB/s", forward_rates, None);
    table.put("preview_throughput_over_forward", "MiB/s", preview_rates, Some("forward_throughput"));
    table.put("forward_latency", "us", forward_delays, None);
    table.put("preview_latency_over_forward", "us", preview_delays, Some("forward_latency"));
    Ok(())
}

/// A socket whose connections are the port's.
async fn forward(id: &str) -> Result<(String, JoinHandle<()>)> {
    let socket = Path::new(STORAGE).join("sandboxes").join(id).join("s/v.sock");
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let at = listener.local_addr()?.to_string();
    let relay = tokio::spawn(async move {
        while let Ok((mut near, _)) = listener.accept().await {
            let socket = socket.clone();
            tokio::spawn(async move {
                let carried = async {
                    near.set_nodelay(true)?;
                    let client = bare::greet(&socket).await?;
                    let (mut far, first) = client.forward(PORT, Duration::from_secs(60)).await?;
                    near.write_all(&first).await?;
                    tokio::io::copy_bidirectional(&mut near, &mut far).await?;
                    anyhow::Ok(())
                };
                if let Err(error) = carried.await {
                    eprintln!("the forward: {error:#}");
                }
            });
        }
    });
    Ok((at, relay))
}

/// Seconds from the connect to the last byte.
async fn transfer(at: &str, path: &str, size: u64) -> Result<f64> {
    let before = Instant::now();
    let stream = TcpStream::connect(at).await?;
    stream.set_nodelay(true)?;
    let got = Connection::over(stream).await?.drain(path).await?;
    let seconds = before.elapsed().as_secs_f64();
    ensure!(got == size, "{got} bytes of {size}");
    Ok(seconds)
}
