//! Guests that misbehave on purpose. Each has a neighbour whose well-being is the assertion.

use anyhow::{Result, ensure};
use serde_json::json;

use qemu_tests::api::Api;

use crate::fixture::Fixture;

/// A misbehaving guest and its neighbour.
fn pair(api: &Api) -> Result<(String, String)> {
    Ok((api.create_base()?, api.create_base()?))
}

fn neighbour_is_well(fixture: &Fixture, api: &Api, neighbour: &str) -> Result<()> {
    ensure!(
        api.exec(neighbour, "echo well > /root/f && cat /root/f")? == "well\n",
        "the neighbour is not well"
    );
    let third = api.create_base()?;
    ensure!(api.exec(&third, "echo new")? == "new\n", "a new sandbox is not well");
    api.delete_all()?;
    fixture.assert_nothing_leaks()
}

pub fn a_full_disk(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let (bad, good) = pair(&api)?;

    // A file larger than the disk is refused at once; then real blocks, bounded so that the suite stays short.
    let said = api.exec(&bad, "fallocate -l 200G /root/huge 2>&1; head -c 600M /dev/urandom > /root/some; sync; echo code $?; fallocate -l 100G /x 2>&1; df --output=pcent / | tail -1")?;

    ensure!(said.contains("No space left") || said.contains("File too large"), "{said}");
    ensure!(api.exec(&bad, "echo still here")? == "still here\n", "the guest itself is lost");
    neighbour_is_well(fixture, &api, &good)
}

pub fn a_fork_bomb(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let (bad, good) = pair(&api)?;

    let body = json!({"cmd": "bomb() { bomb | bomb & }; bomb; sleep 15", "timeout_seconds": 10});
    let answer = api.call("POST", &format!("/v1/sandboxes/{bad}/exec"), Some(&body))?;

    ensure!(answer.status == 504 || answer.status == 200, "{answer:?}");
    neighbour_is_well(fixture, &api, &good)
}

pub fn a_console_flood(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let (bad, good) = pair(&api)?;
    let before = fixture.ssh("journalctl -b --no-pager -t vmm | wc -l")?;

    let body = json!({"cmd": "timeout 8 sh -c 'while :; do echo flood flood flood flood flood > /dev/console; done'", "timeout_seconds": 12});
    api.call("POST", &format!("/v1/sandboxes/{bad}/exec"), Some(&body))?;

    let size = fixture.ssh(
        "journalctl --namespace=sandboxes --disk-usage | grep -oE '[0-9.]+[KMG]'; journalctl -b --no-pager -t vmm | wc -l",
    )?;
    ensure!(!size.contains('G'), "the consoles' journal takes {size}");
    let after: u64 = size.lines().last().unwrap_or_default().trim().parse()?;
    ensure!(after >= before.trim().parse::<u64>()?, "our own journal lost lines");
    neighbour_is_well(fixture, &api, &good)
}

/// A hostile guest can put anything behind its vsock port: the agent's place is taken and garbage is spoken.
pub fn garbage_on_vsock(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let (bad, good) = pair(&api)?;
    let script = r#"cat > /root/g.py <<'X'
import os, signal, socket, time
for pid in [p for p in os.listdir('/proc') if p.isdigit()]:
    try:
        if b'panda-agent' in open(f'/proc/{pid}/cmdline', 'rb').read(): agent = int(pid)
    except OSError: pass
s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
for _ in range(2000):
    try:
        os.kill(agent, signal.SIGSTOP) if _ % 2 else os.kill(agent, signal.SIGKILL)
    except OSError: pass
    try:
        s.bind((socket.VMADDR_CID_ANY, 52)); break
    except OSError: time.sleep(0.002)
s.listen(64)
open('/root/bound', 'w').write('x')
end = time.time() + 60
while time.time() < end:
    c, _ = s.accept()
    try:
        c.sendall(b'\x01\xff\xff\xff\x7f' + os.urandom(70000))
        c.sendall(os.urandom(3000000))
    except OSError: pass
X
setsid python3 /root/g.py >/dev/null 2>&1 < /dev/null & sleep 4; cat /root/bound"#;
    let _ = api.call(
        "POST",
        &format!("/v1/sandboxes/{bad}/exec"),
        Some(&json!({"cmd": script, "timeout_seconds": 20})),
    );

    let mut statuses = Vec::new();
    for _ in 0..4 {
        let answer = api.call(
            "POST",
            &format!("/v1/sandboxes/{bad}/exec"),
            Some(&json!({"cmd": "true", "timeout_seconds": 5})),
        )?;
        statuses.push(answer.status);
        let answer = api.call("GET", &format!("/v1/sandboxes/{bad}/fs?path=/etc/hostname"), None)?;
        statuses.push(answer.status);
    }

    ensure!(statuses.iter().all(|status| ![500, 502].contains(status)), "{statuses:?}");
    ensure!(api.delete(&bad)?.status == 204, "it cannot be deleted");
    neighbour_is_well(fixture, &api, &good)
}
