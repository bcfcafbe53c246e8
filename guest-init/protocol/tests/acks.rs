//! When the host acknowledges output, against an agent that is played by hand.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use bytes::BytesMut;
use pandastack_protocol::{Client, Decoder, Frame, Kind, Started, encode, output_payload};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

const LIMIT: Duration = Duration::from_secs(10);

/// The agent's end.
struct Agent {
    stream: DuplexStream,
    decoder: Decoder,
}

impl Agent {
    async fn receive(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return frame;
            }
            assert_ne!(self.stream.read_buf(self.decoder.buffer()).await.unwrap(), 0);
        }
    }

    async fn send(&mut self, kind: Kind, payload: &[u8]) {
        let mut out = BytesMut::new();
        encode(kind, payload, &mut out);
        self.stream.write_all(&out).await.unwrap();
    }
}

/// What the host acknowledges of `bytes` of output, after which nothing comes, when it keeps so many.
async fn acknowledged(bytes: usize, keep: u64) -> u64 {
    let (host, agent) = tokio::io::duplex(4 << 20);
    let mut agent = Agent { stream: agent, decoder: Decoder::new() };
    let played = async {
        let hello = agent.receive().await;
        agent.send(Kind::Hello, &hello.payload).await;
        assert_eq!(agent.receive().await.kind, Kind::Request);
        let started = Started { session: "s".into(), pid: 1, offset: 0, dropped: 0, stdin: 0 };
        agent.send(Kind::Started, &serde_json::to_vec(&started).unwrap()).await;
        agent.send(Kind::Stdout, &output_payload(0, &vec![b'x'; bytes])).await;
        let ack = agent.receive().await;
        assert_eq!(ack.kind, Kind::Ack);
        u64::from_le_bytes(ack.payload[..].try_into().unwrap())
    };
    let client = Client::greet(host, 7, LIMIT);
    let followed = async {
        let mut stream = client.await.unwrap().attach("s", 0, LIMIT).await.unwrap();
        stream.keep(keep);
        loop {
            stream.next().await.unwrap();
        }
    };
    tokio::select! {
        acknowledged = played => acknowledged,
        () = followed => unreachable!("it never ends"),
    }
}

#[tokio::test]
async fn less_than_every_agent_keeps_is_acknowledged_before_the_host_waits() {
    assert_eq!(acknowledged(20 << 10, 0).await, 20 << 10);
}

#[tokio::test]
async fn what_is_to_be_kept_is_acknowledged_only_for_an_agent_that_may_be_waiting() {
    assert_eq!(acknowledged(200 << 10, 100 << 10).await, 100 << 10);
    assert_eq!(acknowledged(100 << 10, 512 << 10).await, (100 - 16) << 10);
}

#[tokio::test]
async fn a_silent_command_is_probed_with_what_was_acknowledged_before() {
    assert_eq!(acknowledged(1, 0).await, 0);
}
