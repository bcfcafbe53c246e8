//! What the measurements share: timed calls of the API, and waiting until the appliance is at rest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_tests_inside::http::Connection;
use serde_json::{Value, json};
use tokio::net::TcpStream;

/// Where the data partition has what storage keeps.
pub const STORAGE: &str = "/var/lib/pandastack/storage";

/// The appliance's API over a kept-alive connection, which is made again, outside of what is timed, when it was idle for too
/// long.
#[derive(Debug)]
pub struct Api {
    http: Connection,
    token: String,
}

impl Api {
    /// Connects to it.
    pub async fn connect(token: String) -> Result<Self> {
        Ok(Self { http: dial().await?, token })
    }

    async fn http(&mut self) -> Result<&mut Connection> {
        if self.http.is_closed() {
            self.http = dial().await?;
        }
        Ok(&mut self.http)
    }

    /// Another connection with the same token.
    pub async fn another(&self) -> Result<Self> {
        Self::connect(self.token.clone()).await
    }

    /// A call that has to succeed, and how long it took, microseconds.
    pub async fn timed(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<(Value, f64)> {
        let token = self.token.clone();
        let http = self.http().await?;
        let before = Instant::now();
        let answer = http.call(method, path, Some(&token), body).await?;
        Ok((answer, before.elapsed().as_secs_f64() * 1e6))
    }

    /// Creates a sandbox: its id, microseconds, and the whole answer.
    pub async fn create(&mut self, template: &str) -> Result<(String, f64, Value)> {
        let (made, micros) =
            self.timed("POST", "/v1/sandboxes", Some(&json!({"template": template}))).await?;
        Ok((made["id"].as_str().context("no id")?.to_owned(), micros, made))
    }

    /// Deletes a sandbox; microseconds.
    pub async fn delete(&mut self, id: &str) -> Result<f64> {
        Ok(self.timed("DELETE", &format!("/v1/sandboxes/{id}"), None).await?.1)
    }

    /// A verb below a sandbox: the answer, and microseconds.
    pub async fn verb(&mut self, id: &str, verb: &str, body: Option<&Value>) -> Result<(Value, f64)> {
        self.timed("POST", &format!("/v1/sandboxes/{id}/{verb}"), body).await
    }

    /// Runs a command that has to end with 0.
    pub async fn exec(&mut self, id: &str, cmd: &str) -> Result<f64> {
        let (answer, micros) =
            self.verb(id, "exec", Some(&json!({"cmd": cmd, "timeout_seconds": 120}))).await?;
        ensure!(answer["exit_code"] == 0, "{cmd:?} failed: {answer}");
        Ok(micros)
    }

    /// Slots that are ready.
    pub async fn slots(&mut self) -> Result<u64> {
        Ok(self.gauge("pandastack_slots_ready").await? as u64)
    }

    /// Waits until the refill of slots has come to rest.
    pub async fn slots_full(&mut self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(180);
        let wanted = self.gauge("pandastack_slots_wanted").await? as u64;
        while self.slots().await? < wanted {
            ensure!(Instant::now() < deadline, "the slots do not fill up");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(())
    }

    async fn gauge(&mut self, name: &str) -> Result<f64> {
        let text = self.http().await?.text("/metrics").await?;
        let line = text.lines().find(|line| line.starts_with(name) && !line.starts_with('#'));
        let value = line.and_then(|line| line.rsplit(' ').next());
        Ok(value.with_context(|| format!("no metric {name}"))?.parse()?)
    }
}

async fn dial() -> Result<Connection> {
    Connection::over(TcpStream::connect("127.0.0.1:8080").await?).await
}

/// The ids of a fork's children.
pub fn children(answer: &Value) -> Vec<String> {
    let all = answer["children"].as_array().into_iter().flatten();
    all.filter_map(|child| Some(child["id"].as_str()?.to_owned())).collect()
}
