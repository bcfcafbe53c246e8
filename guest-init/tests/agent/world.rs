//! An agent of this process, the host's client to it, and what tests ask of both.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use guest_init::agent::{Agent, machine::Machine, serve};
use pandastack_protocol::*;
use tokio::net::UnixStream;

pub const LIMIT: Duration = Duration::from_secs(20);

/// A machine that only remembers what it was told.
#[derive(Debug, Default, Clone)]
pub struct Fake(pub Arc<Mutex<Vec<String>>>);

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
pub struct TestCgroup(pub Option<PathBuf>);

impl TestCgroup {
    pub fn new() -> Self {
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

pub struct World {
    pub agent: Arc<Agent>,
    pub machine: Fake,
    pub dir: tempfile::TempDir,
    pub cgroup: TestCgroup,
}

impl World {
    pub fn new() -> Self {
        let cgroup = TestCgroup::new();
        let machine = Fake::default();
        let agent = Agent::new(machine.clone(), cgroup.0.clone());
        Self { agent, machine, dir: tempfile::tempdir().expect("a directory"), cgroup }
    }

    pub fn without_cgroups() -> Self {
        let machine = Fake::default();
        let agent = Agent::new(machine.clone(), None);
        Self { agent, machine, dir: tempfile::tempdir().expect("a directory"), cgroup: TestCgroup(None) }
    }

    pub fn raw(&self) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let agent = self.agent.clone();
        tokio::spawn(async move {
            let _ = serve(theirs, agent).await;
        });
        ours
    }

    pub async fn client(&self) -> Client<UnixStream> {
        Client::greet(self.raw(), 42, LIMIT).await.expect("a greeting")
    }

    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    pub async fn exec(&self, exec: Exec) -> ExecStream<UnixStream> {
        self.client().await.exec(exec, LIMIT).await.map_err(|(_, error)| error).expect("it starts")
    }

    pub async fn sh(&self, script: &str) -> Outcome {
        collect(self.exec(sh(script)).await).await
    }

    pub async fn refused(&self, exec: Exec) -> Code {
        match self.client().await.exec(exec, LIMIT).await {
            Err((Some(_), ClientError::Guest(failure))) => failure.code,
            other => panic!("{other:?}"),
        }
    }
}

pub fn id() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{:020}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub fn sh(script: &str) -> Exec {
    Exec {
        session: id(),
        argv: ["/bin/sh", "-c", script].map(String::from).to_vec(),
        cwd: "/".into(),
        ..Exec::default()
    }
}

#[derive(Debug)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exit: Exit,
}

impl Outcome {
    pub fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).expect("UTF-8")
    }
    pub fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).expect("UTF-8")
    }
}

pub async fn collect(mut stream: ExecStream<UnixStream>) -> Outcome {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        match tokio::time::timeout(LIMIT, stream.next()).await.expect("in time").expect("an event") {
            ExecEvent::Stdout(bytes) => stdout.extend_from_slice(&bytes),
            ExecEvent::Stderr(bytes) => stderr.extend_from_slice(&bytes),
            ExecEvent::Exit(exit) => return Outcome { stdout, stderr, exit },
        }
    }
}

pub fn alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    !stat.is_empty() && !stat.contains(") Z ")
}

pub async fn until(what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !check() {
        assert!(Instant::now() < deadline, "{what} does not happen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Why the guest refused.
pub fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Guest(failure)) => failure.code,
        other => panic!("{other:?}"),
    }
}
