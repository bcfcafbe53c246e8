//! The one place where an error becomes HTTP.
//!
//! Owns: status, `error` sentence, `code`, `retryable`, `Retry-After`. Refuses to know: which route it happened in.
//!
//! A handler answers `Result<Response, Problem>`; the problem travels in the response's extensions to the gate, which
//! adds the request id and writes the body. Three phrases make clients run a command a second time and never appear in
//! a sentence of ours (see [`calm`]).

use http::{HeaderValue, StatusCode, header};
use pandastack_bus::Error as BusError;
use pandastack_daemon::retry::never_sent;
use pandastack_protocol::{Code, Failure};
use pandastack_proxy::Refusal;
use serde_json::{Map, Value};
use warp::reply::Response;

/// Why a request was not done.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{status}: {message}")]
pub struct Problem {
    /// Status of the answer.
    pub status: StatusCode,
    /// Word for programs.
    pub code: &'static str,
    /// One sentence for people.
    pub message: String,
    /// Seconds after which the same request may succeed. On 503 and 429 a promise that nothing was made.
    pub retry_after: Option<u32>,
    /// `Allow` of a 405.
    pub allow: Option<String>,
    /// Further keys of the body.
    pub extra: Map<String, Value>,
}

/// What is known about the effect of a call whose answer was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// None: it only reads, or it was never sent.
    None,
    /// Perhaps.
    Perhaps,
}

/// Seconds to wait for capacity.
const CAPACITY_RETRY: u32 = 5;
/// Seconds to wait for something of the workspace's own to be deleted.
const QUOTA_RETRY: u32 = 2;
const SENTENCE_CHARS: usize = 600;

impl Problem {
    /// A problem with a status, a word and a sentence.
    pub fn new(status: StatusCode, code: &'static str, message: impl AsRef<str>) -> Self {
        let mut message = calm(message.as_ref());
        if message.trim().is_empty() {
            code.clone_into(&mut message);
        }
        Self { status, code, message, retry_after: None, allow: None, extra: Map::new() }
    }

    /// 400: the request can never succeed as it is.
    pub fn invalid(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    /// 404.
    pub fn not_found(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 404 for a sandbox that does not exist, or exists for somebody else: both look the same.
    pub fn no_sandbox(id: &str) -> Self {
        let shown: String = id.chars().filter(|c| !c.is_control()).take(64).collect();
        Self::not_found(format!("sandbox {shown:?} not found"))
    }

    /// 409.
    pub fn conflict(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// 401 in the contract's form.
    pub fn unauthorized(detail: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "unauthorized").with("detail", detail)
    }

    /// 413.
    pub fn too_large(message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    }

    /// 503 with `Retry-After`: nothing was made or started.
    pub fn unavailable(code: &'static str, message: impl AsRef<str>) -> Self {
        let mut problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        problem.retry_after = Some(CAPACITY_RETRY);
        problem
    }

    /// 504: it took too long, or its outcome is unknown.
    pub fn gave_up(code: &'static str, message: impl AsRef<str>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, code, message)
    }

    /// 500: our own fault. What happened is for the journal, not for the caller.
    pub fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "internal error; the operator's journal has it",
        )
    }

