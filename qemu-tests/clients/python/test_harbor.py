"""A third-party program built on the Python client, unmodified."""

import asyncio
from types import SimpleNamespace

import pytest
from harbor_firecracker.environment import FirecrackerEnvironment
from harbor_firecracker.errors import ExecTimeoutError
from harbor_firecracker.rollouts import RolloutPool


@pytest.fixture(scope="module")
def environment(client):
    made = FirecrackerEnvironment(environment_name="suite", session_id="s1", task_env_config=SimpleNamespace(template="base", ttl_seconds=900))
    asyncio.run(made.start(force_build=False))
    yield made
    asyncio.run(made.stop(delete=True))


def test_exec_with_directory_environment_and_user(environment):
    result = asyncio.run(environment.exec("pwd; id -un; echo $A", cwd="/tmp", env={"A": "b c"}, user="nobody"))

    assert result.return_code == 0 and result.stdout.split("\n")[:2] == ["/tmp", "nobody"]


def test_a_timeout_is_its_own_error(environment):
    with pytest.raises(ExecTimeoutError):
        asyncio.run(environment.exec("sleep 60", timeout_sec=2))


def test_directories_travel_both_ways(environment, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.txt").write_text("a")
    (source / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))

    asyncio.run(environment.upload_dir(str(source), "/tmp/tree"))
    asyncio.run(environment.download_dir("/tmp/tree", str(target)))

    assert (target / "a.txt").read_text() == "a" and (target / "deep" / "er" / "b.bin").read_bytes() == bytes(range(256))


def test_it_is_healthy(environment):
    assert asyncio.run(environment.run_healthcheck()) is True


def test_a_rollout_pool_is_warmed_forked_in_batches_and_closed(client, monkeypatch):
    # Its batches have 16; three each show the same in a third of the memory.
    monkeypatch.setattr(RolloutPool, "FORK_BATCH_CAP", 3)
    before = {sandbox.id for sandbox in client.sandboxes.list()}
    snapshots = {snapshot["id"] for snapshot in client.snapshots.list()}

    pool = RolloutPool.warm("base", setup=lambda sandbox: sandbox.exec("echo warm > /dev/shm/setup; echo warm > /root/setup", check=True))
    pool.base.exec("echo later >> /dev/shm/setup")
    rollouts = pool.fork(5, metadata={"run": "suite"})
    told = [rollout.sandbox.exec(f"echo {rollout.index} > /root/own; cat /dev/shm/setup /root/setup /root/own").stdout for rollout in rollouts]
    more = pool.fork(1)
    taken = {snapshot["id"] for snapshot in client.snapshots.list()} - snapshots
    ids = {sandbox.id for sandbox in client.sandboxes.list()} - before
    pool.close()
    client.snapshots.delete(pool.snapshot_id)

    assert told == [f"warm\nlater\nwarm\n{index}\n" for index in range(5)] and more[0].index == 5
    assert all(rollout.fork_ms and rollout.sandbox.metadata["run"] == "suite" for rollout in rollouts)
    assert len(ids) == 7 and taken == {pool.snapshot_id}
    assert {sandbox.id for sandbox in client.sandboxes.list()} == before


def test_stopping_without_deleting_hibernates(client):
    made = FirecrackerEnvironment(environment_name="suite", session_id="s2", task_env_config=SimpleNamespace(template="base", ttl_seconds=900))
    asyncio.run(made.start(force_build=False))
    asyncio.run(made.exec("echo kept > /root/kept"))
    before = [sandbox for sandbox in client.sandboxes.list() if sandbox.metadata.get("session_id") == "s2"]

    asyncio.run(made.stop(delete=False))

    (sandbox,) = before
    assert client.sandboxes.get(sandbox.id).status == "hibernated"
    assert sandbox.exec("cat /root/kept").stdout == "kept\n"
    sandbox.kill()
