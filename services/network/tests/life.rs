//! Attachments come, stay and go: once, again, many at once, across restarts of the daemon.

mod world;

use std::{collections::BTreeSet, io::Write, time::Instant};

use pandastack_bus::{self as bus, SandboxId, network::NetworkBackend};
use pandastack_network::{error::Error, manager::Manager, tap};
use world::{
    PUBLIC, Sandbox, Space, World, pidfd,
    probe::{connect, hear, serve, tcp},
    tool,
};

/// The links of ours that the appliance has, by name and number.
fn links() -> BTreeSet<(String, u32)> {
    let all = tool("ip", "-o link show group 10200");
    all.lines()
        .map(|line| {
            let mut words = line.split([':', '@', ' ']).filter(|word| !word.is_empty());
            let number = words.next().and_then(|word| word.parse().ok()).expect("a number");
            (words.next().expect("a name").to_owned(), number)
        })
        .collect()
}

/// The elements that the appliance's rules let in.
fn elements() -> BTreeSet<String> {
    let set = tool("nft", "list set inet pandastack links");
    let listed =
        set.split_once("elements = {").map_or("", |(_, rest)| rest.split('}').next().unwrap_or_default());
    listed.split(',').map(|element| element.trim().to_owned()).filter(|element| !element.is_empty()).collect()
}

fn element(link: &str, address: &str) -> String {
    format!("\"{link}\" . {address}")
}

#[test]
fn a_second_attach_changes_nothing() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;
        let mut stream = sandbox.guest.run(|| connect(PUBLIC, 7000)).expect("a connection");
        hear(&mut stream);
        let before = links();

        let again = manager.attach(sandbox.id.as_str(), sandbox.space.pidfd()).await.expect("attached");

        assert_eq!(again, sandbox.attachment);
        assert_eq!(links(), before);
        stream.write_all(b"still here").expect("sent");
        assert_eq!(hear(&mut stream), "still here");
    });
}

#[test]
fn a_new_process_keeps_the_address() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let old = Sandbox::new(&manager).await;
        let before = links();
        // The old one still runs: the new one gets the link all the same.
        let new = Space::new();

        let attachment = manager.attach(old.id.as_str(), new.pidfd()).await.expect("attached");

        assert_eq!(attachment, old.attachment);
        assert_eq!(links().len(), 1);
        assert_ne!(links(), before);
        assert_eq!(elements(), [element(&attachment.link, &attachment.address)].into());
        assert!(new.ip("-o addr show up0").contains(&attachment.address));
        assert_eq!(old.guest.run(|| tcp(PUBLIC, 7000)), None);
    });
}

#[test]
fn half_an_attachment_is_finished() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;
        // Each of these is a state that a crash in the middle can leave, with Firecracker already on the tap.
        let (space, link) = (&sandbox.space, &sandbox.attachment.link);
        let remove = format!("link del {link}");
        let damages: [&dyn Fn() -> String; 4] = [
            &|| space.ip("link set up0 alias unfinished"),
            &|| space.ip("link del up0"),
            &|| tool("ip", &remove),
            &|| {
                space.ip("link set up0 alias unfinished");
                space.ip("link set tap0 down");
                space.run(|| tool("nft", "delete table inet pandastack"))
            },
        ];
        for (number, damage) in damages.into_iter().enumerate() {
            damage();
            let again = manager.attach(sandbox.id.as_str(), space.pidfd()).await.expect("attached");

            assert_eq!(again, sandbox.attachment, "damage {number}");
            assert!(sandbox.guest.run(|| tcp(PUBLIC, 7000)).is_some(), "damage {number}");
        }
    });
}

