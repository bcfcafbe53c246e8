"""Snapshots: one point in time of memory and disk, independent of what it was taken of."""

import pytest
from pandastack.exceptions import BadRequestError, NotFoundError

import alive


@pytest.fixture
def taking(client):
    """Takes snapshots and deletes what is left of them."""
    made = []

    def take(sandbox):
        made.append(sandbox.snapshot())
        return made[-1]

    yield take
    for snapshot in made:
        try:
            client.snapshots.delete(snapshot)
        except NotFoundError:
            pass


def test_a_snapshot_is_listed_got_and_deleted(client, fresh, taking):
    one, two = taking(fresh), taking(fresh)

    listed = [snapshot["id"] for snapshot in client.snapshots.list(sandbox_id=fresh.id)]
    got = client.snapshots.get(one)
    client.snapshots.delete(one)

    assert listed == [two, one] and two in [snapshot["id"] for snapshot in client.snapshots.list()]
    assert (got["id"], got["sandbox_id"], got["template"]) == (one, fresh.id, "base")
    assert isinstance(got["size_bytes"], int) and got["size_bytes"] > 0 and isinstance(got["created_at"], str)
    assert [snapshot["id"] for snapshot in client.snapshots.list(sandbox_id=fresh.id)] == [two]
    for call in (client.snapshots.get, client.snapshots.delete):
        with pytest.raises(NotFoundError):
            call(one)
    assert client.snapshots.list(sandbox_id="a" * 20) == []


def test_no_answer_shows_a_path_of_the_host(http, client, fresh):
    made = http("POST", f"/v1/sandboxes/{fresh.id}/snapshots")
    texts = [made.text] + [http("GET", path).text for path in ("/v1/snapshots", f"/v1/snapshots/{made.json()['id']}")]
    client.snapshots.delete(made.json()["id"])

    assert made.status_code == 201 and made.json()["sandbox_id"] == fresh.id and made.json()["created_at"]
    for text in texts:
        assert "/var/" not in text and "/vm" not in text and "mem_path\":\"/" not in text, text


def test_a_sandbox_from_a_snapshot_has_memory_and_disk_of_that_moment(client, fresh, taking, making):
    fresh.filesystem.write("/root/kept", "then")
    fresh.exec("echo then > /dev/shm/kept")
    before = alive.start(fresh)
    snapshot = taking(fresh)
    fresh.exec("echo later > /root/kept; echo later > /dev/shm/kept; sync")

    copy = making(client.sandboxes.create(template="base", from_snapshot=snapshot, metadata={"of": "snapshot"}))

    assert (copy.status, copy.from_snapshot, copy.metadata["of"]) == ("running", snapshot, "snapshot")
    assert copy.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/kept /dev/shm/kept").stdout == "thenthen\n"
    alive.goes_on(copy, before)
    alive.goes_on(fresh, before)
    assert fresh.exec("cat /root/kept").stdout == "later\n"
    for a, b in zip(copy.exec(alive.IDENTITY).stdout.split("\n")[:3], fresh.exec(alive.IDENTITY).stdout.split("\n")[:3]):
        assert a and a != b
    assert copy.guest_ip != client.sandboxes.get(fresh.id).guest_ip


def test_the_snapshots_template_wins(client, fresh, taking, making):
    copy = making(client.sandboxes.create(from_snapshot=taking(fresh)))

    assert (copy.template, copy.memory_mb) == ("base", 2048)


def test_copies_outlive_the_snapshot_and_the_snapshot_its_sandbox(client, making, taking):
    source = making(client.sandboxes.create(template="base"))
    source.filesystem.write("/root/kept", "kept")
    snapshot = taking(source)
    source.kill()

    one = making(client.sandboxes.create(template="base", from_snapshot=snapshot))
    client.snapshots.delete(snapshot)

    assert one.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/kept; python3 -c 'print(7)'").stdout == "kept7\n"
    one.hibernate()
    assert one.filesystem.read("/root/kept") == b"kept"
    with pytest.raises((NotFoundError, BadRequestError)):
        client.sandboxes.create(template="base", from_snapshot=snapshot)


def test_a_snapshot_of_a_copy_is_as_good(client, fresh, taking, making):
    fresh.filesystem.write("/root/one", "1")
    copy = making(client.sandboxes.create(template="base", from_snapshot=taking(fresh)))
    copy.filesystem.write("/root/two", "2")

    second = making(client.sandboxes.create(template="base", from_snapshot=taking(copy)))

    assert second.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/one /root/two").stdout == "12"


@pytest.mark.parametrize("verb, state", [("hibernate", "hibernated"), ("pause", "paused")])
def test_a_sandbox_at_rest_stays_so(client, fresh, taking, making, verb, state):
    before = alive.start(fresh)
    getattr(fresh, verb)()

    snapshot = taking(fresh)

    assert alive.status(client, fresh) == state
    alive.goes_on(making(client.sandboxes.create(template="base", from_snapshot=snapshot)), before)
    fresh.resume() if verb == "pause" else fresh.wake()
    alive.goes_on(fresh, before)


def test_a_foreign_snapshot_does_not_exist(client, foreign, shared, taking):
    snapshot = taking(shared)

    assert snapshot not in [other["id"] for other in foreign.snapshots.list()]
    for call in (foreign.snapshots.get, foreign.snapshots.delete):
        with pytest.raises(NotFoundError):
            call(snapshot)
    with pytest.raises((NotFoundError, BadRequestError)):
        foreign.sandboxes.create(template="base", from_snapshot=snapshot)
    assert client.snapshots.get(snapshot)["id"] == snapshot
