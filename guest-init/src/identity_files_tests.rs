//! Real mounts, in a mount namespace of its own whose `/etc` and `/run` are empty. Needs root; where namespaces cannot be
//! made each test says that it was skipped.

use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, unshare},
};

use super::*;

const ONE: Names<'static> = Names {
    machine_id: "0123456789abcdef0123456789abcdef",
    boot_id: "01234567-89ab-4cde-8f01-23456789abcd",
    hostname: "sb-one",
};
const TWO: Names<'static> = Names {
    machine_id: "fedcba9876543210fedcba9876543210",
    boot_id: "fedcba98-89ab-4cde-8f01-23456789abcd",
    hostname: "a-longer-name-than-the-other-one",
};

#[test]
fn hosts_keeps_foreign_lines_and_replaces_its_own() {
    let first = with_host("", "sb-one");
    assert_eq!(first, "127.0.0.1\tlocalhost\n127.0.1.1\tsb-one\n");
    let edited = first + "10.0.0.9 db\n";
    assert_eq!(with_host(&edited, "sb-two"), "127.0.0.1\tlocalhost\n10.0.0.9 db\n127.0.1.1\tsb-two\n");
}

/// Runs `test` in a machine whose identity files are installed and open.
fn installed(test: impl FnOnce(Copies) + Send) {
    let run = || {
        if let Err(error) = unshare(CloneFlags::CLONE_NEWNS) {
            println!("skipped: unshare: {error}");
            return;
        }
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("private mounts");
        for path in ["/etc", "/run"] {
            mount(Some("test"), path, Some("tmpfs"), MsFlags::empty(), None::<&str>)
                .expect("an empty directory");
        }
        fs::write(HOSTS, "10.0.0.9 db\n").expect("written");
        install().expect("installed");
        test(Copies::open().expect("open"));
    };
    std::thread::scope(|scope| scope.spawn(run).join().expect("the test passes"));
}

/// What programs see.
fn seen() -> [String; 4] {
    BOUND.each_ref().map(|bound| fs::read_to_string(bound.target).expect(bound.target))
}

fn expected(names: Names<'_>) -> [String; 4] {
    [
        format!("{}\n", names.machine_id),
        format!("{}\n", names.hostname),
        format!("127.0.0.1\tlocalhost\n10.0.0.9 db\n127.0.1.1\t{}\n", names.hostname),
        format!("{}\n", names.boot_id),
    ]
}

#[test]
fn programs_see_what_was_written_last_and_no_rest_of_what_was_there() {
    installed(|mut copies| {
        for names in [ONE, TWO, ONE] {
            copies.write(names).expect("written");
            assert_eq!(seen(), expected(names));
        }
        fs::write("/etc/hostname", "x".repeat(10_000)).expect("a user writes it");
        copies.write(TWO).expect("written");
        assert_eq!(seen(), expected(TWO));
    });
}

#[test]
fn a_target_that_leads_elsewhere_is_noticed_and_mended() {
    let elsewhere: [fn(&Bound); 3] = [
        |bound| umount2(bound.target, MntFlags::MNT_DETACH).expect("unmounted"),
        |bound| {
            fs::write("/run/other", "ours? no").expect("written");
            mount(Some("/run/other"), bound.target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .expect("bound");
        },
        |bound| {
            let parent = Path::new(bound.target).parent().expect("a parent");
            mount(Some("test"), parent, Some("tmpfs"), MsFlags::empty(), None::<&str>).expect("covered");
        },
    ];
    for change in elsewhere {
        for bound in &BOUND {
            installed(|mut copies| {
                copies.write(ONE).expect("written");
                remember_defaults(b"kept").expect("written");
                change(bound);
                copies.write(TWO).expect_err("programs do not see it");
                install().expect("mended");
                Copies::open().expect("open").write(TWO).expect("written");
                let ([machine_id, hostname, hosts, boot_id], expected) = (seen(), expected(TWO));
                assert_eq!([&machine_id, &hostname, &boot_id], [&expected[0], &expected[1], &expected[3]]);
                assert!(hosts.ends_with(&format!("127.0.1.1\t{}\n", TWO.hostname)), "{hosts}");
                assert_eq!(remembered_defaults().expect("there"), b"kept");
            });
        }
    }
}

#[test]
fn a_full_or_emptied_tmpfs_stops_nothing() {
    installed(|mut copies| {
        let _ = fs::write(Path::new(IDENTITY).join("filler"), vec![1; 2 << 20]);
        for bound in &BOUND {
            fs::remove_file(source(bound)).expect("removed");
        }
        copies.write(TWO).expect("written");
        assert_eq!(seen(), expected(TWO));
    });
}
