//! Why a request was not carried, as status and sentence. The services give it their own form.
//!
//! No sentence has one of the phrases on which the published clients send a request once more (`connection refused`, `no route
//! to host`, `i/o timeout`): by then the request may have been delivered.

use http::StatusCode;

/// Seconds after which it may be tried again.
const RETRY: u32 = 5;

/// Why a request was not carried.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Status of the answer.
    pub status: StatusCode,
    /// Word for programs.
    pub code: &'static str,
    /// One sentence.
    pub message: String,
    /// Seconds after which the same request may succeed; nothing was delivered.
    pub retry_after: Option<u32>,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), retry_after: None }
    }

    /// 404: no such sandbox, or somebody else's.
    pub fn no_sandbox(id: &str) -> Self {
        let shown: String = id.chars().filter(|c| !c.is_control()).take(64).collect();
        Self::new(StatusCode::NOT_FOUND, "not_found", format!("sandbox {shown:?} not found"))
    }

    /// 503: it is there and takes no requests as it is.
    pub fn not_running(state: &str) -> Self {
        let message = format!("sandbox not running: it is {state}");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "not_running", message)
    }

    /// 503: it could not be woken; it is as before.
    pub fn asleep(why: &str, hopeless: bool) -> Self {
        let retry_after = (!hopeless).then_some(RETRY);
        let refusal =
            Self::new(StatusCode::SERVICE_UNAVAILABLE, "auto_wake", format!("auto-wake: {}", calm(why)));
        Self { retry_after, ..refusal }
    }

    /// 503: not now. Nothing was delivered.
    pub fn unavailable(code: &'static str, message: impl Into<String>) -> Self {
        let refusal = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        Self { retry_after: Some(RETRY), ..refusal }
    }

    /// 502: the program behind the port did not answer as it should.
    pub fn upstream(why: &str) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "upstream", format!("upstream: {}", calm(why)))
    }

    /// 504: no answer in time.
    pub fn late(message: impl Into<String>) -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "gave_up", message)
    }

    /// 502: what allowed it ended while it was under way.
    pub fn cut() -> Self {
        Self::upstream("the sandbox went, or the right to reach it ended")
    }

    /// 400: the client's own fault.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }
}

/// One line without the phrases that make clients repeat a request.
fn calm(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    let lower = line.to_ascii_lowercase();
    if ["connection refused", "no route to host", "i/o timeout"].iter().any(|phrase| lower.contains(phrase)) {
        return "the guest is not reachable".into();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_phrases_that_make_clients_repeat_a_request_never_pass() {
        for phrase in ["dial: Connection Refused", "no route TO host", "read: i/o timeout"] {
            assert_eq!(Refusal::upstream(phrase).message, "upstream: the guest is not reachable");
            assert_eq!(Refusal::asleep(phrase, false).message, "auto-wake: the guest is not reachable");
        }
        assert_eq!(Refusal::upstream("a\r\nb").message, "upstream: a  b");
    }
}
