//! The daemon is killed, or power is cut, before each call with an effect in turn.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, atomic::Ordering},
};

use pandastack_bus::{
    SandboxId,
    storage::{Purpose, VolumeUse},
    vmm::{Child, SandboxInfo, SandboxSpec, State, VmmBackend},
};
use pandastack_vmm::backend::Backend;

use crate::{
    daemon::{Daemon, clean, eventually, open, spec, started},
    fakes::{Fake, Handle},
};

const THOUGHT: &str = "a thought";

/// What a daemon acknowledged before it was killed.
#[derive(Default)]
struct Promises {
    /// The state of each sandbox; `None` while a verb is under way that may have come to its end or not.
    there: BTreeMap<String, Option<State>>,
    gone: Vec<String>,
    snapshots: BTreeSet<String>,
}

/// A life in which everything happens.
struct Life {
    world: Arc<Fake>,
    backend: Backend<Handle>,
    promises: Arc<Mutex<Promises>>,
}

impl Life {
    fn promises(&self) -> MutexGuard<'_, Promises> {
        self.promises.lock().unwrap()
    }

    fn promise(&self, id: &str, state: State) {
        self.promises().there.insert(id.to_owned(), Some(state));
    }

    fn unsettle(&self, id: &str) {
        self.promises().there.insert(id.to_owned(), None);
    }

    async fn create(&self, request: &str, spec: SandboxSpec) -> SandboxInfo {
        let made = self.backend.create(request.into(), spec).await.unwrap();
        self.world.books.lock().unwrap().minds.insert(made.machine.clone(), THOUGHT.into());
        self.promise(&made.id, State::Running);
        made
    }

    async fn delete(&self, id: &str) {
        self.promises().there.remove(id);
        assert!(self.backend.delete(id.to_owned()).await.unwrap());
        self.promises().gone.push(id.to_owned());
    }

    async fn hibernate(&self, id: &str) {
        self.unsettle(id);
        self.backend.hibernate(id.to_owned()).await.unwrap();
        self.promise(id, State::Hibernated);
    }

    async fn wake(&self, id: &str) {
        self.unsettle(id);
        self.backend.wake(id.to_owned()).await.unwrap();
        self.promise(id, State::Running);
    }

    async fn whole(self, daemon: Daemon) {
        let backend = &self.backend;
        for action in daemon.reconcile().await.unwrap() {
            daemon.carry_out(action).await;
        }
        let slot = daemon.make_slot().await.unwrap();
        daemon.push_slot(slot);
        let volumes = vec![VolumeUse { name: "data".into(), read_only: false }];
        let kept = self.create("kept", SandboxSpec { volumes, ..spec(true) }).await.id;
        let gone = self.create("gone", spec(false)).await.id;
        backend.set_ttl(kept.clone(), 99).await.unwrap();
        self.delete(&gone).await;

        self.unsettle(&kept);
        backend.pause(kept.clone()).await.unwrap();
        self.promise(&kept, State::Paused);
        self.unsettle(&kept);
        backend.resume(kept.clone()).await.unwrap();
        self.promise(&kept, State::Running);

        let snapshot = SandboxId::random().to_string();
        backend.snapshot(kept.clone(), snapshot.clone()).await.unwrap();
        self.promises().snapshots.insert(snapshot.clone());
        let copy = self.create("copy", SandboxSpec { snapshot, ..spec(false) }).await.id;
        self.hibernate(&copy).await;
        self.delete(&copy).await;

        self.hibernate(&kept).await;
        self.wake(&kept).await;
        let child = |persistent| Child { metadata: BTreeMap::new(), ttl_seconds: 60, persistent };
        let fork = backend.fork("fork".into(), kept.clone(), vec![child(false), child(true)]).await.unwrap();
        for birth in &fork.children {
            self.promise(&birth.id, State::Running);
        }
        self.hibernate(&kept).await;
        let of_asleep = SandboxId::random().to_string();
        backend.snapshot(kept.clone(), of_asleep.clone()).await.unwrap();
        self.promises().snapshots.insert(of_asleep);
        self.wake(&kept).await;
        self.delete(&fork.children[0].id).await;
    }
}

