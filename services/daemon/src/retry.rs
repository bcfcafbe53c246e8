//! Calls to the other daemons that may be repeated.
//!
//! Owns: how long one waits for a daemon that restarts. Refuses to know: what is called.

use std::time::Duration;

use pandastack_bus::{Error, Result, zbus};

/// How long a daemon that is not on the bus may take to come back (a restart takes about a second).
const AWAY_FOR: Duration = Duration::from_secs(6);
const STEP: Duration = Duration::from_millis(150);

/// Repeats a call while its daemon is not on the bus, and once more when the connection to it was lost half-way. Only for
/// calls that may be made twice.
pub async fn again<T, F, Fut>(mut call: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    again_knowing(&mut call).await.map(|(value, _)| value)
}

/// As [`again`], and as often as no reply comes in time, for so long. For what may take longer than the bus waits, and goes
/// on with what is under way when it is asked for again.
pub async fn patiently<T, F, Fut>(patience: Duration, mut call: F) -> Result<T>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let end = tokio::time::Instant::now() + patience;
    loop {
        match again(&mut call).await {
            Err(Error::Bus(error)) if !never_sent(&error) && tokio::time::Instant::now() < end => {
                tokio::time::sleep(STEP).await;
            }
            other => return other,
        }
    }
}

/// As [`again`]; the second value says whether an earlier attempt may have had its effect.
pub async fn again_knowing<T, F, Fut>(mut call: F) -> Result<(T, bool)>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T>>,
{
    let mut failing_since = None;
    let mut perhaps = false;
    loop {
        match call().await {
            Ok(value) => return Ok((value, perhaps)),
            Err(Error::Bus(error)) => {
                let away = never_sent(&error);
                // Died while it worked: the bus says so at once. A reply that did not come in time is not repeated.
                let died = matches!(&error, zbus::Error::MethodError(name, ..)
                    if name.as_str() == "org.freedesktop.DBus.Error.NoReply")
                    || matches!(&error, zbus::Error::FDO(fdo) if matches!(**fdo, zbus::fdo::Error::NoReply(_)));
                perhaps |= !away;
                // From the first failure on: a call may have worked for long before its daemon went.
                let since = *failing_since.get_or_insert_with(tokio::time::Instant::now);
                if !(away || died) || since.elapsed() > AWAY_FOR {
                    // The caller must not take a last "not there" for "had no effect".
                    return Err(Error::Bus(if perhaps && away { zbus::Error::InvalidReply } else { error }));
                }
                tokio::time::sleep(STEP).await;
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether a failed bus call certainly had no effect: the daemon was not on the bus.
pub fn never_sent(error: &zbus::Error) -> bool {
    match error {
        zbus::Error::FDO(error) => {
            matches!(**error, zbus::fdo::Error::ServiceUnknown(_) | zbus::fdo::Error::NameHasNoOwner(_))
        }
        zbus::Error::MethodError(name, ..) => matches!(
            name.as_str(),
            "org.freedesktop.DBus.Error.ServiceUnknown" | "org.freedesktop.DBus.Error.NameHasNoOwner"
        ),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(170);

    fn away() -> Error {
        Error::Bus(zbus::Error::FDO(Box::new(zbus::fdo::Error::ServiceUnknown(String::new()))))
    }

    #[tokio::test(start_paused = true)]
    async fn patience_begins_with_the_first_failure() {
        let calls = AtomicUsize::new(0);
        let answer = again(|| async {
            match calls.fetch_add(1, Ordering::Relaxed) {
                0 => {
                    tokio::time::sleep(AWAY_FOR * 2).await;
                    Err(away())
                }
                1 => Err(away()),
                _ => Ok(7),
            }
        });
        assert_eq!(answer.await, Ok(7));
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_longer_than_the_bus_waits_is_asked_for_again_and_not_for_ever() {
        let late = || Error::Bus(zbus::Error::InvalidReply);
        let calls = AtomicUsize::new(0);
        let slow = patiently(PATIENCE, || async {
            tokio::time::sleep(Duration::from_secs(28)).await;
            if calls.fetch_add(1, Ordering::Relaxed) < 4 { Err(late()) } else { Ok(7) }
        });
        assert_eq!(slow.await, Ok(7));

        let start = tokio::time::Instant::now();
        let never = patiently(PATIENCE, || async {
            tokio::time::sleep(Duration::from_secs(28)).await;
            Err::<(), _>(late())
        });
        assert_eq!(never.await, Err(late()));
        assert!(start.elapsed() < PATIENCE + Duration::from_secs(29));
        assert_eq!(patiently(PATIENCE, || async { Err::<(), _>(away()) }).await, Err(away()));
        assert!(start.elapsed() < 2 * PATIENCE, "a daemon that is away is not waited for as long");
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends() {
        let start = tokio::time::Instant::now();
        assert_eq!(again(|| async { Err::<(), _>(away()) }).await, Err(away()));
        assert!(start.elapsed() > AWAY_FOR && start.elapsed() < AWAY_FOR * 2);
    }
}
