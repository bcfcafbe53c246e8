"""Forks: children with the parent's memory and disk of one moment, while the parent runs on."""

import time

import pytest
from pandastack import Candidate
from pandastack.exceptions import BadRequestError, NotFoundError

import alive


def test_a_fork_has_memory_and_disk_and_the_parent_runs_on(client, http, fresh, making):
    fresh.filesystem.write("/root/kept", "then")
    before = alive.start(fresh)

    child = making(fresh.fork(metadata={"branch": "one"}))

    fresh.exec("echo parent > /root/kept")
    assert child.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/kept").stdout == "then"
    child.exec("echo child > /root/kept")
    assert fresh.exec("cat /root/kept").stdout == "parent\n"
    alive.goes_on(child, before)
    alive.goes_on(fresh, before)
    told = http("GET", f"/v1/sandboxes/{child.id}").json()
    assert (told["parent_id"], told["status"], told["boot_mode"], told["template"]) == (fresh.id, "running", "fork", "base")
    assert (told["metadata"]["branch"], told["metadata"]["fork_parent_id"]) == ("one", fresh.id)


def test_every_copy_is_unique(client, fresh, making):
    children = making(*fresh.fork_tree(2))
    probe = alive.IDENTITY + "; head -c 16 /dev/urandom | od -An -tx1"

    told = [one.exec(probe).stdout.split("\n")[:4] for one in (fresh, *children)]

    for values in zip(*told):
        assert len(set(values)) == 3 and all(values), values
    assert all(name[2].startswith("sb-" + one.id[:8]) for name, one in zip(told[1:], children))
    addresses = [client.sandboxes.get(one.id).guest_ip for one in (fresh, *children)]
    assert len(set(addresses)) == 3 and all(addresses)


@pytest.mark.parametrize("form", [
    {}, {"data": b"", "headers": {"Content-Type": "text/plain;charset=UTF-8"}}, {"json": {}}, {"json": {"count": 1, "mode": "warm"}},
    {"params": {"warm": "1"}}], ids=["none", "empty", "object", "go", "query"])
def test_a_fork_is_answered_as_every_client_reads_it(http, shared, form):
    answer = http("POST", f"/v1/sandboxes/{shared.id}/fork", **form)
    body = answer.json()
    for child in body["children"]:
        http("DELETE", f"/v1/sandboxes/{child['id']}")

    assert answer.status_code == 201
    assert body["parent_id"] == shared.id and body["snapshot_id"] and body["at"]
    assert body["sandbox"]["id"] == body["children"][0]["id"] and len(body["children"]) == 1
    assert body["sandbox"]["status"] == "running" and isinstance(body["sandbox"]["boot_ms"], int)


def test_a_tree_comes_in_order_as_full_objects(client, http, fresh, making):
    answer = http("POST", f"/v1/sandboxes/{fresh.id}/fork-tree", json={"count": 3, "metadata": {
        "mine": "yes", "fork_index": "9", "fork_tree_id": "forged", "fork_parent_id": "forged", "workspace": "other"}})
    body = answer.json()
    making(*(client.sandboxes.get(child["id"]) for child in body["children"]))

    assert answer.status_code == 201 and body["errors"] == [] and body["parent_id"] == fresh.id and body["tree_id"]
    assert isinstance(body["paused_us"], int)
    assert [child["metadata"]["fork_index"] for child in body["children"]] == ["0", "1", "2"]
    for child in body["children"]:
        metadata = child["metadata"]
        assert (metadata["fork_tree_id"], metadata["fork_tree_role"], metadata["fork_parent_id"]) == (body["tree_id"], "child", fresh.id)
        assert metadata["mine"] == "yes" and metadata["workspace"] == client.sandboxes.get(fresh.id).metadata["workspace"]
        assert child["guest_ip"] and child["boot_mode"] == "fork" and child["ttl_seconds"] > 0 and child["status"] == "running"
    assert [snapshot for snapshot in client.snapshots.list() if snapshot["sandbox_id"] == fresh.id] == []


def test_a_tree_without_a_count_has_two(http, shared):
    body = http("POST", f"/v1/sandboxes/{shared.id}/fork-tree").json()
    statuses = [http("DELETE", f"/v1/sandboxes/{child['id']}").status_code for child in body["children"]]

    assert statuses == [204, 204]


def test_children_outlive_their_parent_and_have_children(client, making):
    parent = making(client.sandboxes.create(template="base"))
    parent.filesystem.write("/root/kept", "kept")
    child = making(parent.fork())
    parent.kill()

    grandchild = making(child.fork())

    assert grandchild.exec("sync; echo 3 > /proc/sys/vm/drop_caches; cat /root/kept; python3 -c 'print(7)'").stdout == "kept7\n"
    child.hibernate()
    assert child.filesystem.read("/root/kept") == b"kept"
    assert grandchild.exec("echo on").stdout == "on\n"


def test_a_hibernated_parent_can_be_forked(fresh, making):
    before = alive.start(fresh)
    fresh.hibernate()

    child = making(fresh.fork())

    alive.goes_on(child, before)
    alive.goes_on(fresh, before)


