"""Templates of a workspace: built in a machine of their own, baked, used, replaced, deleted."""

import gzip
import hashlib
import io
import itertools
import json
import os
import tarfile

import pytest
import requests
from pandastack import templates
from pandastack.exceptions import AuthError, BadRequestError, NotFoundError
from pandastack.templates import TemplateBuildError

NUMBER = itertools.count()
# Every build takes a minute or more under emulation.
LONG = os.environ.get("SUITE") == "long"
# The first build bakes the template of the build machine, which takes minutes under emulation.
PATIENCE = 1500

pytestmark = pytest.mark.timeout(PATIENCE + 300)

DOCKERFILE = """\
# What a template may be made of.
ARG GREETING=hello
FROM base AS tools
RUN mkdir -p /out && echo built > /out/tool

FROM base
LABEL purpose="suite"
ENV SUITE=yes \\
    COLOUR=green
WORKDIR /srv/app
COPY sub/a.txt ./a.txt
COPY sub /srv/all
COPY --from=tools /out/tool /usr/local/share/tool
RUN echo "from $SUITE in $(pwd)" > made.txt && \\
    printf '%s\\n' one \\
    two > /srv/lines && \\
    useradd --create-home worker
USER worker
RUN id -un > /home/worker/me
USER root
EXPOSE 8000
CMD ["cat", "made.txt"]
"""


@pytest.fixture
def name(client):
    """Names for templates; what is left of them is deleted."""
    made = []

    def fresh():
        made.append(f"suite-{next(NUMBER)}")
        return made[-1]

    yield fresh
    for one in made:
        try:
            client.templates.delete(one)
        except NotFoundError:
            pass


