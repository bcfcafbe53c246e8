#!/usr/bin/python3 -B
"""The program of the template `builder`, with real buildah and real ext4, on this machine.

Runs in a small Debian root of its own in ${XDG_CACHE_HOME:-~/.cache}/pandastack/builder-test, with the packages that the template
has; made when it is missing or they change. Every build runs in it as in the microVM, but without any network, and with every
directory read-only that it has no business to write to. Needs root (it asks sudo) and loop devices.
"""

import dataclasses
import gzip
import io
import json
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import unittest

from test_builder_archives import BUSYBOX, ROOT, docker_archive, entry, hard, link, oci_archive, oci_blobs, shell, tar, zeros

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE / "builder/program"
NEEDED = ("python3", "rsync", "util-linux", "gzip", "xz-utils", "zstd", "bzip2", "busybox-static", "iproute2")
# How a build is started: as in the microVM it is root's, sees the disks below /mnt, and has proc, sys, dev and an empty /run.
START = """
root=$1 work=$2 state=$3 disks=$4; shift 4
mount --make-rprivate / && mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"; mount -t sysfs sysfs "$root/sys"
for empty in run tmp root var/tmp var/lib/containers; do mount -t tmpfs tmpfs "$root/$empty"; done
mount --bind "$work" "$root/work"; mount --rbind "$disks" "$root/mnt"; mount --bind "$state" "$root/var/lib/pandastack-build"
cd "$root"; pivot_root . .old
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
umount -l /.old; ip link set lo up
exec "$@"
"""


def environment():
    """Goes on as root where its mounts are nobody else's, with the root in place."""
    if os.geteuid() != 0:
        keep = [f"{name}={os.environ[name]}" for name in ("PATH", "HOME", "XDG_CACHE_HOME") if name in os.environ]
        os.execvp("sudo", ["sudo", "env", *keep, sys.executable, "-B", __file__, *sys.argv[1:]])
    if os.environ.get("BUILDER_TEST") != "inside":
        os.execvpe("unshare", ["unshare", "--mount", sys.executable, "-B", __file__, *sys.argv[1:]], os.environ | {"BUILDER_TEST": "inside"})
    from roots import Root  # It is a module of this folder, for root only.

    packages = [*NEEDED, *tomllib.loads((HERE / "builder/template.toml").read_text())["debian"]["packages"]]
    mark = ROOT / "installed"
    if not mark.exists() or mark.read_text() != "\n".join(packages):
        shutil.rmtree(ROOT, ignore_errors=True)
        ROOT.mkdir(parents=True)
        Root(ROOT / "root", "builder-test").bootstrap(packages)
        for folder in ("work", ".old", "var/lib/pandastack-build", "var/lib/containers", "usr/lib/pandastack"):
            (ROOT / "root" / folder).mkdir(parents=True, exist_ok=True)
        mark.write_text("\n".join(packages))
    shutil.copytree(PROGRAM, ROOT / "root/usr/lib/pandastack", dirs_exist_ok=True)


if __name__ == "__main__":
    environment()
sys.path.insert(0, str(PROGRAM))

from builder import dockerfile  # noqa: E402
from builder.report import WrongInput, printable  # noqa: E402


# --- builds -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Built:
    """How a build ended."""

    code: int
    log: list[str]
    result: dict | None


