//! The agent, driven by the host's own client over a pair of connected streams, with real processes and files.
//!
//! Runs as root on Linux. Where a cgroup2 hierarchy can be written to, sessions are in cgroups as in a guest.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use guest_init::agent::{Agent, machine::Machine, serve};
use pandastack_protocol::*;
use tokio::{io::AsyncWriteExt, net::UnixStream};

const LIMIT: Duration = Duration::from_secs(20);

/// A machine that only remembers what it was told.
#[derive(Debug, Default, Clone)]
struct Fake(Arc<Mutex<Vec<String>>>);

impl Machine for Fake {
    fn identify(&self, identity: &Identity) -> Result<(), Failure> {
        if identity.entropy.is_empty() {
            return Err(Failure { code: Code::Internal, message: "no entropy".into() });
        }
        self.0.lock().expect("lock").push(format!("identity {}", identity.unix_nanos));
        Ok(())
    }
    fn grow_root(&self) -> Result<(), Failure> {
        self.0.lock().expect("lock").push("grow".into());
        Ok(())
    }
    fn mount(&self, mounts: &[Mount]) -> Result<(), Failure> {
        self.0.lock().expect("lock").push(format!("mount {}", mounts.len()));
        Ok(())
    }
    fn shut_down(&self) -> Result<(), Failure> {
        self.0.lock().expect("lock").push("shut down".into());
        Ok(())
    }
    fn remember_defaults(&self, defaults: &Defaults) {
        self.0.lock().expect("lock").push(format!("remember {}", defaults.workdir));
    }
    fn remembered_defaults(&self) -> Defaults {
        Defaults::default()
    }
}

/// A cgroup of our own, removed at the end; `None` where there is no cgroup2 to write to.
struct TestCgroup(Option<PathBuf>);

impl TestCgroup {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("pandastack-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        for root in ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"] {
            let path = Path::new(root).join(&name);
            if Path::new(root).join("cgroup.subtree_control").exists() && fs::create_dir(&path).is_ok() {
                return Self(Some(path));
            }
        }
        Self(None)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let Some(path) = &self.0 else { return };
        let _ = fs::write(path.join("cgroup.kill"), "1");
        for _ in 0..100 {
            for child in fs::read_dir(path).into_iter().flatten().flatten() {
                let _ = fs::remove_dir(child.path());
            }
            if fs::remove_dir(path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

struct World {
    agent: Arc<Agent>,
    machine: Fake,
    dir: tempfile::TempDir,
    _cgroup: TestCgroup,
}

impl World {
    fn new() -> Self {
        let cgroup = TestCgroup::new();
        let machine = Fake::default();
        let agent = Agent::new(machine.clone(), cgroup.0.clone());
        Self { agent, machine, dir: tempfile::tempdir().expect("a directory"), _cgroup: cgroup }
    }

    fn without_cgroups() -> Self {
        let machine = Fake::default();
        let agent = Agent::new(machine.clone(), None);
        Self { agent, machine, dir: tempfile::tempdir().expect("a directory"), _cgroup: TestCgroup(None) }
    }

    fn raw(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let agent = self.agent.clone();
        tokio::spawn(async move {
            let _ = serve(theirs, agent).await;
        });
        ours
    }

    async fn client(&self) -> Client<UnixStream> {
        Client::greet(self.raw(), 42, LIMIT).await.expect("a greeting")
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    async fn exec(&self, exec: Exec) -> ExecStream<UnixStream> {
        self.client().await.exec(exec, LIMIT).await.map_err(|(_, error)| error).expect("it starts")
    }

    async fn sh(&self, script: &str) -> Outcome {
        collect(self.exec(sh(script)).await).await
    }

    async fn refused(&self, exec: Exec) -> Code {
        match self.client().await.exec(exec, LIMIT).await {
            Err((Some(_), ClientError::Guest(failure))) => failure.code,
            other => panic!("{other:?}"),
        }
    }
}

fn id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{:020}", NEXT.fetch_add(1, Ordering::Relaxed))
}

fn sh(script: &str) -> Exec {
    Exec {
        session: id(),
        argv: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        cwd: "/".into(),
        ..Exec::default()
    }
}

#[derive(Debug)]
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Exit,
}

impl Outcome {
    fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8")
    }
    fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).expect("UTF-8")
    }
}

async fn collect(mut stream: ExecStream<UnixStream>) -> Outcome {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").expect("an event") {
            ExecEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ExecEvent::Exit(exit) => return Outcome { stdout, stderr, exit },
        }
    }
}

fn alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

