"""Volumes: attached at create, mounted at /mnt/<name>, one writer or many readers, cloned for children."""

import concurrent.futures
import itertools

import pytest
from pandastack.exceptions import BadRequestError, NotFoundError

NUMBER = itertools.count()
SIZE = 64


@pytest.fixture
def volume(client):
    """Makes volumes; what is left of them is deleted when the test's sandboxes are gone."""
    made = []

    def make(size_mb=SIZE):
        made.append(f"suite-{next(NUMBER)}")
        client.volumes.create(made[-1], size_mb)
        return made[-1]

    yield make
    for name in made:
        try:
            client.volumes.delete(name)
        except NotFoundError:
            pass


# `volume` is asked for first everywhere: it is torn down last, after the sandboxes that hold what it made.
def attached(client, making, *names, read_only=False, **kwargs):
    return making(client.sandboxes.create(template="base", volumes=[{"name": name, "read_only": read_only} for name in names], **kwargs))


def test_a_volume_is_made_listed_got_and_deleted(client):
    made = client.volumes.create("suite.A_1-x", SIZE)

    got, listed = client.volumes.get("suite.A_1-x"), client.volumes.list()
    with pytest.raises(BadRequestError):
        client.volumes.create("suite.A_1-x", SIZE)
    client.volumes.delete("suite.A_1-x")

    assert (made["name"], made["size_mb"], made["size_bytes"]) == ("suite.A_1-x", SIZE, SIZE << 20)
    assert (got["size_mb"], [one["name"] for one in listed].count("suite.A_1-x")) == (SIZE, 1)
    for call in (client.volumes.get, client.volumes.delete):
        with pytest.raises(NotFoundError):
            call("suite.A_1-x")


def test_it_is_mounted_where_the_answer_says_and_keeps_what_is_written(volume, client, http, making):
    name = volume()
    one = attached(client, making, name)
    told = http("GET", f"/v1/sandboxes/{one.id}").json()["volumes"]

    one.exec(f"echo first > /mnt/{name}/f; sync", check=True)
    one.hibernate()
    with pytest.raises(BadRequestError):
        client.volumes.delete(name)
    assert one.exec(f"sync; echo 3 > /proc/sys/vm/drop_caches; cat /mnt/{name}/f; echo second >> /mnt/{name}/f; sync").stdout == "first\n"
    with pytest.raises(BadRequestError):
        client.volumes.delete(name)
    one.kill()
    two = attached(client, making, name)

    assert [(volume["name"], volume["path"], volume["read_only"]) for volume in told] == [(name, f"/mnt/{name}", False)]
    assert two.exec(f"cat /mnt/{name}/f; findmnt -no FSTYPE /mnt/{name}").stdout == "first\nsecond\next4\n"


def test_unsynced_writes_are_there_after_a_clean_end_too(volume, client, making):
    name = volume()
    one = attached(client, making, name)
    one.exec(f"echo lazy > /mnt/{name}/f; sync -f /mnt/{name}", check=True)
    one.kill()

    assert attached(client, making, name).filesystem.read(f"/mnt/{name}/f") == b"lazy\n"


def test_the_guests_kernel_refuses_writes_to_a_read_only_volume(volume, client, http, making):
    name = volume()
    writer = attached(client, making, name)
    writer.exec(f"echo kept > /mnt/{name}/f; sync", check=True)
    writer.kill()

    reader = attached(client, making, name, read_only=True)

    device = reader.exec(f"findmnt -no SOURCE /mnt/{name}").stdout.strip()
    assert reader.exec(f"cat /mnt/{name}/f").stdout == "kept\n"
    assert reader.exec(f"touch /mnt/{name}/g").exit_code != 0
    assert reader.exec(f"mount -o remount,rw /mnt/{name} && touch /mnt/{name}/g").exit_code != 0
    assert reader.exec(f"blockdev --setrw {device}; dd if=/dev/zero of={device} bs=4096 count=1 oflag=direct").exit_code != 0
    assert http("GET", f"/v1/sandboxes/{reader.id}").json()["volumes"][0]["read_only"] is True
    other = attached(client, making, name, read_only=True)
    assert other.exec(f"cat /mnt/{name}/f; ls /mnt/{name}/g 2>/dev/null").stdout == "kept\n"


