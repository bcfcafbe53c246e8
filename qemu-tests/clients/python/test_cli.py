"""The command line of the npm package, unmodified: every one of its commands about sandboxes, files, snapshots, tokens and identity."""

import json
import os
import subprocess

import pytest
from pandastack.exceptions import NotFoundError
from surface import NPM, cli, module, note

pytestmark = pytest.mark.timeout(600)


def told(*args, **options):
    return json.loads(cli(*args, **options).stdout)


@pytest.fixture
def home(tmp_path):
    """A home directory of its own, with a token only in its file."""
    config = tmp_path / ".config/pandastack/config.json"
    config.parent.mkdir(parents=True)
    config.write_text(json.dumps({"token": os.environ["PANDASTACK_API_KEY"], "other": 1}))
    return tmp_path, config


def test_a_sandbox_is_created_shown_and_deleted(client, making):
    made = told("sandbox", "create", "--template", "base", "--ttl", "600", "--metadata", "a=b,c=d")
    sandbox = making(client.sandboxes.get(made["id"]))

    assert (made["status"], made["metadata"]["a"], made["metadata"]["c"]) == ("running", "b", "d")
    assert told("sandbox", "get", made["id"])["id"] == made["id"]
    assert made["id"] in [one["id"] for one in told("sandbox", "list")]
    assert told("sandbox", "lifecycle", made["id"])["ttl_seconds"] == 600
    assert told("sandbox", "set-ttl", made["id"], "--ttl", "700")["ttl_seconds"] == 700
    assert told("sandbox", "set-persistent", made["id"], "--persistent", "true")["persistent"] is True
    assert told("sandbox", "set-persistent", made["id"], "--persistent", "false")["persistent"] is False
    assert made["id"] in cli("sandbox", "delete", made["id"]).stdout
    with pytest.raises(NotFoundError):
        sandbox.refresh()
    assert cli("sandbox", "get", made["id"], check=False).returncode == 1


def test_the_default_template_and_a_snapshot(client, fresh, making):
    plain = making(client.sandboxes.get(told("sandbox", "create")["id"]))
    fresh.filesystem.write("/root/kept", "then")

    taken = told("sandbox", "snapshot", fresh.id)["id"]

    try:
        assert taken in [one["id"] for one in told("snapshot", "list")]
        assert told("snapshot", "get", taken)["id"] == taken
        copy = making(client.sandboxes.get(told("sandbox", "create", "--from-snapshot", taken)["id"]))
        assert copy.filesystem.read("/root/kept") == b"then" and plain.status == "running"
    finally:
        assert taken in cli("snapshot", "delete", taken).stdout
    with pytest.raises(NotFoundError):
        client.snapshots.get(taken)


def test_commands_and_code(shared, interpreter):
    ran = cli("sandbox", "exec", shared.id, "--", "echo out; echo err >&2; true")
    assert (ran.stdout, ran.stderr) == ("out\n", "err\n")
    assert cli("sandbox", "exec", shared.id, "--", "exit 7", check=False).returncode == 7
    assert cli("sandbox", "run-code", interpreter.id, "--language", "python", "--", "print(6 * 7)").stdout == "42\n"
    assert cli("sandbox", "run-code", shared.id, "--", "echo $((6 * 7))").stdout == "42\n"


def test_logs(fresh):
    fresh.exec("echo to-out; echo to-err >&2")

    shown = cli("sandbox", "logs", fresh.id).stdout

    assert "to-out" in shown and "to-err" in shown
    only = cli("sandbox", "logs", fresh.id, "--stream", "stderr").stdout
    assert "to-err" in only and "to-out" not in only


@pytest.mark.parametrize("words", [("sandbox", "ssh"), ("ssh",)])
def test_a_terminal(shared, words):
    ran = subprocess.run(["node", str(NPM), *words, shared.id], input="echo $((6 * 7)) of $TERM; exit\r", capture_output=True, text=True,
                         timeout=120)

    assert ran.returncode == 0 and "42 of xterm-256color" in ran.stdout, (ran.stdout, ran.stderr)
    note("cli:" + " ".join(words))


def test_states(client, fresh):
    for verb, status in (("pause", "paused"), ("resume", "running"), ("hibernate", "hibernated"), ("wake", "running")):
        assert fresh.id in cli("sandbox", verb, fresh.id).stdout
        assert client.sandboxes.get(fresh.id).status == status


def test_forks(client, fresh, making):
    child = making(client.sandboxes.get(told("sandbox", "fork", fresh.id, "--metadata", "a=b")["id"]))
    tree = [making(client.sandboxes.get(one["id"])) for one in told("sandbox", "fork-tree", fresh.id, "--count", "2")]

    promoted = told("sandbox", "promote", tree[0].id)

    assert child.metadata["a"] == "b" and promoted["winner"] == tree[0].id
    assert fresh.id in [sandbox.id for sandbox in client.sandboxes.list()]


