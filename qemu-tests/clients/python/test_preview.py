"""Programs in sandboxes, reached by the API's proxy, by signed previews and by host names."""

import base64
import hashlib
import os
import socket
from urllib.parse import urlsplit

import pytest
import requests
from pandastack.exceptions import NotFoundError

PORT = 3456
EDGE = os.environ["PANDASTACK_EDGE"]
SIZE = 3 * 1024 * 1024

# A web server of the standard library alone: a file, what it was asked, and a WebSocket that echoes what fits into one frame.
PROGRAM = r"""
import base64, hashlib, socketserver, http.server
BODY = bytes(range(256)) * (%d // 256)

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        if self.headers.get("Upgrade", "").lower() == "websocket":
            return self.echo()
        if self.path.startswith("/file"):
            return self.answer(BODY)
        self.answer((self.command + " " + self.path + "\n" + str(self.headers)).encode())

    do_HEAD = do_GET

    def do_POST(self):
        self.answer(hashlib.sha256(self.rfile.read(int(self.headers["Content-Length"]))).hexdigest().encode())

    def echo(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key.encode()).digest()).decode())
        self.end_headers()
        self.close_connection = True
        while True:
            head = self.rfile.read(2)
            if len(head) < 2 or head[0] & 15 == 8:
                return
            mask = self.rfile.read(4)
            data = bytes(byte ^ mask[at %% 4] for at, byte in enumerate(self.rfile.read(head[1] & 127)))
            self.wfile.write(bytes([head[0], len(data)]) + data)

class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64

Server(("127.0.0.1", %d), Handler).serve_forever()
""" % (SIZE, PORT)
WHOLE = hashlib.sha256(bytes(range(256)) * (SIZE // 256)).hexdigest()


@pytest.fixture(scope="module")
def served(client):
    """A sandbox with a program behind a port."""
    sandbox = client.sandboxes.create(template="base", ttl_seconds=3600)
    sandbox.filesystem.write("/root/served.py", PROGRAM)
    sandbox.exec("setsid python3 /root/served.py >/root/served.log 2>&1 < /dev/null &")
    waits = f"for i in $(seq 100); do python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {PORT}))' 2>/dev/null && exit 0; sleep 0.3; done; exit 1"
    assert sandbox.exec(waits, timeout_seconds=60).exit_code == 0
    yield sandbox
    sandbox.kill()


def preview(http, sandbox, **wish):
    answer = http("POST", f"/v1/sandboxes/{sandbox.id}/preview-token", json={"port": PORT, **wish})
    assert answer.status_code == 200, answer.text
    made = answer.json()
    assert made["sandbox_id"] == sandbox.id and made["port"] == PORT and made["expires_at"]
    return made, EDGE + urlsplit(made["url"]).path


def get(url, **kwargs):
    return requests.get(url, timeout=90, **kwargs)


class WebSocket:
    """The little of a client that an echo needs."""

    def __init__(self, url, host=None, timeout=60, token=None):
        parts = urlsplit(url)
        self.socket = socket.create_connection((parts.hostname, parts.port), timeout=timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        self.socket.sendall((f"GET {parts.path} HTTP/1.1\r\nHost: {host or parts.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                             f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
                             + (f"Authorization: Bearer {token}\r\n" if token else "") + "\r\n").encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = self.socket.recv(1)
            assert byte, head
            head += byte
        assert head.startswith(b"HTTP/1.1 101"), head

    def echo(self, text):
        data = text.encode()
        mask = os.urandom(4)
        self.socket.sendall(bytes([0x81, 0x80 | len(data)]) + mask + bytes(byte ^ mask[at % 4] for at, byte in enumerate(data)))
        got = b""
        while len(got) < 2 + len(data):
            part = self.socket.recv(1024)
            assert part, got
            got += part
        assert got == bytes([0x81, len(data)]) + data

    def has_ended(self, within=30):
        self.socket.settimeout(within)
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True


def test_ports_are_listed_named_and_forgotten(client, http, served, foreign):
    urls = served.preview_urls()
    assert urls[PORT] == f"https://{PORT}-{served.id}.{os.environ['PANDASTACK_PREVIEW_HOST']}" and 22 not in urls

    path = f"/v1/sandboxes/{served.id}/ports"
    assert http("POST", path, json={"port": PORT, "label": "web"}).status_code == 201
    one = [one for one in http("GET", path).json() if one["port"] == PORT][0]
    assert (one["label"], one["source"], one["listening"]) == ("web", "user", True)
    assert http("GET", one["proxy_url"]).status_code == 200
    assert http("DELETE", f"{path}/{PORT}").status_code == 204
    assert [one["source"] for one in http("GET", path).json() if one["port"] == PORT] == ["detected"]
    with pytest.raises(NotFoundError):
        foreign._request("GET", f"/sandboxes/{served.id}/ports")


def test_the_api_passes_requests_on_without_the_token(http, served):
    path = f"/v1/sandboxes/{served.id}/proxy/{PORT}"
    told = http("GET", f"{path}/a?b=1&access_token=pds_x", headers={"X-Pandastack-Broker-Auth": "Bearer app"}).text
    assert told.startswith("GET /a?b=1\n") and "pds_" not in told and "Authorization: Bearer app" in told.replace("authorization", "Authorization")
    sent = os.urandom(1 << 20)
    assert http("POST", f"{path}/", data=sent).text == hashlib.sha256(sent).hexdigest()
    assert hashlib.sha256(http("GET", f"{path}/file").content).hexdigest() == WHOLE
    assert http("GET", f"/v1/sandboxes/{served.id}/proxy/1/").status_code == 502


def test_a_preview_outlives_sleep(client, http, served):
    _, url = preview(http, served)
    ws = WebSocket(url + "ws")
    ws.echo("before")
    assert hashlib.sha256(get(url + "file").content).hexdigest() == WHOLE

    served.hibernate()

    assert ws.has_ended()
    again = WebSocket(url + "ws")
    again.echo("after")
    assert client.sandboxes.get(served.id).status == "running"
    assert hashlib.sha256(get(url + "file").content).hexdigest() == WHOLE
    again.echo("still")


def test_what_a_capture_cuts_ends_at_once(http, served):
    """The guest's end of every connection is reset; nothing on this side would say so for minutes."""
    _, url = preview(http, served)
    sockets = [WebSocket(url + "ws"), WebSocket(f"{http.base}/v1/sandboxes/{served.id}/proxy/{PORT}/ws", token=os.environ["PANDASTACK_API_KEY"])]
    for one in sockets:
        one.echo("before")
    served.exec("truncate -s 256M /root/large")
    download = http("GET", f"/v1/sandboxes/{served.id}/fs", params={"path": "/root/large"}, stream=True, timeout=20)
    parts = download.iter_content(1 << 16)
    next(parts)

    served.snapshot()

    assert [one.has_ended(20) for one in sockets] == [True, True]
    # A stall would be a ConnectionError.
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        sum(len(part) for part in parts)
    WebSocket(url + "ws").echo("after")
    assert served.exec("stat -c %s /root/large").stdout.strip() == str(256 << 20)


def test_a_preview_opens_its_paths_until_it_is_revoked(http, served):
    made, url = preview(http, served, paths=["/file", "ws"])
    assert get(url + "file").status_code == 200
    refused = get(url + "other")
    assert refused.status_code == 403 and refused.json()["allowed_paths"] == ["/file", "/ws"]
    ws = WebSocket(url + "ws")
    ws.echo("good")

    tokens = f"/v1/sandboxes/{served.id}/preview-tokens"
    assert made["id"] in [one["id"] for one in http("GET", tokens).json()]
    assert http("DELETE", f"{tokens}/{made['id']}").status_code == 204

    assert ws.has_ended()
    assert get(url + "file").status_code == 401
    assert made["id"] not in [one["id"] for one in http("GET", tokens).json()]


def test_a_preview_expires(http, served):
    _, url = preview(http, served, ttl_seconds=4)
    ws = WebSocket(url + "ws")
    ws.echo("good")

    assert ws.has_ended(60)
    assert get(url).status_code == 401


def test_wrong_tokens_open_nothing(http, served):
    made, _ = preview(http, served)
    payload, mac = made["token"].split(".")
    for token in (payload + ".", payload + "." + mac[::-1], "x", mac):
        assert get(f"{EDGE}/v1/p/{token}/").status_code == 401, token
    assert http("POST", "/v1/sandboxes/" + "z" * 20 + "/preview-token", json={"port": PORT}).status_code == 404
    for wish in ({}, {"port": 22}, {"port": PORT, "paths": ["a|b"]}):
        assert http("POST", f"/v1/sandboxes/{served.id}/preview-token", json=wish).status_code == 400


def test_the_name_that_the_client_makes_opens_the_port(served):
    host = urlsplit(served.preview_url(PORT)).netloc

    told = get(EDGE + "/here?x=1", headers={"Host": host})

    assert told.status_code == 200 and told.text.startswith("GET /here?x=1\n")
    assert f"x-forwarded-host: {host}" in told.text.lower()
    WebSocket(EDGE + "/ws", host).echo("by name")
    other = host.replace(served.id, "z" * 20)
    assert get(EDGE, headers={"Host": other}).status_code == 404
