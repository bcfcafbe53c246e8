//! A small client of the API for what the published ones do not show: statuses, and calls while a daemon is dead.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The API with a token.
#[derive(Debug, Clone)]
pub struct Api {
    base: String,
    token: String,
    agent: ureq::Agent,
}

/// Status and body of an answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub body: Value,
    pub retry_after: Option<String>,
}

impl Api {
    pub fn new(base: String, token: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(60)))
            .build()
            .into();
        Self { base, token: token.to_owned(), agent }
    }

    /// Any request; an error only when no answer came.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        let builder = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.token));
        let bytes = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let mut answer = self.agent.run(builder.body(bytes)?)?;
        let retry_after =
            answer.headers().get("retry-after").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string()?;
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Ok(Answer { status: answer.status().as_u16(), body, retry_after })
    }

    /// A create that has to succeed; its id. Refusals for lack of capacity are asked again, as the clients do.
    pub fn create(&self, body: &Value) -> Result<String> {
        let mut last = None;
        for _ in 0..30 {
            let answer = self.call("POST", "/v1/sandboxes", Some(body))?;
            match (answer.status, &answer.retry_after) {
                (201, _) => return Ok(answer.body["id"].as_str().context("no id")?.to_owned()),
                (503, Some(_)) => std::thread::sleep(Duration::from_secs(3)),
                _ => bail!("create: {answer:?}"),
            }
            last = Some(answer);
        }
        bail!("create is refused again and again: {last:?}")
    }

    pub fn create_base(&self) -> Result<String> {
        self.create(&json!({"template": "base"}))
    }

    pub fn get(&self, id: &str) -> Result<Answer> {
        self.call("GET", &format!("/v1/sandboxes/{id}"), None)
    }

    pub fn delete(&self, id: &str) -> Result<Answer> {
        self.call("DELETE", &format!("/v1/sandboxes/{id}"), None)
    }

    pub fn list(&self) -> Result<Vec<Value>> {
        let answer = self.call("GET", "/v1/sandboxes", None)?;
        match answer.body {
            Value::Array(all) if answer.status == 200 => Ok(all),
            other => bail!("list: {} {other}", answer.status),
        }
    }

    /// Deletes every sandbox of the workspace.
    pub fn delete_all(&self) -> Result<()> {
        for one in self.list()? {
            self.delete(one["id"].as_str().context("no id")?)?;
        }
        Ok(())
    }

    /// Standard output of a command that has to be answered with 200.
    pub fn exec(&self, id: &str, cmd: &str) -> Result<String> {
        let answer = self.call(
            "POST",
            &format!("/v1/sandboxes/{id}/exec"),
            Some(&json!({"cmd": cmd, "timeout_seconds": 50})),
        )?;
        if answer.status != 200 {
            bail!("exec {cmd:?}: {answer:?}");
        }
        Ok(answer.body["stdout"].as_str().context("no stdout")?.to_owned())
    }
}