def test_previews(shared):
    # This client knows no other suffix than the API's host.
    host = f"3000-{shared.id}.127.0.0.1"
    assert cli("sandbox", "preview-url", shared.id, "--port", "3000").stdout.strip() == f"https://{host}"
    assert f"http://{host}" in cli("sandbox", "preview-url", shared.id, "--port", "3000", "--scheme", "http").stdout
    listens = "import socket, time; s = socket.create_server(('127.0.0.1', 3000)); time.sleep(100)"
    shared.exec(f'setsid python3 -c "{listens}" >/dev/null 2>&1 < /dev/null &')
    shared.exec("for i in $(seq 100); do ss -ltn 2>/dev/null | grep -q :3000 && exit 0; sleep 0.2; done", timeout_seconds=60)

    shown = told("sandbox", "preview-urls", shared.id)

    shared.exec("pkill -f create_server")
    assert host in json.dumps(shown)


@pytest.mark.parametrize("words", [["invite"], ["invites"], ["revoke-invite", "x"], ["participants"]])
def test_invitations_fail_inside_the_client(shared, words):
    ran = cli("sandbox", words[0], shared.id, *words[1:], check=False)

    # The sandbox is there and was got; what comes next is no request.
    assert ran.returncode == 1 and "is not a function" in ran.stderr, ran.stderr


def test_files(shared, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.write_bytes("p\u00e4nd\u00e4\n".encode() * 1000)

    cli("fs", "write", shared.id, "--path", "/tmp/cli/a b", "--content", "from the line")
    assert cli("fs", "read", shared.id, "--path", "/tmp/cli/a b").stdout == "from the line"
    cli("fs", "upload", shared.id, "--local", str(here), "--remote", "/tmp/cli/up")
    assert shared.filesystem.read("/tmp/cli/up") == here.read_bytes()
    cli("fs", "download", shared.id, "--remote", "/tmp/cli/up", "--local", str(there))
    assert there.read_bytes() == here.read_bytes()
    assert cli("fs", "read", shared.id, "--path", "/none", check=False).returncode == 1


def test_the_catalogue():
    assert {"base", "code-interpreter"} <= {one["name"] for one in told("template", "list")}
    assert told("template", "get", "base")["name"] == "base"
    assert cli("template", "get", "nothing", check=False).returncode == 1


@pytest.mark.timeout(1800)
def test_a_template_is_built_followed_and_deleted(client, small_archive, tmp_path, making):
    path, name = tmp_path / "rootfs.tar", "suite-cli"
    path.write_bytes(small_archive)

    made = told("template", "build", "--name", name, "--rootfs", str(path), "--size-mb", "128")
    try:
        lines = cli("template", "build-logs", made["id"], "--follow", timeout=1500).stdout.splitlines()
        assert (made["status"], lines[-1]) == ("queued", "==> done")
        assert told("template", "build-status", made["id"])["status"] == "done"
        assert made["id"] in [one["id"] for one in told("template", "builds")]
        assert making(client.sandboxes.create(template=name)).exec("cat /etc/passwd").stdout.startswith("root:")
    finally:
        deleted = cli("template", "delete", name, check=False)
    assert (deleted.returncode, deleted.stdout) == (0, f"deleted template {name}\n")
    note("cli:template delete")


def test_a_build_by_the_modules_command_line(http, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM base\nRUN sleep 1000\n")

    # Waiting, it would call a function that its own module does not have.
    build = module("template", "build", "--name", "suite-module", "--no-wait", cwd=tmp_path).stdout.strip()

    assert http("POST", f"/v1/templates/builds/{build}/cancel").status_code == 200
    assert module("template", "build-logs", build, "--follow", timeout=600).returncode == 0
    assert http("GET", f"/v1/templates/builds/{build}").json()["status"] == "failed"


def test_tokens(client):
    made = told("token", "create", "--label", "from-cli")

    assert made["prefix"] in [one["prefix"] for one in told("token", "list")]
    mine = told("me", env={"PANDASTACK_API_KEY": made["token"]})
    assert mine["user_id"] == client.me()["user_id"]
    assert made["prefix"] in cli("token", "revoke", made["prefix"]).stdout
    assert cli("me", env={"PANDASTACK_API_KEY": made["token"]}, check=False).returncode == 1


def test_login_tells_how_and_logout_forgets_the_token(home):
    directory, config = home
    alone = {key: value for key, value in os.environ.items() if key != "PANDASTACK_API_KEY"} | {"HOME": str(directory)}
    run = lambda *args: subprocess.run(["node", str(NPM), *args], env=alone, capture_output=True, text=True, timeout=60)
    assert run("me").returncode == 0
    login = run("auth", "login")
    assert login.returncode == 0 and "PANDASTACK_API_KEY" in login.stdout

    logout = run("auth", "logout")

    assert logout.returncode == 0 and json.loads(config.read_text()) == {"other": 1}
    assert run("me").returncode == 1
    note("cli:auth login")
    note("cli:auth logout")


def test_version_and_help():
    assert cli("version").stdout.strip() == "pandastack 0.9.0"
    assert "fork-tree" in cli("--help", check=False).stdout
    note("cli:help")
