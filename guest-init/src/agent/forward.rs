//! A connection that becomes a TCP connection to a port of this guest.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use pandastack_protocol::{Code, Failure};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional},
    net::TcpStream,
};

const LIMIT: Duration = Duration::from_secs(5);

/// Connects to a port of the loopback (of both families: `localhost` is `::1` to some) or, for programs that listen there only,
/// of `eth0`.
pub async fn connect(port: u16) -> Result<TcpStream, Failure> {
    for address in addresses() {
        let attempt = TcpStream::connect(SocketAddr::new(address, port));
        if let Ok(Ok(stream)) = tokio::time::timeout(LIMIT, attempt).await {
            // Small answers must not wait for more.
            let _ = stream.set_nodelay(true);
            return Ok(stream);
        }
    }
    Err(Failure { code: Code::Refused, message: format!("nobody listens on port {port}") })
}

/// Where programs are looked for.
pub fn addresses() -> impl Iterator<Item = IpAddr> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    loopback.into_iter().chain(link_address("eth0"))
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