    /// Adds a key to the body.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.extra.insert(key.to_owned(), value.into());
        self
    }

    /// Whether the same request may succeed later.
    pub fn retryable(&self) -> bool {
        self.retry_after.is_some() || self.status == StatusCode::INSUFFICIENT_STORAGE
    }

    /// What a bus method of another daemon answered.
    pub fn from_bus(error: &BusError, effect: Effect) -> Self {
        Self::of_bus(None, error, effect)
    }

    /// As [`Problem::from_bus`], for a call about a sandbox.
    pub fn about(sandbox: &str, error: &BusError, effect: Effect) -> Self {
        Self::of_bus(Some(sandbox), error, effect)
    }

    fn of_bus(sandbox: Option<&str>, error: &BusError, effect: Effect) -> Self {
        let text = error.message();
        match error {
            BusError::NotFound(_) => Self::not_found(text),
            BusError::Exists(_) => Self::conflict(text),
            BusError::InvalidArgument(_) => Self::invalid(text),
            BusError::WrongState(_) => Self::new(StatusCode::CONFLICT, "wrong_state", text),
            BusError::NoCapacity(_) => Self::unavailable("no_capacity", text),
            // Not 503: the appliance has room, and a proxy must not take it for one that has none. The clients ask again, as
            // something of the workspace's own may be deleted at any time.
            BusError::Quota(_) => {
                let mut problem = Self::new(StatusCode::TOO_MANY_REQUESTS, "quota", text);
                problem.retry_after = Some(QUOTA_RETRY);
                problem
            }
            // Without Retry-After: they would only ask again in vain.
            BusError::BeyondQuota(_) => Self::new(StatusCode::TOO_MANY_REQUESTS, "quota", text),
            BusError::NoSpace(_) => Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", text),
            BusError::NotReady(_) => Self::unavailable("not_ready", text),
            BusError::Refused(_) => Self::new(StatusCode::BAD_GATEWAY, "refused", text),
            BusError::GuestUnreachable(_) if effect == Effect::None => {
                Self::unavailable("guest_unreachable", untimed(&text))
            }
            BusError::GuestUnreachable(_) => Self::gave_up("guest_unreachable", untimed(&text)),
            BusError::Timeout(_) => Self::gave_up("gave_up", untimed(&text)),
            BusError::Internal(_) => {
                tracing::error!(sandbox, error = %text, "a daemon reports its own fault");
                Self::internal()
            }
            BusError::Bus(bus) if effect == Effect::None || never_sent(bus) => {
                tracing::warn!(sandbox, error = %text, "the bus call did not reach its daemon");
                Self::unavailable("not_ready", "the appliance is not ready for this request; try again soon")
            }
            BusError::Bus(_) => {
                tracing::warn!(sandbox, error = %text, "the bus call was not answered");
                Self::gave_up(
                    "unknown_outcome",
                    "no answer in time; whether the request had an effect is unknown",
                )
            }
        }
    }

    /// What the guest's agent answered to a request about a file.
    pub fn from_file_failure(failure: &Failure) -> Self {
        let text =
            if failure.message.is_empty() { "the guest refused the request" } else { &failure.message };
        match failure.code {
            Code::NotFound => Self::not_found(text),
            Code::NotADirectory => Self::new(StatusCode::BAD_REQUEST, "not_a_directory", text),
            Code::IsADirectory => Self::new(StatusCode::BAD_REQUEST, "is_a_directory", text),
            Code::Denied => Self::new(StatusCode::BAD_REQUEST, "denied", text),
            Code::NoSpace => Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", text),
            Code::Invalid | Code::Refused | Code::Unsupported => Self::invalid(text),
            Code::Busy => Self::unavailable("busy", text),
            Code::Internal => Self::unavailable("guest_failed", text),
        }
    }

    /// What the guest's agent answered to the start of a command. Nothing of it runs.
    pub fn from_start_failure(failure: &Failure) -> Self {
        let text =
            if failure.message.is_empty() { "the guest refused the command" } else { &failure.message };
        let text = untimed(text);
        match failure.code {
            Code::NoSpace => Self::new(StatusCode::INSUFFICIENT_STORAGE, "no_space", text),
            Code::Busy => Self::unavailable("busy", text),
            Code::Internal => Self::unavailable("guest_failed", text),
            _ => Self::invalid(text),
        }
    }

    /// What the proxy says instead of an answer of the guest's.
    pub fn from_refusal(refusal: &Refusal) -> Self {
        let problem = Self::new(refusal.status, refusal.code, &refusal.message);
        Self { retry_after: refusal.retry_after, ..problem }
    }

    /// The JSON object of the answer.
    pub fn body(&self, request_id: &str) -> Value {
        let mut body = self.extra.clone();
        body.insert("error".into(), self.message.clone().into());
        body.insert("code".into(), self.code.into());
        body.insert("retryable".into(), self.retryable().into());
        body.insert("request_id".into(), request_id.into());
        Value::Object(body)
    }

    /// The whole answer.
    pub fn render(&self, request_id: &str) -> Response {
        let mut response = Response::new(self.body(request_id).to_string().into());
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(value) = self.allow.as_deref().and_then(|allow| HeaderValue::from_str(allow).ok()) {
            headers.insert(header::ALLOW, value);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }

    /// An empty answer that carries the problem to the gate.
    pub fn into_response(self) -> Response {
        let mut response = Response::default();
        *response.status_mut() = self.status;
        response.extensions_mut().insert(self);
        response
    }
}