@pytest.fixture
def context(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("the file\n")
    (tmp_path / "name").write_text("called as a field of the form\n")
    return tmp_path


@pytest.fixture
def push(operator, shared):
    """Puts an image of one layer into the played registry; answers with a reference to it."""
    registry, images = os.environ["SUITE_REGISTRY"], os.environ["SUITE_IMAGES"]

    def push(image, layer, **config):
        def keep(content, path=None):
            digest = "sha256:" + hashlib.sha256(content).hexdigest()
            path = f"{images}/{image}/{path or 'blobs/' + digest}"
            operator(f"mkdir -p $(dirname {path}) && cat > {path}", content)
            return {"digest": digest, "size": len(content)}

        architecture = {"x86_64": "amd64", "aarch64": "arm64"}[shared.exec("uname -m").stdout.strip()]
        described = {"architecture": architecture, "os": "linux", "config": config,
                     "rootfs": {"type": "layers", "diff_ids": ["sha256:" + hashlib.sha256(layer).hexdigest()]}}
        kind = "application/vnd.oci.image."
        manifest = {"schemaVersion": 2, "mediaType": kind + "manifest.v1+json",
                    "config": {"mediaType": kind + "config.v1+json", **keep(json.dumps(described).encode())},
                    "layers": [{"mediaType": kind + "layer.v1.tar+gzip", **keep(gzip.compress(layer))}]}
        keep(json.dumps(manifest).encode(), "manifests/latest")
        return f"{registry}/{image}:latest"

    yield push
    operator(f"rm -rf {images}")


def test_a_dockerfile_becomes_a_template_that_restores(client, http, name, context, making):
    made = templates.build_from_dockerfile(name := name(), DOCKERFILE, context_dir=str(context), memory_mb=512)
    assert made.status == "queued" and made.name == name

    lines = list(templates.build_logs(made.id))
    done = templates.wait_for_build(made.id, timeout_seconds=PATIENCE)

    assert done.is_done and done.is_terminal and lines[-1] == "==> done", lines
    assert list(client.templates.build_logs(made.id, follow=False)) == lines
    assert made.id in [one.id for one in client.templates.builds()]
    template = client.templates.get(name)
    assert (template.is_global, template.memory_mb, template.workspace) == (False, 512, "default")
    listed = [one.name for one in client.templates.list()]
    assert listed.index(name) > listed.index("code-interpreter") and "builder" not in listed
    sandbox = making(client.sandboxes.create(template=name))
    assert sandbox.template == name
    assert http("GET", f"/v1/sandboxes/{sandbox.id}").json()["boot_mode"] == "snapshot"
    shown = sandbox.exec("cat /srv/app/a.txt /srv/app/made.txt /srv/all/a.txt /usr/local/share/tool /home/worker/me /srv/lines; echo $COLOUR")
    assert shown.stdout == "the file\nfrom yes in /srv/app\nthe file\nbuilt\nworker\none\ntwo\ngreen\n"

    snapshot = sandbox.snapshot()
    templates.delete(name)
    with pytest.raises(NotFoundError):
        client.templates.get(name)
    with pytest.raises(BadRequestError):
        client.sandboxes.create(template=name)
    assert sandbox.exec("echo on").stdout == "on\n"
    child = making(client.sandboxes.create(from_snapshot=snapshot))
    assert (child.template, child.exec("cat /srv/app/a.txt").stdout) == (name, "the file\n")
    http("DELETE", f"/v1/snapshots/{snapshot}")


def test_an_archive_becomes_a_template_that_is_its_workspaces_alone(client, foreign, http, name, small_archive, tmp_path, making):
    path, name = tmp_path / "rootfs.tar", name()
    path.write_bytes(small_archive)
    built = templates.build(name, rootfs_tar=str(path), size_mb=128)

    assert built.is_done, built
    sandbox = making(client.sandboxes.create(template=name))
    assert sandbox.exec("cat /etc/passwd").stdout.startswith("root:")
    with pytest.raises(BadRequestError, match="replace=true"):
        client.templates.build_from_dockerfile(name, "FROM base\n")
    # The appliance's own is nobody's.
    for call in (lambda: foreign.templates.get(name), lambda: foreign.templates.delete(name),
                 lambda: foreign.templates.get_build(built.id), lambda: client.templates.get("builder"),
                 lambda: client.templates.delete("builder")):
        with pytest.raises(NotFoundError):
            call()
    for who, template in ((foreign, name), (client, "builder")):
        with pytest.raises((BadRequestError, AuthError)):
            who.sandboxes.create(template=template)
    assert name not in [one.name for one in foreign.templates.list()]
    assert built.id not in [one.id for one in foreign.templates.builds()]
    theirs = requests.get(http.base + f"/v1/templates/builds/{built.id}/logs", timeout=60,
                          headers={"Authorization": "Bearer " + os.environ["PANDASTACK_FOREIGN_KEY"]})
    assert theirs.status_code == 404


@pytest.mark.skipif(not LONG, reason="two more builds")
def test_a_template_is_replaced(client, http, name, small_archive, tmp_path, making):
    path, name = tmp_path / "rootfs.tar", name()
    path.write_bytes(small_archive)
    client.templates.build(name, rootfs_tar=str(path), size_mb=128, timeout_seconds=PATIENCE)
    before = making(client.sandboxes.create(template=name))

    form = {"name": name, "dockerfile": f"FROM {name}\nRUN echo second > /second\n", "size_mb": "128"}
    answer = http("POST", "/v1/templates/build?replace=true", data=form)
    assert answer.status_code == 202, answer.text
    client.templates.wait_for_build(answer.json()["id"], timeout_seconds=PATIENCE)

    after = making(client.sandboxes.create(template=name))
    assert after.exec("cat /second").stdout == "second\n"
    assert before.exec("cat /second 2>/dev/null; echo $?").stdout == "1\n"


def test_a_build_that_fails_says_why_and_leaves_nothing(client, http, name):
    def volumes():
        return http("GET", "/v1/volumes").json()

    def built(dockerfile):
        return lambda called: templates.build_from_dockerfile(called, dockerfile)

    before = volumes()
    missing = os.environ["SUITE_REGISTRY"] + "/nobody/has:this"
    # templates/test_builder.py has every other way to fail.
    for build, sentence in ((built("FROM base\nRUN false\n"), ""), (lambda called: templates.register(called, missing), f"{missing} cannot be pulled")):
        made = build(failing := name())
        with pytest.raises(TemplateBuildError) as failed:
            client.templates.wait_for_build(made.id, timeout_seconds=PATIENCE)
        assert sentence in str(failed.value)
        with pytest.raises(NotFoundError):
            client.templates.get(failing)
    assert volumes() == before


def test_a_build_is_cancelled(client, http, name):
    made = client.templates.build_from_dockerfile(name(), "FROM base\nRUN sleep 1000\n")
    answer = http("POST", f"/v1/templates/builds/{made.id}/cancel")
    assert answer.status_code == 200, answer.text
    with pytest.raises(TemplateBuildError, match="cancelled"):
        client.templates.wait_for_build(made.id, timeout_seconds=PATIENCE)
    assert http("POST", f"/v1/templates/builds/{made.id}/cancel").status_code == 409


@pytest.mark.skipif(not LONG, reason="two more builds; templates/test_builder.py has every hostile archive")
def test_a_hostile_archive_is_contained(client, name, small_archive, tmp_path):
    whole = io.BytesIO(small_archive)
    with tarfile.open(fileobj=whole, mode="a") as archive:
        for path, kind, target in (
            ("../../../../escaped", tarfile.REGTYPE, ""),
            ("/absolute", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, "/work"),
            ("link/through", tarfile.REGTYPE, ""),
            ("hard", tarfile.LNKTYPE, "../../etc/shadow"),
            ("dev/sda", tarfile.BLKTYPE, ""),
        ):
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname = kind, target
            archive.addfile(entry, io.BytesIO())
    path = tmp_path / "hostile.tar"
    path.write_bytes(whole.getvalue())

    built = client.templates.build(name(), rootfs_tar=str(path), size_mb=128, timeout_seconds=PATIENCE)

    # Refused, or contained: either way it is over, and the next build is not disturbed.
    assert built.is_terminal
    clean = client.templates.build_from_dockerfile(name(), "FROM base\n")
    assert client.templates.wait_for_build(clean.id, timeout_seconds=PATIENCE).is_done


def test_hostile_names_and_sizes_are_refused(client, http):
    def build(fields, files=None):
        return http("POST", "/v1/templates/build", data=fields, files=files)

    good = {"name": "hostile", "dockerfile": "FROM base"}
    before = len(client.templates.builds())
    for fields in ({}, {"name": "hostile"}, {**good, "name": ".."}, {**good, "name": "builds"}, {**good, "name": "a/b"},
                   {**good, "size_mb": "16385"}, {**good, "size_mb": "x"}, {**good, "cpu": "65"}, {**good, "memory_mb": "1"}):
        assert build(fields).status_code == 400, fields
    for path in ("../x", "/etc/x", "a/../../x", "a//x"):
        answer = build(good, {path: (path, b"x")})
        assert answer.status_code == 400 and answer.json()["error"], (path, answer.text)
    large = build(good, {"large": ("large", bytes(51 << 20))})
    assert large.status_code == 413, large.text
    assert build({**good, "name": "base"}).status_code == 409
    assert build({**good, "name": "base", "replace": "true"}).status_code == 403
    with pytest.raises(BadRequestError, match="global templates cannot be deleted"):
        client.templates.delete("base")
    assert len(client.templates.builds()) == before


def test_an_image_is_refused_outside_of_the_operators_list(client):
    for image in ("debian", "registry.example.com/team/app:1", "us-central1-docker.pkg.dev/p/r/n:1"):
        with pytest.raises(BadRequestError, match="operator"):
            client.templates.register("image", image)
    with pytest.raises(BadRequestError):
        client.templates.register("image", "not a reference")


def test_an_image_of_a_registry_becomes_a_template(client, name, push, small_archive, making):
    reference = push("team/small", small_archive, Env=["COLOUR=green"], WorkingDir="/etc")

    made = client.templates.register(name := name(), reference, size_mb=128, memory_mb=512)
    done = client.templates.wait_for_build(made.id, timeout_seconds=PATIENCE)

    assert done.is_done and client.templates.get(name).memory_mb == 512
    sandbox = making(client.sandboxes.create(template=name))
    child = making(sandbox.fork())
    snapshot = sandbox.snapshot()
    copy = making(client.sandboxes.create(from_snapshot=snapshot))
    client.snapshots.delete(snapshot)
    for one in (sandbox, child, copy):
        assert one.exec("pwd; echo $COLOUR").stdout == "/etc\ngreen\n"
    client.templates.delete(name)


@pytest.mark.skipif(not LONG, reason="two more builds")
def test_two_workspaces_have_each_their_own_of_one_name(client, foreign, name, small_archive, tmp_path):
    path, name = tmp_path / "rootfs.tar", name()
    path.write_bytes(small_archive)
    for who in (client, foreign):
        who.templates.build(name, rootfs_tar=str(path), size_mb=128, timeout_seconds=PATIENCE)

    assert client.templates.get(name).workspace != foreign.templates.get(name).workspace
    foreign.templates.delete(name)
    assert client.templates.get(name).name == name
