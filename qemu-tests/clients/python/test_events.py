"""What happened to sandboxes, who changed what, how long starts took, what sandboxes take."""

import json
import time


def listed(http, path, **params):
    answer = http("GET", path, params=params)
    assert answer.status_code == 200, (answer.status_code, answer.text)
    return answer.json()


def types(http, sandbox, **params):
    return [event["type"] for event in listed(http, f"/v1/sandboxes/{sandbox.id}/events", **params)["events"]]


class Stream:
    """Followed events; closed at the end of a `with`."""

    def __init__(self, http, path, last=None):
        headers = {"Last-Event-ID": last} if last else {}
        self.answer = http("GET", path, params={"follow": "1"}, headers=headers, stream=True)
        assert self.answer.status_code == 200, (self.answer.status_code, self.answer.text)
        assert self.answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        self.lines = self.answer.iter_lines()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.answer.close()

    def __iter__(self):
        event_id = None
        for line in self.lines:
            if line.startswith(b"id: "):
                event_id = line[4:].decode()
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                assert str(event["seq"]) == event_id
                yield event

    def until(self, kind):
        got = []
        for event in self:
            got.append(event)
            if event["type"] == kind:
                break
        return got


def test_the_life_of_a_sandbox_is_told_in_order(http, client, making, foreign):
    sandbox = making(client.sandboxes.create(template="base"))
    sandbox.pause()
    sandbox.resume()
    sandbox.hibernate()
    assert "sandbox.hibernated" in types(http, sandbox)
    assert client.sandboxes.get(sandbox.id).status == "hibernated", "looking wakes nobody"
    sandbox.wake()
    child = making(sandbox.fork())

    # A fork has answered before its parent's record says so.
    until = time.monotonic() + 30
    while (told := types(http, sandbox))[-1] != "sandbox.forked" and time.monotonic() < until:
        time.sleep(0.1)
    order = ["sandbox.running", "sandbox.paused", "sandbox.resumed", "sandbox.hibernated", "sandbox.woken", "fork.completed"]
    assert [kind for kind in told if kind in order] == order, told
    assert types(http, sandbox, tail=1) == told[-1:]
    first = listed(http, f"/v1/sandboxes/{sandbox.id}/events")["events"][0]
    assert set(first) == {"seq", "time", "sandbox_id", "type", "payload"} and first["sandbox_id"] == sandbox.id
    assert child.id in str(listed(http, "/v1/events")["events"])
    answer = foreign.session.request("GET", f"{http.base}/v1/sandboxes/{sandbox.id}/events", timeout=60)
    assert answer.status_code == 404
    for bad in ({"tail": "x"}, {"follow": "2"}, {"since": "x"}):
        assert http("GET", f"/v1/sandboxes/{sandbox.id}/events", params=bad).status_code == 400, bad


def test_a_stream_goes_on_without_a_gap_and_ends_with_its_sandbox(http, client, making):
    sandbox = making(client.sandboxes.create(template="base"))
    path = f"/v1/sandboxes/{sandbox.id}/events"
    with Stream(http, path) as stream:
        seen = stream.until("sandbox.running")
        sandbox.pause()
        seen += stream.until("sandbox.paused")
    sandbox.resume()
    with Stream(http, path, last=str(seen[-1]["seq"])) as stream:
        seen += stream.until("sandbox.resumed")
        sandbox.kill()
        seen += list(stream)

    kinds = [event["type"] for event in seen]
    assert len(set(event["seq"] for event in seen)) == len(seen) and kinds[-1] == "sandbox.deleted", kinds
    whole = [event for event in listed(http, "/v1/events", tail=1000)["events"] if event["sandbox_id"] == sandbox.id]
    assert whole == seen


def test_what_was_changed_is_on_record(http, client, making):
    sandbox = making(client.sandboxes.create(template="base"))
    sandbox.exec("echo a-secret-in-a-command")
    http("GET", f"/v1/sandboxes/{sandbox.id}")

    answer = http("GET", "/v1/audit", params={"limit": 50})

    mine = [entry for entry in answer.json()["entries"] if sandbox.id in entry["path"]]
    assert [(entry["method"], entry["path"], entry["status"]) for entry in mine] == [("POST", f"/v1/sandboxes/{sandbox.id}/exec", 200)]
    assert "secret" not in answer.text and "pds_" not in answer.text.replace("/v1/me/tokens/pds_", "")
    assert set(mine[0]) == {"ts", "workspace", "request_id", "method", "path", "status"}
    assert http("GET", "/v1/audit", params={"limit": "0"}).status_code == 400


def test_starts_are_counted(http, fresh):
    stats = listed(http, "/v1/stats/boot", limit=500)

    mine = [start for start in stats["recent"] if start["sandbox_id"] == fresh.id]
    assert len(mine) == 1 and mine[0]["template"] == "base" and mine[0]["boot_mode"] == "snapshot"
    assert mine[0]["boot_ms"] == http("GET", f"/v1/sandboxes/{fresh.id}").json()["boot_ms"]
    assert stats["overall"]["count"] == stats["total_samples"] >= stats["by_mode"]["snapshot"]["count"] >= 1
    assert stats["overall"]["min_ms"] <= stats["overall"]["p50_ms"] <= stats["overall"]["p99_ms"] <= stats["overall"]["max_ms"]


def test_what_a_sandbox_takes_is_measured(http, fresh, foreign):
    fresh.exec("i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    deadline, points = time.time() + 90, {}
    while time.time() < deadline and not points.get("cpu_percent"):
        answer = listed(http, f"/v1/metrics/sandbox/{fresh.id}")
        points = {series["name"]: series["points"] for series in answer["series"]}
        time.sleep(5)

    assert points["cpu_percent"][-1][1] >= 0 and points["memory_bytes"][-1][1] > 1 << 20
    assert answer["step"] == "15s" and abs(points["memory_bytes"][-1][0] - time.time()) < 120
    overview = {series["name"]: series["points"] for series in listed(http, "/v1/metrics/overview")["series"]}
    assert overview["memory_bytes"][-1][1] >= 1 << 20
    path = f"/v1/metrics/sandbox/{fresh.id}"
    assert foreign.session.request("GET", http.base + path, timeout=60).status_code == 404
    assert http("GET", path, params={"step": "2m"}).status_code == 400
