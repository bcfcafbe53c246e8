//! A small client of the API for what the published ones do not show: statuses, and calls while a daemon is dead.
//!
//! Owns: requests and their plain answers. Refuses to know: what an answer should have been; whoever asks judges it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// The API with a token.
#[derive(Debug, Clone)]
pub struct Api {
    base: String,
    token: String,
    agent: ureq::Agent,
}

/// An answer of any status.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body as JSON; as a text when it is not JSON.
    pub body: Value,
    /// Header `Retry-After`.
    pub retry_after: Option<String>,
}

impl Answer {
    /// Whether the host refused for lack of means, in the form that promises that nothing was made.
    #[must_use]
    pub fn is_capacity_refusal(&self) -> bool {
        self.body["error"].is_string()
            && (self.status == 507 || matches!((self.status, &self.retry_after), (503, Some(_))))
    }

    /// A text of the body.
    ///
    /// # Errors
    /// When there is none by this name.
    pub fn text(&self, field: &str) -> Result<String> {
        Ok(self.body[field].as_str().with_context(|| format!("no {field} in {self:?}"))?.to_owned())
    }
}

impl Api {
    /// The API at `base` (scheme, host and port).
    #[must_use]
    pub fn new(base: String, token: &str) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // Under emulation a busy guest is slow, not dead.
            .timeout_global(Some(Duration::from_secs(180)))
            .build()
            .into();
        Self { base, token: token.to_owned(), agent }
    }

    /// Any request.
    ///
    /// # Errors
    /// Only when no answer came.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        self.send(method, path, body.map(serde_json::to_vec).transpose()?.unwrap_or_default())
    }

    /// Any request with any body.
    ///
    /// # Errors
    /// Only when no answer came.
    pub fn send(&self, method: &str, path: &str, bytes: Vec<u8>) -> Result<Answer> {
        self.send_as("application/json", method, path, bytes)
    }

    /// Any request with a body of any type.
    ///
    /// # Errors
    /// Only when no answer came.
    pub fn send_as(&self, kind: &str, method: &str, path: &str, bytes: Vec<u8>) -> Result<Answer> {
        let builder = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.token))
            .header("content-type", kind);
        let mut answer = self.agent.run(builder.body(bytes)?)?;
        let retry_after =
            answer.headers().get("retry-after").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let text = answer.body_mut().with_config().limit(64 << 20).read_to_string()?;
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        Ok(Answer { status: answer.status().as_u16(), body, retry_after })
    }

    /// A POST that may be refused for lack of capacity; then it is asked again, as the Python client does.
    ///
    /// # Errors
    /// When no answer came, or it is refused for longer than that client's patience.
    pub fn post_patiently(&self, path: &str, body: &Value) -> Result<Answer> {
        let mut last = None;
        for _ in 0..30 {
            let answer = self.call("POST", path, Some(body))?;
            if !answer.is_capacity_refusal() {
                return Ok(answer);
            }
            last = Some(answer);
            std::thread::sleep(Duration::from_secs(3));
        }
        bail!("POST {path} is refused again and again: {last:?}")
    }

    /// A create that has to succeed; its id.
    ///
    /// # Errors
    /// Any other answer than 201.
    pub fn create(&self, body: &Value) -> Result<String> {
        let answer = self.post_patiently("/v1/sandboxes", body)?;
        ensure!(answer.status == 201, "create: {answer:?}");
        answer.text("id")
    }

    /// A sandbox of the template `base`; its id.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_base(&self) -> Result<String> {
        self.create(&json!({"template": "base"}))
    }

    /// One sandbox.
    ///
    /// # Errors
    /// Only when no answer came.
    pub fn get(&self, id: &str) -> Result<Answer> {
        self.call("GET", &format!("/v1/sandboxes/{id}"), None)
    }

    /// The `status` of a sandbox that has to be there.
    ///
    /// # Errors
    /// When it is not.
    pub fn status(&self, id: &str) -> Result<String> {
        self.get(id)?.text("status")
    }

    /// Deletes a sandbox.
    ///
    /// # Errors
    /// Only when no answer came.
    pub fn delete(&self, id: &str) -> Result<Answer> {
        self.call("DELETE", &format!("/v1/sandboxes/{id}"), None)
    }

    /// `POST` of a verb below a sandbox, without a body.
    ///
    /// # Errors
    /// Only when no answer came.
    pub fn verb(&self, id: &str, verb: &str) -> Result<Answer> {
        self.call("POST", &format!("/v1/sandboxes/{id}/{verb}"), None)
    }

    /// As [`Self::verb`], for a verb that has to succeed.
    ///
    /// # Errors
    /// Any answer but 2xx.
    pub fn done(&self, id: &str, verb: &str) -> Result<Answer> {
        let answer = self.verb(id, verb)?;
        ensure!((200..300).contains(&answer.status), "{verb} of {id}: {answer:?}");
        Ok(answer)
    }

    /// Forks a sandbox into so many children, which have to be made; their ids in order.
    ///
    /// # Errors
    /// Fewer children, or any other answer than 201.
    pub fn fork(&self, id: &str, count: usize) -> Result<Vec<String>> {
        let path = format!("/v1/sandboxes/{id}/fork-tree");
        let answer = self.post_patiently(&path, &json!({"count": count}))?;
        let made = ids(&answer.body["children"]);
        ensure!(answer.status == 201 && made.len() == count, "fork-tree of {count}: {answer:?}");
        Ok(made)
    }

    /// The sandboxes of the workspace.
    ///
    /// # Errors
    /// Any other answer than 200 with an array.
    pub fn list(&self) -> Result<Vec<Value>> {
        self.array("/v1/sandboxes")
    }

    /// Ids of the workspace's snapshots, newest first.
    ///
    /// # Errors
    /// As [`Self::list`].
    pub fn snapshots(&self) -> Result<Vec<String>> {
        Ok(ids(&Value::Array(self.array("/v1/snapshots")?)))
    }

    fn array(&self, path: &str) -> Result<Vec<Value>> {
        let answer = self.call("GET", path, None)?;
        match answer.body {
            Value::Array(all) if answer.status == 200 => Ok(all),
            other => bail!("GET {path}: {} {other}", answer.status),
        }
    }

    /// Deletes every sandbox, snapshot and volume of the workspace.
    ///
    /// # Errors
    /// When something cannot be listed or no answer comes.
    pub fn delete_all(&self) -> Result<()> {
        for id in ids(&Value::Array(self.list()?)) {
            self.delete(&id)?;
        }
        for id in self.snapshots()? {
            self.call("DELETE", &format!("/v1/snapshots/{id}"), None)?;
        }
        for volume in self.array("/v1/volumes")? {
            let name = volume["name"].as_str().context("a volume without a name")?;
            self.call("DELETE", &format!("/v1/volumes/{name}"), None)?;
        }
        Ok(())
    }

    /// Writes a file in a sandbox.
    ///
    /// # Errors
    /// Any answer but 2xx.
    pub fn write(&self, id: &str, path: &str, bytes: &[u8]) -> Result<()> {
        let answer = self.send("PUT", &format!("/v1/sandboxes/{id}/fs?path={path}"), bytes.to_vec())?;
        ensure!((200..300).contains(&answer.status), "writing {path}: {answer:?}");
        Ok(())
    }

    /// Standard output of a command that has to be answered with 200.
    ///
    /// # Errors
    /// Any other answer.
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

/// The `id` of every element.
pub fn ids(all: &Value) -> Vec<String> {
    all.as_array().into_iter().flatten().filter_map(|one| Some(one["id"].as_str()?.to_owned())).collect()
}
