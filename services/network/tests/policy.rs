//! What a guest reaches and what it does not, with real packets through the real rules.

mod world;

use std::{
    io::{Read as _, Write as _},
    net::UdpSocket,
    time::Duration,
};

use pandastack_network::dns::{Config, Forwarder};
use world::{
    APPLIANCE, CLOSED, PUBLIC, Sandbox, World,
    probe::{self, exchange, serve, settle, shout, tcp, udp},
    tool,
};

#[test]
fn the_internet_is_reachable_and_sees_the_appliance() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;

        assert_eq!(sandbox.guest.run(|| tcp(PUBLIC, 7000)).as_deref(), Some(APPLIANCE));
        assert_eq!(sandbox.guest.run(|| udp("203.0.113.1", 7000)).as_deref(), Some(APPLIANCE));
        assert_eq!(sandbox.guest.run(|| tcp("203.0.113.1", 7000)).as_deref(), Some(APPLIANCE));
    });
}

#[test]
fn much_data_passes_where_every_path_is_checked_both_ways() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;
        // As distributions set it; the rules alone are enough everywhere else in these tests.
        let check = || std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "1").expect("strict");
        check();
        sandbox.space.run(check);

        let mut stream = sandbox.guest.run(|| probe::connect(PUBLIC, 7000)).expect("a connection");
        assert_eq!(probe::hear(&mut stream), APPLIANCE);
        let sent: Vec<u8> = (0..500_000_u32).map(|number| (number % 251) as u8).collect();
        let mut sender = stream.try_clone().expect("a descriptor");
        let copy = sent.clone();
        let sending = std::thread::spawn(move || sender.write_all(&copy));
        let mut received = vec![0; sent.len()];
        stream.read_exact(&mut received).expect("all of it comes back");
        assert!(received == sent, "as it was sent");
        sending.join().expect("no panic").expect("sent");
    });
}

#[test]
fn private_and_metadata_addresses_are_not_reachable() {
    World::run(|world| async move {
        let heard = world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;

        for address in CLOSED {
            if address != "240.1.2.3" {
                assert_eq!(
                    tcp(address, 7000).as_deref(),
                    Some(APPLIANCE),
                    "{address} is there for the appliance"
                );
            }
            assert_eq!(sandbox.guest.run(|| tcp(address, 7000)), None, "{address} over TCP");
            sandbox.guest.run(|| shout("172.31.255.2", address, 7000, "hello"));
        }
        settle();
        assert_eq!(heard.texts(), Default::default());
    });
}

#[test]
fn the_host_is_not_reachable() {
    World::run(|world| async move {
        let heard = serve(7001);
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;
        sandbox.space.run(|| serve(7003));

        for address in [APPLIANCE, "10.200.0.1"] {
            assert!(tcp(address, 7001).is_some(), "{address} is there for the appliance itself");
        }
        for address in [APPLIANCE, "10.200.0.1", "172.31.255.1", "127.0.0.2", &sandbox.attachment.address] {
            for port in [7001, 7003] {
                assert_eq!(sandbox.guest.run(|| tcp(address, port)), None, "{address} over TCP");
                sandbox.guest.run(|| shout("172.31.255.2", address, port, "hello"));
            }
        }
        settle();
        assert_eq!(heard.texts(), Default::default());
    });
}

#[test]
fn sandboxes_do_not_reach_each_other_but_the_host_reaches_them() {
    World::run(|world| async move {
        let manager = world.manager().await;
        let (one, two) = (Sandbox::new(&manager).await, Sandbox::new(&manager).await);
        let heard = two.guest.run(|| serve(7002));
        let address = two.attachment.address.as_str();

        assert_eq!(tcp(address, 7002).as_deref(), Some("10.200.0.1"));
        assert_eq!(udp(address, 7002).as_deref(), Some("10.200.0.1"));
        assert_eq!(heard.count(), 1);
        assert_eq!(one.guest.run(|| tcp(address, 7002)), None);
        one.guest.run(|| shout("172.31.255.2", address, 7002, "hello"));
        assert_eq!(world.internet.run(|| tcp(address, 7002)), None, "from outside");
        world.internet.run(|| shout("203.0.113.1", address, 7002, "hello"));
        settle();
        assert_eq!(heard.count(), 1);
    });
}

