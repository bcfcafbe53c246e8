"""`template push` needs a Docker engine beside the client: it builds and pushes there, to the vendor's registry, and then names the image.

Without an engine it ends before any request. With a stand-in for one the request is made, and refused: that registry is none of the operator's.
"""

import os
import stat
import sys

import pytest
from pandastack.exceptions import PandastackError
from surface import cli, module


@pytest.fixture
def work(tmp_path):
    """A Dockerfile, a PATH without an engine, and one whose `docker` only notes what it was asked."""
    (tmp_path / "Dockerfile").write_text("FROM base\n")
    bare, noting = tmp_path / "bare", tmp_path / "noting"
    for directory in (bare, noting):
        directory.mkdir()
    docker = noting / "docker"
    docker.write_text(f"#!/bin/sh\necho \"$1\" >> {tmp_path}/asked\n")
    docker.chmod(docker.stat().st_mode | stat.S_IXUSR)
    system = [directory for directory in os.environ["PATH"].split(":") if not os.path.exists(directory + "/docker")]
    path = lambda first: ":".join([str(first), os.path.dirname(sys.executable), *system])
    return tmp_path, path(bare), path(noting)


def names(client):
    return {template.name for template in client.templates.list()}


def push(run, work, path):
    words = ["template", "push", "--name", "pushed", "--dockerfile", str(work / "Dockerfile"), "--context", str(work)]
    return run(*words, check=False, env={"PATH": path})


def asked(work):
    return (work / "asked").read_text().split()


def both(client, work, run):
    directory, without, noting = work
    before = names(client)
    alone = push(run, directory, without)
    assert alone.returncode != 0 and "docker" in alone.stderr, alone.stderr
    assert not (directory / "asked").exists()

    refused = push(run, directory, noting)

    assert asked(directory) == ["build", "push"]
    assert refused.returncode != 0 and refused.stderr and names(client) == before, refused.stderr


def test_the_command_line_pushes_with_docker(client, work):
    both(client, work, cli)


def test_the_modules_command_line_pushes_with_docker(client, work):
    both(client, work, module)


def test_the_sdk_pushes_with_docker(client, work, monkeypatch):
    from pandastack import templates

    directory, without, noting = work
    before = names(client)
    for push in (client.templates.push, templates.push):
        monkeypatch.setenv("PATH", without)
        with pytest.raises(FileNotFoundError, match="docker"):
            push("pushed", str(directory / "Dockerfile"))
        monkeypatch.setenv("PATH", noting)
        with pytest.raises(PandastackError):
            push("pushed", str(directory / "Dockerfile"))

    assert asked(directory) == ["build", "push"] * 2
    assert names(client) == before
    assert templates.registry_ref("a", "1", region="r", project="p", repo="q") == "r-docker.pkg.dev/p/q/a:1"
