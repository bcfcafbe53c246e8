use std::{collections::BTreeMap, fs, path::Path};

use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use super::*;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Note {
    text: String,
    number: u64,
}

fn note(number: u64) -> Note {
    Note { text: format!("note {number}"), number }
}

#[derive(Debug, Clone)]
enum Step {
    Put(u8, u64),
    Remove(u8),
    Reopen,
    DeleteIndex,
    CorruptIndex(u8),
    /// A crash between the file and the index: the file changes behind the store's back.
    FileOnly(u8, u64),
    TornTemporary(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..12u8, any::<u64>()).prop_map(|(key, n)| Step::Put(key, n)),
        3 => (0..12u8).prop_map(Step::Remove),
        1 => Just(Step::Reopen),
        1 => Just(Step::DeleteIndex),
        1 => any::<u8>().prop_map(Step::CorruptIndex),
        1 => (0..12u8, any::<u64>()).prop_map(|(key, n)| Step::FileOnly(key, n)),
        1 => (0..12u8).prop_map(Step::TornTemporary),
    ];
    prop::collection::vec(step, 0..24)
}

fn key(number: u8) -> String {
    format!("key-{number}.x")
}

fn open(dir: &Path) -> Records<Note> {
    Records::open(dir).unwrap()
}

fn corrupt(index: &Path, seed: u8) {
    for entry in fs::read_dir(index).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let mut bytes = fs::read(&path).unwrap();
            match seed % 3 {
                0 => bytes.truncate(bytes.len() / 2),
                1 => bytes.iter_mut().step_by(7).for_each(|byte| *byte ^= seed | 1),
                _ => bytes = vec![seed; 100],
            }
            fs::write(&path, bytes).unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn after_anything_that_happens_reopening_gives_what_the_files_say(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let mut model = BTreeMap::new();
        let mut records = Some(open(dir.path()));
        for step in steps {
            match step {
                Step::Put(k, n) => {
                    records.as_ref().unwrap().put(&key(k), &note(n)).unwrap();
                    model.insert(key(k), note(n));
                }
                Step::Remove(k) => {
                    let was_there = records.as_ref().unwrap().remove(&key(k)).unwrap();
                    prop_assert_eq!(was_there, model.remove(&key(k)).is_some());
                }
                other => {
                    drop(records.take());
                    match other {
                        Step::DeleteIndex => fs::remove_dir_all(dir.path().join(".index")).unwrap(),
                        Step::CorruptIndex(seed) => corrupt(&dir.path().join(".index"), seed),
                        Step::FileOnly(k, n) => {
                            let bytes = serde_json::to_vec(&note(n)).unwrap();
                            files::write_atomic(&dir.path().join(format!("{}.json", key(k))), &bytes, 0o600).unwrap();
                            model.insert(key(k), note(n));
                        }
                        Step::TornTemporary(k) => {
                            let name = format!(".{}.json.4711-0.tmp", key(k));
                            fs::write(dir.path().join(name), b"{\"text\":\"ha").unwrap();
                        }
                        _ => {}
                    }
                    records = Some(open(dir.path()));
                }
            }
            let now: BTreeMap<_, _> = records.as_ref().unwrap().iter().unwrap().into_iter().collect();
            prop_assert_eq!(&now, &model);
        }
        drop(records);
        let records = open(dir.path());
        for (key, value) in &model {
            let found = records.get(key).unwrap();
            prop_assert_eq!(found.as_ref(), Some(value));
        }
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        prop_assert!(!names.iter().any(|n| n.to_string_lossy().ends_with(".tmp")), "{:?}", names);
    }
}

#[test]
fn a_file_that_does_not_parse_is_moved_aside_and_the_rest_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).put("good", &note(1)).unwrap();
    fs::write(dir.path().join("torn.json"), b"{\"text\":").unwrap();
    fs::write(dir.path().join("bad key.json"), b"{}").unwrap();
    fs::create_dir(dir.path().join("directory.json")).unwrap();

    let records = open(dir.path());

    assert_eq!(records.iter().unwrap(), [("good".to_owned(), note(1))]);
    assert!(dir.path().join("torn.json.bad").exists());
    assert!(dir.path().join("bad key.json.bad").exists());
    assert!(dir.path().join("directory.json.bad").exists());
}

