//! What an operator sees and may do, and what nobody may.

use anyhow::{Context, Result, ensure};

use qemu_tests::accel::Accelerator;

use crate::fixture::Fixture;

/// Exposure scores (`systemd-analyze security`), each at most.
const BUDGET: [(&str, f64); 8] = [
    ("pandastack-api.service", 1.8),
    ("pandastack-edge.service", 1.8),
    ("pandastack-vmm.service", 1.2),
    ("pandastack-storage.service", 1.0),
    ("pandastack-network.service", 3.2),
    ("pandastack-sandbox@.service", 1.8),
    ("pandastack-kvm-hold.service", 1.0),
    ("pandastack-hibernate.service", 1.3),
];

pub fn the_disk_is_as_promised(fixture: &Fixture) -> Result<()> {
    let mounts = fixture.ssh("findmnt -rno TARGET,FSTYPE,OPTIONS / ; findmnt -rno TARGET,FSTYPE,OPTIONS /var; findmnt -rno TARGET,FSTYPE,OPTIONS /usr/share/pandastack/templates")?;
    let reflink = fixture.ssh("xfs_info /var | grep -o 'reflink=1'")?;
    let whole = fixture.ssh("lsblk -bno SIZE /dev/vda | head -1; df --output=size -B1 /var | tail -1")?;

    ensure!(mounts.contains("/ erofs ro") && mounts.contains("/var xfs rw"), "{mounts}");
    ensure!(mounts.contains("/usr/share/pandastack/templates erofs ro"), "{mounts}");
    ensure!(reflink.trim() == "reflink=1", "{reflink}");
    let sizes: Vec<u64> = whole.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    ensure!(
        sizes.len() == 2 && sizes[1] > sizes[0] / 2,
        "the data partition does not use the disk: {sizes:?}"
    );
    ensure!(fixture.try_ssh("touch /usr/x")?.1.contains("Read-only"), "/usr can be written");
    Ok(())
}

pub fn every_unit_is_up(fixture: &Fixture) -> Result<()> {
    let failed = fixture.ssh("systemctl list-units --all --plain --no-legend --state=failed,auto-restart")?;
    let mut down = Vec::new();
    for (unit, _) in BUDGET.iter().filter(|(unit, _)| !unit.contains('@')) {
        let state = fixture.ssh(&format!("systemctl is-active {unit} || true"))?;
        if state.trim() != "active" {
            down.push(format!("{unit} is {}", state.trim()));
        }
    }
    let restart = fixture.ssh("cat /proc/sys/kernel/panic")?;

    ensure!(failed.trim().is_empty(), "{failed}");
    ensure!(restart.trim() == "10", "a kernel that gives up does not restart: {restart:?}");
    ensure!(down.is_empty(), "{}", down.join("; "));
    Ok(())
}

pub fn guests_stay_on_the_processors_named_for_them(fixture: &Fixture) -> Result<()> {
    let named = fixture.ssh("grep -o 'pandastack.guest_cpus=[^ ]*' /proc/cmdline || true")?;
    let held = fixture.ssh(
        "cat /sys/fs/cgroup$(systemctl show pandastack-sandboxes.slice -p ControlGroup --value)/cpuset.cpus.effective",
    )?;

    let emulated = qemu_tests::accel::choose(&qemu_tests::accel::probe()).accelerator == Accelerator::Tcg;
    ensure!(!emulated || !named.trim().is_empty(), "an emulated appliance does not name them");
    if let Some(named) = named.trim().strip_prefix("pandastack.guest_cpus=") {
        ensure!(held.trim() == named, "guests may use {held:?}, not {named}");
    }
    Ok(())
}

pub fn nobody_can_log_in(fixture: &Fixture) -> Result<()> {
    let shadow = fixture.ssh("grep -vE '^[^:]+:[!*]' /etc/shadow || true")?;
    let gettys =
        fixture.ssh("systemctl list-units --all --plain --no-legend '*getty*' | grep running || true")?;
    let password = fixture.ssh("sshd -T -f /usr/lib/pandastack/sshd_config 2>/dev/null | grep -iE '^(passwordauthentication|kbdinteractiveauthentication) yes' || true")?;

    ensure!(shadow.trim().is_empty(), "accounts with a password: {shadow}");
    ensure!(gettys.trim().is_empty(), "{gettys}");
    ensure!(password.trim().is_empty(), "{password}");
    Ok(())
}

pub fn exposure_is_within_budget(fixture: &Fixture) -> Result<()> {
    let mut over = Vec::new();
    for (unit, most) in BUDGET {
        let instance = unit.replace("@.", "@aaaaaaaaaaaaaaaaaaaa.");
        let text = fixture.ssh(&format!("systemd-analyze security --no-pager {instance} | tail -1"))?;
        let score: f64 = text
            .split_whitespace()
            .find_map(|word| word.parse().ok())
            .with_context(|| format!("no score in {text:?}"))?;
        eprintln!("  exposure {unit}: {score} of {most}");
        if score > most {
            over.push(format!("{unit}: {score} > {most}"));
        }
    }
    ensure!(over.is_empty(), "{}", over.join("; "));
    Ok(())
}

