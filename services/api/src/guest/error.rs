//! Why a guest did not do what it was asked, and what the caller is told.

use http::StatusCode;
use pandastack_protocol::Failure;

use crate::problem::{Effect, Problem};

/// Why the guest did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GuestError {
    /// It said no. Nothing of the request remains.
    #[error(transparent)]
    Refused(Failure),
    /// No connection could be had. Nothing was asked.
    #[error("{0:?}")]
    Bus(pandastack_bus::Error),
    /// It is paused. Nothing was asked.
    #[error("the sandbox is paused")]
    Paused,
    /// It is hibernated and was not woken, or could not be. Nothing was asked.
    #[error("the sandbox is hibernated: {0:?}")]
    Asleep(pandastack_bus::Error),
    /// Somebody else follows the command now.
    #[error("another request follows this command now")]
    TakenOver,
    /// It was asked and did not answer, or not in our language. Whether it did something is unknown.
    #[error("the guest does not answer: {0}")]
    Lost(String),
}

impl GuestError {
    /// For a request that only reads.
    pub fn reading(self, sandbox: &str) -> Problem {
        match self {
            Self::Refused(failure) => Problem::from_file_failure(&failure),
            Self::Bus(error) => Problem::about(sandbox, &error, Effect::None),
            Self::Paused => Problem::new(StatusCode::CONFLICT, "paused", "sandbox is paused"),
            Self::Asleep(error) => asleep(sandbox, &error),
            Self::TakenOver => Problem::conflict("another request follows this command now"),
            Self::Lost(_) => Problem::unavailable("guest_unreachable", "the guest does not answer"),
        }
    }

    /// For a request that changes something.
    pub fn changing(self, sandbox: &str) -> Problem {
        match self {
            Self::Lost(_) => Problem::gave_up(
                "guest_unreachable",
                "the guest does not answer; whether the request had an effect is unknown",
            ),
            other => other.reading(sandbox),
        }
    }

    /// For the start of a command.
    pub fn starting(self, sandbox: &str) -> Problem {
        match self {
            Self::Refused(failure) => Problem::from_start_failure(&failure),
            Self::Bus(error) => match Problem::about(sandbox, &error, Effect::None) {
                problem if problem.status == StatusCode::GATEWAY_TIMEOUT => {
                    Problem::unavailable("guest_unreachable", "the guest is not reachable")
                }
                problem => problem,
            },
            Self::Lost(_) => Problem::gave_up(
                "guest_unreachable",
                "the guest does not answer; whether the command was started is unknown",
            ),
            other => other.reading(sandbox),
        }
    }
}

/// 503: a sandbox that could not be woken. It is as before.
fn asleep(sandbox: &str, error: &pandastack_bus::Error) -> Problem {
    let cause = Problem::about(sandbox, error, Effect::None);
    let mut problem =
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "auto_wake", format!("auto-wake: {}", cause.message));
    // It cannot be woken as it is: asking again does not help.
    let hopeless = cause.status.is_client_error() || cause.status == StatusCode::INTERNAL_SERVER_ERROR;
    problem.retry_after = (!hopeless).then_some(cause.retry_after.unwrap_or(5));
    problem
}

#[cfg(test)]
mod tests {
    use pandastack_bus::Error;

    use super::*;

    #[test]
    fn a_sandbox_that_could_not_be_woken_is_a_503_and_says_whether_to_ask_again() {
        for (error, retry) in [
            (Error::NoCapacity("no memory".into()), Some(5)),
            (Error::NoSpace("disk full".into()), Some(5)),
            (Error::WrongState("another processor".into()), None),
            (Error::Internal("secret".into()), None),
        ] {
            let problem = GuestError::Asleep(error).starting("x");
            assert_eq!((problem.status.as_u16(), problem.retry_after), (503, retry), "{problem:?}");
            assert!(problem.message.starts_with("auto-wake: ") && !problem.message.contains("secret"));
        }
    }
}