def test_one_writer_or_many_readers(volume, client, making):
    written, read = volume(), volume()
    writer, _ = attached(client, making, written), attached(client, making, read, read_only=True)
    before = len(client.sandboxes.list())

    for name, read_only in ((written, False), (written, True), (read, False)):
        with pytest.raises(BadRequestError):
            client.sandboxes.create(template="base", volumes=[{"name": name, "read_only": read_only}])

    assert len(client.sandboxes.list()) == before
    writer.hibernate()
    with pytest.raises(BadRequestError):
        client.sandboxes.create(template="base", volumes=[{"name": written}])
    writer.kill()
    assert attached(client, making, written).exec(f"touch /mnt/{written}/ok").exit_code == 0


def test_four_of_a_kind_and_not_five(volume, client, http, making):
    names = [volume() for _ in range(5)]

    for read_only in (False, True):
        answer = http("POST", "/v1/sandboxes", json={"template": "base", "volumes": [{"name": name, "read_only": read_only} for name in names]})
        assert answer.status_code == 400 and answer.json()["error"], (answer.status_code, answer.text)
    full = attached(client, making, *names[:4])

    wrote = full.exec("".join(f"echo {name} > /mnt/{name}/f && cat /mnt/{name}/f;" for name in names[:4]))
    assert wrote.stdout.split() == names[:4]
    order = full.exec("".join(f"findmnt -no SOURCE /mnt/{name};" for name in names[:4])).stdout.split()
    assert order == sorted(order), "the devices are not in the order asked for"


def test_writable_and_read_only_ones_together(volume, client, making):
    writable, read_only = volume(), volume()

    one = making(client.sandboxes.create(template="base", volumes=[{"name": read_only, "read_only": True}, {"name": writable}]))

    assert one.exec(f"touch /mnt/{writable}/f").exit_code == 0
    assert one.exec(f"touch /mnt/{read_only}/f").exit_code != 0


def test_a_volume_grows_while_nobody_has_it(volume, client, http, making):
    name = volume()
    holder = attached(client, making, name)
    holder.exec(f"echo kept > /mnt/{name}/f; sync", check=True)
    blocks = f"df -B1M --output=size /mnt/{name} | tail -1"
    small = int(holder.exec(blocks).stdout)
    grow = lambda body, which=name: http("PATCH", f"/v1/volumes/{which}", json=body)

    while_held = grow({"size_mb": 4 * SIZE})
    holder.kill()
    grown = grow({"size_mb": 4 * SIZE})
    again = attached(client, making, name)

    assert while_held.status_code == 409 and while_held.json()["error"]
    assert grown.status_code == 200 and grown.json()["size_mb"] == 4 * SIZE and client.volumes.get(name)["size_mb"] == 4 * SIZE
    assert again.exec(f"cat /mnt/{name}/f").stdout == "kept\n" and int(again.exec(blocks).stdout) > 3 * small
    again.kill()
    for body in ({"size_mb": SIZE}, {"size_mb": 0}, {"size_mb": -1}, {"size_mb": "9999"}, {"size_mb": 65537}, {"size_mb": 1.5}, {}, []):
        assert grow(body).status_code == 400, body
    assert grow({"size_mb": SIZE}, "nobody-has-this").status_code == 404
    assert client.volumes.get(name)["size_mb"] == 4 * SIZE