pub fn the_first_token_is_not_in_the_journal(fixture: &Fixture) -> Result<()> {
    let found = fixture.ssh("journalctl -b --no-pager -o cat | grep -cE 'pds_[0-9a-f]{32}' || true")?;
    let files = fixture.ssh(&format!(
        "grep -rlF {} /var/lib/pandastack/api /run/pandastack 2>/dev/null || true",
        fixture.token()
    ))?;

    ensure!(found.trim() == "0", "{found} lines of the journal hold a token");
    ensure!(files.trim().is_empty(), "the token lies in {files}");
    Ok(())
}

pub fn busctl_administers_tenancy(fixture: &Fixture) -> Result<()> {
    let call = "busctl call ai.pandastack.api1 /ai/pandastack/api1 ai.pandastack.api1.Manager";

    let token = fixture.foreign_token()?;
    let workspaces = fixture.ssh(&format!("{call} ListWorkspaces"))?;
    let stranger = qemu_tests::api::Api::new(fixture.base()?, &token);
    let sees = stranger.list()?;
    let once = fixture.ssh(&format!("{call} CreateToken ssu stranger once 0"))?;
    let once = once.trim().trim_start_matches("s \"").trim_end_matches('"').to_owned();
    fixture.ssh(&format!("{call} RevokeToken s {}", &once[..12]))?;
    let refused = qemu_tests::api::Api::new(fixture.base()?, &once).call("GET", "/v1/me", None)?;

    ensure!(token.starts_with("pds_") && token.len() == 36, "{token}");
    ensure!(workspaces.contains("\"stranger\"") && workspaces.contains("\"default\""), "{workspaces}");
    ensure!(sees.is_empty(), "{sees:?}");
    ensure!(refused.status == 401, "{refused:?}");
    Ok(())
}

pub fn busctl_sets_what_a_workspace_may_have(fixture: &Fixture) -> Result<()> {
    let call = "busctl call ai.pandastack.api1 /ai/pandastack/api1 ai.pandastack.api1.Manager";
    let stranger = qemu_tests::api::Api::new(fixture.base()?, &fixture.foreign_token()?);
    let first = stranger.create_base()?;
    // Daemons that were just restarted are waited for.
    let post = |path: &str, body| stranger.post_patiently(path, &body);
    let create = || post("/v1/sandboxes", serde_json::json!({"template": "base"}));
    let set = |what: &str| fixture.ssh(&format!("{call} {what}"));

    set("SetQuota sst stranger sandboxes 1")?;
    set("SetQuota sst stranger volumes 0")?;
    let shown = set("Quotas s stranger")?;
    // Their records are the daemons'.
    fixture.ssh("systemctl restart pandastack-vmm pandastack-storage")?;
    let full = create()?;
    let fork = post(&format!("/v1/sandboxes/{first}/fork"), serde_json::json!({}))?;
    let volume = post("/v1/volumes", serde_json::json!({"name": "x"}))?;
    let there = stranger.list()?.len();
    stranger.delete(&first)?;
    let second = create()?;
    set("RemoveQuota ss stranger sandboxes")?;
    set("RemoveQuota ss stranger volumes")?;
    set("SetRate suuu stranger 1 1 1")?;
    let slow: Vec<_> = (0..4).map(|_| stranger.call("GET", "/v1/me", None)).collect::<Result<_>>()?;
    set("SetRate suuu stranger 0 0 0")?;
    stranger.delete_all()?;

    ensure!(shown.contains("\"sandboxes\" 1 1") && shown.contains("\"volumes\" 0 0"), "{shown}");
    for refused in [&full, &fork] {
        let promises = refused.status == 429 && refused.retry_after.is_some();
        ensure!(promises && refused.text("error")?.starts_with("max sandboxes reached"), "{refused:?}");
    }
    // Nothing that is deleted would make room for it.
    ensure!(volume.status == 429 && volume.retry_after.is_none(), "{volume:?}");
    ensure!(there == 1, "{there} sandboxes after the refusals");
    ensure!(second.status == 201, "room does not help: {second:?}");
    ensure!(slow.iter().any(|answer| answer.status == 429), "{slow:?}");
    Ok(())
}