#[test]
fn detach_leaves_nothing_and_can_be_repeated() {
    World::run(|world| async move {
        let manager = world.manager().await;
        let (one, two) = (Sandbox::new(&manager).await, Sandbox::new(&manager).await);

        assert!(manager.detach(one.id.as_str()).await.expect("detached"));
        assert!(!manager.detach(one.id.as_str()).await.expect("nothing to detach"));
        assert!(!manager.detach(SandboxId::random().as_str()).await.expect("nothing to detach"));

        let rest = &two.attachment;
        assert_eq!(links().into_iter().map(|(name, _)| name).collect::<Vec<_>>(), [rest.link.as_str()]);
        assert_eq!(elements(), [element(&rest.link, &rest.address)].into());
        assert!(!tool("ip", "route").contains(&format!("{} ", one.attachment.address)));
        let owners = NetworkBackend::owners(&manager).await.expect("owners");
        assert_eq!(owners, std::slice::from_ref(rest));
        // The unit of a detached sandbox may still run; attaching it again is a new attachment.
        let again = manager.attach(one.id.as_str(), one.space.pidfd()).await.expect("attached");
        assert_ne!(again.address, one.attachment.address);
    });
}

#[test]
fn a_restart_keeps_connections_and_clears_what_has_no_owner() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let (kept, orphan) = (Sandbox::new(&manager).await, Sandbox::new(&manager).await);
        let mut stream = kept.guest.run(|| connect(PUBLIC, 7000)).expect("a connection");
        hear(&mut stream);
        tool("ip", "link add vfremd type veth peer name other");
        drop(manager);
        std::fs::remove_file(world.state.path().join(format!("owners/{}.json", orphan.id))).expect("removed");

        let manager = restarted(&world).await;

        assert_eq!(manager.owners().len(), 1);
        let names: Vec<_> = links().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [kept.attachment.link.as_str()]);
        assert!(tool("ip", "-o link").contains("vfremd"), "a link that is not ours stays");
        assert_eq!(elements(), [element(&kept.attachment.link, &kept.attachment.address)].into());
        stream.write_all(b"still here").expect("sent");
        assert_eq!(hear(&mut stream), "still here");
        assert!(kept.guest.run(|| tcp(PUBLIC, 7000)).is_some());
        assert_eq!(orphan.guest.run(|| tcp(PUBLIC, 7000)), None);
        let again = manager.attach(kept.id.as_str(), kept.space.pidfd()).await.expect("attached");
        assert_eq!(again, kept.attachment);
    });
}

/// The records are free again once the last task of the old manager has ended.
async fn restarted(world: &World) -> Manager {
    for _ in 0..50 {
        match Manager::start(world.config()).await {
            Err(Error::Record(_)) => tokio::time::sleep(std::time::Duration::from_millis(20)).await,
            other => return other.expect("the manager starts"),
        }
    }
    panic!("the records stay locked");
}

#[test]
fn rules_that_somebody_took_away_come_back() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let one = Sandbox::new(&manager).await;

        tool("nft", "flush ruleset");
        let two = Sandbox::new(&manager).await;
        assert_eq!(elements().len(), 2);
        assert!(
            one.guest.run(|| tcp(PUBLIC, 7000)).is_some() && two.guest.run(|| tcp(PUBLIC, 7000)).is_some()
        );

        tool("nft", "flush ruleset");
        manager.reload().await.expect("loaded");
        assert_eq!(elements().len(), 2);
        manager.ping().await.expect("alive");
    });
}

#[test]
fn many_at_once() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let spaces: Vec<_> = (0..12).map(|_| (SandboxId::random(), Space::new())).collect();

        let started = Instant::now();
        let tasks: Vec<_> = spaces
            .iter()
            // Each twice, as a caller does that was cut off.
            .flat_map(|(id, space)| [(id.clone(), space.pidfd()), (id.clone(), space.pidfd())])
            .map(|(id, process)| {
                let manager = manager.clone();
                tokio::spawn(async move { manager.attach(id.as_str(), process).await.expect("attached") })
            })
            .collect();
        let mut addresses = BTreeSet::new();
        for task in tasks {
            addresses.insert(task.await.expect("no panic").address);
        }
        println!("12 attaches at once, each asked for twice: {:?}", started.elapsed());
        assert_eq!(addresses.len(), 12);
        assert_eq!(elements().len(), 12);

        let (id, space) = (SandboxId::random(), Space::new());
        let started = Instant::now();
        manager.attach(id.as_str(), space.pidfd()).await.expect("attached");
        println!("one attach: {:?}", started.elapsed());
        let tasks: Vec<_> = spaces
            .iter()
            .map(|(id, _)| {
                let (manager, id) = (manager.clone(), id.clone());
                tokio::spawn(async move { manager.detach(id.as_str()).await.expect("detached") })
            })
            .collect();
        for task in tasks {
            assert!(task.await.expect("no panic"));
        }
        assert_eq!((links().len(), elements().len()), (1, 1));
    });
}

