//! A small HTTP client: one connection per request, so that hanging up is dropping.
#![allow(dead_code)]

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, Response, body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;

use crate::common::{Appliance, TOKEN};

/// Who asks whom.
pub struct Api {
    address: SocketAddr,
    token: Option<String>,
}

/// A whole answer.
#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    headers: http::HeaderMap,
    pub body: Bytes,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
    pub fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }
}

/// Closes the connection when it is dropped.
pub struct HangUp(tokio::task::JoinHandle<()>);

impl Drop for HangUp {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Api {
    pub fn new(appliance: &Appliance) -> Self {
        Self::with_token(appliance, TOKEN)
    }
    pub fn with_token(appliance: &Appliance, token: &str) -> Self {
        Self { address: appliance.address, token: Some(token.to_owned()) }
    }
    pub fn without_token(appliance: &Appliance) -> Self {
        Self { address: appliance.address, token: None }
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await
    }
    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send("POST", path, &[("content-type", "application/json")], body.to_string().as_bytes()).await
    }
    pub async fn exec(&self, id: &str, body: Value) -> Reply {
        self.post(&format!("/v1/sandboxes/{id}/exec"), &body).await
    }
    pub async fn sandbox(&self) -> String {
        let made = self.post("/v1/sandboxes", &json!({"template": "base"})).await;
        made.json()["id"].as_str().unwrap().to_owned()
    }

    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let (response, _open) = self.open(method, path, headers, body).await;
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Reply { status: head.status.as_u16(), headers: head.headers, body }
    }

    /// The head of an answer; its body arrives while the second value lives.
    pub async fn open(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> (Response<Incoming>, HangUp) {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        let hang_up = HangUp(tokio::spawn(async move {
            let _ = connection.await;
        }));
        let mut request = Request::builder().method(method).uri(path).header("host", "test");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::copy_from_slice(body))).unwrap();
        (sender.send_request(request).await.unwrap(), hang_up)
    }
}
