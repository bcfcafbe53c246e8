use super::*;
use crate::builds::record::Kind;

fn build(id: &str, workspace: &str, created_unix_ms: u64) -> Build {
    Build {
        id: id.into(),
        workspace: workspace.into(),
        name: "mine".into(),
        kind: Kind::Rootfs,
        size_mib: 64,
        vcpus: 1,
        memory_mib: 128,
        image_ref: String::new(),
        replace: false,
        template: "t".repeat(20),
        stage: Stage::Queued,
        cancelled: false,
        error: String::new(),
        attempts: 0,
        bytes: 0,
        env: BTreeMap::new(),
        workdir: String::new(),
        created_unix_ms,
        ended_unix_ms: 0,
    }
}

fn open(dir: &Path) -> Arc<Builds> {
    Builds::open(dir, Vec::new(), Workshop::default()).unwrap()
}

async fn uploaded(builds: &Builds, id: &str) {
    let incoming = builds.spool.begin(id).await.unwrap();
    incoming.finish(&Default::default()).await.unwrap();
}

#[tokio::test]
async fn builds_wait_in_turn_and_a_restart_goes_on_where_it_makes_sense() {
    let dir = tempfile::tempdir().unwrap();
    let builds = open(dir.path());
    for (id, at) in [("b", 2), ("a", 1), ("c", 3)] {
        builds.add(build(id, "w", at)).await.unwrap();
        uploaded(&builds, id).await;
    }
    assert_eq!(builds.next().unwrap().id, "a");
    builds.happen("b", Event::Go, "").await.unwrap().unwrap();
    assert_eq!(builds.next().unwrap().id, "b", "what was begun comes first");
    uploaded(&builds, "nobody").await;
    drop(builds);

    let builds = open(dir.path());
    let again = builds.get("w", "b").unwrap();
    assert_eq!((again.stage, again.attempts), (Stage::Queued, 1));
    assert!(builds.spool.read("b").await.is_ok() && builds.spool.read("nobody").await.is_err());
    builds.happen("b", Event::Go, "").await.unwrap().unwrap();
    drop(builds);
    let builds = open(dir.path());
    let given_up = builds.get("w", "b").unwrap();
    assert_eq!(given_up.stage, Stage::Failing);
    assert!(given_up.error.contains("restart") && builds.spool.read("b").await.is_err());
    assert_eq!(builds.list("w").iter().map(|build| build.id.as_str()).collect::<Vec<_>>(), ["c", "b", "a"]);
    assert!(builds.get("v", "b").is_none() && builds.list("v").is_empty());
}

#[tokio::test]
async fn places_are_bounded_and_given_back() {
    let dir = tempfile::tempdir().unwrap();
    let builds = open(dir.path());
    builds.add(build("a", "w", 1)).await.unwrap();
    let places: Vec<_> = (1..OPEN_PER_WORKSPACE).map(|_| builds.enter("w").unwrap()).collect();
    assert!(matches!(builds.enter("w"), Err(BuildsError::TooMany)));
    builds.enter("v").unwrap();
    drop(places);
    let others: Vec<_> = (1..OPEN).map(|number| builds.enter(&format!("w{number}")).unwrap()).collect();
    assert!(matches!(builds.enter("v"), Err(BuildsError::Full)));
    drop(others);
    builds.happen("a", Event::Cancel, "cancelled").await.unwrap().unwrap();
    builds.happen("a", Event::Step, "").await.unwrap().unwrap();
    let _all: Vec<_> = (0..OPEN_PER_WORKSPACE).map(|_| builds.enter("w").unwrap()).collect();
}

#[tokio::test]
async fn old_builds_go_with_their_logs() {
    let dir = tempfile::tempdir().unwrap();
    let builds = open(dir.path());
    for number in 0..KEPT as u64 + 3 {
        let id = format!("{number:016}");
        builds.add(build(&id, "w", number)).await.unwrap();
        std::fs::write(builds.log(&id), "x\n").unwrap();
        builds.happen(&id, Event::Fault, "why").await.unwrap().unwrap();
        let ended = builds.happen(&id, Event::Step, "").await.unwrap().unwrap();
        assert!(ended.ended_unix_ms > 0 && ended.error == "why");
    }
    assert_eq!(builds.list("w").len(), KEPT + 1);
    assert_eq!(std::fs::read_dir(dir.path().join("logs")).unwrap().count(), KEPT + 1);
    builds.forget("w").await.unwrap();
    assert_eq!(std::fs::read_dir(dir.path().join("logs")).unwrap().count(), 0);
    assert!(builds.list("").is_empty());
}