@pytest.mark.parametrize("way", ["fork", "snapshot"])
def test_a_child_has_a_clone_of_its_own(volume, client, http, making, way):
    name = volume()
    parent = attached(client, making, name)
    # Not synced: it is in the parent's memory, or on the disk, but for the child it is there.
    parent.exec(f"echo parent > /mnt/{name}/f")
    if way == "fork":
        child = making(parent.fork())
    else:
        snapshot = parent.snapshot()
        child = making(client.sandboxes.create(template="base", from_snapshot=snapshot))
        client.snapshots.delete(snapshot)

    read = f"sync; echo 3 > /proc/sys/vm/drop_caches; cat /mnt/{name}/f"
    assert child.exec(f"{read}; echo child > /mnt/{name}/f; sync").stdout == "parent\n"
    assert parent.exec(read).stdout == "parent\n"
    child.hibernate()
    assert child.exec(read).stdout == "child\n"
    assert [one["name"] for one in http("GET", f"/v1/sandboxes/{child.id}").json()["volumes"]] == [name]
    parent.kill()
    # The clone is the child's; the volume is free.
    assert attached(client, making, name).exec(f"cat /mnt/{name}/f").stdout == "parent\n"
    child.kill()
    assert client.volumes.get(name)["size_mb"] == SIZE


@pytest.fixture
def keep(http):
    """Takes snapshots of volumes; what is left of them is deleted."""
    made = []

    def take(name, **body):
        answer = http("POST", f"/v1/volumes/{name}/snapshots", json=body)
        assert answer.status_code == 201, (answer.status_code, answer.text)
        made.append(answer.json())
        return made[-1]

    yield take
    for one in made:
        assert http("DELETE", f"/v1/volumes/{one['volume']}/snapshots/{one['id']}").status_code in (204, 404)


def copied(http, name, snapshot, **more):
    return http("POST", "/v1/volumes", json={"name": name, "from_snapshot": snapshot["id"], **more})


def test_a_snapshot_has_what_the_running_guest_wrote_and_outlives_the_volume(volume, keep, client, http, making):
    name = volume()
    one = attached(client, making, name)
    # Not synced: it is in the guest's page cache only.
    one.exec(f"echo first > /mnt/{name}/f", check=True)

    snapshot = keep(name, label="nightly")

    one.exec(f"echo second > /mnt/{name}/f; sync", check=True)
    assert (snapshot["volume"], snapshot["size_mb"], snapshot["synced"], snapshot["label"]) == (name, SIZE, True, "nightly")
    assert one.exec(f"cat /mnt/{name}/f").stdout == "second\n"
    one.kill()
    client.volumes.delete(name)
    assert [kept["id"] for kept in http("GET", f"/v1/volumes/{name}/snapshots").json()] == [snapshot["id"]]
    assert snapshot["id"] in [kept["id"] for kept in http("GET", "/v1/volume-snapshots").json()]
    try:
        for copy, more, size in ((name, {}, SIZE), (f"{name}-grown", {"size_mb": 4 * SIZE}, 4 * SIZE)):
            answer = copied(http, copy, snapshot, **more)
            assert (answer.status_code, answer.json()["size_mb"]) == (201, size), answer.text
        # Never mounted since: a reader does without the journal.
        reader = attached(client, making, name, read_only=True)
        assert reader.exec(f"cat /mnt/{name}/f").stdout == "first\n"
        grown = attached(client, making, f"{name}-grown")
        assert grown.exec(f"cat /mnt/{name}-grown/f; echo mine > /mnt/{name}-grown/f; sync", check=True).stdout == "first\n"
        assert int(grown.exec(f"df -B1M --output=size /mnt/{name}-grown | tail -1").stdout) > 3 * SIZE
        assert reader.exec(f"cat /mnt/{name}/f").stdout == "first\n", "the copies have nothing in common"
        assert grown.exec("dmesg | grep 'EXT4-fs error'").stdout == ""
        grown.kill()
        reader.kill()
    finally:
        for copy in (name, f"{name}-grown"):
            try:
                client.volumes.delete(copy)
            except NotFoundError:
                pass