class BuildTest(unittest.TestCase):
    """A new target for each test, mounted as `self.target`."""

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="builder-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.work, self.disks, self.state = self.folder / "work", self.folder / "disks", self.folder / "state"
        for folder in (self.work, self.disks, self.state):
            folder.mkdir()
        self.target = self.disk("target")

    def disk(self, name, size=64, content=None, read_only=False):
        """An ext4 of `size` MiB below /mnt of the build, with what the archive `content` holds."""
        file, place = self.folder / f"{name}.img", self.disks / name
        if place.exists():
            subprocess.run(["umount", place], check=True)
        else:
            self.addCleanup(subprocess.run, ["umount", "-l", place], check=True)
        place.mkdir(exist_ok=True)
        with open(file, "wb") as out:
            out.truncate(size << 20)
        subprocess.run(["mkfs.ext4", "-q", "-m0", "-F", file], check=True)
        subprocess.run(["mount", "-o", "loop,noatime", file, place], check=True)
        if content:
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(place)
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        return place

    def build(self, before="", **fields):
        """Runs the program on a request with these fields."""
        (self.work / "request.json").write_text(json.dumps({"target": "/mnt/target", "target_is": None} | fields))
        (self.work / "result.json").unlink(missing_ok=True)
        command = f"{before} /usr/lib/pandastack/build /work/request.json"
        done = subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "sh", "-ec", START, "sh", ROOT / "root", self.work,
                               self.state, self.disks, "sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, timeout=600)
        result = self.work / "result.json"
        built = Built(done.returncode, done.stdout.splitlines(), json.loads(result.read_text()) if result.exists() else None)
        self.assertEqual(built.code == 0, built.result is not None, built.log)
        self.assertNotIn("Traceback", done.stdout)
        return built

    def rootfs(self, content, **fields):
        (self.work / "rootfs").write_bytes(content)
        return self.build(kind="rootfs", source="/work/rootfs", **fields)

    def dockerfile(self, text, context=None, **fields):
        (self.work / "Dockerfile").write_text(text)
        for name, content in (context or {}).items():
            path = self.work / "context" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return self.build(kind="dockerfile", dockerfile="/work/Dockerfile", source="/work/context" if context else None, **fields)

    def assert_built(self, built):
        self.assertEqual(built.code, 0, built.log)
        self.assertEqual((self.target / "etc/resolv.conf").read_text(), "nameserver 172.31.255.1\n")
        self.assertEqual((self.target / "etc/machine-id").read_text(), "")
        for name in ("proc", "sys", "dev", "run", "mnt", "root", "tmp"):
            self.assertTrue((self.target / name).is_dir(), name)

    def assert_refused(self, built, *sentence):
        self.assertEqual(built.code, 65, built.log)
        for part in sentence:
            self.assertIn(part, built.log[-1])
        self.assertRegex(built.log[-1], r"\.$")


