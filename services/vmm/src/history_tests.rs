//! Whoever reads on from a position sees every event once, whatever happens meanwhile.

use std::collections::BTreeSet;

use pandastack_bus::vmm::SandboxSpec;
use proptest::prelude::*;

use super::*;
use crate::record::{Purpose, Sandbox, Shape};

fn record(workspace: &str) -> Record {
    let spec = SandboxSpec {
        workspace: workspace.into(),
        template: "base".into(),
        metadata: BTreeMap::new(),
        ttl_seconds: 1,
        persistent: false,
        disk_mib: 0,
        snapshot: String::new(),
        volumes: Vec::new(),
    };
    let shape = Shape {
        template: "base".into(),
        vcpus: 1,
        memory_mib: 1,
        disk_mib: 1,
        disk_grown: false,
        env: BTreeMap::new(),
        workdir: String::new(),
        warmup: String::new(),
    };
    let mut record = Record::slot(SandboxId::random(), 1);
    let mut inner = Sandbox::new("", String::new(), spec, shape, "snapshot");
    inner.born = true;
    record.purpose = Purpose::Sandbox(Box::new(inner));
    record
}

fn open(directory: &Path) -> (History, mpsc::UnboundedReceiver<Hint>) {
    let (hints, told) = mpsc::unbounded_channel();
    (History::open(directory, hints), told)
}