#[test]
fn a_second_opening_is_refused_and_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path());
    first.put("a", &note(1)).unwrap();

    assert!(matches!(Records::<Note>::open(dir.path()), Err(RecordsError::Busy(_))));
    assert_eq!(first.get("a").unwrap(), Some(note(1)));
    assert!(!dir.path().join(".index.bad").exists());
}

#[test]
fn keys_that_could_leave_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    for key in ["", ".hidden", "..", "a/b", "a\0b", "ä", " ", &"x".repeat(129)] {
        assert!(matches!(records.put(key, &note(1)), Err(RecordsError::InvalidKey(_))), "{key:?}");
        assert!(matches!(records.get(key), Err(RecordsError::InvalidKey(_))), "{key:?}");
        assert!(matches!(records.remove(key), Err(RecordsError::InvalidKey(_))), "{key:?}");
    }
    records.put(&"x".repeat(128), &note(1)).unwrap();
}

#[test]
fn a_failed_write_changes_nothing_and_does_not_poison() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    records.put("a", &note(1)).unwrap();
    fs::create_dir(dir.path().join("b.json")).unwrap();

    assert!(matches!(records.put("b", &note(2)), Err(RecordsError::Io { .. })));
    records.put("a", &note(3)).unwrap();
    assert_eq!(records.iter().unwrap(), [("a".to_owned(), note(3))]);
}

#[test]
fn after_a_failed_fsync_every_change_is_refused_until_it_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    records.put("a", &note(1)).unwrap();
    let failure = files::Failure { error: io::Error::other("EIO"), in_doubt: true };
    assert!(!records.is_poisoned());
    records.failed(dir.path().into(), failure);

    assert!(matches!(records.put("a", &note(2)), Err(RecordsError::Poisoned(_))));
    assert!(matches!(records.remove("a"), Err(RecordsError::Poisoned(_))));
    assert!(records.is_poisoned());
    assert_eq!(records.get("a").unwrap(), Some(note(1)), "reading goes on");
    drop(records);
    open(dir.path()).put("a", &note(2)).unwrap();
}

#[test]
fn a_lost_index_is_replaced_by_the_files_while_running() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    records.put("a", &note(1)).unwrap();
    assert_eq!(records.ask_index(|_| Err::<(), _>(sled::Error::Unsupported("test".into()))), None);

    records.put("b", &note(2)).unwrap();
    assert_eq!(records.get("b").unwrap(), Some(note(2)));
    assert_eq!(records.iter().unwrap().len(), 2);
    drop(records);
    assert_eq!(open(dir.path()).iter().unwrap().len(), 2, "the stale index was made again");
}

#[test]
fn a_row_that_rots_in_the_index_is_read_from_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    records.put("a", &note(1)).unwrap();
    records.index.insert("a", b"rot").unwrap();

    assert_eq!(records.get("a").unwrap(), Some(note(1)));
    assert_eq!(records.iter().unwrap(), [("a".to_owned(), note(1))]);
}

#[test]
fn a_record_that_is_too_large_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    let large = Note { text: "x".repeat(RECORD_LIMIT as usize), number: 0 };

    assert!(matches!(records.put("a", &large), Err(RecordsError::Encode { .. })));
    assert_eq!(records.get("a").unwrap(), None);
}

#[test]
fn a_full_disk_is_told_apart_and_does_not_poison() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    let failure = files::Failure { error: io::ErrorKind::StorageFull.into(), in_doubt: false };

    assert!(matches!(records.failed(dir.path().into(), failure), RecordsError::Full { .. }));
    assert!(!records.is_poisoned());
    records.put("a", &note(1)).unwrap();
}

#[test]
fn a_key_does_not_wait_for_another_one() {
    let dir = tempfile::tempdir().unwrap();
    let records = open(dir.path());
    let turn = records.turn("a").unwrap();
    let (tell, told) = std::sync::mpsc::channel();

    std::thread::scope(|scope| {
        // Some of them share the lock of `a`; the first that does not proves it.
        for number in 0..TURNS {
            let (records, tell) = (&records, tell.clone());
            scope.spawn(move || {
                records.put(&format!("b{number}"), &note(1)).unwrap();
                tell.send(number).unwrap();
            });
        }
        let first = told.recv_timeout(std::time::Duration::from_secs(20));
        drop(turn);
        assert!(first.is_ok(), "one change holds up all others");
    });
}