def test_a_snapshot_of_a_guest_that_stands_still_says_that_it_was_not_synced(volume, keep, client, making):
    name = volume()
    one = attached(client, making, name)
    one.exec(f"echo kept > /mnt/{name}/f; sync", check=True)

    one.pause()
    still = keep(name)
    one.resume()
    one.hibernate()
    asleep = keep(name)

    assert (still["synced"], asleep["synced"]) == (False, True)
    assert one.exec(f"cat /mnt/{name}/f").stdout == "kept\n"


def test_what_is_acknowledged_is_kept_when_daemons_are_killed_meanwhile(volume, client, http, making, operator):
    name = volume()
    one = attached(client, making, name)
    told, asked = [], 0

    for daemon in ("storage", "vmm", "storage"):
        one.exec(f"echo {asked} > /mnt/{name}/f", check=True)
        with concurrent.futures.ThreadPoolExecutor(1) as beside:
            unit = f"pandastack-{daemon}.service"
            kill = beside.submit(operator, f"systemctl kill -s KILL {unit}; sleep 1; until systemctl is-active --quiet {unit}; do sleep 0.2; done")
            while not kill.done():
                answer = http("POST", f"/v1/volumes/{name}/snapshots", json={"label": str(asked)})
                asked += 1
                assert answer.status_code in (201, 409, 503), answer.text
                if answer.status_code == 201:
                    told.append(answer.json()["id"])
            kill.result()
        one.exec("true", check=True)

    kept = {snapshot["id"]: snapshot for snapshot in http("GET", f"/v1/volumes/{name}/snapshots").json()}
    try:
        assert told and set(told) <= set(kept) and len(kept) <= asked, (told, kept, asked)
        copy = copied(http, f"{name}-copy", kept[told[-1]])
        assert copy.status_code == 201, copy.text
        reader = attached(client, making, f"{name}-copy", read_only=True)
        assert reader.exec(f"cat /mnt/{name}-copy/f", check=True).stdout.strip().isdigit()
        reader.kill()
    finally:
        for snapshot in kept.values():
            http("DELETE", f"/v1/volumes/{name}/snapshots/{snapshot['id']}")
        http("DELETE", f"/v1/volumes/{name}-copy")


def test_what_a_volumes_snapshot_cannot_be_is_refused(volume, keep, client, foreign, http):
    name = volume()
    snapshot = keep(name)
    before = http("GET", "/v1/volumes").json()

    for more in ({"size_mb": SIZE - 1}, {"size_mb": 0}, {"size_mb": "64"}, {"size_mb": 65537}, {"name": ".."}, {"from_snapshot": 5}):
        answer = http("POST", "/v1/volumes", json={"name": f"{name}-bad", "from_snapshot": snapshot["id"], **more})
        assert answer.status_code == 400 and answer.json()["error"], (more, answer.status_code, answer.text)
    assert copied(http, name, snapshot).status_code == 409
    for wrong in ("a" * 20, "../x", ""):
        assert http("POST", "/v1/volumes", json={"name": f"{name}-bad", "from_snapshot": wrong}).status_code == 404, wrong
    for body in ({"label": 5}, {"label": "x" * 257}, [], "x"):
        assert http("POST", f"/v1/volumes/{name}/snapshots", json=body).status_code == 400, body
    for which in ("nobody-has-this", "%2e%2e"):
        assert http("POST", f"/v1/volumes/{which}/snapshots").status_code == 404, which
    for method, path, body in (("POST", f"/volumes/{name}/snapshots", {}), ("GET", f"/volumes/{name}/snapshots", None),
                               ("DELETE", f"/volumes/{name}/snapshots/{snapshot['id']}", None),
                               ("POST", "/volumes", {"name": name, "from_snapshot": snapshot["id"]})):
        with pytest.raises(NotFoundError):
            foreign._request(method, path, json=body)
    assert foreign._request("GET", "/volume-snapshots") == []
    assert http("GET", "/v1/volumes").json() == before
    lines = {line["resource"]: line["used"] for line in http("GET", "/v1/quotas").json()["quotas"]}
    assert lines["volumes"] == len(before) + len(http("GET", "/v1/volume-snapshots").json())
    for status in (204, 404):
        assert http("DELETE", f"/v1/volumes/{name}/snapshots/{snapshot['id']}").status_code == status


