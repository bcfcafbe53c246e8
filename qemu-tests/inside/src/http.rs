//! One HTTP/1.1 request over a stream that is already connected.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Request, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};

/// A kept-alive connection.
#[derive(Debug)]
pub struct Connection {
    sender: http1::SendRequest<Full<Bytes>>,
}

impl Connection {
    /// Speaks HTTP on a stream.
    pub async fn over<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) -> Result<Self> {
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(driver);
        Ok(Self { sender })
    }

    /// Whether the other end has closed it, as it does after a while without requests.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// The text behind a path, without a token.
    pub async fn text(&mut self, path: &str) -> Result<String> {
        self.sender.ready().await?;
        let request =
            Request::builder().uri(path).header("host", "appliance").body(Full::from(Bytes::new()))?;
        let answer = self.sender.send_request(request).await?;
        ensure!(answer.status().is_success(), "GET {path}: {}", answer.status());
        Ok(String::from_utf8(answer.into_body().collect().await?.to_bytes().to_vec())?)
    }

    /// How many bytes are behind a path, without a token; they are read a piece at a time and thrown away.
    pub async fn drain(&mut self, path: &str) -> Result<u64> {
        self.sender.ready().await?;
        let request =
            Request::builder().uri(path).header("host", "appliance").body(Full::from(Bytes::new()))?;
        let answer = self.sender.send_request(request).await?;
        ensure!(answer.status().is_success(), "GET {path}: {}", answer.status());
        let (mut body, mut size) = (answer.into_body(), 0);
        while let Some(frame) = body.frame().await {
            size += frame?.data_ref().map_or(0, |data| data.len() as u64);
        }
        Ok(size)
    }

    /// Sends a request and answers the parsed body (`Null` for none); an error for any status but 2xx.
    pub async fn call(
        &mut self,
        method: &str,
        path: &str,
        token: Option<&str>,
        body: Option<&Value>,
    ) -> Result<Value> {
        let mut request = Request::builder().method(method).uri(path).header("host", "appliance");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        self.sender.ready().await?;
        let answer = self.sender.send_request(request.body(Full::from(bytes))?).await?;
        let status = answer.status();
        let bytes = answer.into_body().collect().await?.to_bytes();
        ensure!(status.is_success(), "{method} {path}: {status} {}", String::from_utf8_lossy(&bytes));
        if bytes.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&bytes).context("the answer is not JSON")
    }
}