async fn until(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !check() {
        assert!(Instant::now() < deadline, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn streams_are_separate_and_exit_codes_right() {
    let world = World::new();
    let outcome = world.sh("echo out; echo err >&2; exit 7").await;
    assert_eq!((outcome.out(), outcome.err()), ("out\n", "err\n"));
    assert_eq!((outcome.exit.code, outcome.exit.signal, outcome.exit.output_bytes), (7, 0, 8));
    assert_eq!(world.sh("true").await.exit.code, 0);
    let killed = world.sh("kill -9 $$").await.exit;
    assert_eq!((killed.code, killed.signal, killed.timed_out, killed.oom), (137, 9, false, false));
    assert_eq!(world.sh("nonexistent-command").await.exit.code, 127);
}

#[tokio::test]
async fn missing_and_unusable_programs() {
    let world = World::new();
    let missing = Exec { session: id(), argv: vec!["no-such-program".into()], ..Exec::default() };
    let outcome = collect(world.exec(missing).await).await;
    assert_eq!((outcome.exit.code, outcome.err()), (127, "no-such-program: not found\n"));
    let locked = Exec { session: id(), argv: vec!["/etc/passwd".into()], ..Exec::default() };
    let outcome = collect(world.exec(locked).await).await;
    assert_eq!(outcome.exit.code, 126);
    assert!(outcome.err().starts_with("/etc/passwd: cannot execute: "), "{}", outcome.err());
    let by_path = Exec { session: id(), argv: vec!["true".into()], ..Exec::default() };
    assert_eq!(collect(world.exec(by_path).await).await.exit.code, 0);
}

#[tokio::test]
async fn bad_requests_are_refused_and_the_connection_lives() {
    let world = World::new();
    assert_eq!(world.refused(Exec { cwd: "/nonexistent".into(), ..sh("true") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { cwd: "relative".into(), ..sh("true") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { user: "no-such-user".into(), ..sh("true") }).await, Code::NotFound);
    assert_eq!(world.refused(Exec { argv: vec![], ..sh("") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { argv: vec!["a\0b".into()], ..sh("") }).await, Code::Invalid);
    assert_eq!(world.refused(Exec { session: "short".into(), ..sh("") }).await, Code::Invalid);
    assert_eq!(world.refused(sh(&"x".repeat(200_000))).await, Code::Invalid);
    let bad_env = Exec { env: BTreeMap::from([("A=B".into(), "c".into())]), ..sh("true") };
    assert_eq!(world.refused(bad_env).await, Code::Invalid);
    // None of these left a session behind.
    let sessions: Sessions = world.client().await.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
    assert_eq!(sessions.sessions, vec![]);
}

#[tokio::test]
async fn environment_directory_and_user() {
    let world = World::new();
    let mut client = world.client().await;
    let defaults = Defaults {
        env: BTreeMap::from([
            ("PATH".into(), "/image/bin:/usr/bin:/bin".into()),
            ("IMAGE".into(), "yes".into()),
        ]),
        workdir: "/usr".into(),
    };
    let identity = Identity { unix_nanos: 5, entropy: "00".into(), unique: None, defaults: Some(defaults) };
    let () = client.call(&Request::Identity(identity.clone()), LIMIT).await.expect("identity");
    let script = "echo $PATH $IMAGE $HOME $USER $MORE; pwd; umask; cat /dev/stdin";
    let exec =
        Exec { cwd: String::new(), env: BTreeMap::from([("MORE".into(), "x y".into())]), ..sh(script) };
    let outcome = collect(world.exec(exec).await).await;
    assert_eq!(outcome.out(), "/image/bin:/usr/bin:/bin yes /root root x y\n/usr\n0022\n");
    let exec = Exec { user: "12345".into(), ..sh("id -u; id -g; id -G; cat /proc/self/oom_score_adj") };
    assert_eq!(collect(world.exec(exec).await).await.out(), "12345\n12345\n12345\n0\n");
    // What is known is not written again, which every sandbox of a template would have to wait for.
    let () = client.call(&Request::Identity(identity.clone()), LIMIT).await.expect("identity");
    assert_eq!(*world.machine.0.lock().expect("lock"), ["identity 5", "remember /usr", "identity 5"]);
    let failed = Identity { entropy: String::new(), ..identity };
    let error = client.call::<()>(&Request::Identity(failed), LIMIT).await.expect_err("refused");
    assert!(matches!(error, ClientError::Guest(Failure { code: Code::Internal, .. })));
}

#[tokio::test]
async fn standard_input_both_small_and_larger_than_every_buffer() {
    let world = World::new();
    let mut stream = world.exec(Exec { stdin: true, ..sh("cat; echo end") }).await;
    stream.stdin(b"hello ");
    stream.stdin(b"world\n");
    stream.stdin_end();
    assert_eq!(collect(stream).await.out(), "hello world\nend\n");

    // 5 MB in and 5 MB out at the same time, over a window and a replay buffer that are both smaller.
    let input: Vec<u8> = (0..5_000_000u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut stream = world.exec(Exec { stdin: true, ..sh("cat") }).await;
    stream.stdin(&input);
    stream.stdin_end();
    let outcome = collect(stream).await;
    assert!(outcome.stdout == input, "{} bytes came back", outcome.stdout.len());
    assert_eq!(outcome.exit.dropped, 0);

    // A program that does not read its input holds nothing up.
    let mut stream = world.exec(Exec { stdin: true, ..sh("exec <&-; sleep 0.2; echo done") }).await;
    stream.stdin(&input);
    assert_eq!(collect(stream).await.out(), "done\n");
}

#[tokio::test]
async fn a_timeout_ends_everything_also_what_ignores_term() {
    for world in [World::new(), World::without_cgroups()] {
        let script = "sh -c 'trap \"\" TERM; echo $$; while :; do sleep 0.1; done' & wait";
        let begin = Instant::now();
        let outcome = collect(world.exec(Exec { timeout_ms: 300, ..sh(script) }).await).await;
        let took = begin.elapsed();
        assert!(outcome.exit.timed_out, "{:?}", outcome.exit);
        assert_eq!((outcome.exit.code, outcome.exit.signal), (143, 15));
        assert!(took >= Duration::from_millis(2200) && took < Duration::from_secs(8), "{took:?}");
        assert!(!alive(outcome.out()), "the child lives on");
    }
    let world = World::new();
    let begin = Instant::now();
    let outcome = collect(world.exec(Exec { timeout_ms: 200, ..sh("yes; true") }).await).await;
    assert!(outcome.exit.timed_out && begin.elapsed() < Duration::from_secs(2), "output hides the limit");
    let quick = collect(world.exec(Exec { timeout_ms: 5000, ..sh("exit 3") }).await).await;
    assert_eq!((quick.exit.code, quick.exit.timed_out), (3, false));
}

#[tokio::test]
async fn background_children_live_on_and_hold_nothing() {
    let world = World::new();
    let begin = Instant::now();
    let file = world.path("log");
    // It holds both pipes and writes into them for as long as it lives.
    let script =
        format!("(while :; do echo noise; echo tick >>{file}; sleep 0.05; done) & echo $!; echo last words");
    let outcome = world.sh(&script).await;
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(outcome.out().contains("last words\n"));
    let pid = outcome.out().lines().find(|line| line.parse::<u32>().is_ok()).expect("a pid").to_owned();
    let ticks = || fs::read_to_string(&file).unwrap_or_default().lines().count();
    let before = ticks();
    until("more ticks", || ticks() > before + 5).await;
    assert!(alive(&pid), "it died of its pipe");
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.parse().expect("a pid")),
        nix::sys::signal::Signal::SIGKILL,
    )
    .expect("kill");
}

#[tokio::test]
async fn what_was_written_before_the_end_is_complete() {
    let world = World::new();
    for _ in 0..20 {
        let outcome = world.sh("sleep 100 & head -c 65536 /dev/zero; printf x >&2; kill $!").await;
        assert_eq!((outcome.stdout.len(), outcome.err()), (65536, "x"));
    }
}

#[tokio::test]
async fn much_output_on_both_streams_with_a_slow_reader() {
    let world = World::new();
    let script = "head -c 5000000 /dev/zero & head -c 5000000 /dev/zero | tr '\\0' x >&2; wait";
    let mut stream = world.exec(sh(script)).await;
    let (mut out, mut err, mut events) = (0, 0, 0);
    let exit = loop {
        events += 1;
        if events % 16 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        match tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").expect("an event") {
            ExecEvent::Stdout(bytes) => {
                assert!(bytes.iter().all(|byte| *byte == 0));
                out += bytes.len();
            }
            ExecEvent::Stderr(bytes) => {
                assert!(bytes.iter().all(|byte| *byte == b'x'));
                err += bytes.len();
            }
            ExecEvent::Exit(exit) => break exit,
        }
    };
    assert_eq!(
        (out, err, exit.code, exit.dropped, exit.output_bytes),
        (5_000_000, 5_000_000, 0, 0, 10_000_000)
    );
    // The connection is idle again.
    let mut client = stream.into_client().expect("the client");
    let health: Health = client.call(&Request::Health {}, LIMIT).await.expect("health");
    assert_eq!(health.sessions, 0);
    assert!(health.memory_available_kib > 0 && health.disk_free_bytes > 0 && health.unix_nanos > 1 << 60);
}

#[tokio::test]
async fn attaching_after_a_lost_connection_gives_exactly_what_is_missing() {
    let world = World::new();
    // As much as is kept for one who comes back, so that it is several rounds also when every event is as large as can be.
    let count = 75_000;
    let exec = sh(&format!("i=0; while [ $i -lt {count} ]; do echo line $i; i=$((i+1)); done"));
    let expected: String = (0..count).map(|i| format!("line {i}\n")).collect();
    assert!(expected.len() < REPLAY_BYTES && expected.len() > 8 * CHUNK);
    let mut stream = world.exec(exec.clone()).await;
    let mut text = Vec::new();
    let mut rounds = 0;
    'all: loop {
        for _ in 0..3 {
            match tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").expect("an event") {
                ExecEvent::Stdout(bytes) => text.extend_from_slice(&bytes),
                ExecEvent::Stderr(_) => panic!("nothing was written there"),
                ExecEvent::Exit(exit) => {
                    assert_eq!((exit.code, exit.dropped, exit.output_bytes), (0, 0, expected.len() as u64));
                    break 'all;
                }
            }
        }
        let offset = stream.offset();
        drop(stream);
        rounds += 1;
        stream = world
            .client()
            .await
            .attach(&exec.session, offset, LIMIT)
            .await
            .map_err(|e| e.1)
            .expect("attached");
        assert_eq!(stream.started.offset, offset);
    }
    assert!(rounds > 1);
    assert!(text == expected.as_bytes());
    // The same id is never run twice: it is attached to at 0, which is partly gone by now.
    let again = collect(world.exec(Exec { argv: vec!["/bin/false".into()], ..exec }).await).await;
    assert_eq!(again.exit.code, 0);
    assert!(expected.as_bytes().ends_with(&again.stdout));
    let missing = world.client().await.attach(&id(), 0, LIMIT).await.expect_err("no such session").1;
    assert!(matches!(missing, ClientError::Guest(Failure { code: Code::NotFound, .. })));
}

#[tokio::test]
async fn nobody_attached_drops_the_oldest_and_counts() {
    let world = World::new();
    let exec = Exec { detach: true, ..sh("sleep 0.3; head -c 3000000 /dev/zero; echo end") };
    drop(world.exec(exec.clone()).await);
    let mut client = world.client().await;
    let deadline = Instant::now() + LIMIT;
    loop {
        let list: Sessions = client.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
        let info = &list.sessions[0];
        assert!(info.detached && info.session == exec.session);
        if info.exit.is_some() {
            break;
        }
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stream = client.attach(&exec.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    let started = stream.started.clone();
    let outcome = collect(stream).await;
    assert!(outcome.stdout.ends_with(b"end\n"));
    assert_eq!(outcome.exit.output_bytes, 3_000_004);
    assert_eq!(outcome.exit.dropped + outcome.stdout.len() as u64, 3_000_004);
    assert_eq!(started.dropped, outcome.exit.dropped);
    assert!(outcome.stdout.len() <= REPLAY_BYTES && outcome.stdout.len() > REPLAY_BYTES / 2);
}

/// Of a guest that was restored: a copy has a name of its own.
fn restored(copy: bool) -> Request {
    let unique = Unique {
        sandbox: "copy".into(),
        machine_id: "0".repeat(32),
        boot_id: "01234567-89ab-4cde-8f01-23456789abcd".into(),
        hostname: "sb-copy".into(),
    };
    let unique = copy.then_some(unique);
    Request::Identity(Identity { unix_nanos: 1, entropy: "00".into(), unique, defaults: None })
}

#[tokio::test]
async fn a_copy_detaches_what_runs_and_a_wake_does_not() {
    let world = World::new();
    let running = sh("read word; echo got $word");
    let mut stream = world.exec(Exec { stdin: true, ..running.clone() }).await;
    let ended = sh("true");
    assert_eq!(collect(world.exec(ended.clone()).await).await.exit.code, 0);
    let mut client = world.client().await;
    let mut detached = async |request: &Request| {
        let () = client.call(request, LIMIT).await.expect("done");
        let list: Sessions = client.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
        let of = |exec: &Exec| {
            list.sessions.iter().find(|info| info.session == exec.session).expect("it is there")
        };
        (of(&running).detached, of(&ended).detached)
    };
    assert_eq!(detached(&restored(false)).await, (false, false));
    assert_eq!(detached(&restored(true)).await, (true, false));
    // Whoever was attached belongs to the parent; anybody may go on here.
    assert!(matches!(stream.next().await, Err(ClientError::Lost(_))));
    let mut stream =
        world.client().await.attach(&running.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    stream.stdin(b"word\n");
    assert_eq!(collect(stream).await.out(), "got word\n");
}

#[tokio::test]
async fn in_a_copy_nothing_holds_output_up() {
    let world = World::new();
    let exec = sh("head -c 3000000 /dev/zero; echo end");
    // It is attached to and never acknowledges, so its program is held up.
    let parent = world.exec(exec.clone()).await;
    let mut client = world.client().await;
    let mut info = async || {
        let list: Sessions = client.call(&Request::Sessions {}, LIMIT).await.expect("sessions");
        list.sessions[0].clone()
    };
    while info().await.output_bytes < REPLAY_BYTES as u64 / 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(info().await.exit, None);
    let () = world.client().await.call(&restored(true), LIMIT).await.expect("done");
    let exit = loop {
        match info().await.exit {
            Some(exit) => break exit,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    };
    assert_eq!((exit.code, exit.output_bytes), (0, 3_000_004));
    assert!(exit.dropped > 0);
    drop(parent);
    let kept = world.client().await.attach(&exec.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    let outcome = collect(kept).await;
    assert!(outcome.stdout.ends_with(b"end\n"), "the oldest is dropped, not the newest");
    assert_eq!(outcome.exit.dropped + outcome.stdout.len() as u64, 3_000_004);
}

#[tokio::test]
async fn an_attachment_takes_over_from_an_older_one() {
    let world = World::new();
    let exec = sh("sleep 0.5; echo late");
    let mut first = world.exec(exec.clone()).await;
    let second =
        world.client().await.attach(&exec.session, 0, LIMIT).await.map_err(|e| e.1).expect("attached");
    assert!(matches!(first.next().await, Err(ClientError::Lost(_))));
    assert_eq!(collect(second).await.out(), "late\n");
}

#[tokio::test]
async fn signals_kill_and_sessions() {
    let world = World::new();
    let exec = sh("trap 'echo caught; exit 5' USR1; echo ready; while :; do sleep 0.05; done");
    let mut stream = world.exec(exec).await;
    assert!(matches!(stream.next().await, Ok(ExecEvent::Stdout(_))));
    stream.signal(10);
    let outcome = collect(stream).await;
    assert_eq!((outcome.out(), outcome.exit.code), ("caught\n", 5));

    let exec = sh("setsid sleep 1000 & echo $!; sleep 1000");
    let mut stream = world.exec(exec.clone()).await;
    let Ok(ExecEvent::Stdout(pid)) = stream.next().await else { panic!("a pid") };
    let pid = String::from_utf8(pid.to_vec()).expect("UTF-8");
    let () =
        world.client().await.call(&Request::Kill { session: exec.session }, LIMIT).await.expect("killed");
    let exit = collect(stream).await.exit;
    assert_eq!((exit.code, exit.signal, exit.timed_out), (137, 9, false));
    if world._cgroup.0.is_some() {
        until("the end of the other session", || !alive(&pid)).await;
    }
    let missing = world.client().await.call::<()>(&Request::Kill { session: id() }, LIMIT).await;
    assert!(matches!(missing, Err(ClientError::Guest(Failure { code: Code::NotFound, .. }))));
}

#[tokio::test]
async fn terminals() {
    let world = World::new();
    let exec = Exec {
        tty: Some(Window { rows: 30, cols: 100 }),
        ..sh("stty size; tty; echo err >&2; read x; echo got $x; stty size; echo $TERM")
    };
    let mut stream = world.exec(exec).await;
    let mut text = String::new();
    while !text.contains("err") {
        let Ok(ExecEvent::Stdout(bytes)) = stream.next().await else { panic!("output") };
        text.push_str(std::str::from_utf8(&bytes).expect("UTF-8"));
    }
    assert!(text.starts_with("30 100\r\n/dev/pts/"), "{text:?}");
    stream.resize(Window { rows: 10, cols: 20 });
    stream.stdin(b"word\r");
    let outcome = collect(stream).await;
    assert!(outcome.out().ends_with("got word\r\n10 20\r\nxterm-256color\r\n"), "{:?}", outcome.out());
    assert_eq!(outcome.exit.code, 0);
}

async fn put(
    client: &mut Client<UnixStream>,
    path: &str,
    bytes: &[u8],
    mode: u32,
) -> Result<Written, ClientError> {
    client.write_file(path, bytes.len() as u64, mode, LIMIT).await?;
    client.write_chunk(bytes, LIMIT).await?;
    client.write_end(LIMIT).await
}

async fn get(client: &mut Client<UnixStream>, path: &str) -> Result<Vec<u8>, ClientError> {
    client.read_file(path, LIMIT).await?;
    let mut all = Vec::new();
    while let Some(bytes) = client.read_chunk(LIMIT).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Guest(failure)) => failure.code,
        other => panic!("{other:?}"),
    }
}

fn leftovers(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).expect("a directory").flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".panda"))
        .collect()
}

#[tokio::test]
async fn files_come_back_as_they_were_written() {
    let world = World::new();
    let mut client = world.client().await;
    let path = world.path("a/b/c.bin");
    let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i % 253) as u8).collect();
    assert_eq!(put(&mut client, &path, &bytes, 0o640).await.expect("written"), Written { bytes: 3_000_001 });
    assert_eq!(fs::metadata(&path).expect("it is there").mode() & 0o7777, 0o640);
    assert_eq!(fs::metadata(world.path("a/b")).expect("it is there").mode() & 0o7777, 0o755);
    assert!(get(&mut client, &path).await.expect("read") == bytes);
    // An existing file keeps its mode and owner.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    std::os::unix::fs::chown(&path, Some(1234), Some(1235)).expect("chown");
    put(&mut client, &path, b"short", 0o777).await.expect("written");
    let metadata = fs::metadata(&path).expect("it is there");
    assert_eq!(
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid(), metadata.len()),
        (0o600, 1234, 1235, 5)
    );
    // Empty ones, and ones without a size, are files, too.
    put(&mut client, &world.path("empty"), b"", 0o644).await.expect("written");
    assert_eq!(get(&mut client, &world.path("empty")).await.expect("read"), b"");
    assert!(!get(&mut client, "/proc/self/status").await.expect("read").is_empty());
    assert_eq!(leftovers(world.dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn links_are_written_through() {
    let world = World::new();
    let mut client = world.client().await;
    fs::create_dir(world.path("d")).expect("mkdir");
    symlink("d/target", world.path("link")).expect("symlink");
    put(&mut client, &world.path("link"), b"one", 0o644).await.expect("written");
    assert!(fs::symlink_metadata(world.path("link")).expect("there").is_symlink());
    assert_eq!(fs::read(world.path("d/target")).expect("there"), b"one");
    put(&mut client, &world.path("link"), b"two", 0o644).await.expect("written");
    assert_eq!(fs::read(world.path("d/target")).expect("there"), b"two");
    symlink("loop", world.path("loop")).expect("symlink");
    assert_eq!(code(put(&mut client, &world.path("loop"), b"x", 0o644).await), Code::Invalid);
}

#[tokio::test]
async fn a_write_is_whole_or_not_at_all() {
    let world = World::new();
    let path = world.path("file");
    fs::write(&path, "old").expect("written");
    let unchanged = || {
        assert_eq!(fs::read_to_string(&path).expect("there"), "old");
        assert_eq!(leftovers(world.dir.path()), Vec::<String>::new());
    };
    let mut client = world.client().await;
    // Fewer bytes than announced.
    client.write_file(&path, 10, 0o644, LIMIT).await.expect("ready");
    client.write_chunk(b"12345", LIMIT).await.expect("sent");
    assert_eq!(code(client.write_end(LIMIT).await), Code::Invalid);
    unchanged();
    // More, and far more, than announced; the connection goes on.
    for length in [11, 3_000_000] {
        client.write_file(&path, 10, 0o644, LIMIT).await.expect("ready");
        client.write_chunk(&vec![0; length], LIMIT).await.expect("sent");
        assert_eq!(code(client.write_end(LIMIT).await), Code::Invalid);
        unchanged();
    }
    // No room: refused before a byte is sent.
    assert_eq!(code(client.write_file(&path, 1 << 55, 0o644, LIMIT).await), Code::NoSpace);
    assert_eq!(code(client.write_file(&path, u64::MAX, 0o644, LIMIT).await), Code::NoSpace);
    unchanged();
    // A host that goes away.
    client.write_file(&path, 1_000_000, 0o644, LIMIT).await.expect("ready");
    client.write_chunk(&[0; 600_000], LIMIT).await.expect("sent");
    assert_eq!(leftovers(world.dir.path()).len(), 1);
    drop(client);
    until("tidying up", || leftovers(world.dir.path()).is_empty()).await;
    unchanged();
}

#[tokio::test]
async fn wrong_paths_are_told_apart() {
    let world = World::new();
    let mut client = world.client().await;
    fs::write(world.path("file"), "x").expect("written");
    fs::create_dir(world.path("dir")).expect("mkdir");
    nix::unistd::mkfifo(Path::new(&world.path("fifo")), nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let _socket = std::os::unix::net::UnixListener::bind(world.path("socket")).expect("bind");
    let below_file = world.path("file/x");
    assert_eq!(code(get(&mut client, &world.path("none")).await), Code::NotFound);
    assert_eq!(code(get(&mut client, &world.path("dir")).await), Code::IsADirectory);
    assert_eq!(code(get(&mut client, &below_file).await), Code::NotADirectory);
    for node in ["fifo", "socket"] {
        assert_eq!(code(get(&mut client, &world.path(node)).await), Code::Invalid, "{node}");
        assert_eq!(code(put(&mut client, &world.path(node), b"x", 0o644).await), Code::Invalid, "{node}");
    }
    assert_eq!(code(get(&mut client, "/dev/zero").await), Code::Invalid);
    assert_eq!(code(get(&mut client, "relative").await), Code::Invalid);
    assert_eq!(code(get(&mut client, "/a\0b").await), Code::Invalid);
    assert_eq!(code(put(&mut client, &world.path("dir"), b"x", 0o644).await), Code::IsADirectory);
    assert_eq!(code(put(&mut client, &world.path("new/"), b"x", 0o644).await), Code::IsADirectory);
    assert_eq!(code(put(&mut client, "/", b"x", 0o644).await), Code::IsADirectory);
    assert_eq!(code(put(&mut client, &below_file, b"x", 0o644).await), Code::NotADirectory);
    assert_eq!(code(put(&mut client, &world.path("file/x/y"), b"x", 0o644).await), Code::NotADirectory);
    client.list(&world.path("file"), LIMIT).await.expect("sent");
    assert_eq!(code(client.next_entries(LIMIT).await), Code::NotADirectory);
    client.list(&world.path("none"), LIMIT).await.expect("sent");
    assert_eq!(code(client.next_entries(LIMIT).await), Code::NotFound);
    let stat = |path: &str| Request::Stat { path: path.to_owned() };
    assert_eq!(code(client.call::<Entry>(&stat(&world.path("none")), LIMIT).await), Code::NotFound);
    let entry: Entry = client.call(&stat(&world.path("fifo")), LIMIT).await.expect("stat");
    assert_eq!((entry.kind, entry.name.as_str()), ('p', "fifo"));
    let root: Entry = client.call(&stat("/"), LIMIT).await.expect("stat");
    assert_eq!((root.kind, root.name.as_str()), ('d', "/"));
}

#[tokio::test]
async fn listings_are_sorted_complete_and_cut_into_frames() {
    let world = World::new();
    let mut client = world.client().await;
    let dir = world.path("many");
    fs::create_dir(&dir).expect("mkdir");
    for i in 0..3000 {
        fs::write(format!("{dir}/{i:05}"), "").expect("written");
    }
    symlink("/", format!("{dir}/zlink")).expect("symlink");
    use std::os::unix::ffi::OsStrExt;
    fs::write(Path::new(&dir).join(std::ffi::OsStr::from_bytes(b"z\xff")), "abc").expect("written");
    client.list(&dir, LIMIT).await.expect("sent");
    let mut all = Vec::new();
    let mut frames = 0;
    while let Some(entries) = client.next_entries(LIMIT).await.expect("entries") {
        frames += 1;
        all.extend(entries);
    }
    assert!(frames > 5);
    assert_eq!(all.len(), 3002);
    assert!(all.windows(2).all(|pair| pair[0].name < pair[1].name));
    let last = &all[3000..];
    assert_eq!((last[0].name.as_str(), last[0].kind), ("zlink", 'l'));
    assert_eq!((last[1].name.as_str(), last[1].kind, last[1].size), ("z\u{fffd}", 'f', 3));
}

#[tokio::test]
async fn deleting_stays_inside() {
    let world = World::new();
    let mut client = world.client().await;
    let delete = |path: String| Request::Delete { path };
    let outside = world.path("outside");
    fs::create_dir(&outside).expect("mkdir");
    fs::write(format!("{outside}/keep"), "x").expect("written");
    let tree = world.path("tree");
    // Deeper than any number of open directories, and wide.
    let mut deep = PathBuf::from(&tree);
    for _ in 0..120 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).expect("mkdir");
    fs::write(deep.join("leaf"), "x").expect("written");
    symlink(&outside, format!("{tree}/link")).expect("symlink");
    for i in 0..3000 {
        fs::write(format!("{tree}/{i}"), "").expect("written");
    }
    let () = client.call(&delete(tree.clone()), LIMIT).await.expect("deleted");
    assert!(!Path::new(&tree).exists());
    assert_eq!(fs::read_to_string(format!("{outside}/keep")).expect("it stays"), "x");
    // A link itself, not what it leads to.
    symlink(&outside, world.path("link")).expect("symlink");
    let () = client.call(&delete(world.path("link")), LIMIT).await.expect("deleted");
    assert!(Path::new(&outside).exists() && !Path::new(&world.path("link")).exists());
    assert_eq!(code(client.call::<()>(&delete(tree), LIMIT).await), Code::NotFound);
    for path in ["/", "//", "/tmp/..", "/.", "relative"] {
        assert_eq!(code(client.call::<()>(&delete(path.into()), LIMIT).await), Code::Invalid, "{path}");
    }
    for path in ["/proc", "/tmp/../sys", "/proc/sys/kernel/hostname"] {
        assert_eq!(code(client.call::<()>(&delete(path.into()), LIMIT).await), Code::Denied, "{path}");
    }
}

#[tokio::test]
async fn forwarding() {
    let world = World::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let (mut read, mut write) = stream.split();
        tokio::io::copy(&mut read, &mut write).await.expect("copied");
    });
    let (mut stream, rest) = world.client().await.forward(port, LIMIT).await.expect("connected");
    assert!(rest.is_empty());
    stream.write_all(b"echo").await.expect("written");
    stream.shutdown().await.expect("half closed");
    let mut back = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut back).await.expect("read");
    assert_eq!(back, "echo");
    let unused =
        std::net::TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("an address").port();
    assert_eq!(code(world.client().await.forward(unused, LIMIT).await.map(|(_, rest)| rest)), Code::Refused);
}