def test_promote_deletes_the_siblings_and_nobody_else(client, fresh, making):
    others = making(*fresh.fork_tree(2))
    winner, loser = making(*fresh.fork_tree(2))

    told = winner.promote(cleanup_siblings=True)

    assert (told["winner"], told["tree_id"]) == (winner.id, winner.metadata["fork_tree_id"])
    assert told["deleted"] == [loser.id] and not told["failures"]
    with pytest.raises(NotFoundError):
        client.sandboxes.get(loser.id)
    for kept in (winner, fresh, *others):
        assert alive.status(client, kept) == "running"


def test_promote_without_cleanup_deletes_nothing(client, fresh, making):
    one, two = making(*fresh.fork_tree(2))

    told = one.promote(tree_id=one.metadata["fork_tree_id"])

    assert told["winner"] == one.id and not told["deleted"]
    assert alive.status(client, two) == "running"


def test_promote_of_what_is_no_child_of_that_tree(http, client, fresh, making):
    one, two = making(*fresh.fork_tree(2))

    for id, body in ((fresh.id, {"cleanup_siblings": True}), (one.id, {"cleanup_siblings": True, "tree_id": "a" * 20}),
                     (one.id, {"tree_id": 5}), (one.id, {"cleanup_siblings": "yes"})):
        answer = http("POST", f"/v1/sandboxes/{id}/promote", json=body)
        assert answer.status_code in (400, 404, 409, 422) and answer.json()["error"], (body, answer.status_code)

    assert {alive.status(client, one), alive.status(client, two), alive.status(client, fresh)} == {"running"}


def test_explore_keeps_the_best_branch(client, fresh, making):
    fresh.exec("mkdir -p /app && echo 41 > /app/start")
    before = {sandbox.id for sandbox in client.sandboxes.list()}

    result = fresh.explore(
        ["echo $(($(cat /app/start) + 1)) > /app/result; cat /app/result", Candidate.shell("fails", "exit 3"),
         Candidate.call("by hand", lambda sandbox: sandbox.exec("echo 7 > /app/result").exit_code)],
        score_fn=lambda sandbox, outcome: float(sandbox.filesystem.read("/app/result")) if outcome.ok else 0.0)
    making(result.winner)

    assert not result.errors and not result.reap_failures and result.tree_id
    assert [outcome.score for outcome in result.outcomes] == [42.0, 7.0, 0.0]
    assert "/app/result" in result.outcomes[0].files_changed and result.outcomes[-1].exit_code == 3
    assert result.winner.filesystem.read("/app/result") == b"42\n" and len(result.reaped) == 2
    assert {sandbox.id for sandbox in client.sandboxes.list()} == before | {result.winner.id}
    assert result.winner.lifecycle()["ttl_seconds"] != 600, "the winner has still the limit of an orphan"


def test_orphans_of_explore_are_reaped_and_the_promoted_is_not(client, fresh, making):
    one, two = making(*fresh.fork_tree(2, metadata={"explore": "1", "explore_ttl": "12"}))
    assert [child.metadata["explore_ttl"] for child in (one, two)] == ["12", "12"]
    one.promote()

    deadline = time.time() + 90
    while time.time() < deadline and two.id in (listed := [sandbox.id for sandbox in client.sandboxes.list()]):
        time.sleep(2)

    assert two.id not in listed and one.id in listed and fresh.id in listed


@pytest.mark.parametrize("route, body", [
    ("fork-tree", {"count": 0}), ("fork-tree", {"count": 17}), ("fork-tree", {"count": -1}), ("fork-tree", {"count": "2"}),
    ("fork-tree", {"count": 2.5}), ("fork-tree", {"count": 10**20}), ("fork-tree", {"count": 2, "metadata": []}),
    ("fork-tree", {"count": 2, "metadata": {"a": 1}}),
    ("fork-tree", []), ("fork", {"count": 0}), ("fork", {"count": 17}), ("fork", {"metadata": 3}), ("fork", {"metadata": {"": "x"}}),
    ("fork", {"count": []}), ("fork", "text"), ("promote", []), ("promote", {"tree_id": []})])
def test_a_wrong_body_is_a_400_and_makes_nothing(http, client, shared, route, body):
    before = {sandbox.id for sandbox in client.sandboxes.list()}

    answer = http("POST", f"/v1/sandboxes/{shared.id}/{route}", json=body)

    assert answer.status_code == 400 and len(answer.json()["error"]) > 3, (answer.status_code, answer.text)
    assert {sandbox.id for sandbox in client.sandboxes.list()} == before


def test_an_idempotency_key_forks_once(http, shared):
    key = {"Idempotency-Key": f"fork-{time.time_ns()}"}

    one, two = (http("POST", f"/v1/sandboxes/{shared.id}/fork", json={}, headers=key).json() for _ in range(2))
    status = http("DELETE", f"/v1/sandboxes/{one['sandbox']['id']}").status_code

    assert one["sandbox"]["id"] == two["sandbox"]["id"] and status == 204


def test_a_killed_child_is_gone_for_good(client, fresh):
    child = fresh.fork()
    child.kill()

    with pytest.raises(NotFoundError):
        child.exec("true")
    with pytest.raises(NotFoundError):
        child.promote()
    with pytest.raises((NotFoundError, BadRequestError)):
        child.fork()
