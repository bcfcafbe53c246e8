//! The resolver that guests see: hands their questions to the host's resolvers.
//!
//! Owns: the sockets on 10.200.0.1:53, who may ask, how much and for how long. Refuses to know: names. No answer is
//! cached, checked or logged; where a guest may connect is the firewall's business, whatever a name says.
//!
//! Everything here is read from hostile senders: messages, questions in flight and connections are bounded, per source
//! and in all, and what is beyond the bounds is dropped.

mod message;
mod quota;
mod resolvers;
mod upstream;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    time::timeout,
};

use self::{
    message::Query,
    quota::{Quota, Slot},
    resolvers::Resolvers,
};
use crate::{
    error::{Error, Result},
    plan,
};

/// Largest question, and largest answer over UDP, bytes.
pub const DATAGRAM: usize = 4096;
/// Questions that one connection may ask before it is closed.
const QUESTIONS: usize = 256;
/// Ports that the kernel may choose before it is given up.
const CHOICES: usize = 16;

/// How the forwarder is bounded, and whom it asks.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Files that name the host's resolvers; the first one that names any counts.
    pub resolvers: Vec<PathBuf>,
    /// Port of the host's resolvers.
    pub port: u16,
    /// Time for one question, with every resolver tried; then the answer is SERVFAIL.
    pub patience: Duration,
    /// Time that a connection may rest.
    pub idle: Duration,
    /// Questions in flight and connections, each, of one source.
    pub per_source: usize,
    /// The same of all sources together.
    pub overall: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((plan::HOST, 53)),
            resolvers: vec!["/run/systemd/resolve/resolv.conf".into(), "/etc/resolv.conf".into()],
            port: 53,
            patience: Duration::from_secs(5),
            idle: Duration::from_secs(10),
            per_source: 64,
            overall: 1024,
        }
    }
}

/// The forwarder, bound but not yet answering.
#[derive(Debug)]
pub struct Forwarder {
    udp: UdpSocket,
    tcp: TcpListener,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: Config,
    resolvers: Resolvers,
    questions: Quota,
    connections: Quota,
}

impl Forwarder {
    /// Binds both sockets.
    ///
    /// # Errors
    /// The address is not there or in use.
    pub async fn bind(config: Config) -> Result<Self> {
        let (udp, tcp) = bind_both(config.listen).await?;
        let shared = Shared {
            resolvers: Resolvers::new(config.resolvers.clone(), config.port),
            questions: Quota::new(config.per_source, config.overall),
            connections: Quota::new(config.per_source, config.overall),
            config,
        };
        Ok(Self { udp, tcp, shared: Arc::new(shared) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket has no address.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.udp.local_addr()
    }

    /// Answers for ever.
    pub async fn serve(self) {
        let Self { udp, tcp, shared } = self;
        tokio::join!(serve_udp(Arc::new(udp), Arc::clone(&shared)), serve_tcp(tcp, shared));
    }
}

/// Both sockets on the same port. Where the kernel was asked to choose one, what it chose for UDP may be taken for TCP:
/// then it chooses again.
async fn bind_both(listen: SocketAddr) -> Result<(UdpSocket, TcpListener)> {
    let mut choices = if listen.port() == 0 { CHOICES } else { 1 };
    loop {
        choices -= 1;
        let udp = UdpSocket::bind(listen).await.map_err(Error::system("the resolver's UDP port"))?;
        let address = udp.local_addr().map_err(Error::system("the resolver's UDP port"))?;
        match TcpListener::bind(address).await {
            Ok(tcp) => return Ok((udp, tcp)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && choices > 0 => {}
            Err(error) => return Err(Error::system("the resolver's TCP port")(error)),
        }
    }
}

/// Only sandboxes are answered; in tests also the loopback net, which no packet from outside ever comes from.
fn may_ask(source: SocketAddr) -> bool {
    let IpAddr::V4(address) = source.ip() else { return false };
    let mask = u32::MAX << (32 - plan::OUTSIDE_PREFIX);
    let is_outside = u32::from(address) & mask == u32::from(plan::OUTSIDE);
    (is_outside && address != plan::HOST) || is_test_loopback(address)
}

fn is_test_loopback(address: Ipv4Addr) -> bool {
    cfg!(test) && address.is_loopback()
}

async fn serve_udp(socket: Arc<UdpSocket>, shared: Arc<Shared>) {
    // One byte more than allowed, to know what was too long.
    let mut buffer = vec![0; DATAGRAM + 1];
    loop {
        let (length, source) = match socket.recv_from(&mut buffer).await {
            Ok(received) => received,
            Err(error) => {
                pause("receiving a question", &error).await;
                continue;
            }
        };
        if length > DATAGRAM || !may_ask(source) {
            continue;
        }
        let Some(query) = Query::parse(&buffer[..length]) else { continue };
        let Some(slot) = shared.questions.take(source.ip()) else { continue };
        let (socket, shared) = (Arc::clone(&socket), Arc::clone(&shared));
        tokio::spawn(async move {
            let answer = shared.answer_udp(&query).await;
            // The guest may be gone.
            let _ = socket.send_to(&answer, source).await;
            drop(slot);
        });
    }
}

async fn serve_tcp(listener: TcpListener, shared: Arc<Shared>) {
    loop {
        let (stream, source) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                pause("accepting a connection", &error).await;
                continue;
            }
        };
        if !may_ask(source) {
            continue;
        }
        let Some(slot) = shared.connections.take(source.ip()) else { continue };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            // Whatever ended it, there is nobody to tell.
            let _ = shared.serve_connection(stream, &slot).await;
        });
    }
}

/// After an error of our own side (no descriptors left): not at once again.
async fn pause(what: &str, error: &io::Error) {
    tracing::warn!("{what}: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

impl Shared {
    async fn answer_udp(&self, query: &Query) -> Vec<u8> {
        let resolvers = self.resolvers.current().await;
        let ask = |resolver, limit| timeout(limit, upstream::ask_udp(resolver, query));
        let answer = upstream::first_answer(&resolvers, self.config.patience, ask).await;
        answer.unwrap_or_else(|| query.failure())
    }

    async fn answer_tcp(&self, query: &Query) -> Vec<u8> {
        let resolvers = self.resolvers.current().await;
        let ask = |resolver, limit| timeout(limit, upstream::ask_tcp(resolver, query));
        let answer = upstream::first_answer(&resolvers, self.config.patience, ask).await;
        answer.unwrap_or_else(|| query.failure())
    }

    /// One question after the other until the guest is done, idle, or over a bound.
    async fn serve_connection(&self, mut stream: TcpStream, slot: &Slot) -> io::Result<()> {
        for _ in 0..QUESTIONS {
            let question = timeout(self.config.idle, read_message(&mut stream, DATAGRAM)).await??;
            let Some(query) = Query::parse(&question) else { return Ok(()) };
            let Some(question) = self.questions.take(slot.source()) else { return Ok(()) };
            let answer = self.answer_tcp(&query).await;
            drop(question);
            timeout(self.config.idle, write_message(&mut stream, &answer)).await??;
        }
        Ok(())
    }
}

/// Reads a message with its length in front.
async fn read_message(stream: &mut TcpStream, limit: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

/// Writes a message with its length in front, in one piece.
async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

#[cfg(test)]
mod tests;
