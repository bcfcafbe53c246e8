//! Asking a resolver of the host.
//!
//! Owns: one socket per question, so that its port is as hard to guess as its number. Refuses to know: who wants to know.

use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    net::{TcpStream, UdpSocket},
    time::{Instant, error::Elapsed},
};

use super::{DATAGRAM, message::Query, read_message, write_message};

/// Asks one resolver after the other until one answers; each gets its share of the time that is left.
pub(super) async fn first_answer<F, Fut>(
    resolvers: &[SocketAddr],
    patience: Duration,
    ask: F,
) -> Option<Vec<u8>>
where
    F: Fn(SocketAddr, Duration) -> Fut,
    Fut: Future<Output = Result<io::Result<Vec<u8>>, Elapsed>>,
{
    let end = Instant::now() + patience;
    for (tried, resolver) in resolvers.iter().enumerate() {
        let left = u32::try_from(resolvers.len() - tried).unwrap_or(u32::MAX);
        let share = end.saturating_duration_since(Instant::now()) / left;
        if let Ok(Ok(answer)) = ask(*resolver, share).await {
            return Some(answer);
        }
    }
    None
}

/// Asks over UDP; waits for as long as it is let.
pub(super) async fn ask_udp(resolver: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
    let any: IpAddr = match resolver {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    // Connected: the kernel drops what comes from elsewhere, and says when nobody listens.
    socket.connect(resolver).await?;
    let id = random_number()?;
    socket.send(&query.renumbered(id)).await?;
    let mut buffer = vec![0; DATAGRAM + 1];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if length > DATAGRAM {
            continue;
        }
        if let Some(answer) = query.accept(id, &buffer[..length]) {
            return Ok(answer);
        }
    }
}

/// Asks over TCP; waits for as long as it is let.
pub(super) async fn ask_tcp(resolver: SocketAddr, query: &Query) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let id = random_number()?;
    write_message(&mut stream, &query.renumbered(id)).await?;
    let answer = read_message(&mut stream, usize::from(u16::MAX)).await?;
    query.accept(id, &answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn random_number() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
    Ok(u16::from_ne_bytes(bytes))
}
