//! What a create makes of the slots that wait.

use pandastack_bus::vmm::{SandboxSpec, VmmBackend};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{clean, spec, with_slots},
    fakes::Fake,
};

fn calls(world: &Fake, id: &str) -> Vec<String> {
    let log = world.books.lock().unwrap().log.clone();
    log.iter().filter_map(|line| line.strip_suffix(&format!(" {id}"))).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_dressed_slot_only_has_to_go_on() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let daemon = with_slots(&world, directory.path(), 2).await;
    world.books.lock().unwrap().log.clear();

    let made = Backend(daemon).create("r".into(), spec(false)).await.unwrap();

    assert_eq!(calls(&world, &made.id), ["resume", "identify"]);
    let books = world.books.lock().unwrap();
    assert!(books.machine_ids.contains_key(&made.id), "it was made unique when it was dressed");
    drop(books);
    clean(&world);
}

#[tokio::test]
async fn a_larger_disk_takes_an_empty_slot() {
    let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
    let daemon = with_slots(&world, directory.path(), 2).await;

    let larger = SandboxSpec { disk_mib: 2048, ..spec(false) };
    let made = Backend(daemon).create("r".into(), larger).await.unwrap();

    let calls = calls(&world, &made.id);
    assert!(calls.contains(&"load".to_owned()) && !calls.contains(&"resume".to_owned()), "{calls:?}");
    clean(&world);
}