/// One bounded line without the phrases on which clients send a command once more.
pub fn calm(text: &str) -> String {
    let line: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SENTENCE_CHARS).collect();
    let lower = line.to_ascii_lowercase();
    if ["connection refused", "no route to host", "i/o timeout"].iter().any(|phrase| lower.contains(phrase)) {
        return "the guest is not reachable".into();
    }
    line
}

/// Without the words by which clients recognise a command's own time limit.
pub fn untimed(text: &str) -> String {
    let lower = text.to_ascii_lowercase();
    if lower.contains("timeout") || lower.contains("deadline exceeded") {
        return "the guest did not answer in time".into();
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use pandastack_bus::zbus;

    use super::*;

    #[test]
    fn every_bus_error_has_its_status() {
        let text = || "a sentence".to_owned();
        let table = [
            (BusError::NotFound(text()), 404, None),
            (BusError::Exists(text()), 409, None),
            (BusError::InvalidArgument(text()), 400, None),
            (BusError::WrongState(text()), 409, None),
            (BusError::NoCapacity(text()), 503, Some(5)),
            (BusError::Quota(text()), 429, Some(2)),
            (BusError::BeyondQuota(text()), 429, None),
            (BusError::NoSpace(text()), 507, None),
            (BusError::NotReady(text()), 503, Some(5)),
            (BusError::GuestUnreachable(text()), 504, None),
            (BusError::Timeout(text()), 504, None),
            (BusError::Refused(text()), 502, None),
            (BusError::Internal(text()), 500, None),
            (BusError::Bus(zbus::Error::InvalidReply), 504, None),
        ];
        for (error, status, retry) in table {
            let problem = Problem::from_bus(&error, Effect::Perhaps);
            assert_eq!((problem.status.as_u16(), problem.retry_after), (status, retry), "{error:?}");
        }
    }

    #[test]
    fn a_call_without_effect_is_retryable_when_its_daemon_is_away() {
        let problem = Problem::from_bus(&BusError::Bus(zbus::Error::InvalidReply), Effect::None);

        assert_eq!((problem.status.as_u16(), problem.retry_after), (503, Some(5)));
    }

    #[test]
    fn the_phrases_that_make_clients_repeat_a_command_never_pass() {
        for phrase in ["dial: Connect: Connection Refused", "No route to host", "read: i/o timeout"] {
            let problem = Problem::new(StatusCode::BAD_REQUEST, "x", phrase);
            assert_eq!(problem.message, "the guest is not reachable");
        }
        let start = Failure { code: Code::Internal, message: "Timeout of fork".into() };
        assert!(!Problem::from_start_failure(&start).message.to_lowercase().contains("timeout"));
    }

    #[test]
    fn the_body_is_flat_and_its_error_a_string() {
        let body = Problem::unauthorized("missing bearer token").body("abc");

        assert_eq!(
            body,
            serde_json::json!({"error": "unauthorized", "detail": "missing bearer token",
                "code": "unauthorized", "retryable": false, "request_id": "abc"})
        );
    }
}
