"""What a tenant may send, made by hand for test_builder.py: archives of root file systems and of images."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import tarfile

# A small Debian root in which builds are run.
ROOT = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pandastack/builder-test"
BUSYBOX = ROOT / "root/usr/bin/busybox"


def entry(name, content=None, **fields):
    """An entry of an archive: a file where there is content, else what `type` says."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.REGTYPE if content is not None else tarfile.DIRTYPE
    info.mode = 0o755
    for field, value in fields.items():
        setattr(info, field, value)
    info.size = fields.get("size", len(content or b""))
    return info, content or b""


def link(name, to):
    return entry(name, type=tarfile.SYMTYPE, linkname=to)


def hard(name, to):
    return entry(name, type=tarfile.LNKTYPE, linkname=to)


def tar(*entries, end=True):
    """An archive; without its end, more can follow."""
    out = io.BytesIO()
    archive = tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT)
    for info, content in entries:
        archive.addfile(info, io.BytesIO(content))
    if end:
        archive.close()
    return out.getvalue()


def zeros(mebibytes):
    """Zeros, compressed."""
    return gzip.compress(bytes(1 << 20), 1) * mebibytes


def shell():
    """The least that a sandbox runs on."""
    applets = ("cat", "chown", "env", "id", "ls", "mkdir", "rm", "sleep", "stat", "touch", "wc")
    return [entry("./"), entry("bin/"), entry("bin/busybox", BUSYBOX.read_bytes()), link("bin/sh", "busybox"), *(link(f"bin/{name}", "busybox") for name in applets)]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def image(architecture="amd64"):
    """Two layers, of which the second takes out a file of the first, and the configuration of an image of them."""
    layers = [tar(*shell(), entry("etc/gone", b"x"), entry("data", b"1", uid=7, gid=8)), tar(entry("etc/.wh.gone", b""), entry("data", b"22", uid=7, gid=8))]
    config = {"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer)}" for layer in layers]},
              "config": {"Env": ["PATH=/bin", "GREETING=good day", "not.a.name=1"], "WorkingDir": "/srv/app", "Cmd": ["/bin/sh"], "User": "7"}}
    return layers, json.dumps(config).encode()


def docker_archive(layer_name="{}.tar", config_name="{}.json", more=(), **options):
    layers, config = image(**options)
    files = {layer_name.format(sha256(layer)): layer for layer in layers}
    manifest = [{"Config": config_name.format(sha256(config)), "RepoTags": ["app:1"], "Layers": list(files)}]
    return tar(*more, *(entry(name, layer) for name, layer in files.items()), entry(config_name.format(sha256(config)), config),
               entry("manifest.json", json.dumps(manifest).encode()))


def oci_blobs():
    layers, config = image()
    blobs = {sha256(content): content for content in (*(gzip.compress(layer, 1) for layer in layers), config)}
    *layer_names, config_name = blobs
    kind = "application/vnd.oci.image"
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", "digest": f"sha256:{config_name}", "size": len(config)},
        "layers": [{"mediaType": f"{kind}.layer.v1.tar+gzip", "digest": f"sha256:{name}", "size": len(blobs[name])} for name in layer_names],
    }).encode()
    return blobs | {sha256(manifest): manifest}, {"mediaType": f"{kind}.manifest.v1+json", "digest": f"sha256:{sha256(manifest)}", "size": len(manifest)}


def oci_archive():
    blobs, manifest = oci_blobs()
    return tar(entry("blobs/"), entry("blobs/sha256/"), *(entry(f"blobs/sha256/{name}", content) for name, content in blobs.items()),
               entry("index.json", json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()), entry("oci-layout", b'{"imageLayoutVersion": "1.0.0"}'))