#[test]
fn a_guest_speaks_only_for_itself() {
    World::run(|world| async move {
        let heard = world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let (one, two) = (Sandbox::new(&manager).await, Sandbox::new(&manager).await);

        for address in
            ["9.9.9.9", "172.31.255.1", "10.200.0.1", &one.attachment.address, &two.attachment.address]
        {
            one.guest.ip(&format!("addr add {address}/32 dev lo"));
            one.guest.run(|| shout(address, PUBLIC, 7000, address));
        }
        one.guest.run(|| shout("172.31.255.2", PUBLIC, 7000, "own"));
        settle();
        assert_eq!(heard.texts(), ["own".to_owned()].into());

        // The answer would go to the right card, so only what arrives tells.
        two.guest.ip("link set eth0 address 06:00:ac:1f:ff:03");
        two.guest.run(|| shout("172.31.255.2", PUBLIC, 7000, "another card"));
        two.guest.ip("link set eth0 address 06:00:ac:1f:ff:02");
        two.guest.run(|| shout("172.31.255.2", PUBLIC, 7000, "the right card"));
        settle();
        assert_eq!(heard.texts(), ["own".to_owned(), "the right card".to_owned()].into());
    });
}

#[test]
fn the_host_does_not_rely_on_the_rules_of_the_namespace() {
    World::run(|world| async move {
        let heard = world.internet.run(|| serve(7000));
        let at_host = serve(7001);
        let manager = world.manager().await;
        let (one, two) = (Sandbox::new(&manager).await, Sandbox::new(&manager).await);
        // As if the sandbox had taken over its namespace.
        one.space.run(|| tool("nft", "delete table inet pandastack"));

        let own = one.attachment.address.as_str();
        for address in ["9.9.9.9", "10.200.77.77", "10.200.0.1", &two.attachment.address] {
            one.space.ip(&format!("addr add {address}/32 dev lo"));
            one.space.run(|| shout(address, PUBLIC, 7000, address));
            one.space.run(|| shout(address, APPLIANCE, 7001, address));
        }
        one.space.run(|| shout(own, PUBLIC, 7000, "own"));
        for address in [APPLIANCE, "10.9.9.9", "169.254.169.254", &two.attachment.address] {
            one.space.run(|| shout(own, address, 7000, "closed"));
            one.space.run(|| shout(own, address, 7001, "closed"));
        }
        settle();
        assert_eq!(heard.texts(), ["own".to_owned()].into());
        assert_eq!(at_host.texts(), Default::default());
    });
}

#[test]
fn ipv6_does_not_pass() {
    World::run(|world| async move {
        let heard = serve(7001);
        let manager = world.manager().await;
        let sandbox = Sandbox::new(&manager).await;
        let link = &sandbox.attachment.link;
        assert!(!tool("ip", &format!("-6 addr show dev {link}")).contains("inet6"));
        for device in ["tap0", "up0"] {
            assert!(!sandbox.space.ip(&format!("-6 addr show dev {device}")).contains("inet6"), "{device}");
        }
        // As if all three had taken addresses and switched their namespaces' rules off.
        sandbox.space.run(|| tool("nft", "delete table inet pandastack"));
        tool("ip", &format!("-6 addr add fd00::1/64 dev {link} nodad"));
        sandbox.space.ip("-6 addr add fd00::2/64 dev up0 nodad");

        assert_eq!(sandbox.space.run(|| udp("fd00::1", 7001)), None);
        assert_eq!(heard.count(), 0);

        // It was the rule.
        tool("nft", "delete table inet pandastack");
        assert_eq!(sandbox.space.run(|| udp("fd00::1", 7001)).as_deref(), Some("fd00::2"));
    });
}