def test_a_failed_create_holds_nothing(volume, client, http):
    name = volume()

    for body in ({"template": "no-such", "volumes": [{"name": name}]},
                 {"template": "base", "volumes": [{"name": name}, {"name": "nobody-has-this"}]},
                 {"template": "base", "volumes": [{"name": name}, {"name": name}]},
                 {"template": "base", "volumes": [{"name": name}], "from_snapshot": "a" * 20}):
        answer = http("POST", "/v1/sandboxes", json=body)
        assert answer.status_code in (400, 404, 409) and answer.json()["error"], (body, answer.status_code, answer.text)

    client.volumes.delete(name)


def test_volumes_do_not_come_together_with_a_snapshot(volume, client, http, shared):
    name, snapshot = volume(), shared.snapshot()

    answer = http("POST", "/v1/sandboxes", json={"template": "base", "from_snapshot": snapshot, "volumes": [{"name": name}]})
    client.snapshots.delete(snapshot)

    assert answer.status_code == 400 and answer.json()["error"]
    client.volumes.delete(name)


def test_a_foreign_volume_does_not_exist(volume, client, foreign, http):
    name = volume()

    assert name not in [one["name"] for one in foreign.volumes.list()]
    for call in (foreign.volumes.get, foreign.volumes.delete, lambda one: foreign._request("PATCH", f"/volumes/{one}", json={"size_mb": 999})):
        with pytest.raises(NotFoundError):
            call(name)
    with pytest.raises((BadRequestError, NotFoundError)):
        foreign.sandboxes.create(template="base", volumes=[{"name": name}])
    # Names are the workspace's own.
    foreign.volumes.create(name, SIZE)
    foreign.volumes.delete(name)
    assert client.volumes.get(name)["size_mb"] == SIZE


@pytest.mark.parametrize("body", [
    {"name": "", "size_mb": 64}, {"name": ".", "size_mb": 64}, {"name": "..", "size_mb": 64}, {"name": "a/b", "size_mb": 64},
    {"name": "x" * 65, "size_mb": 64}, {"name": "a b", "size_mb": 64}, {"name": "é", "size_mb": 64}, {"name": 5, "size_mb": 64},
    {"size_mb": 64}, {"name": "suite-bad", "size_mb": 0}, {"name": "suite-bad", "size_mb": -1}, {"name": "suite-bad", "size_mb": 65537},
    {"name": "suite-bad", "size_mb": "64"}, {"name": "suite-bad", "size_mb": 1.5}, {"name": "suite-bad", "size_mb": 10**30}, [], "x"])
def test_a_wrong_volume_is_a_400_and_makes_nothing(http, body):
    before = http("GET", "/v1/volumes").json()

    answer = http("POST", "/v1/volumes", json=body)

    assert answer.status_code == 400 and len(answer.json()["error"]) > 3, (answer.status_code, answer.text)
    assert http("GET", "/v1/volumes").json() == before


@pytest.mark.parametrize("volumes", [
    {}, [5], ["name"], [{}], [{"name": 5}], [{"name": ".."}], [{"name": "/etc"}], [{"name": "x", "read_only": "yes"}], [None],
    [{"name": "x"}] * 100])
def test_a_wrong_attachment_is_a_400(http, volumes):
    answer = http("POST", "/v1/sandboxes", json={"template": "base", "volumes": volumes})

    assert answer.status_code == 400 and answer.json()["error"], (answer.status_code, answer.text)
