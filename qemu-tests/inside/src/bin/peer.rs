//! Plays machines that a guest may or may not reach.
//!
//! `peer ADDRESS:PORT …` answers on each address, TCP and UDP, with `peer ADDRESS:PORT`, for at most an hour.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, UdpSocket},
};

#[tokio::main]
async fn main() -> Result<()> {
    for argument in std::env::args().skip(1) {
        let at: SocketAddr = argument.parse()?;
        let (tcp, udp) = (TcpListener::bind(at).await?, UdpSocket::bind(at).await?);
        tokio::spawn(serve_tcp(tcp, at));
        tokio::spawn(serve_udp(udp, at));
    }
    println!("listening");
    tokio::time::sleep(Duration::from_secs(3600)).await;
    Ok(())
}

async fn serve_tcp(listener: TcpListener, at: SocketAddr) {
    while let Ok((mut stream, from)) = listener.accept().await {
        let _ = stream.write_all(format!("peer {at} saw {}\n", from.ip()).as_bytes()).await;
    }
}

async fn serve_udp(socket: UdpSocket, at: SocketAddr) {
    let mut buffer = [0; 512];
    while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
        let _ = socket.send_to(format!("peer {at} saw {}\n", from.ip()).as_bytes(), from).await;
    }
}