#[tokio::test]
async fn control() {
    let world = World::new();
    let mut client = world.client().await;
    for request in [Request::Sync {}, Request::GrowRoot {}, Request::Shutdown {}] {
        let () = client.call(&request, LIMIT).await.expect("done");
    }
    until("shutting down", || *world.machine.0.lock().expect("lock") == ["grow", "shut down"]).await;
}

#[tokio::test]
async fn only_volumes_are_mounted_and_only_below_mnt() {
    let world = World::new();
    let mut client = world.client().await;
    let mount = |device: &str, path: &str| Mount {
        device: device.to_owned(),
        path: path.to_owned(),
        read_only: false,
    };
    let good = [mount("vdb", "/mnt/data"), mount("vdz", "/mnt/more/of it")];
    let () = client.call(&Request::Mount { mounts: good.to_vec() }, LIMIT).await.expect("mounted");
    let bad_devices = ["", "vda", "vdB", "vd", "vdbc", "sdb", "/dev/vdb", "../vdb", "vd\0"];
    let bad_paths = [
        "",
        "mnt/a",
        "/mnt",
        "/mnt/",
        "/mnt//a",
        "/mnt/a/",
        "/mnt/./a",
        "/mnt/../etc",
        "/mnt/a/..",
        "/etc",
        "/mnta",
        "/mnt/a\0",
    ];
    let bad = bad_devices.map(|device| mount(device, "/mnt/x"));
    let bad = bad.into_iter().chain(bad_paths.map(|path| mount("vdc", path)));
    let twice = [mount("vdb", "/mnt/x"), mount("vdx", "/mnt/data")];
    for wrong in bad.chain(twice) {
        let mounts = vec![good[0].clone(), wrong.clone()];
        assert_eq!(
            code(client.call::<()>(&Request::Mount { mounts }, LIMIT).await),
            Code::Invalid,
            "{wrong:?}"
        );
    }
    assert_eq!(*world.machine.0.lock().expect("lock"), ["mount 2"]);
}