pub fn systemctl_and_journalctl_show_a_sandbox(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let id = api.create_base()?;
    let unit = format!("pandastack-sandbox@{id}.service");

    let shown = fixture.ssh(&format!(
        "systemctl show {unit} -p ActiveState -p MemoryMax -p CPUQuotaPerSecUSec -p TasksMax -p Slice"
    ))?;
    api.exec(&id, "echo from-the-guest > /dev/console")?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    let console =
        fixture.ssh(&format!("journalctl --namespace=sandboxes --no-pager -o cat -u {unit} | tail -20"))?;
    let lines = fixture.ssh(&format!("journalctl --no-pager -o cat SANDBOX={id} | wc -l"))?;
    let state = fixture.ssh(&format!(
        "busctl call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Get s {id}"
    ))?;
    let events = fixture.ssh(&format!(
        "busctl call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager Events s {id}"
    ))?;
    api.delete(&id)?;

    ensure!(
        shown.contains("ActiveState=active") && shown.contains("Slice=pandastack-sandboxes.slice"),
        "{shown}"
    );
    ensure!(
        !shown.contains("MemoryMax=infinity") && !shown.contains("CPUQuotaPerSecUSec=infinity"),
        "no limits: {shown}"
    );
    ensure!(console.contains("from-the-guest"), "the console does not show it: {console}");
    ensure!(lines.trim().parse::<u32>()? >= 2, "the journal has {lines} lines of it");
    ensure!(state.contains("\"running\"") && events.contains("sandbox.running"), "{state} {events}");
    Ok(())
}

pub fn two_instances_have_different_users(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let (one, two) = (api.create_base()?, api.create_base()?);

    let uid = |id: &str| {
        fixture.ssh(&format!("stat -c %u /proc/$(systemctl show -P MainPID pandastack-sandbox@{id}.service)"))
    };
    let namespace = |id: &str, kind: &str| {
        fixture.ssh(&format!(
            "readlink /proc/$(systemctl show -P MainPID pandastack-sandbox@{id}.service)/ns/{kind}"
        ))
    };
    let (first, second) = (uid(&one)?, uid(&two)?);
    let mut shared = Vec::new();
    for kind in ["net", "mnt", "pid", "ipc"] {
        if namespace(&one, kind)? == namespace(&two, kind)? {
            shared.push(kind);
        }
    }
    let capabilities = fixture.ssh(&format!(
        "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp):' /proc/$(systemctl show -P MainPID pandastack-sandbox@{one}.service)/status"
    ))?;
    api.delete_all()?;

    ensure!(first != second && first.trim() != "0", "uids {first} and {second}");
    ensure!(shared.is_empty(), "shared namespaces: {shared:?}");
    ensure!(
        capabilities.contains("CapEff:\t0000000000000000")
            && capabilities.contains("CapBnd:\t0000000000000000"),
        "{capabilities}"
    );
    ensure!(
        capabilities.contains("NoNewPrivs:\t1") && capabilities.contains("Seccomp:\t2"),
        "{capabilities}"
    );
    Ok(())
}

pub fn vmm_may_manage_nothing_but_sandboxes(fixture: &Fixture) -> Result<()> {
    let as_vmm = "setpriv --reuid=pandastack-vmm --regid=pandastack-vmm --clear-groups";
    let busctl =
        "busctl call org.freedesktop.systemd1 /org/freedesktop/systemd1 org.freedesktop.systemd1.Manager";
    let mut allowed = Vec::new();
    for wish in [
        "StopUnit ss pandastack-api.service replace",
        "RestartUnit ss pandastack-network.service replace",
        "StartUnit ss pandastack-sandbox@../../x.service replace",
        "StartUnit ss debug-shell.service replace",
        "PowerOff",
    ] {
        if fixture.ssh(&format!("{as_vmm} {busctl} {wish} && echo allowed || true"))?.contains("allowed") {
            allowed.push(wish);
        }
    }
    let others = fixture.ssh(
        "setpriv --reuid=pandastack-network --regid=pandastack-network --clear-groups busctl call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager List s '' && echo allowed || true",
    )?;

    ensure!(allowed.is_empty(), "vmm may: {allowed:?}");
    ensure!(!others.contains("allowed"), "network may call vmm");
    Ok(())
}

/// The service that faces strangers reaches what programs serve, and no agent.
pub fn edge_reaches_ports_and_nothing_else(fixture: &Fixture) -> Result<()> {
    let api = fixture.api()?;
    let id = api.create_base()?;
    api.exec(&id, "(python3 -m http.server 8000 >/dev/null 2>&1 &) ; for i in $(seq 60); do curl -s -o /dev/null localhost:8000 && break; sleep 0.5; done")?;
    let ask = |wish: &str| {
        fixture.try_ssh(&format!(
            "setpriv --reuid=pandastack-edge --regid=pandastack-edge --clear-groups busctl call ai.pandastack.vmm1 /ai/pandastack/vmm1 ai.pandastack.vmm1.Manager {wish}"
        ))
    };

    let (port, said) = ask(&format!("OpenPort sqb {id} 8000 false"))?;
    let mut allowed = Vec::new();
    for wish in
        ["OpenAgent sb ID true", "OpenConsole sutb ID 9 0 false", "List s ''", "Delete s ID", "Capacity"]
    {
        let (code, said) = ask(&wish.replace("ID", &id))?;
        ensure!(code == 0 || said.contains("Access denied"), "{wish}: {said}");
        if code == 0 {
            allowed.push(wish);
        }
    }

    ensure!(port == 0, "a port: {said}");
    ensure!(allowed.is_empty(), "edge may: {allowed:?}");
    ensure!(api.delete(&id)?.status == 204, "not deleted");
    Ok(())
}
