//! Who hears whom: servers that say who called, and calls that say whether anybody answered.

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream, UdpSocket},
    sync::{Arc, Mutex},
    time::Duration,
};

/// How long a call waits; everything in this world answers within a few milliseconds, on a busy machine a second later.
const PATIENCE: Duration = Duration::from_millis(1500);

/// What came to a server's UDP port.
#[derive(Debug, Clone, Default)]
pub struct Heard(Arc<Mutex<Vec<String>>>);

impl Heard {
    /// Every text heard so far.
    pub fn texts(&self) -> BTreeSet<String> {
        self.0.lock().expect("no server panics").iter().cloned().collect()
    }

    /// How many datagrams there were.
    pub fn count(&self) -> usize {
        self.0.lock().expect("no server panics").len()
    }
}

/// Serves a port of both kinds on every address of the calling thread's namespace: answers with the caller's address,
/// and over TCP with what it says after that, until it hangs up.
pub fn serve(port: u16) -> Heard {
    let heard = Heard::default();
    let tcp = TcpListener::bind(("::", port)).expect("a TCP port");
    std::thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            std::thread::spawn(move || echo(stream));
        }
    });
    let udp = UdpSocket::bind(("::", port)).expect("a UDP port");
    let log = heard.clone();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, source)) = udp.recv_from(&mut buffer) {
            log.0.lock().expect("no server panics").push(String::from_utf8_lossy(&buffer[..length]).into());
            let _ = udp.send_to(plain(source).as_bytes(), source);
        }
    });
    heard
}

fn echo(mut stream: TcpStream) {
    let Ok(caller) = stream.peer_addr() else { return };
    let mut buffer = [0; 2048];
    let _ = stream.write_all(plain(caller).as_bytes());
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// The address alone, also of an IPv4 caller at an IPv6 socket.
fn plain(caller: SocketAddr) -> String {
    caller.ip().to_canonical().to_string()
}

/// Calls over TCP; answers what the server said of the caller.
pub fn tcp(server: &str, port: u16) -> Option<String> {
    let mut stream = connect(server, port)?;
    Some(hear(&mut stream))
}

/// Opens a connection.
pub fn connect(server: &str, port: u16) -> Option<TcpStream> {
    let stream = TcpStream::connect_timeout(&target(server, port), PATIENCE).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    Some(stream)
}

/// What the other end says next.
pub fn hear(stream: &mut TcpStream) -> String {
    let mut buffer = [0; 2048];
    let length = stream.read(&mut buffer).expect("the server speaks");
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// Calls over UDP; answers what the server said of the caller.
pub fn udp(server: &str, port: u16) -> Option<String> {
    exchange(server, port, b"call").map(|answer| String::from_utf8_lossy(&answer).into_owned())
}

/// Sends one datagram and waits for one.
pub fn exchange(server: &str, port: u16, message: &[u8]) -> Option<Vec<u8>> {
    let server = target(server, port);
    let any = if server.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).expect("a socket");
    socket.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    socket.connect(server).ok()?;
    socket.send(message).ok()?;
    let mut buffer = [0; 2048];
    let length = socket.recv(&mut buffer).ok()?;
    Some(buffer[..length].to_vec())
}

/// Sends a text from an address, and does not wait.
pub fn shout(from: &str, server: &str, port: u16, text: &str) {
    let socket = UdpSocket::bind((from, 0)).expect("an address of the namespace");
    // That it cannot even leave is fine, too.
    let _ = socket.send_to(text.as_bytes(), target(server, port));
}

/// Gives everything that is on its way the time to arrive.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(300));
}

fn target(server: &str, port: u16) -> SocketAddr {
    SocketAddr::new(server.parse().expect("an address"), port)
}