#[tokio::test]
async fn a_request_may_come_along_with_the_greeting() {
    let world = World::new();
    let request = Request::Health {};
    let (mut client, health): (_, Health) =
        Client::greet_and_call(world.raw(), 7, &request, LIMIT).await.expect("both answers");
    assert_eq!((client.hello.nonce, health.sessions), (7, 0));
    let () = client.call(&Request::GrowRoot {}, LIMIT).await.expect("the connection goes on");
    let missing = Request::Kill { session: id() };
    assert_eq!(
        code(Client::greet_and_call::<()>(world.raw(), 7, &missing, LIMIT).await.map(drop)),
        Code::NotFound
    );

    // The agent also answers a host that waits for its greeting, and one that sends it in pieces.
    let mut stream = world.raw();
    let mut out = bytes::BytesMut::new();
    encode(Kind::Hello, br#"{"proto":1,"nonce":7}"#, &mut out);
    encode(Kind::Request, br#"{"op":"health"}"#, &mut out);
    for piece in out.chunks(7) {
        stream.write_all(piece).await.expect("written");
        tokio::task::yield_now().await;
    }
    let (mut decoder, mut kinds) = (Decoder::new(), Vec::new());
    while kinds.len() < 2 {
        assert!(tokio::io::AsyncReadExt::read_buf(&mut stream, decoder.buffer()).await.expect("read") > 0);
        while let Some(frame) = decoder.next_frame().expect("frames") {
            kinds.push(frame.kind);
        }
    }
    assert_eq!(kinds, [Kind::Hello, Kind::Done]);
}

#[tokio::test]
async fn garbage_ends_a_connection_and_nothing_else() {
    use tokio::io::AsyncReadExt;
    let world = World::new();
    let hello = serde_json::to_vec(&Hello { proto: 1, nonce: 1, agent: String::new() }).expect("JSON");
    let mut greeting = bytes::BytesMut::new();
    encode(Kind::Hello, &hello, &mut greeting);
    let mut old = bytes::BytesMut::new();
    encode(Kind::Hello, br#"{"proto":0,"nonce":1}"#, &mut old);
    let too_long = [2, 255, 255, 255, 255];
    for bytes in
        [&[0xff; 4096][..], b"GET / HTTP/1.1\r\n\r\n", &too_long, &old, &[&greeting[..], &too_long].concat()]
    {
        let mut stream = world.raw();
        stream.write_all(bytes).await.expect("written");
        stream.shutdown().await.expect("half closed");
        let mut answer = Vec::new();
        tokio::time::timeout(LIMIT, stream.read_to_end(&mut answer)).await.expect("in time").expect("closed");
    }
    // Requests that do not parse are answered, and the connection goes on.
    let mut stream = world.raw();
    let mut out = greeting.clone();
    encode(Kind::Request, b"{", &mut out);
    encode(Kind::Request, br#"{"op":"of_the_future"}"#, &mut out);
    encode(Kind::Ack, b"left over", &mut out);
    encode(Kind::Request, br#"{"op":"health","later":1}"#, &mut out);
    stream.write_all(&out).await.expect("written");
    let mut decoder = Decoder::new();
    let mut answers = Vec::new();
    while answers.len() < 4 {
        assert!(stream.read_buf(decoder.buffer()).await.expect("read") > 0);
        while let Some(frame) = decoder.next_frame().expect("frames") {
            answers.push(frame);
        }
    }
    let failure = |frame: &Frame| serde_json::from_slice::<Failure>(&frame.payload).expect("a failure").code;
    assert_eq!((failure(&answers[1]), failure(&answers[2])), (Code::Invalid, Code::Unsupported));
    assert_eq!(answers[3].kind, Kind::Done);
    assert_eq!(world.sh("echo still here").await.out(), "still here\n");
}

async fn log(client: &mut Client<UnixStream>, position: u64, session: &str, wait_ms: u64) -> LogPage {
    let request = Request::Log { position, life: 0, session: session.into(), wait_ms };
    client.log(&request, LIMIT).await.expect("a page")
}

fn said(page: &LogPage, session: &str, stream: LogStream) -> String {
    let of = page.parts.iter().filter(|part| part.session == session && part.stream == stream);
    of.map(|part| String::from_utf8_lossy(&part.bytes)).collect()
}

#[tokio::test]
async fn the_log_has_what_all_sessions_wrote_apart_and_in_order() {
    let world = World::new();
    let (one, two) = (sh("echo out; echo err >&2; printf half"), sh("echo other"));
    let (first, second) = (one.session.clone(), two.session.clone());
    collect(world.exec(one).await).await;
    collect(world.exec(two).await).await;
    collect(world.exec(Exec { unlogged: true, ..sh("echo unseen") }).await).await;
    let terminal = Exec { tty: Some(Window { rows: 9, cols: 9 }), ..sh("echo typed") };
    collect(world.exec(terminal).await).await;

    let mut client = world.client().await;
    let page = log(&mut client, 0, "", 0).await;

    assert_eq!(said(&page, &first, LogStream::Stdout), "out\nhalf\n");
    assert_eq!(said(&page, &first, LogStream::Stderr), "err\n");
    assert_eq!(said(&page, &second, LogStream::Stdout), "other\n");
    assert_eq!((page.end.start, page.end.next, page.end.end), (0, 19, 19));
    let only = log(&mut client, 0, &second, 0).await;
    assert_eq!((only.parts.len(), only.end.next), (1, 19));
}

#[tokio::test]
async fn a_reader_of_the_log_is_told_at_once_and_waits_no_longer_than_it_said() {
    let world = World::new();
    let mut client = world.client().await;
    let start = Instant::now();
    assert_eq!(log(&mut client, 0, "", 100).await.parts, []);
    assert!(start.elapsed() >= Duration::from_millis(100));

    let session = sh("echo late");
    let id = session.session.clone();
    let (page, _) = tokio::join!(log(&mut client, 0, &id, 20_000), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        collect(world.exec(sh("echo somebody else")).await).await;
        collect(world.exec(session).await).await
    });
    assert_eq!(said(&page, &id, LogStream::Stdout), "late\n");
    assert!(start.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn what_the_background_writes_after_its_shell_is_in_the_log() {
    let world = World::new();
    let exec = sh("(sleep 0.3; echo behind; printf open) & echo front");
    let id = exec.session.clone();
    collect(world.exec(exec).await).await;
    let mut client = world.client().await;
    let deadline = Instant::now() + LIMIT;
    let mut page = log(&mut client, 0, &id, 0).await;
    while !said(&page, &id, LogStream::Stdout).contains("open\n") && Instant::now() < deadline {
        page = log(&mut client, 0, &id, 0).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(said(&page, &id, LogStream::Stdout), "front\nbehind\nopen\n");
}
