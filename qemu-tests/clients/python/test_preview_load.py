"""A preview under load: a large download with the API restarted meanwhile and the sandbox asleep in between, and 200 connections at once.

`appliance download` runs the same with more: DOWNLOAD_MIB.
"""

import concurrent.futures
import hashlib
import os
import threading
import time

import pytest
import requests
from test_preview import EDGE, WebSocket, preview

PORT = 3456
MIB = int(os.environ.get("DOWNLOAD_MIB", "128"))
CONNECTIONS = 200

# Each MiB begins with its number, so that none is taken for another.
BLOCK = hashlib.shake_128(b"block").digest((1 << 20) - 8)
PROGRAM = r"""
import asyncio, base64, hashlib
BLOCK = hashlib.shake_128(b"block").digest((1 << 20) - 8)

async def serve(reader, writer):
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    lines = head.split("\r\n")
    path = lines[0].split(" ")[1]
    fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    if path.startswith("/blocks/"):
        count = int(path.split("/")[2])
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {count << 20}\r\n\r\n".encode())
        for number in range(count):
            writer.write(number.to_bytes(8, "big") + BLOCK)
            await writer.drain()
    elif "sec-websocket-key" in fields:
        accept = base64.b64encode(hashlib.sha1((fields["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()).decode()
        writer.write(f"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\r\n".encode())
        while len(start := await reader.read(2)) == 2 and start[0] & 15 != 8:
            mask = await reader.readexactly(4)
            data = bytes(byte ^ mask[at % 4] for at, byte in enumerate(await reader.readexactly(start[1] & 127)))
            writer.write(bytes([start[0], len(data)]) + data)
            await writer.drain()
    else:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(path)}\r\n\r\n{path}".encode())
    await writer.drain()
    writer.close()

async def quietly(reader, writer):
    try:
        await serve(reader, writer)
    except (OSError, asyncio.IncompleteReadError):
        writer.close()

async def main():
    server = await asyncio.start_server(quietly, "127.0.0.1", PORT, backlog=512)
    await server.serve_forever()

asyncio.run(main())
""".replace("PORT", str(PORT))

# Under emulation the host's loopback into a guest is slow: a MiB a second was seen.
pytestmark = pytest.mark.timeout(900 + 20 * MIB)


@pytest.fixture(scope="module")
def served(client):
    sandbox = client.sandboxes.create(template="base", ttl_seconds=24 * 3600)
    sandbox.filesystem.write("/root/served.py", PROGRAM)
    sandbox.exec("setsid python3 /root/served.py >/root/served.log 2>&1 < /dev/null &")
    waits = f"for i in $(seq 100); do python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", {PORT}))' 2>/dev/null && exit 0; sleep 0.3; done; cat /root/served.log; exit 1"
    ready = sandbox.exec(waits, timeout_seconds=60)
    assert ready.exit_code == 0, ready.stdout
    yield sandbox
    sandbox.kill()


def download(url, meanwhile=None):
    """Reads every byte and compares it; `meanwhile` is called when a quarter is there."""
    wanted = hashlib.sha256()
    for number in range(MIB):
        wanted.update(number.to_bytes(8, "big") + BLOCK)
    got, size, start = hashlib.sha256(), 0, meanwhile
    with requests.get(f"{url}blocks/{MIB}", stream=True, timeout=120) as answer:
        assert answer.status_code == 200
        for part in answer.iter_content(1 << 18):
            got.update(part)
            size += len(part)
            if start is not None and size >= MIB << 18:
                start()
                start = None
    assert size == MIB << 20 and start is None
    assert got.digest() == wanted.digest(), "the bytes are others"


def answers_again(http, within=60):
    deadline = time.time() + within
    while True:
        try:
            if http("GET", "/healthz").status_code == 200:
                return
        except requests.ConnectionError:
            pass
        assert time.time() < deadline, "the API does not come back"
        time.sleep(0.3)


def test_a_download_is_whole_while_the_api_restarts_and_after_sleep(client, http, served, operator):
    _, url = preview(http, served)
    ws = WebSocket(url)
    ws.echo("before")
    restarts = []

    def restart():
        restarts.append(threading.Thread(target=operator, args=("systemctl restart pandastack-api",)))
        restarts[0].start()
        # The API is away, or about to be.
        ws.echo("meanwhile")

    download(url, meanwhile=restart)
    restarts[0].join()
    ws.echo("after")
    answers_again(http)

    served.hibernate()

    assert ws.has_ended()
    download(url)
    WebSocket(url).echo("awake again")
    assert client.sandboxes.get(served.id).status == "running"


def test_two_hundred_connections_at_once_and_none_is_lost(http, served):
    _, url = preview(http, served)
    opened = threading.Barrier(CONNECTIONS)

    def one(number):
        ws = WebSocket(url, timeout=300)
        ws.echo(f"{number} first")
        # Nobody goes on before all are open.
        opened.wait(300)
        ws.echo(f"{number} second")
        ws.socket.close()
        return number

    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        assert sorted(pool.map(one, range(CONNECTIONS))) == list(range(CONNECTIONS))


def test_two_hundred_requests_at_once_are_all_answered(http, served):
    _, url = preview(http, served)

    def one(number):
        answer = requests.get(f"{url}{number}", timeout=300)
        return answer.status_code, answer.text

    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as pool:
        answers = list(pool.map(one, range(CONNECTIONS)))

    assert answers == [(200, f"/{number}") for number in range(CONNECTIONS)]
