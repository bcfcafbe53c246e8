"""The clients' worker for managed agents, with the vendor's queue played by the test and its runner by a script in the sandbox."""

import http.server
import json
import os
import subprocess
import threading
import time

import pytest
from pandastack.cma import CmaConfig, Worker
from pandastack import set_default_client
from surface import NPM, module, note

pytestmark = pytest.mark.timeout(600)

RUNNER = '#!/bin/sh\nmkdir -p /mnt/session/outputs/deep\necho "$ANTHROPIC_WORK_ID" > /mnt/session/outputs/deep/result\n'


class Queue(http.server.BaseHTTPRequestHandler):
    """One work item, once."""

    def log_message(self, *_):
        pass

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        item = self.server.items.pop() if self.server.items else None
        if item is None:
            time.sleep(0.2)
            return self.answer(204)
        self.answer(200, json.dumps({"id": "work1", "data": {"id": item}}).encode())

    def do_POST(self):
        self.server.acknowledged.append(self.path)
        self.answer(200, b"{}")


@pytest.fixture
def queue():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Queue)
    server.items, server.acknowledged = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def session(client, making, queue):
    """A session's sandbox that was there before, with a runner, and an environment that leads the worker to it."""
    name = f"session-{os.getpid()}-{time.time_ns()}"
    sandbox = making(client.sandboxes.create(template="base", metadata={"cma.session_id": name}))
    sandbox.filesystem.write("/usr/local/bin/ant", RUNNER)
    sandbox.exec("chmod 755 /usr/local/bin/ant")
    queue.items.append(name)
    address = f"http://127.0.0.1:{queue.server_address[1]}"
    return sandbox, name, {"ANTHROPIC_ENVIRONMENT_ID": "env_1", "ANTHROPIC_ENVIRONMENT_KEY": "key", "ANTHROPIC_BASE_URL": address, "CMA_TEMPLATE": "base"}


def sleeps(client, sandbox, within=120):
    deadline = time.time() + within
    while time.time() < deadline and client.sandboxes.get(sandbox.id).status != "hibernated":
        time.sleep(1)
    return client.sandboxes.get(sandbox.id).status == "hibernated"


def test_the_worker_runs_a_session_and_lets_its_sandbox_sleep(client, session, queue, monkeypatch, tmp_path):
    sandbox, name, environment = session
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = CmaConfig.from_env(outputs_dir=tmp_path)
    assert config.missing_required() == [] and CmaConfig.from_env(environment_key="").missing_required() == ["ANTHROPIC_ENVIRONMENT_KEY"]
    worker = Worker(config, logger=lambda _: None)
    # In this thread, which is the one that the surface's list looks at; another one stops it.
    stopper = threading.Thread(target=lambda: (sleeps(client, sandbox), worker.stop()))
    stopper.start()

    try:
        worker.run(install_signal_handlers=False)
    finally:
        stopper.join()
        set_default_client(client)

    assert queue.acknowledged == ["/v1/environments/env_1/work/work1/ack"]
    assert (tmp_path / name / "deep/result").read_text() == "work1\n"
    assert client.sandboxes.get(sandbox.id).status == "hibernated"


@pytest.mark.parametrize("line, command", [("cli:cma", None), ("python:__main__ cma", module)], ids=["npm", "module"])
def test_the_command_lines_of_the_worker(client, session, queue, tmp_path, line, command):
    import sys

    sandbox, name, environment = session
    words = ["node", str(NPM), "cma"] if command is None else [sys.executable, "-m", "pandastack", "cma"]
    worker = subprocess.Popen(words + ["--outputs-dir", str(tmp_path)], env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        assert sleeps(client, sandbox)
        assert (tmp_path / name / "deep/result").read_text() == "work1\n"
    finally:
        worker.terminate()
        worker.wait(60)
    note(line)
