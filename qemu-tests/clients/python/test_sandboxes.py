import datetime
import threading
import time
import uuid

import pytest
from pandastack import Client, Sandbox
from pandastack.exceptions import AuthError, BadRequestError, NotFoundError


def test_a_created_sandbox_is_running_and_listed(client, shared):
    listed = {sandbox.id: sandbox for sandbox in client.sandboxes.list()}

    got = client.sandboxes.get(shared.id)

    assert got.status == "running" and shared.id in listed
    assert (got.cpu, got.memory_mb, got.template) == (2, 2048, "base")
    assert got.metadata["suite"] == "shared"
    assert isinstance(got.boot_ms, int) and got.guest_ip


def test_the_module_level_client_works(client, shared):
    assert Sandbox.get(shared.id).id == shared.id
    assert shared.id in [sandbox.id for sandbox in Sandbox.list()]


def test_a_second_create_is_restored_and_two_guests_differ(client, shared, fresh):
    assert shared.boot_mode == "snapshot" and fresh.boot_mode == "snapshot"
    probe = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; head -c 16 /dev/urandom | od -An -tx1"

    one, two = shared.exec(probe).stdout.split("\n"), fresh.exec(probe).stdout.split("\n")

    for name, a, b in zip(["machine-id", "boot-id", "hostname", "random"], one, two):
        assert a and b and a != b, name
    assert two[2].startswith("sb-" + fresh.id[:8])


def test_the_clock_agrees_with_the_host(http, fresh):
    before = http("GET", "/healthz").headers["Date"]
    guest = float(fresh.exec("date +%s.%N").stdout)
    after = http("GET", "/healthz").headers["Date"]

    stamp = lambda text: datetime.datetime.strptime(text, "%a, %d %b %Y %H:%M:%S %Z").replace(
        tzinfo=datetime.timezone.utc).timestamp()
    assert stamp(before) - 1 <= guest <= stamp(after) + 2


def test_ttl_and_persistence_are_set_and_read(fresh):
    assert fresh.lifecycle()["persistent"] is False

    assert fresh.set_ttl(1234)["ttl_seconds"] == 1234
    assert fresh.set_persistent(True)["persistent"] is True

    assert fresh.lifecycle()["ttl_seconds"] == 1234
    assert fresh.refresh().persistent is True
    fresh.set_persistent(False)


def test_an_idle_sandbox_is_deleted_and_a_persistent_one_is_not(client):
    idle = client.sandboxes.create(template="base", ttl_seconds=5)
    kept = client.sandboxes.create(template="base", ttl_seconds=5, persistent=True)

    deadline = time.time() + 60
    while time.time() < deadline and idle.id in [sandbox.id for sandbox in client.sandboxes.list()]:
        time.sleep(2)

    listed = [sandbox.id for sandbox in client.sandboxes.list()]
    assert idle.id not in listed and kept.id in listed
    kept.kill()


def test_a_killed_sandbox_is_gone(client):
    sandbox = client.sandboxes.create(template="base")

    sandbox.kill()

    with pytest.raises(NotFoundError):
        client.sandboxes.get(sandbox.id)
    with pytest.raises(NotFoundError):
        sandbox.exec("true")


def test_the_context_manager_kills(client):
    with client.sandboxes.create(template="base") as sandbox:
        assert sandbox.exec("echo in").stdout == "in\n"

    assert sandbox.id not in [other.id for other in client.sandboxes.list()]


def test_creates_side_by_side_all_work(client):
    made, failed = [], []

    def one():
        try:
            made.append(client.__class__().sandboxes.create(template="base"))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=one) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    assert not failed and len({sandbox.id for sandbox in made}) == 6
    assert [sandbox.exec("echo $((20+3))").stdout for sandbox in made] == ["23\n"] * 6
    [sandbox.kill() for sandbox in made]


def test_an_idempotency_key_gives_the_same_sandbox(http):
    key = str(uuid.uuid4())
    body = {"template": "base", "metadata": {"k": "v"}}

    one = http("POST", "/v1/sandboxes", json=body, headers={"Idempotency-Key": key}).json()
    two = http("POST", "/v1/sandboxes", json=body, headers={"Idempotency-Key": key}).json()
    other = http("POST", "/v1/sandboxes", json={"template": "base"}, headers={"Idempotency-Key": key})

    assert one["id"] == two["id"]
    assert 400 <= other.status_code < 500
    assert http("DELETE", f"/v1/sandboxes/{one['id']}").status_code == 204


def test_ubuntu_is_an_alias_of_base(client):
    sandbox = client.sandboxes.create(template="ubuntu-24.04")

    assert sandbox.template in ("base", "ubuntu-24.04")
    sandbox.kill()


def test_write_only_metadata_is_not_returned(client):
    sandbox = client.sandboxes.create(template="base", metadata={"secret.key": "hidden", "open": "shown"})

    listed = next(other for other in client.sandboxes.list() if other.id == sandbox.id)

    assert listed.metadata.get("open") == "shown"
    assert "secret.key" not in listed.metadata and "hidden" not in str(listed.metadata)
    sandbox.kill()


def test_every_error_class_is_raised_for_its_cause(client, shared):
    with pytest.raises(AuthError):
        Client(api_key="pds_" + "0" * 32).sandboxes.list()
    with pytest.raises(BadRequestError, match="unknown template"):
        client.sandboxes.create(template="no-such-template")
    with pytest.raises(NotFoundError):
        client.sandboxes.get("a" * 20)
    with pytest.raises(NotFoundError):
        shared.filesystem.read("/no/such/file")
    with pytest.raises(BadRequestError):
        client.sandboxes.create(template="base", ttl_seconds=-1)


def test_a_foreign_sandbox_does_not_exist(foreign, shared, client):
    assert shared.id not in [sandbox.id for sandbox in foreign.sandboxes.list()]
    with pytest.raises(NotFoundError):
        foreign.sandboxes.get(shared.id)
    stranger = foreign.sandboxes
    for attempt in (
        lambda: stranger.delete(shared.id),
        lambda: foreign._request("POST", f"/sandboxes/{shared.id}/exec", json={"cmd": "true"}),
        lambda: foreign._request("GET", f"/sandboxes/{shared.id}/fs", params={"path": "/etc/hostname"}),
        lambda: foreign._request("PATCH", f"/sandboxes/{shared.id}/lifecycle", json={"ttl_seconds": 5}),
    ):
        with pytest.raises(NotFoundError):
            attempt()
    assert client.sandboxes.get(shared.id).status == "running"
