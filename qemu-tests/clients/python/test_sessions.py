"""Commands that outlive their connection, their machine and their parent: started once, never lost, never run twice."""

import json
import threading
import time

import pytest

LINES = 30
# Every run of it appends one line to a file, whatever becomes of its output.
COMMAND = f"echo run >> /root/runs; for i in $(seq {LINES}); do echo line $i; sleep 0.1; done; echo last >&2; exit 5"


def events(response):
    """The events of a stream as (event, data), up to its end."""
    event = ""
    for line in response.iter_lines():
        if line.startswith(b"event:"):
            event = line[6:].strip().decode()
        elif line.startswith(b"data:"):
            yield event, json.loads(line[5:])


@pytest.fixture
def sessions(http):
    class Sessions:
        def start(self, sandbox, cmd=COMMAND, **more):
            answer = http("POST", f"/v1/sandboxes/{sandbox.id}/exec", json={"cmd": cmd, "detach": True, **more})
            assert answer.status_code == 202, (answer.status_code, answer.text)
            return answer.json()["session_id"]

        def listed(self, sandbox):
            answer = http("GET", f"/v1/sandboxes/{sandbox.id}/execs")
            assert answer.status_code == 200 and isinstance(answer.json(), list), (answer.status_code, answer.text)
            return [one["session_id"] for one in answer.json()]

        def open(self, sandbox, session, offset=0):
            return http("GET", f"/v1/sandboxes/{sandbox.id}/execs/{session}", params={"offset": offset}, stream=True)

        def read(self, sandbox, session, offset=0):
            """Standard output, standard error and exit code from an offset on."""
            out, err, code, position = "", "", None, offset
            with self.open(sandbox, session, offset) as response:
                assert response.status_code == 200, (response.status_code, response.text)
                assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
                for event, data in events(response):
                    if event in ("stdout", "stderr"):
                        assert data["offset"] == position, (data, position)
                        position += len(data["chunk"].encode())
                        out, err = (out + data["chunk"], err) if event == "stdout" else (out, err + data["chunk"])
                    elif event == "exit":
                        code = data["exit_code"]
                    else:
                        assert event != "error", data
            return out, err, code

        def kill(self, sandbox, session):
            return http("DELETE", f"/v1/sandboxes/{sandbox.id}/execs/{session}").status_code

    return Sessions()


WHOLE = ("".join(f"line {i}\n" for i in range(1, LINES + 1)), "last\n", 5)


def test_a_detached_command_is_listed_and_read_at_any_offset(sessions, fresh):
    session = sessions.start(fresh)

    listed, whole = sessions.listed(fresh), sessions.read(fresh, session)
    half = sessions.read(fresh, session, offset=len("line 1\nline 2\n"))

    assert session in listed and whole == WHOLE
    assert half == (WHOLE[0].removeprefix("line 1\nline 2\n"), *WHOLE[1:])
    assert sessions.read(fresh, session, offset=len(WHOLE[0] + WHOLE[1])) == ("", "", 5)
    assert fresh.exec("cat /root/runs").stdout == "run\n"


def test_a_reader_that_goes_away_kills_nothing(sessions, fresh):
    session = sessions.start(fresh)
    with sessions.open(fresh, session) as response:
        next(events(response))

    assert sessions.read(fresh, session) == WHOLE


