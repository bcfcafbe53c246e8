"""Pause, resume, hibernate, wake: what stays, what wakes, and what a wrong state is told."""

import threading

import pytest
from pandastack.exceptions import BadRequestError, NotFoundError

import alive


def test_a_paused_sandbox_keeps_its_processes(client, fresh):
    before = alive.start(fresh)

    fresh.pause()
    assert alive.status(client, fresh) == "paused"
    fresh.resume()

    assert alive.status(client, fresh) == "running"
    alive.goes_on(fresh, before)


def test_a_paused_sandbox_refuses_what_needs_the_guest(client, http, fresh):
    fresh.pause()

    for method, below, kwargs in (("POST", "exec", {"json": {"cmd": "true"}}), ("POST", "exec/stream", {"json": {"cmd": "true"}}),
                                  ("GET", "fs?path=/etc/hostname", {}), ("PUT", "fs?path=/root/x", {"data": b"x"}), ("POST", "wake", {})):
        answer = http(method, f"/v1/sandboxes/{fresh.id}/{below}", **kwargs)
        assert answer.status_code == 409 and answer.json()["error"], (below, answer.status_code, answer.text)
    assert alive.status(client, fresh) == "paused"


def test_hibernation_keeps_memory_disk_processes_and_identity(client, fresh):
    before = alive.start(fresh)
    fresh.filesystem.write("/root/kept", "on disk")
    fresh.exec("echo in memory > /dev/shm/kept")
    identity = fresh.exec(alive.IDENTITY).stdout

    for _ in range(2):
        fresh.hibernate()
        assert alive.status(client, fresh) == "hibernated"
        fresh.wake()
        got = client.sandboxes.get(fresh.id)
        assert (got.status, got.boot_mode, got.id) == ("running", "wake", fresh.id) and got.guest_ip
        before = alive.goes_on(fresh, before)

    assert fresh.filesystem.read("/root/kept") == b"on disk"
    assert fresh.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/kept /dev/shm/kept").stdout == "on diskin memory\n"
    assert fresh.exec(alive.IDENTITY).stdout == identity


def test_a_woken_guest_knows_the_time(http, client, making):
    from email.utils import parsedate_to_datetime
    sandbox = making(client.sandboxes.create(template="base"))
    sandbox.hibernate()
    sandbox.wake()

    before = parsedate_to_datetime(http("GET", "/healthz").headers["Date"]).timestamp()
    now = float(sandbox.exec("date +%s.%N").stdout)
    after = parsedate_to_datetime(http("GET", "/healthz").headers["Date"]).timestamp()

    assert before - 1 <= now <= after + 2


@pytest.mark.parametrize("verb, alias, state", [("hibernate", "stop", "hibernated"), ("wake", "start", "running")])
def test_aliases_and_repetition(http, fresh, verb, alias, state):
    if verb == "wake":
        fresh.hibernate()

    for name in (alias, verb, alias):
        answer = http("POST", f"/v1/sandboxes/{fresh.id}/{name}")
        assert answer.status_code == 200 and answer.json()["status"] == state, (name, answer.text)


def test_pause_and_resume_may_be_repeated_in_every_form(http, fresh):
    forms = ({}, {"data": b"", "headers": {"Content-Type": "text/plain;charset=UTF-8"}}, {"json": {}})

    for verb in ("resume", "pause", "resume"):
        assert [http("POST", f"/v1/sandboxes/{fresh.id}/{verb}", **form).status_code for form in forms] == [204] * 3, verb


def test_a_paused_sandbox_can_be_hibernated(client, fresh):
    before = alive.start(fresh)
    fresh.pause()
    fresh.hibernate()

    fresh.wake()

    alive.goes_on(fresh, before)


def test_wrong_states_are_a_409_and_change_nothing(client, http, fresh):
    fresh.hibernate()

    for verb in ("resume", "pause"):
        answer = http("POST", f"/v1/sandboxes/{fresh.id}/{verb}")
        assert answer.status_code == 409 and answer.json()["error"], (verb, answer.status_code, answer.text)
        with pytest.raises(BadRequestError):
            getattr(fresh, verb)()
    assert alive.status(client, fresh) == "hibernated"


def test_reading_the_status_wakes_nothing(client, http, fresh):
    fresh.hibernate()

    assert client.sandboxes.get(fresh.id).status == "hibernated"
    assert fresh.lifecycle()["persistent"] is False
    assert [one.status for one in client.sandboxes.list() if one.id == fresh.id] == ["hibernated"]
    assert http("GET", "/metrics").status_code == 200

    assert alive.status(client, fresh) == "hibernated"


@pytest.mark.parametrize("use", [
    lambda sandbox: sandbox.exec("echo on").stdout == "on\n",
    lambda sandbox: sandbox.exec_stream("exit 4") == 4,
    lambda sandbox: sandbox.filesystem.read("/root/kept") == b"kept",
    lambda sandbox: sandbox.filesystem.write("/root/new", "x") is not None,
    lambda sandbox: any(info.name == "kept" for info in sandbox.filesystem.listdir("/root"))],
    ids=["exec", "exec_stream", "read", "write", "listdir"])
def test_what_needs_the_guest_wakes_it(client, shared, use):
    shared.filesystem.write("/root/kept", "kept")
    shared.hibernate()

    assert use(shared)

    assert alive.status(client, shared) == "running"


def test_many_requests_at_once_wake_it_once(client, fresh):
    before = alive.start(fresh)
    fresh.hibernate()
    failed = []

    def one(number):
        try:
            result = client.__class__().sandboxes.get(fresh.id).exec(f"echo {number} > /dev/shm/{number}; echo {number}")
            assert result.stdout == f"{number}\n"
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    assert not failed
    # Two machines would each have some of them.
    assert fresh.exec("cd /dev/shm && cat 0 1 2 3 4 5").stdout == "0\n1\n2\n3\n4\n5\n"
    alive.goes_on(fresh, before)


def test_a_hibernated_or_paused_sandbox_can_be_deleted(client):
    for verb in ("hibernate", "pause"):
        sandbox = client.sandboxes.create(template="base")
        getattr(sandbox, verb)()

        sandbox.kill()

        with pytest.raises(NotFoundError):
            client.sandboxes.get(sandbox.id)


def test_an_idle_hibernated_sandbox_is_deleted_as_a_running_one(client, making):
    import time
    sandbox = making(client.sandboxes.create(template="base", ttl_seconds=5))
    sandbox.hibernate()

    deadline = time.time() + 60
    while time.time() < deadline and sandbox.id in [other.id for other in client.sandboxes.list()]:
        time.sleep(2)

    assert sandbox.id not in [other.id for other in client.sandboxes.list()]


@pytest.mark.parametrize("verb", ["pause", "resume", "hibernate", "stop", "wake", "start", "snapshots", "fork", "fork-tree", "promote"])
def test_nobody_else_can(http, foreign, shared, verb):
    with pytest.raises(NotFoundError):
        foreign._request("POST", f"/sandboxes/{shared.id}/{verb}", json={"count": 2} if verb == "fork-tree" else None)
    for id in ("a" * 20, "x", "00000000-0000-0000-0000-000000000001"):
        assert http("POST", f"/v1/sandboxes/{id}/{verb}").status_code == 404
