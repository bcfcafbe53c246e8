//! WebSockets through the API, with the real agent.
#![allow(clippy::unwrap_used)]

mod client;
mod common;

use std::time::Duration;

use client::Api;
use common::{Appliance, TOKEN};
use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{self, Message, client::IntoClientRequest},
};

const LIMIT: Duration = Duration::from_secs(30);

struct Socket {
    stream: WebSocketStream<TcpStream>,
    session: String,
    protocol: Option<String>,
}

impl Socket {
    async fn open(
        appliance: &Appliance,
        path: &str,
        headers: &[(&'static str, String)],
    ) -> Result<Self, u16> {
        let tcp = TcpStream::connect(appliance.address).await.unwrap();
        let mut request = format!("ws://{}{path}", appliance.address).into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        match client_async(request, tcp).await {
            Ok((stream, response)) => {
                let header =
                    |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
                Ok(Self {
                    stream,
                    session: header("x-pandastack-session").unwrap_or_default(),
                    protocol: header("sec-websocket-protocol"),
                })
            }
            Err(tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }

    async fn authorized(appliance: &Appliance, path: &str) -> Result<Self, u16> {
        let headers = [("authorization", format!("Bearer {TOKEN}")), ("user-agent", "test".to_owned())];
        Self::open(appliance, path, &headers).await
    }

    async fn say(&mut self, value: Value) {
        self.stream.send(Message::text(value.to_string())).await.unwrap();
    }

    async fn next(&mut self) -> Message {
        timeout(LIMIT, self.stream.next()).await.expect("in time").expect("a message").expect("no error")
    }

    async fn json(&mut self) -> Value {
        // All of it: pings come as long as nothing else does.
        let text = async {
            loop {
                if let Message::Text(text) = self.next().await {
                    return text;
                }
            }
        };
        serde_json::from_str(&timeout(LIMIT, text).await.expect("in time")).unwrap()
    }

    /// Binary output until it contains `wanted`.
    async fn until(&mut self, wanted: &str) -> String {
        let mut all = String::new();
        let found = async {
            while !all.contains(wanted) {
                match self.next().await {
                    Message::Binary(bytes) => all.push_str(&String::from_utf8_lossy(&bytes)),
                    Message::Ping(_) | Message::Pong(_) => {}
                    other => panic!("{other:?} after {all:?}"),
                }
            }
        };
        let in_time = timeout(LIMIT, found).await.is_ok();
        assert!(in_time, "no {wanted:?} in {all:?}");
        all
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_takes_keys_and_says_how_it_ended() {
    let appliance = Appliance::start().await;
    let id = Api::new(&appliance).sandbox().await;
    let mut socket =
        Socket::authorized(&appliance, &format!("/v1/sandboxes/{id}/ssh?rows=33&cols=99")).await.unwrap();

    socket.stream.send(Message::binary(&b"PS1=; stty size; echo $TERM\r"[..])).await.unwrap();
    let first = socket.until("xterm-256color\r\n").await;
    socket.say(json!({"resize": {"rows": 40, "cols": 120}})).await;
    socket.say(json!({"stdin": "stty size\r"})).await;
    socket.until("40 120").await;
    // Only a program that runs is interrupted: a key before that is the shell's own.
    socket.stream.send(Message::binary(&b"sh -c 'echo star\"\"ted; exec sleep 1000'\r"[..])).await.unwrap();
    socket.until("started\r\n").await;
    socket.stream.send(Message::binary(&b"\x03"[..])).await.unwrap();
    socket.stream.send(Message::binary(&b"exit 7\r"[..])).await.unwrap();

    assert!(first.contains("33 99"), "{first}");
    assert_eq!(socket.json().await, json!({"exit": 7}));
    let Message::Close(Some(frame)) = socket.next().await else { panic!("a close") };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1000, r#"{"exit":7}"#));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_published_command_line_sees_no_control_message() {
    let appliance = Appliance::start().await;
    let id = Api::new(&appliance).sandbox().await;
    let headers = [("authorization", format!("Bearer {TOKEN}"))];
    let mut socket = Socket::open(&appliance, &format!("/v1/sandboxes/{id}/ssh"), &headers).await.unwrap();

    socket.stream.send(Message::binary(&b"exit 3\r"[..])).await.unwrap();
    let close = loop {
        match socket.next().await {
            Message::Close(frame) => break frame.unwrap(),
            Message::Text(text) => panic!("{text}"),
            _ => {}
        }
    };
    assert_eq!(close.reason.as_str(), r#"{"exit":3}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_whose_connection_breaks_goes_on() {
    let appliance = Appliance::start().await;
    let id = Api::new(&appliance).sandbox().await;
    let path = format!("/v1/sandboxes/{id}/exec/pty");
    let mut socket = Socket::authorized(&appliance, &path).await.unwrap();
    socket.stream.send(Message::binary(&b"PS1=; word=kept; echo rea''dy\r"[..])).await.unwrap();
    socket.until("ready\r\n").await;
    let session = socket.session.clone();
    // No goodbye.
    drop(socket);
    // Nor does it hurt when the way to the guest is cut as well.
    appliance.vmm.cut().await;

    let mut again =
        Socket::authorized(&appliance, &format!("{path}?session={session}&rows=20&cols=70")).await.unwrap();
    again.until("ready\r\n").await;
    again.stream.send(Message::binary(&b"echo $word; stty size\r"[..])).await.unwrap();
    again.until("kept\r\n20 70").await;
    again.stream.close(None).await.unwrap();

    let gone = async {
        let api = Api::new(&appliance);
        loop {
            let listed = api.get(&format!("/v1/sandboxes/{id}/execs")).await.json();
            if listed.as_array().unwrap().iter().all(|one| !one["exit_code"].is_null()) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(LIMIT, gone).await.expect("a goodbye ends the shell");
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_run_side_by_side_and_each_is_ended() {
    let appliance = Appliance::start().await;
    let id = Api::new(&appliance).sandbox().await;
    let mut socket = Socket::authorized(&appliance, &format!("/v1/sandboxes/{id}/exec/ws")).await.unwrap();

    socket.say(json!({"id": "long", "cmd": "echo begun; sleep 1000"})).await;
    assert_eq!(socket.json().await, json!({"id": "long", "stream": "stdout", "data": "begun\n"}));
    socket.say(json!({"id": "a", "cmd": "echo é >&2; exit 3"})).await;
    assert_eq!(socket.json().await, json!({"id": "a", "stream": "stderr", "data": "é\n"}));
    assert_eq!(socket.json().await, json!({"id": "a", "exit": 3}));
    socket.say(json!({"id": "long", "cmd": "true"})).await;
    assert_eq!(socket.json().await["error"], "a command with this id runs");
    socket.say(json!({"id": "long", "cancel": true})).await;
    assert_eq!(socket.json().await, json!({"id": "long", "exit": 137}));
    socket.say(json!({"id": "slow", "cmd": "sleep 1000", "timeout_seconds": 1})).await;
    assert_eq!(socket.json().await, json!({"id": "slow", "error": "command timeout after 1s"}));

    for (wrong, sentence) in [
        ("[1]", "bad json: "),
        ("{", "bad json: "),
        (r#"{"cmd":"true"}"#, "id required"),
        (r#"{"id":"x"}"#, "cmd required"),
        (r#"{"id":"x","cmd":7}"#, "field `cmd`"),
        (r#"{"id":"x","cancel":true}"#, "no such command"),
        (r#"{"id":"x","cmd":"true","detach":true}"#, "`detach` goes with"),
    ] {
        socket.stream.send(Message::text(wrong)).await.unwrap();
        let error = socket.json().await["error"].as_str().unwrap().to_owned();
        assert!(error.starts_with(sentence), "{wrong}: {error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_come_before_the_upgrade() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    let id = api.sandbox().await;
    let (foreign, _) = appliance.other_workspace().await;
    let foreign = [("authorization", format!("Bearer {foreign}"))];
    for path in ["ssh", "exec/pty", "exec/ws", "lsp/python"] {
        let own = format!("/v1/sandboxes/{id}/{path}");
        assert_eq!(api.get(&own).await.status, 426, "{path}");
        assert_eq!(Socket::open(&appliance, &own, &[]).await.err(), Some(401), "{path}");
        assert_eq!(Socket::open(&appliance, &own, &foreign).await.err(), Some(404), "{path}");
        let unknown = format!("/v1/sandboxes/nothinglikethis/{path}");
        assert_eq!(Socket::authorized(&appliance, &unknown).await.err(), Some(404), "{path}");
    }
    let wrong = [("ssh?offset=x", 400), ("ssh?session=no", 404), ("lsp/cobol", 400)];
    for (path, status) in wrong {
        let path = format!("/v1/sandboxes/{id}/{path}");
        assert_eq!(Socket::authorized(&appliance, &path).await.err(), Some(status), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_names_its_token_among_the_subprotocols() {
    let appliance = Appliance::start().await;
    let id = Api::new(&appliance).sandbox().await;
    let headers = [("sec-websocket-protocol", format!("lsp, bearer.{TOKEN}"))];
    let mut socket =
        Socket::open(&appliance, &format!("/v1/sandboxes/{id}/lsp/python"), &headers).await.unwrap();

    assert_eq!(socket.protocol.as_deref(), Some("lsp"));
    // Whether this machine has one or not: it ends, and says how.
    socket.stream.send(Message::binary(&b"nonsense"[..])).await.unwrap();
    socket.stream.close(None).await.unwrap();
}