fn query(workspace: &str, after: u64, limit: u32) -> HistoryQuery {
    HistoryQuery { workspace: workspace.into(), after, limit, ..HistoryQuery::default() }
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn only_what_is_durable_and_acknowledged_is_told_and_once() {
    let directory = directory();
    let (history, mut hints) = open(directory.path());
    let mut one = record("a");
    one.note(5, "sandbox.creating", "");
    one.note(6, "sandbox.running", "why");
    if let Some(inner) = one.sandbox_mut() {
        inner.born = false;
    }
    history.durable(&one, &BTreeMap::new());
    assert!(history.page(&query("a", 0, 9)).rows.is_empty());
    if let Some(inner) = one.sandbox_mut() {
        inner.born = true;
    }
    history.durable(&one, &BTreeMap::from([("boot_ms".into(), "7".into())]));
    history.durable(&one, &BTreeMap::new());
    let page = history.page(&query("a", 0, 9));
    let kinds: Vec<&str> = page.rows.iter().map(|row| &*row.kind).collect();
    assert_eq!(kinds, ["sandbox.creating", "sandbox.running"]);
    assert_eq!((page.rows[1].unix_ms, page.rows[1].payload.len(), page.rows[0].payload.len()), (6, 2, 0));
    assert_eq!(hints.try_recv().ok(), Some(("a".into(), one.id.to_string())));
    assert!(hints.try_recv().is_err());
    assert!(history.page(&query("b", 0, 9)).rows.is_empty());
}

#[test]
fn a_restart_keeps_the_events_of_what_is_gone_and_fills_in_the_rest() {
    let directory = directory();
    let (mut gone, mut there) = (record("a"), record("a"));
    let position = {
        let (history, _hints) = open(directory.path());
        gone.note(1, "sandbox.running", "");
        history.durable(&gone, &BTreeMap::new());
        history.gone(2, &gone);
        there.note(3, "sandbox.running", "");
        history.durable(&there, &BTreeMap::new());
        history.page(&query("", 0, 9)).position
    };
    // Durable, and then the power went before it was told; the file ends in the middle of a line.
    there.note(4, "sandbox.paused", "");
    let path = directory.path().join(FILES[0]);
    let mut file = OpenOptions::new().append(true).open(path).unwrap_or_else(|error| panic!("{error}"));
    assert!(file.write_all(b"{\"row\":{\"seq\":18446744073").is_ok());

    let (history, _hints) = open(directory.path());
    history.fill_in([&there].into_iter());
    let all = history.page(&query("", 0, 9));
    let kinds: Vec<&str> = all.rows.iter().map(|row| &*row.kind).collect();
    assert_eq!(kinds, ["sandbox.running", "sandbox.deleted", "sandbox.running", "sandbox.paused"]);
    let new = history.page(&query("", position, 9));
    assert_eq!((new.rows.len(), &*new.rows[0].kind), (1, "sandbox.paused"));
    drop(history);
    let (history, _hints) = open(directory.path());
    history.fill_in([&there].into_iter());
    assert_eq!(history.page(&query("", 0, 9)).rows.len(), 4);
}

#[test]
fn a_noisy_workspace_loses_its_own_events() {
    let directory = directory();
    let (history, _hints) = open(directory.path());
    history.append(0, "quiet", &SandboxId::random(), "x", BTreeMap::new());
    for _ in 0..KEPT_EACH + 10 {
        history.append(0, "noisy", &SandboxId::random(), "x", BTreeMap::new());
    }
    assert_eq!(history.page(&query("quiet", 0, 9)).rows.len(), 1);
    assert_eq!(history.state().rows.len(), KEPT_EACH + 1);
}

#[derive(Debug, Clone)]
enum Step {
    Note(usize),
    Save(usize),
    Delete(usize),
    Restart,
    Read(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0usize..4).prop_map(Step::Note),
        3 => (0usize..4).prop_map(Step::Save),
        1 => (0usize..4).prop_map(Step::Delete),
        1 => Just(Step::Restart),
        4 => (1u32..4).prop_map(Step::Read),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Followers who began with a replay of the newest few, at any moment, and go on by position: what they saw together with
    /// what came before their replay is everything that was told, once and in order.
    #[test]
    fn replay_and_live_have_neither_gap_nor_double(
        steps in prop::collection::vec(step(), 1..60),
        begins in prop::collection::vec((0usize..60, 0u32..5, any::<bool>()), 1..4),
    ) {
        let directory = directory();
        let (mut history, mut hints) = open(directory.path());
        let mut records: Vec<Record> = (0..4).map(|at| record(["a", "b"][at % 2])).collect();
        let mut saved = records.clone();
        let mut followers: Vec<Option<(String, u64, Vec<u64>)>> = vec![None; begins.len()];
        for (at, step) in steps.iter().enumerate() {
            for (follower, (begin, tail, narrow)) in followers.iter_mut().zip(&begins) {
                if *begin == at {
                    let workspace = if *narrow { "a" } else { "" };
                    let newest = HistoryQuery { newest: true, ..query(workspace, 0, *tail) };
                    let page = history.page(&newest);
                    let seen = page.rows.iter().map(|row| row.seq).collect();
                    *follower = Some((workspace.to_owned(), page.position, seen));
                }
            }
            match step {
                Step::Note(which) => records[*which].note(at as u64, "x", ""),
                Step::Save(which) => {
                    saved[*which] = records[*which].clone();
                    history.durable(&saved[*which], &BTreeMap::new());
                }
                Step::Delete(which) => {
                    history.gone(at as u64, &records[*which]);
                    records[*which] = record(["a", "b"][which % 2]);
                    saved[*which] = records[*which].clone();
                }
                Step::Restart => {
                    drop(history);
                    (history, hints) = open(directory.path());
                    history.fill_in(saved.iter());
                    records.clone_from(&saved);
                }
                Step::Read(limit) => {
                    for (workspace, position, seen) in followers.iter_mut().flatten() {
                        let page = history.page(&query(workspace, *position, *limit));
                        prop_assert!(page.position >= *position);
                        seen.extend(page.rows.iter().map(|row| row.seq));
                        *position = page.position;
                    }
                }
            }
        }
        drop(hints);
        for (workspace, mut position, mut seen) in followers.into_iter().flatten() {
            loop {
                let page = history.page(&query(&workspace, position, 2));
                seen.extend(page.rows.iter().map(|row| row.seq));
                if page.rows.is_empty() {
                    break;
                }
                position = page.position;
            }
            let all: Vec<u64> = history.page(&query(&workspace, 0, 1000)).rows.iter().map(|row| row.seq).collect();
            let unique: BTreeSet<u64> = seen.iter().copied().collect();
            prop_assert_eq!(unique.len(), seen.len(), "something came twice");
            prop_assert!(all.ends_with(&seen), "{:?} is no end of {:?}", seen, all);
        }
    }
}