#[test]
fn names_are_resolved_through_the_gateway() {
    World::run(|world| async move {
        let resolver = world.internet.run(|| UdpSocket::bind((PUBLIC, 53))).expect("a resolver");
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, source)) = resolver.recv_from(&mut buffer) {
                buffer[2] |= 0x80;
                let _ = resolver.send_to(&buffer[..length], source);
            }
        });
        let file = world.state.path().join("resolv.conf");
        std::fs::write(&file, format!("nameserver {PUBLIC}\n")).expect("written");
        let manager = world.manager().await;
        let config = Config { resolvers: vec![file], ..Config::default() };
        tokio::spawn(Forwarder::bind(config).await.expect("bound").serve());
        let sandbox = Sandbox::new(&manager).await;

        let question = [0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 0, 0, 1, 0, 1];
        let mut answer = question;
        answer[2] |= 0x80;
        for server in ["172.31.255.1", "10.200.0.1"] {
            let heard = sandbox.guest.run(|| exchange(server, 53, &question));
            assert_eq!(heard.as_deref(), Some(&answer[..]), "{server}");
        }
        // This resolver has no TCP: the forwarder says so instead of leaving the guest to wait.
        let failure = sandbox.guest.run(|| {
            let mut stream = probe::connect("172.31.255.1", 53).expect("the forwarder's TCP port");
            stream.write_all(&[0, 19]).and_then(|()| stream.write_all(&question)).expect("asked");
            let mut answer = [0; 21];
            stream.read_exact(&mut answer).expect("answered");
            answer
        });
        assert_eq!(failure[..6], [0, 19, 0xab, 0xcd, 0x81, 0x82]);
    });
}

#[test]
fn a_guest_that_asks_without_end_is_throttled() {
    World::run(|world| async move {
        let manager = world.manager().await;
        let socket = UdpSocket::bind("10.200.0.1:53").expect("the resolver's port");
        socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a time limit");
        let sandbox = Sandbox::new(&manager).await;

        let started = std::time::Instant::now();
        sandbox.guest.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            for _ in 0..3000 {
                let _ = socket.send_to(b"?", "172.31.255.1:53");
            }
        });
        let mut count = 0;
        while socket.recv(&mut [0; 16]).is_ok() {
            count += 1;
        }
        let allowed = 400 + 200 * (started.elapsed().as_secs() + 1);
        assert!((100..=allowed).contains(&count), "{count} of 3000 came through, {allowed} may");
    });
}

#[test]
fn a_guest_cannot_fill_the_connection_table() {
    World::run(|world| async move {
        world.internet.run(|| serve(7000));
        let manager = world.manager().await;
        let (one, two) = (Sandbox::new(&manager).await, Sandbox::new(&manager).await);
        let flows = || -> usize {
            let text =
                std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").expect("a count");
            text.trim().parse().expect("a number")
        };

        one.guest.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
            for number in 0..12_000_u16 {
                let _ = socket.send_to(b"?", ("198.51.100.10", 10_000 + number));
                if number % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        });
        settle();
        // Both bounds are at work: the namespace's own, and the host's for one that has none.
        let inside = one.space.run(flows);
        assert!((3000..=4200).contains(&inside), "{inside} in the namespace");
        assert!((3000..=4200).contains(&flows()), "{} in the host", flows());
        one.space.run(|| tool("nft", "delete table inet pandastack"));
        one.space.run(|| {
            let socket = UdpSocket::bind((one.attachment.address.as_str(), 0)).expect("a socket");
            for number in 0..6000_u16 {
                let _ = socket.send_to(b"?", ("198.51.100.10", 30_000 + number));
            }
        });
        settle();
        assert!(flows() <= 4200, "{} in the host", flows());
        assert!(two.guest.run(|| tcp(PUBLIC, 7000)).is_some(), "the neighbour is not disturbed");
    });
}
