"""A third-party program built on the Python client, unmodified."""

import asyncio
from types import SimpleNamespace

import pytest
from harbor_firecracker.environment import FirecrackerEnvironment
from harbor_firecracker.errors import ExecTimeoutError


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
