import hashlib
import json
import threading
import time

import pytest
import requests
from pandastack.exceptions import CommandFailed, SandboxTimeout


def test_streams_and_exit_code_are_apart(shared):
    result = shared.exec("echo out; echo err >&2; exit 7")

    assert (result.stdout, result.stderr, result.exit_code) == ("out\n", "err\n", 7)
    assert isinstance(result.duration_ms, (int, float))


def test_check_raises(shared):
    with pytest.raises(CommandFailed) as caught:
        shared.exec("echo why >&2; exit 3", check=True)
    assert caught.value.exit_code == 3 and caught.value.stderr == "why\n"


@pytest.mark.parametrize("cmd, code", [
    ("kill -9 $$", 137), ("kill -TERM $$", 143), ("/no/such/program", 127), ("touch /tmp/x; chmod 644 /tmp/x; /tmp/x", 126),
    ("exit 125", 125), ("true", 0)])
def test_exit_codes_follow_the_shell(shared, cmd, code):
    assert shared.exec(cmd).exit_code == code


def test_it_runs_as_root_in_its_home_with_the_image_environment(shared):
    assert shared.exec("id -un; pwd; echo $HOME; cd /workspace && pwd").stdout == "root\n/root\n/root\n/workspace\n"
    # Run, or only found where running it once takes half a minute of emulation; the template's own build runs them all.
    for command in ("git --version", "python3 --version", "node --version", "command -v go pnpm yarn bun"):
        assert shared.exec(command).exit_code == 0, command


def test_here_documents_and_quotes_work(shared):
    assert shared.exec("cat <<'X'\n$HOME \"'\nX").stdout == "$HOME \"'\n"


def test_stdin_is_empty(shared):
    assert shared.exec("cat; echo done", timeout_seconds=10).stdout == "done\n"


def test_invalid_utf8_is_replaced(shared):
    assert shared.exec(r"printf 'a\377b'").stdout == "a\ufffdb"


def test_a_timeout_kills_everything_it_started(shared):
    started = time.time()
    with pytest.raises(SandboxTimeout):
        shared.exec("trap '' TERM; (trap '' TERM; sleep 54321) & sleep 54321", timeout_seconds=2)
    assert time.time() - started < 25
    assert shared.exec("pgrep -f 'sleep 5432[1]'").stdout == ""


def test_a_background_process_neither_holds_the_call_nor_dies(shared):
    started = time.time()
    result = shared.exec("sleep 300 & echo $!")

    assert time.time() - started < 25
    assert shared.exec(f"kill -0 {result.stdout.strip()} && kill {result.stdout.strip()}").exit_code == 0


def test_a_command_longer_than_the_clients_patience(shared):
    assert shared.exec("sleep 34; echo late").stdout == "late\n"


def test_streaming_delivers_everything_in_order(shared):
    out, err = [], []

    code = shared.exec_stream("for i in 1 2 3; do echo o$i; echo e$i >&2; sleep 0.2; done; exit 4", out.append, err.append)

    assert code == 4 and "".join(out) == "o1\no2\no3\n" and "".join(err) == "e1\ne2\ne3\n"


def test_streaming_keeps_every_character(shared):
    wanted = "naïve 🐼 \u0085 \u2028 \u2029 \x0b \x0c \x1c end"
    shared.filesystem.write("/tmp/odd", wanted * 200)
    got = []

    assert shared.exec_stream("cat /tmp/odd", got.append) == 0

    assert "".join(got) == wanted * 200


def test_streaming_a_lot_arrives_whole(shared):
    seen = [0]

    def count(chunk):
        seen[0] += len(chunk)

    assert shared.exec_stream("head -c 8000000 /dev/zero | tr '\\0' x", count) == 0
    assert seen[0] == 8000000


def test_streaming_reports_a_timeout(shared):
    with pytest.raises(SandboxTimeout):
        shared.exec_stream("sleep 60", timeout_seconds=2)


def test_a_client_that_hangs_up_ends_its_command(http, shared):
    answer = http("POST", f"/v1/sandboxes/{shared.id}/exec/stream", json={"cmd": "echo up; sleep 98765"}, stream=True)
    next(answer.iter_content(10))

    answer.close()

    deadline = time.time() + 30
    while time.time() < deadline and shared.exec("pgrep -f 'sleep 9876[5]'").stdout:
        time.sleep(1)
    assert shared.exec("pgrep -f 'sleep 9876[5]'").stdout == ""


def test_output_over_the_cap_is_cut_and_said(http, shared):
    answer = http("POST", f"/v1/sandboxes/{shared.id}/exec", json={"cmd": "head -c 20000000 /dev/zero | tr '\\0' y"}).json()

    assert answer["exit_code"] == 0 and answer["truncated"] is True
    assert len(answer["stdout"]) == 16 << 20


def test_cwd_env_user_and_stdin(http, shared):
    body = {"cmd": "pwd; echo $WHAT; id -un; cat", "cwd": "/tmp", "env": {"WHAT": "this"}, "user": "nobody", "stdin": "in"}

    answer = http("POST", f"/v1/sandboxes/{shared.id}/exec", json=body).json()

    assert answer["stdout"] == "/tmp\nthis\nnobody\nin"


def test_many_at_once(shared):
    got = []
    threads = [threading.Thread(target=lambda n=n: got.append(shared.exec(f"sleep 1; echo {n}").stdout)) for n in range(12)]

    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    assert sorted(got) == sorted(f"{n}\n" for n in range(12))


def test_run_code(interpreter):
    assert interpreter.run_code("import numpy, pandas; print(numpy.arange(4).sum())").stdout == "6\n"
    assert interpreter.run_code("echo sh", language="bash").stdout == "sh\n"


def test_the_data_stack_is_there(interpreter):
    """Found, not imported: the template's own build imports each of them; here that would take minutes of emulation."""
    code = "import importlib.util as u; print([m for m in " + repr([
        "numpy", "pandas", "scipy", "sklearn", "matplotlib", "seaborn", "plotly", "sympy", "openpyxl", "PIL", "requests", "httpx",
        "bs4", "ipykernel", "pyarrow", "statsmodels", "sqlalchemy", "fastapi"]) + " if not u.find_spec(m)])"

    assert interpreter.run_code(code).stdout == "[]\n"
    assert interpreter.exec("node --version && tsc --version").exit_code == 0


def test_the_stream_is_exactly_framed(http, shared):
    answer = http("POST", f"/v1/sandboxes/{shared.id}/exec/stream", json={"cmd": "printf 'é'; exit 5"})

    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-cache" and answer.headers["X-Accel-Buffering"] == "no"
    body = answer.content
    assert b"\r" not in body and body.isascii() and body.endswith(b"\n\n")
    assert b'event: stdout\ndata: {"chunk":"\\u00e9"}\n\n' in body
    assert b'event: exit\ndata: {"exit_code":5' in body


def test_a_slow_reader_gets_every_byte_once(http, shared):
    answer = http("POST", f"/v1/sandboxes/{shared.id}/exec/stream", json={"cmd": "seq 900000 | tr '\\n' ,"}, stream=True)
    body = bytearray()
    for chunk in answer.iter_content(65536):
        body += chunk
        if len(body) < 600000:
            time.sleep(0.2)

    events = [event.partition(b"\ndata: ") for event in bytes(body).split(b"\n\n") if event]
    output = "".join(json.loads(data)["chunk"] for name, _, data in events if name == b"event: stdout")
    assert events[-1][0] == b"event: exit"
    assert hashlib.sha256(output.encode()).digest() == hashlib.sha256("".join(f"{n}," for n in range(1, 900001)).encode()).digest()