def test_two_readers_get_the_same(sessions, fresh):
    session, got = sessions.start(fresh), []

    def read():
        try:
            got.append(sessions.read(fresh, session))
        except AssertionError as error:
            # One of them may be told that another has taken its place; then it comes again.
            assert "another request follows this command now" in str(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

    got += [sessions.read(fresh, session) for _ in range(2 - len(got))]
    assert got == [WHOLE, WHOLE]


def test_a_detached_command_goes_on_through_capture_hibernation_and_wake(sessions, fresh, client):
    session = sessions.start(fresh)
    client.snapshots.delete(fresh.snapshot())
    fresh.hibernate()
    fresh.wake()

    assert session in sessions.listed(fresh)
    assert sessions.read(fresh, session) == WHOLE
    assert fresh.exec("cat /root/runs").stdout == "run\n"


def test_reading_a_session_wakes_its_sandbox(sessions, fresh):
    session = sessions.start(fresh)
    fresh.hibernate()

    assert sessions.read(fresh, session) == WHOLE


def test_it_goes_on_in_a_forks_child_and_in_the_parent(sessions, fresh, making):
    session = sessions.start(fresh)
    child = making(fresh.fork())

    assert session in sessions.listed(child)
    assert sessions.read(child, session) == WHOLE and sessions.read(fresh, session) == WHOLE
    assert child.exec("cat /root/runs").stdout == fresh.exec("cat /root/runs").stdout == "run\n"


@pytest.mark.parametrize("how", ["exec", "stream"])
def test_an_attached_command_is_neither_lost_nor_run_twice_by_captures(fresh, client, making, how):
    got = {}

    def run():
        # A client of its own: streams change the timeout of theirs.
        mine = client.__class__().sandboxes.get(fresh.id)
        if how == "exec":
            result = mine.exec(COMMAND)
            got["told"] = (result.stdout, result.stderr, result.exit_code)
        else:
            out, err = [], []
            code = mine.exec_stream(COMMAND, on_stdout=out.append, on_stderr=err.append)
            got["told"] = ("".join(out), "".join(err), code)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.time() + 20
    while not fresh.filesystem.exists("/root/runs") and time.time() < deadline:
        time.sleep(0.1)
    client.snapshots.delete(fresh.snapshot())
    child = making(fresh.fork())
    thread.join()

    assert got["told"] == WHOLE
    assert fresh.exec("cat /root/runs").stdout == "run\n"
    assert child.exec("cat /root/runs").stdout == "run\n"


def test_a_killed_session_ends_with_everything_it_started(sessions, fresh):
    session = sessions.start(fresh, "sleep 54322 & sleep 54322")

    assert sessions.kill(fresh, session) in (200, 204)

    deadline = time.time() + 20
    while time.time() < deadline and fresh.exec("pgrep -f 'sleep 5432[2]'").stdout:
        time.sleep(0.2)
    assert fresh.exec("pgrep -f 'sleep 5432[2]'").stdout == ""


def test_a_detached_command_has_a_time_limit_too(sessions, fresh):
    session = sessions.start(fresh, "sleep 54323", timeout_seconds=2)

    with sessions.open(fresh, session) as response:
        last = list(events(response))[-1]

    assert last[0] == "error" and "timeout" in last[1]["error"] or last[0] == "exit" and last[1]["exit_code"] in (124, 137, 143), last
    assert fresh.exec("pgrep -f 'sleep 5432[3]'").stdout == ""


def test_wrong_requests(http, sessions, fresh, foreign):
    session = sessions.start(fresh, "sleep 60")
    at = f"/v1/sandboxes/{fresh.id}/execs"

    for body in ({"cmd": "true", "detach": "yes"}, {"cmd": "", "detach": True}, {"detach": True}):
        assert http("POST", f"/v1/sandboxes/{fresh.id}/exec", json=body).status_code == 400, body
    for other in ("nothing", "a" * 20, "..%2f..", "x" * 500):
        assert http("GET", f"{at}/{other}").status_code in (400, 404), other
        assert http("DELETE", f"{at}/{other}").status_code in (400, 404), other
    for offset in ("-1", "x", "1.5", str(10**30)):
        assert http("GET", f"{at}/{session}", params={"offset": offset}).status_code == 400, offset
    for method, path in (("GET", at), ("GET", f"{at}/{session}"), ("DELETE", f"{at}/{session}")):
        assert foreign.session.request(method, http.base + path, timeout=60).status_code == 404, (method, path)
    assert sessions.kill(fresh, session) in (200, 204)
