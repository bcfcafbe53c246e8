"""The published Python client against a booted appliance.

PANDASTACK_API and PANDASTACK_API_KEY say which; PANDASTACK_FOREIGN_KEY is a token of another workspace.
"""

import json
import os
import subprocess
import sys
import types

import pytest
import requests

# harbor-firecracker plugs into a package that cannot be installed here (it wants a newer Python). What it needs of it
# is a base class and a result type.
_harbor = {name: types.ModuleType(name) for name in (
    "harbor", "harbor.environments", "harbor.environments.base", "harbor.environments.capabilities",
    "harbor.models", "harbor.models.task", "harbor.models.task.config")}


class _BaseEnvironment:
    def __init__(self, **given):
        self.__dict__.update(given)


class _ExecResult:
    def __init__(self, stdout, stderr, return_code):
        self.stdout, self.stderr, self.return_code = stdout, stderr, return_code


_harbor["harbor.environments.base"].BaseEnvironment = _BaseEnvironment
_harbor["harbor.environments.base"].ExecResult = _ExecResult
_harbor["harbor.environments.capabilities"].EnvironmentCapabilities = type("EnvironmentCapabilities", (), {})
_harbor["harbor.environments.capabilities"].EnvironmentResourceCapabilities = type("Resources", (), {})
_harbor["harbor.models.task.config"].TaskOS = type("TaskOS", (), {"LINUX": "linux"})
_harbor["harbor.models.task.config"].NetworkPolicy = type("NetworkPolicy", (), {})
sys.modules.update(_harbor)

import surface  # noqa: E402

# Before any test module imports a name of the client.
surface.install()

from pandastack import Client, set_default_client  # noqa: E402


def pytest_configure(config):
    config.pluginmanager.register(surface.Recorder())


@pytest.fixture(scope="session")
def client():
    made = Client()
    set_default_client(made)
    return made


@pytest.fixture(scope="session")
def foreign():
    """A client of another workspace."""
    return Client(api_key=os.environ["PANDASTACK_FOREIGN_KEY"])


@pytest.fixture(scope="session")
def kept(client):
    """Sandboxes that tests share, by template."""
    made = {}
    yield made
    for sandbox in made.values():
        sandbox.kill()


def running(client, kept, template):
    sandbox = kept.get(template)
    if sandbox is None or client.sandboxes.get(sandbox.id).status != "running":
        if sandbox is not None:
            sandbox.kill()
        sandbox = client.sandboxes.create(template=template, metadata={"suite": "shared"}, ttl_seconds=3600)
        kept[template] = sandbox
    return sandbox


@pytest.fixture
def shared(client, kept):
    """One running sandbox for tests that leave it as it was."""
    return running(client, kept, "base")


@pytest.fixture
def interpreter(client, kept):
    return running(client, kept, "code-interpreter")


@pytest.fixture
def fresh(client):
    """A sandbox of its own."""
    sandbox = client.sandboxes.create(template="base")
    yield sandbox
    try:
        sandbox.kill()
    except Exception:
        pass


@pytest.fixture
def making():
    """Sandboxes that a test makes in passing; whatever is left of them is killed."""
    made = []

    def keep(*sandboxes):
        made.extend(sandboxes)
        return sandboxes[0] if len(sandboxes) == 1 else sandboxes

    yield keep
    for sandbox in made:
        try:
            sandbox.kill()
        except Exception:
            pass


@pytest.fixture(scope="session")
def http():
    """Raw HTTP with the same token, for what the client never sends."""
    session = requests.Session()
    session.headers["Authorization"] = "Bearer " + os.environ["PANDASTACK_API_KEY"]
    base = os.environ["PANDASTACK_API"]

    def call(method, path, **kwargs):
        kwargs.setdefault("timeout", 60)
        return session.request(method, base + path, **kwargs)

    call.base = base
    call.session = session
    return call


@pytest.fixture(scope="session")
def operator():
    """Root's shell in the appliance: runs a line, which has to succeed, and gives it bytes to read."""
    words = json.loads(os.environ["PANDASTACK_SHELL"])

    def run(line, given=b""):
        told = subprocess.run(words + [line], capture_output=True, timeout=150, input=given)
        assert told.returncode == 0, (line, told.stdout, told.stderr)
        return told.stdout.decode()

    return run


@pytest.fixture
def small_archive(shared):
    """A root file system of a shell and a cat, out of a sandbox, as a tar."""
    files = "bin/sh bin/cat lib64/ld-linux-x86-64.so.2 lib/x86_64-linux-gnu/libc.so.6 etc/passwd"
    shared.exec(f"tar -C / -chf /tmp/small.tar {files}", check=True)
    archive = shared.filesystem.read("/tmp/small.tar")
    shared.exec("rm /tmp/small.tar")
    return archive
