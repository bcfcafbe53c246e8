"""What a sandbox's programs wrote, and its console: whole, by lines, and while it is written."""

import json
import threading
import time

import pytest


def lines(response, count, seconds=60):
    """So many lines of a followed log; the connection is closed after that."""
    got, deadline = [], time.time() + seconds
    with response:
        for raw in response.iter_lines():
            if raw.startswith(b"data:"):
                got.append(json.loads(raw[5:])["line"])
            elif raw:
                assert raw in (b"event: line", b": keep-alive"), raw
            if len(got) == count or time.time() > deadline:
                break
    return got


def follow(http, sandbox, **params):
    answer = http("GET", f"/v1/sandboxes/{sandbox.id}/logs", params={"follow": "1", **params}, stream=True)
    assert answer.status_code == 200, (answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    return answer


def text(http, sandbox, **params):
    answer = http("GET", f"/v1/sandboxes/{sandbox.id}/logs", params=params)
    assert answer.status_code == 200, (answer.status_code, answer.text)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    return answer.text


def test_the_streams_are_apart_and_in_order(http, fresh):
    fresh.exec("echo one; echo zwei é; echo bad >&2")
    session = http("POST", f"/v1/sandboxes/{fresh.id}/exec", json={"cmd": "echo three", "detach": True}).json()["session_id"]
    deadline = time.time() + 20
    while "three" not in text(http, fresh) and time.time() < deadline:
        time.sleep(0.2)

    assert text(http, fresh, stream="stdout") == "one\nzwei é\nthree\n"
    assert text(http, fresh, stream="stderr") == "bad\n"
    assert sorted(text(http, fresh, stream="both").splitlines()) == ["bad", "one", "three", "zwei é"]
    assert text(http, fresh, stream="stdout", tail=1) == "three\n"
    assert text(http, fresh, session=session) == "three\n"
    assert text(http, fresh, since=int(time.time()) + 3600) == ""
    # Nothing of a warm-up, nothing of anybody else.
    assert "three" in "".join(fresh.logs())


def test_the_client_follows(client, fresh):
    fresh.exec("echo before")
    mine, got = client.__class__().sandboxes.get(fresh.id), []

    def read():
        for line in mine.logs(follow=True):
            got.append(line)
            if "after" in line:
                return

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    time.sleep(1)
    fresh.exec("echo after")
    thread.join(60)

    assert [line.rstrip("\n") for line in got] == ["before", "after"]


def test_a_follower_goes_on_through_capture_and_sleep_and_wakes_nobody(http, client, fresh):
    fresh.exec("echo start")
    answer, got = follow(http, fresh, stream="stdout"), []
    thread = threading.Thread(target=lambda: got.extend(lines(answer, 3, 240)), daemon=True)
    thread.start()
    client.snapshots.delete(fresh.snapshot())
    fresh.exec("echo captured")
    fresh.hibernate()
    time.sleep(5)
    assert client.sandboxes.get(fresh.id).status == "hibernated"
    assert http("GET", f"/v1/sandboxes/{fresh.id}/logs", params={"wake": "false"}).status_code == 409
    fresh.wake()
    fresh.exec("echo woken")
    thread.join(120)

    assert got == ["start\n", "captured\n", "woken\n"]
    assert text(http, fresh, stream="stdout") == "start\ncaptured\nwoken\n"


def test_a_copy_has_the_log_of_its_past(http, fresh, making):
    fresh.exec("echo common")
    child = making(fresh.fork())
    fresh.exec("echo parent")
    child.exec("echo child")

    assert text(http, fresh, stream="stdout") == "common\nparent\n"
    assert text(http, child, stream="stdout") == "common\nchild\n"


def test_the_console_has_what_is_written_to_it(http, fresh):
    fresh.exec("echo said to the console > /dev/ttyS0")

    deadline = time.time() + 60
    while "said to the console" not in text(http, fresh, stream="console") and time.time() < deadline:
        time.sleep(1)
    console = text(http, fresh, stream="console")
    assert "said to the console" in console and "/var/lib" not in console
    assert lines(follow(http, fresh, stream="console", tail=1), 1)


def test_wrong_requests(http, fresh, foreign):
    at = f"/v1/sandboxes/{fresh.id}/logs"
    for bad in ({"stream": "all"}, {"tail": "-1"}, {"tail": "x"}, {"follow": "yes"}, {"since": "yesterday"}, {"session": "../x"}):
        assert http("GET", at, params=bad).status_code == 400, bad
    for params in ({}, {"follow": "1"}, {"stream": "console"}):
        assert foreign.session.request("GET", http.base + at, params=params, timeout=60).status_code == 404, params
