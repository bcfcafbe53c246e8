import hashlib
import os
import time

import pytest
from pandastack.exceptions import BadRequestError, NotFoundError


def test_text_and_bytes_come_back_as_they_were(shared):
    blob = os.urandom(300000)

    assert shared.filesystem.write("/tmp/new/dir/blob", blob)["bytes"] == len(blob)
    shared.filesystem.write("/tmp/text", "päda\n")

    assert shared.filesystem.read("/tmp/new/dir/blob") == blob
    assert shared.filesystem.read("/tmp/text") == "päda\n".encode()
    assert shared.exec("stat -c '%a %U' /tmp/text").stdout == "644 root\n"


def test_an_empty_file(shared):
    shared.filesystem.write("/tmp/empty", b"")

    assert shared.filesystem.read("/tmp/empty") == b""


def test_upload_and_download(shared, tmp_path):
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(20 << 20))

    shared.filesystem.upload(str(source), "/root/up load+1.bin")
    shared.filesystem.download("/root/up load+1.bin", str(target))

    assert source.read_bytes() == target.read_bytes()


def test_a_slow_download_gets_every_byte_once(http, shared):
    shared.exec("seq -w 1000000 > /root/numbers")
    answer = http("GET", f"/v1/sandboxes/{shared.id}/fs", params={"path": "/root/numbers"}, stream=True)
    digest, read = hashlib.sha256(), 0
    for chunk in answer.iter_content(65536):
        digest.update(chunk)
        read += len(chunk)
        if read < 600000:
            time.sleep(0.2)

    assert digest.hexdigest() == shared.exec("sha256sum /root/numbers").stdout.split()[0]


def test_overwriting_is_atomic_and_keeps_the_mode(shared):
    shared.exec("install -m 750 /bin/true /tmp/tool")

    shared.filesystem.write("/tmp/tool", "#!/bin/sh\necho new\n")

    assert shared.exec("stat -c %a /tmp/tool; /tmp/tool; ls -A /tmp | grep -c '^\\.panda'").stdout == "750\nnew\n0\n"


def test_listing_stat_exists_and_walk(shared):
    shared.exec("rm -rf /tmp/w && mkdir -p /tmp/w/sub && echo 12345 > /tmp/w/f && ln -s /tmp/w /tmp/w/loop && echo > '/tmp/w/sp ace'")

    listed = {info.name: info for info in shared.filesystem.listdir("/tmp/w")}

    assert set(listed) == {"sub", "f", "loop", "sp ace"}
    assert listed["f"].size == 6 and not listed["f"].is_dir and listed["sub"].is_dir and not listed["loop"].is_dir
    assert shared.filesystem.stat("/tmp/w/f").size == 6
    assert shared.filesystem.exists("/tmp/w/f") and not shared.filesystem.exists("/tmp/w/none")
    assert {entry[0] for entry in shared.filesystem.walk("/tmp/w")} == {"/tmp/w", "/tmp/w/sub"}


def test_what_is_not_there_is_404(shared, http):
    for path in ("/none", "/etc/hostname/below"):
        with pytest.raises((NotFoundError, BadRequestError)):
            shared.filesystem.read(path)
    with pytest.raises(NotFoundError):
        shared.filesystem.listdir("/none")
    with pytest.raises(NotFoundError):
        shared.filesystem.stat("/none")
    assert http("DELETE", f"/v1/sandboxes/{shared.id}/fs", params={"path": "/none"}).status_code == 404


def test_delete_is_recursive_and_follows_no_link(shared, http):
    shared.exec("mkdir -p /tmp/d/e /tmp/safe && touch /tmp/d/e/f /tmp/safe/kept && ln -sfn /tmp/safe /tmp/d/link")

    assert http("DELETE", f"/v1/sandboxes/{shared.id}/fs", params={"path": "/tmp/d"}).status_code == 204

    assert shared.exec("ls /tmp/d; ls /tmp/safe").stdout == "kept\n"


@pytest.mark.parametrize("path", ["relative", "", "/a/../etc/passwd", "/nul\0byte", "/" + "x" * 5000])
def test_a_bad_path_is_a_400(http, shared, path):
    for method, what in (("GET", "fs"), ("GET", "fs/dir"), ("GET", "fs/stat"), ("DELETE", "fs")):
        if path == "" and what == "fs/dir":
            continue
        answer = http(method, f"/v1/sandboxes/{shared.id}/{what}", params={"path": path})
        assert answer.status_code == 400 and answer.json()["error"], (method, what, answer.text)
    assert http("PUT", f"/v1/sandboxes/{shared.id}/fs", params={"path": path}, data=b"x").status_code == 400


def test_a_directory_is_not_a_file_and_the_other_way_round(shared):
    with pytest.raises(BadRequestError):
        shared.filesystem.read("/etc")
    with pytest.raises(BadRequestError):
        shared.filesystem.write("/etc", "x")
    with pytest.raises((BadRequestError, NotFoundError)):
        shared.filesystem.listdir("/etc/hostname")


def test_a_pipe_does_not_hang_a_read(shared):
    shared.exec("rm -f /tmp/pipe; mkfifo /tmp/pipe")

    with pytest.raises(BadRequestError):
        shared.filesystem.read("/tmp/pipe")


def test_an_upload_larger_than_the_space_left_is_refused_before_it_is_read(http, shared):
    import socket
    import urllib.parse
    at = urllib.parse.urlparse(http.base)
    with socket.create_connection((at.hostname, at.port), timeout=60) as link:
        link.sendall((f"PUT /v1/sandboxes/{shared.id}/fs?path=/tmp/huge HTTP/1.1\r\nHost: x\r\n"
                      f"Authorization: {http.session.headers['Authorization']}\r\nContent-Length: {200 << 30}\r\n\r\n").encode())
        status = link.recv(4096).split(b" ")[1]

    assert status in (b"413", b"400")
    assert not shared.filesystem.exists("/tmp/huge")


def test_an_interrupted_upload_leaves_nothing(http, shared):
    import socket
    import time
    import urllib.parse
    shared.exec("mkdir -p /tmp/cut")
    at = urllib.parse.urlparse(http.base)
    with socket.create_connection((at.hostname, at.port), timeout=60) as link:
        link.sendall((f"PUT /v1/sandboxes/{shared.id}/fs?path=/tmp/cut/f HTTP/1.1\r\nHost: x\r\n"
                      f"Authorization: {http.session.headers['Authorization']}\r\nContent-Length: 1000000\r\n\r\n").encode())
        link.sendall(b"x" * 300000)
        time.sleep(1)
    deadline = time.time() + 20
    while time.time() < deadline and shared.exec("ls -A /tmp/cut").stdout:
        time.sleep(1)

    assert shared.exec("ls -A /tmp/cut").stdout == ""
