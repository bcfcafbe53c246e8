//! Who waits for whom across captures, on a clock that only the tests move.

use proptest::prelude::*;
use tokio::time::advance;

use super::*;

const GRACE: Duration = Duration::from_secs(ORPHAN_SECONDS);

fn session(detach: bool) -> Arc<Session> {
    Session::new(&Exec { detach, ..Exec::default() }, 7, None, Arc::default(), None, 0)
}

/// Time left until it is killed.
fn left(session: &Session) -> Option<Duration> {
    session.orphan_deadline().map(|deadline| deadline - Instant::now())
}

#[tokio::test(start_paused = true)]
async fn the_grace_begins_when_the_connection_breaks() {
    let session = session(false);
    let (attachment, ..) = session.attach(0);
    advance(GRACE * 10).await;
    assert_eq!(left(&session), None);
    session.detach(attachment);
    assert_eq!(left(&session), Some(GRACE));
    advance(GRACE / 2).await;
    assert_eq!(left(&session), Some(GRACE / 2));
    session.attach(0);
    assert_eq!(left(&session), None);
}

#[tokio::test(start_paused = true)]
async fn a_wake_gives_the_whole_grace_to_orphans_only() {
    let (orphan, attached, detached) = (session(false), session(false), session(true));
    attached.attach(0);
    advance(GRACE - Duration::from_secs(1)).await;
    for session in [&orphan, &attached, &detached] {
        session.renew_grace();
    }
    assert_eq!((left(&orphan), left(&attached), left(&detached)), (Some(GRACE), None, None));
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Attach,
    Detach,
    Output(usize),
    Wake,
    Later,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        Just(Step::Attach),
        Just(Step::Detach),
        (0usize..50_000).prop_map(Step::Output),
        Just(Step::Wake),
        Just(Step::Later),
    ]
}

proptest! {
    /// Whatever happened before, and whatever happens after: an abandoned session has no end of its own, reads on
    /// unless somebody is attached here, and knows the stale attachment no more.
    #[test]
    fn an_abandoned_session_waits_for_nobody(
        before in prop::collection::vec(step(), 0..40),
        after in prop::collection::vec(step(), 0..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let session = session(false);
            let mut attachment = None;
            run(&session, &before, &mut attachment).await;
            let stale = attachment.take();
            session.abandon();
            prop_assert!(session.wanted() > 0);
            if let Some(stale) = stale {
                prop_assert_eq!(session.next(stale, 0, 0, 1), Next::TakenOver);
            }
            run(&session, &after, &mut attachment).await;
            prop_assert!(session.is_detached() && session.info().detached);
            prop_assert_eq!(session.orphan_deadline(), None);
            prop_assert!(attachment.is_some() || session.wanted() > 0);
            Ok(())
        })?;
    }
}

async fn run(session: &Session, steps: &[Step], attachment: &mut Option<u64>) {
    for step in steps {
        match *step {
            Step::Attach => *attachment = Some(session.attach(0).0),
            Step::Detach => attachment.take().into_iter().for_each(|number| session.detach(number)),
            Step::Output(bytes) => session.output(Stream::Stdout, &vec![1; bytes.min(session.wanted())]),
            Step::Wake => session.renew_grace(),
            Step::Later => advance(GRACE / 3).await,
        }
    }
}
