//! A connection that becomes a TCP connection to a port of this guest.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use pandastack_protocol::{Code, Failure};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::TcpStream,
};

const LIMIT: Duration = Duration::from_secs(5);

/// Connects to a port of the loopback or, for programs that listen there only, of `eth0`.
pub async fn connect(port: u16) -> Result<TcpStream, Failure> {
    let addresses = [Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), link_address("eth0")];
    for address in addresses.into_iter().flatten() {
        let attempt = TcpStream::connect(SocketAddr::new(address, port));
        if let Ok(Ok(stream)) = tokio::time::timeout(LIMIT, attempt).await {
            // Small answers must not wait for more.
            let _ = stream.set_nodelay(true);
            return Ok(stream);
        }
    }
    Err(Failure { code: Code::Refused, message: format!("nobody listens on port {port}") })
}

/// Carries bytes both ways until both have ended.
pub async fn run<S>(mut stream: S, first: &[u8], mut tcp: TcpStream) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    tcp.write_all(first).await?;
    copy_bidirectional(&mut stream, &mut tcp).await.map(drop)
}

fn link_address(link: &str) -> Option<IpAddr> {
    let addresses = nix::ifaddrs::getifaddrs().ok()?;
    addresses
        .filter(|address| address.interface_name == link)
        .find_map(|address| Some(IpAddr::V4(address.address?.as_sockaddr_in()?.ip())))
}
