//! What PID 1 is told (`sd_notify`, `Type=notify-reload`). Without `$NOTIFY_SOCKET` nobody is told, which is fine.

use sd_notify::NotifyState;

pub(crate) fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(one_line(status))]);
}

pub(crate) fn status(text: &str) {
    send(&[NotifyState::Status(one_line(text))]);
}

pub(crate) fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!("no monotonic clock: {error}"),
    }
}

pub(crate) fn reloaded() {
    send(&[NotifyState::Ready]);
}

pub(crate) fn stopping() {
    send(&[NotifyState::Stopping]);
}

pub(crate) fn alive() {
    send(&[NotifyState::Watchdog]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!("PID 1 cannot be told {states:?}: {error}");
    }
}

/// A line break would start another assignment of the protocol.
fn one_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}