class RootFileSystemTest(BuildTest):
    """A plain root file system."""

    def test_all_that_a_root_has_is_kept(self):
        xattr = entry("bin/ping", b"ping")
        xattr[0].pax_headers = {"SCHILY.xattr.user.note": "kept", "SCHILY.xattr.trusted.no": "x"}
        content = tar(*shell(), entry("./usr/"), entry("usr/su", b"su", mode=0o4755, uid=3, gid=4, mtime=1_000_000_000), hard("usr/su2", "./usr/su"), xattr,
                      link("lib", "usr/lib"), entry("lib/so", b"so"), entry("usr/lib/", mode=0o750, mtime=1), entry("usr/lib/b", b"b"),
                      entry("dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), entry("fifo", type=tarfile.FIFOTYPE),
                      entry("etc/"), link("etc/resolv.conf", "/bin/busybox"), entry("etc/hosts", b"10.0.0.1 host\n"), link("absolute", "/etc/hosts"))
        packed = {"tar": content, "tar.gz": gzip.compress(content, 1)}
        for program in ("xz", "zstd"):
            packed[program] = subprocess.run(["chroot", ROOT / "root", program, "-1c"], input=content, stdout=subprocess.PIPE, check=True).stdout
        for name, archive in packed.items():
            with self.subTest(name):
                self.target = self.disk("target")
                built = self.rootfs(archive)
                self.assert_built(built)
                su = os.lstat(self.target / "usr/su")
                self.assertEqual((su.st_mode & 0o7777, su.st_uid, su.st_gid, su.st_mtime, su.st_nlink), (0o4755, 3, 4, 1_000_000_000, 2))
                self.assertEqual(os.listxattr(self.target / "bin/ping"), ["user.note"])
                self.assertEqual(os.stat(self.target / "usr/lib").st_mtime, 1)
                self.assertEqual(sorted(path.name for path in (self.target / "usr/lib").iterdir()), ["b", "so"])
                self.assertEqual(os.readlink(self.target / "absolute"), "/etc/hosts")
                self.assertEqual((self.target / "etc/hosts").read_text(), "10.0.0.1 host\n")
                self.assertEqual((self.target / "bin/busybox").read_bytes(), BUSYBOX.read_bytes())
                self.assertFalse((self.target / "fifo").exists() or (self.target / "dev/null").exists())
                self.assertTrue(any("2 devices, pipes" in line for line in built.log), built.log)
                self.assertEqual((built.result["env"], built.result["workdir"]), ({}, "/root"))
                self.assertGreater(built.result["bytes"], len(BUSYBOX.read_bytes()))

    def test_holes_stay_holes(self):
        with open(self.folder / "holes", "wb") as file:
            file.seek(20 << 20)
            file.write(b"middle")
            file.truncate(500 << 20)
        for format in ("gnu", "pax"):
            with self.subTest(format):
                self.target = self.disk("target")
                packed = subprocess.run(["tar", "-cS", f"--format={format}", "-C", self.folder, "holes"], stdout=subprocess.PIPE, check=True).stdout
                self.assert_built(self.rootfs(tar(*shell(), end=False) + packed))
                state = os.stat(self.target / "holes")
                self.assertEqual(state.st_size, 500 << 20)
                self.assertLess(state.st_blocks * 512, 1 << 20)
                with open(self.target / "holes", "rb") as file:
                    file.seek(20 << 20)
                    self.assertEqual(file.read(7), b"middle\0")

    def test_links_lead_nowhere_but_into_the_root(self):
        (self.work / "canary").write_text("untouched")
        built = self.rootfs(tar(*shell(), link("a", "/work"), entry("a/canary", b"x"), link("b", "../../../../work"), entry("b/canary2", b"x"),
                                link("c", "/"), link("d", "c/c/../../.."), entry("d/e", b"e"), entry("/absolute", b"y"), link("etc", "/work"),
                                hard("f", "a/canary")))
        self.assertEqual(built.code, 0, built.log)
        self.assertEqual((self.target / "work/canary").read_text(), "x")
        self.assertEqual((self.target / "work/canary").stat().st_nlink, 2)
        self.assertEqual(((self.target / "e").read_text(), (self.target / "absolute").read_text()), ("e", "y"))
        self.assertTrue((self.target / "work/canary2").exists() and (self.target / "work/resolv.conf").exists())
        self.assertEqual((self.work / "canary").read_text(), "untouched")
        self.assertFalse((self.work / "canary2").exists() or (self.work / "resolv.conf").exists())

    def test_hostile_archives_are_refused_with_a_sentence(self):
        many = [entry(f"f{number}", b"") for number in range(1000)]
        loop = [link("a", "b"), link("b", "a"), entry("a/c", b"x")]
        good = tar(*shell())
        packed = gzip.compress(good, 1)
        header = tarfile.TarInfo("big")
        header.type, header.size = tarfile.XHDTYPE, 4 << 30
        cases = {
            "out": (tar(*shell(), entry("x/../../work/canary", b"x")), {}, "leads out of the root"),
            "hard link out": (tar(*shell(), hard("x", "../../etc/passwd")), {}, "leads out of the root"),
            "hard link to nothing": (tar(*shell(), hard("x", "/work/request.json")), {}, "hard link"),
            "links in a circle": (tar(*shell(), *loop), {}, "cannot be unpacked"),
            "too many": (tar(*shell(), *many), {"entries": 900}, "more than 900 entries"),
            "a name too long": (tar(*shell(), entry("n" * 300, b"")), {}, "cannot be unpacked"),
            "a file too large": (tar(*shell(), end=False) + entry("huge", b"", size=1 << 52)[0].tobuf(tarfile.GNU_FORMAT) + bytes(10240), {}, "'huge'"),
            "a header too large": (header.tobuf() + b"0" * (1 << 20), {}, ""),
            "a header that never ends": (gzip.compress(header.tobuf(), 1) + zeros(1000), {}, "header that is too large"),
            "nothing": (b"", {}, ""),
            "garbage": (os.urandom(1 << 20), {}, "no tar"),
            "garbage in gzip": (gzip.compress(os.urandom(1 << 20), 1), {}, "no tar"),
            "garbage in the middle": (tar(*shell(), end=False) + b"\xff" * 2048 + bytes(10240), {}, "damaged at 'bin/wc'"),
            "half a gzip": (packed[: len(packed) // 2], {}, ""),
            "a gzip without its end": (packed[:-4], {}, "uncompressed"),
            "half a tar": (good[: len(good) // 2], {}, ""),
            "no shell": (tar(entry("etc/"), entry("etc/passwd", b"")), {}, "no /bin/sh"),
            "a shell that leads out": (tar(link("bin", "/usr/bin"), link("usr", "../../../usr")), {}, ""),
            "a file where a directory belongs": (tar(*shell(), entry("proc", b"x")), {}, "not one that a sandbox can run"),
        }
        for name, (archive, fields, sentence) in cases.items():
            with self.subTest(name):
                self.target = self.disk("target")
                self.assert_refused(self.rootfs(archive, **fields), sentence)
                self.assertEqual(sorted(path.name for path in self.work.iterdir()), ["request.json", "rootfs"])

    def test_bombs_end_with_the_disk(self):
        header = entry("zeros", b"", size=300 << 20)[0].tobuf()
        self.assert_refused(self.rootfs(gzip.compress(tar(*shell(), end=False) + header, 1) + zeros(301)), "does not fit into")
        self.target = self.disk("target")
        self.assert_refused(self.rootfs(gzip.compress(tar(*shell(), *(entry(f"{n}", b"") for n in range(20_000))), 1)), "files and directories")


class ImageTest(BuildTest):
    """Archives of images, and references."""

    def assert_image(self, built):
        self.assert_built(built)
        self.assertEqual(built.result["env"], {"PATH": "/bin", "GREETING": "good day"})
        self.assertEqual(built.result["workdir"], "/srv/app")
        self.assertTrue((self.target / "srv/app").is_dir())
        self.assertFalse((self.target / "etc/gone").exists())
        data = os.stat(self.target / "data")
        self.assertEqual(((self.target / "data").read_text(), data.st_uid, data.st_gid), ("22", 7, 8))

    def test_archives_are_known_by_their_content(self):
        archives = {"docker": docker_archive(), "docker, compressed": gzip.compress(docker_archive(), 1), "oci": oci_archive(),
                    "docker since 25": docker_archive("blobs/sha256/{}", "blobs/sha256/{}", [entry("blobs/"), entry("oci-layout", b"{}")])}
        for name, archive in archives.items():
            with self.subTest(name):
                self.target = self.disk("target")
                built = self.rootfs(archive)
                self.assert_image(built)
                self.assertTrue(any(line.startswith("ENTRYPOINT and CMD are not used") for line in built.log), built.log)

    def test_images_that_cannot_be_used_are_refused(self):
        self.assert_refused(self.rootfs(docker_archive(architecture="arm64")), "arm64")
        self.assert_refused(self.rootfs(docker_archive().replace(b'"Layers"', b'"Lairs_"')), "no image that can be read")
        self.assert_refused(self.rootfs(tar(entry("manifest.json", b"{"))), "no image that can be read")

    def test_an_image_that_is_too_large_is_refused(self):
        self.target = self.disk("target", size=2)
        self.assert_refused(self.rootfs(docker_archive()), "does not fit into")

    def test_a_reference_is_pulled_from_the_one_registry(self):
        blobs, manifest = oci_blobs()
        site = self.work / "site/v2/team/app"
        for folder in (site / "blobs", site / "manifests"):
            folder.mkdir(parents=True)
        for name, content in blobs.items():
            (site / f"blobs/sha256:{name}").write_bytes(content)
        (site / "manifests/1").write_bytes(blobs[manifest["digest"].removeprefix("sha256:")])
        (self.work / "serve.py").write_text(SERVER)
        before, host = "python3 /work/serve.py & while ! test -e /work/serving; do sleep 0.1; done;", "127.0.0.1:5000"
        fields = {"kind": "reference", "registry": {"host": host, "insecure": True}}
        self.assert_image(self.build(before, reference=f"{host}/team/app:1", **fields))
        self.target = self.disk("target")
        self.assert_refused(self.build(before, reference=f"{host}/team/app:2", **fields), "cannot be pulled")
        self.assert_refused(self.build(reference="example.org/team/app:1", **fields), "only images of")
        self.assert_refused(self.build(reference="app", **fields), "only images of")


# The reading half of a registry.
SERVER = """
import http.server, os, pathlib
os.chdir("/work/site")
class Handler(http.server.SimpleHTTPRequestHandler):
    extensions_map = {"": "application/vnd.oci.image.manifest.v1+json"}
    def do_GET(self):
        if self.path == "/v2/":
            self.send_response(200); self.end_headers()
        else:
            super().do_GET()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 5000), Handler)
pathlib.Path("/work/serving").touch()
server.serve_forever()
"""

TWENTY_LINES = r"""# syntax=docker/dockerfile:1
ARG BASE=tiny
FROM ${BASE} AS tools
ARG WHAT=tool
WORKDIR /out
COPY --chown=3:4 . .
RUN ls && echo "$WHAT" > /out/$WHAT \
    # a remark
    && touch /out/made

FROM ${BASE}
LABEL org.example.kind="test" \
      org.example.owner=nobody
ENV GREETING="good day" PATH=/out:$PATH
RUN <<EOF
FROM=nobody
cat /etc/marker > /marker; echo "$GREETING" >> /marker
rm /etc/gone
echo bbb > /etc/same ; touch -d @1000000000 /etc/same
EOF
COPY --from=tools --chown=3:4 /out /out
COPY --chown=5 sub/file /home/
USER 3
WORKDIR /out
RUN id -u > /out/who; echo $PATH > /out/path; env > /out/env
EXPOSE 80
ENTRYPOINT ["/bin/sh"]
CMD ["-c", "ls"]
"""


class DockerfileTest(BuildTest):
    """Dockerfiles on a template."""

    def setUp(self):
        super().setUp()
        self.template = tar(*shell(), entry("etc/"), entry("etc/marker", b"of the template\n"), entry("etc/gone", b"x"), entry("etc/same", b"aaa\n", mtime=1_000_000_000),
                            entry("large", os.urandom(20 << 20)), entry("tmp/", mode=0o1777))
        self.disk("tiny", content=self.template, read_only=True)
        self.fields = {"templates": {"tiny": "/mnt/tiny"}}

    def copy_of_the_template(self):
        self.target = self.disk("target", content=self.template)
        self.fields["target_is"] = "tiny"

    def test_twenty_lines_on_a_template(self):
        self.copy_of_the_template()
        large = os.stat(self.target / "large")
        context = {"sub/file": "in the context", "secret": "not for the build", ".dockerignore": "secret\n"}
        built = self.dockerfile(TWENTY_LINES, context, template_env={"tiny": {"OF_THE_TEMPLATE": "yes", "PATH": "/own:/bin"}}, **self.fields)
        self.assert_built(built)
        self.assertEqual(built.result["env"], {"PATH": "/out:/own:/bin", "OF_THE_TEMPLATE": "yes", "GREETING": "good day"})
        self.assertEqual(built.result["workdir"], "/out")
        self.assertEqual((self.target / "marker").read_text(), "of the template\ngood day\n")
        self.assertEqual(sorted(os.listdir(self.target / "out")), [".dockerignore", "env", "made", "path", "sub", "tool", "who"])
        self.assertEqual((self.target / "out/who").read_text(), "3\n")
        self.assertEqual((self.target / "out/path").read_text(), "/out:/own:/bin\n")
        self.assertIn("GREETING=good day\n", (self.target / "out/env").read_text())
        self.assertEqual(os.stat(self.target / "home/file").st_uid, 5)
        self.assertFalse((self.target / "etc/gone").exists())
        self.assertEqual((self.target / "etc/same").read_text(), "bbb\n")
        self.assertEqual(os.stat(self.target / "etc/same").st_mtime, 1_000_000_000)
        # What the build has not changed was not written again.
        after = os.stat(self.target / "large")
        self.assertEqual((after.st_ino, after.st_ctime_ns), (large.st_ino, large.st_ctime_ns))
        used = sum(path.lstat().st_blocks * 512 for path in self.state.rglob("*") if stat.S_ISREG(path.lstat().st_mode))
        self.assertLess(used, 5 << 20)

    def test_an_empty_target_gets_everything(self):
        self.assert_built(self.dockerfile("FROM scratch\nCOPY --from=tiny /bin /bin\nCOPY --from=tiny /etc/marker /\n", **self.fields))
        self.assertEqual((self.target / "marker").read_text(), "of the template\n")
        self.target = self.disk("target")
        self.assert_built(self.dockerfile("FROM tiny AS tiny\nRUN touch /made\nFROM tiny\nRUN rm /large\nCOPY --from=tiny /made /\n", **self.fields))
        self.assertTrue((self.target / "made").exists() and not (self.target / "large").exists())

    def test_mounts_and_files_within_the_dockerfile(self):
        self.copy_of_the_template()
        text = """FROM tiny AS one
COPY <<EOF /greeting
hello
EOF
FROM tiny
SHELL ["/bin/sh", "-euc"]
RUN --mount=type=cache,target=/cache --mount=type=bind,from=one,target=/one cat /one/greeting > /cache/x && cat /cache/x > /got
VOLUME /data
"""
        self.assert_built(self.dockerfile(text, **self.fields))
        self.assertEqual((self.target / "got").read_text(), "hello\n")

    def test_what_cannot_be_built_is_refused_with_a_sentence(self):
        cases = {
            "FROM debian:13\n": ("Line 1", "FROM debian:13", "templates (tiny)"),
            "ARG X=nobody\nFROM tiny AS one\nFROM $X\n": ("Line 3", "FROM nobody"),
            "FROM docker-archive:/work/x\n": ("FROM docker-archive:/work/x",),
            "FROM tiny\nCOPY --from=nobody /x /x\n": ("nobody",),
            "FROM scratch\nCOPY sub/file /\n": ("no /bin/sh",),
            "FROM tiny\nRUN exit 7\n": ("RUN exit 7", "exit status 7"),
            "FROM tiny\nCOPY absent /\n": ("absent",),
            "FROM tiny\nNONSENSE x\n": ("NONSENSE",),
            "": ("no FROM",),
            "FROM\n": ("names nothing",),
        }
        for text, sentence in cases.items():
            with self.subTest(text):
                self.target = self.disk("target")
                self.assert_refused(self.dockerfile(text, {"sub/file": "x"}, **self.fields), *sentence)

    def test_a_build_ends_with_the_disk_of_the_builder(self):
        self.state = self.disk("state")
        self.assert_refused(self.dockerfile("FROM tiny\nRUN cat /dev/zero > /zeros\n", **self.fields), "does not fit")

    def test_what_a_build_leaves_running_does_not_keep_it(self):
        self.copy_of_the_template()
        self.assert_built(self.dockerfile("FROM tiny\nRUN sleep 1000 & sleep 1000 >/dev/null 2>&1 & echo started\n", **self.fields))

    def test_a_build_has_its_time(self):
        self.assert_refused(self.dockerfile("FROM tiny\nRUN sleep 1000\n", seconds=4, **self.fields), "within 4 seconds")

    def test_a_target_that_is_not_what_the_host_says_is_no_fault_of_the_tenant(self):
        (self.target / "something").touch()
        self.assertEqual(self.dockerfile("FROM tiny\n", **self.fields).code, 70)
        self.assertEqual(self.dockerfile("FROM tiny\n", target_is="other", **self.fields).code, 70)
        self.assertEqual(self.build(kind="other").code, 70)


class FromTest(unittest.TestCase):
    """The names on FROM lines, without a build."""

    def test_names_are_replaced_and_nothing_else(self):
        known = {"a": "localhost/a", "B.x": "localhost/b"}
        cases = {
            "from a": "FROM localhost/a",
            "FROM --platform=$P a AS a\nFROM a": "FROM --platform=$P localhost/a AS a\nFROM a",
            "ARG N=a\nARG M=${N}\nFROM ${M:-c} as x\nFROM $M": "ARG N=a\nARG M=${N}\nFROM localhost/a as x\nFROM localhost/a",
            "FROM \\\n# remark\n B.x \\\n AS y\nRUN x": "FROM localhost/b AS y\n\n\n\nRUN x",
            "# escape=`\nFROM `\na": "# escape=`\nFROM localhost/a\n",
            "FROM a\nRUN <<E cat <<-'F'\nFROM c\nE\nFROM d\n\tF\nFROM B.x": "FROM localhost/a\nRUN <<E cat <<-'F'\nFROM c\nE\nFROM d\n\tF\nFROM localhost/b",
            "FROM scratch": "FROM scratch",
            "FROM ${X:+c}a": "FROM localhost/a",
        }
        for text, expected in cases.items():
            self.assertEqual(dockerfile.with_names(text, known)[0], expected, text)

    def test_other_names_are_refused(self):
        for text in ("FROM b.x", "FROM a:1", "FROM $A", "FROM a\nFROM --from=x /", "RUN x"):
            with self.assertRaises(WrongInput, msg=text):
                dockerfile.with_names(text, {"a": "localhost/a"})

    def test_a_line_of_the_log_is_one_line(self):
        self.assertEqual(printable("a\nb\tc\x1b[31md\x00\u202ee\ud800"), "a b c[31mde")
        self.assertEqual(len(printable("x" * 10_000)), 2001)


if __name__ == "__main__":
    unittest.main()