/// Compares what is there with what was promised.
async fn check(world: &Arc<Fake>, daemon: &Daemon, promises: &Promises, power: bool, at: &str) {
    let backend = Backend(Arc::clone(daemon));
    let listed: BTreeMap<String, SandboxInfo> =
        backend.list(String::new()).await.unwrap().into_iter().map(|info| (info.id.clone(), info)).collect();
    for (id, promised) in &promises.there {
        let info = listed.get(id).unwrap_or_else(|| panic!("{at}: {id} was acknowledged and is lost"));
        let had_a_machine = *promised != Some(State::Hibernated) && info.state != State::Hibernated;
        match promised {
            _ if power && had_a_machine && !info.persistent => assert_eq!(info.state, State::Failed, "{at}"),
            _ if power && had_a_machine => assert_eq!(info.state, State::Running, "{at}: {}", info.reason),
            Some(promised) => assert_eq!(info.state, *promised, "{at}: {}", info.reason),
            None => assert!(info.state != State::Failed, "{at}: {}", info.reason),
        }
    }
    assert!(promises.gone.iter().all(|id| !listed.contains_key(id)), "{at}: one that was deleted is back");
    let machines: BTreeSet<_> = listed.values().map(|info| info.machine.clone()).collect();
    for owner in world.owners() {
        let slot = || daemon.all().iter().any(|one| one.record().machine().as_str() == owner);
        assert!(machines.contains(&owner) || slot(), "{at}: {owner} is nobody's machine");
    }
    let books = world.books.lock().unwrap();
    assert!(books.captures.is_empty(), "{at}: an unfinished capture is left");
    let paused: BTreeSet<_> =
        listed.values().filter(|info| info.state == State::Paused).map(|info| &info.machine).collect();
    assert_eq!(books.paused.iter().collect::<BTreeSet<_>>(), paused, "{at}");
    let of = |purpose| books.snapshots.values().filter(move |kept| kept.info.spec.purpose == purpose);
    let asleep = listed.values().filter(|info| info.state == State::Hibernated).count();
    assert_eq!(of(Purpose::Hibernation).count(), asleep, "{at}: captures of hibernated sandboxes");
    assert_eq!(of(Purpose::Fork).count(), 0, "{at}: a fork's capture is left");
    assert!(promises.snapshots.iter().all(|id| books.snapshots.contains_key(id)), "{at}: a snapshot is lost");
    assert!(
        books.holds.keys().all(|holder| listed.contains_key(holder)),
        "{at}: volumes are held for nobody"
    );
    assert!(!power || of(Purpose::Hibernation).all(|kept| kept.mind == THOUGHT), "{at}");
}

/// Everything that is there can be used on, and be deleted.
async fn go_on(world: &Arc<Fake>, daemon: &Daemon, power: bool, at: &str) {
    let backend = Backend(Arc::clone(daemon));
    for info in backend.list(String::new()).await.unwrap() {
        let id = info.id;
        if info.state != State::Failed {
            if info.state == State::Paused {
                backend.resume(id.clone()).await.unwrap();
            }
            backend.hibernate(id.clone()).await.unwrap();
            let machine = backend.wake(id.clone()).await.unwrap().machine;
            let mind = world.books.lock().unwrap().minds.get(&machine).cloned().unwrap_or_default();
            // A child of a fork or a copy may be there that was never acknowledged.
            let whole = mind == THOUGHT || power && info.state != State::Hibernated || mind.is_empty();
            assert!(whole, "{at}: {id} woke with {mind:?}");
            assert!(info.state != State::Hibernated || mind == THOUGHT, "{at}: {id} lost its memory");
        }
        assert!(backend.delete(id).await.unwrap());
    }
    assert_eq!(world.owners().len(), 0, "{at}");
    assert!(world.books.lock().unwrap().holds.is_empty(), "{at}");
    eventually(at, || daemon.records.iter().unwrap().is_empty()).await;
    eventually(at, || {
        let books = world.books.lock().unwrap();
        books.snapshots.values().all(|kept| kept.info.spec.purpose == Purpose::Snapshot)
    })
    .await;
    clean(world);
}

/// Kills the daemon (or the power) before each call with an effect in turn, starts it again, and compares.
fn killed_everywhere(power: bool) {
    for budget in 0..400 {
        let (world, directory) = (Fake::new(), tempfile::tempdir().unwrap());
        world.budget.store(budget, Ordering::SeqCst);
        let promises: Arc<Mutex<Promises>> = Arc::default();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let finished = runtime.block_on(async {
            let (daemon, _told) = open(&world, directory.path());
            let backend = Backend(Arc::clone(&daemon));
            let life = Life { world: Arc::clone(&world), backend, promises: Arc::clone(&promises) };
            let life = tokio::spawn(life.whole(daemon));
            tokio::select! {
                () = world.crashed.notified() => false,
                done = life => { done.unwrap(); true }
            }
        });
        // Every task ends where it stands.
        drop(runtime);
        if power {
            world.cut_power();
        }
        world.budget.store(usize::MAX, Ordering::SeqCst);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let at = format!("budget {budget}, after {:?}", world.books.lock().unwrap().log.last());
        runtime.block_on(async {
            let daemon = started(&world, directory.path()).await;
            let promises = std::mem::take(&mut *promises.lock().unwrap());
            check(&world, &daemon, &promises, power, &at).await;
            go_on(&world, &daemon, power, &at).await;
        });
        if finished {
            assert!(budget >= 90, "the life is long enough to be cut in many places: {budget}");
            return;
        }
    }
    panic!("the life never ends");
}

#[test]
fn a_daemon_killed_anywhere_leaves_nothing_and_loses_nothing() {
    killed_everywhere(false);
}

#[test]
fn a_power_cut_anywhere_leaves_nothing_and_loses_nothing() {
    killed_everywhere(true);
}