#[test]
fn what_cannot_be_attached_is_refused_and_leaves_nothing() {
    World::run(|world| async move {
        let manager = world.manager().await;
        let attach = |id: String, process| NetworkBackend::attach(&manager, id, process);
        let id = || SandboxId::random().to_string();

        let space = Space::new();
        let answer = attach("../../etc".to_owned(), space.pidfd()).await;
        assert!(matches!(answer, Err(bus::Error::InvalidArgument(_))), "{answer:?}");
        let file = std::fs::File::open("/dev/null").expect("it exists").into();
        let answer = attach(id(), file).await;
        assert!(matches!(answer, Err(bus::Error::InvalidArgument(_))), "{answer:?}");
        let mut ended = Space::new();
        let process = ended.pidfd();
        ended.end();
        let answer = attach(id(), process).await;
        assert!(matches!(answer, Err(bus::Error::WrongState(_))), "{answer:?}");
        // A unit without a namespace of its own, played by a process of the appliance's.
        let mut sleeper = std::process::Command::new("sleep").arg("60").spawn().expect("a process");
        let rules = tool("nft", "list ruleset");
        let answer = attach(id(), pidfd(sleeper.id())).await;
        let _ = sleeper.kill().and_then(|()| sleeper.wait());
        assert!(matches!(answer, Err(bus::Error::WrongState(_))), "{answer:?}");
        assert_eq!(tool("nft", "list ruleset"), rules, "the appliance's rules are untouched");

        assert_eq!(manager.owners(), []);
        assert_eq!((links().len(), elements().len()), (0, 0));
        let records = std::fs::read_dir(world.state.path().join("owners")).expect("a directory");
        let left =
            records.flatten().filter(|entry| entry.path().extension().is_some_and(|end| end == "json"));
        assert_eq!(left.count(), 0);
    });
}

#[test]
fn the_tap_is_as_the_snapshots_expect_it() {
    World::run(|world| async move {
        let manager = world.manager().await;
        let (id, space) = (SandboxId::random(), Space::new());
        manager.attach(id.as_str(), space.pidfd()).await.expect("attached");

        let tap = space.ip("-d link show tap0");
        for part in [
            "mtu 1450",
            "06:00:ac:1f:ff:01",
            "type tap",
            "vnet_hdr on",
            "persist on",
            "group 12345",
            "pi off",
        ] {
            assert!(tap.contains(part), "{part}: {tap}");
        }
        assert!(space.ip("-o -4 addr show tap0").contains("172.31.255.1/30"));
        // Firecracker's user has the group and no capability at all.
        let as_group = |group: u32| {
            space.run(|| {
                let (group, user) = (nix::unistd::Gid::from_raw(group), nix::unistd::Uid::from_raw(54_321));
                // Of this thread only, by system call: the C library would change every thread of the test.
                // SAFETY: both calls take numbers only.
                unsafe {
                    nix::libc::syscall(nix::libc::SYS_setgroups, 0, std::ptr::null::<u32>());
                    nix::libc::syscall(
                        nix::libc::SYS_setresgid,
                        group.as_raw(),
                        group.as_raw(),
                        group.as_raw(),
                    );
                    nix::libc::syscall(nix::libc::SYS_setresuid, user.as_raw(), user.as_raw(), user.as_raw());
                }
                tap::open("tap0", tap::Kind::Tap).map(drop)
            })
        };
        if std::os::unix::fs::MetadataExt::mode(&std::fs::metadata("/dev/net/tun").expect("it exists"))
            & 0o006
            != 0o006
        {
            println!("not tried as another user: /dev/net/tun is closed to others on this machine");
            return;
        }
        assert!(as_group(12_345).is_ok());
        assert!(as_group(12_346).is_err());
    });
}
