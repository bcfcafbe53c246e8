"""Images: buildah with a store of its own, in which every template is an image that takes no space.

Owns: the store, and what is asked of buildah. A template becomes an image in a second, read-only store (containers-storage calls it
an additional image store) whose only layer is the template's root disk, bound in place: nothing of it is copied, and a build's own
layers hold what the build has changed.
"""

import base64
import dataclasses
import hashlib
import json
import os
import pathlib
import platform
import re
import resource
import shutil
import subprocess
import sys

from . import commands, dockerfile
from .report import Failed, WrongInput, megabytes, say

HERE = pathlib.Path("/var/lib/pandastack-build")
STORE, TEMPLATES, TEMPORARY = HERE / "store", HERE / "templates", HERE / "tmp"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CREATED = "2025-01-01T00:00:00Z"
ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
# Names of templates that an image can have, so that `COPY --from` knows them as well.
REFERENCE = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*$", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Config:
    """What of an image's configuration means something to a sandbox."""

    env: dict[str, str]
    workdir: str | None


class Store:
    """buildah's store for this build."""

    def __init__(self, templates, environments):
        shutil.rmtree(HERE, ignore_errors=True)
        for folder in (STORE, TEMPORARY, TEMPLATES / "overlay/l", TEMPLATES / "overlay-images", TEMPLATES / "overlay-layers"):
            folder.mkdir(parents=True)
        self.names = {}
        images, layers = [], []
        for name, disk in templates.items():
            image, layer = _add_template(name, disk, environments.get(name) or {})
            images.append(image)
            layers.append(layer)
            self.names[name] = image["names"][0]
        for folder, content in (("images", images), ("layers", layers)):
            (TEMPLATES / f"overlay-{folder}/{folder}.json").write_text(json.dumps(content))
            (TEMPLATES / f"overlay-{folder}/{folder}.lock").touch()
        settings = HERE / "storage.conf"
        settings.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{STORE}"\nrunroot = "/run/pandastack-build"\n'
                            f'[storage.options]\nadditionalimagestores = ["{TEMPLATES}"]\n')
        self.environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "TMPDIR": str(TEMPORARY), "CONTAINERS_STORAGE_CONF": str(settings)}
        try:
            commands.output(["buildah", "images", "--quiet"], self.environment)
        except subprocess.CalledProcessError as error:
            raise Failed(f"buildah does not work here: {error.stderr.decode(errors='replace').strip()}") from error

    # --- getting an image; each answers with its id ---

    def pull(self, source):
        """From an archive."""
        say("Reading the image.")
        return self._pull([source], "The archive is no image that can be read")

    def pull_reference(self, reference, host, insecure):
        """From the one registry that the operator allows."""
        if reference.partition("/")[0] != host or "/" not in reference:
            raise WrongInput(f"{reference}: only images of {host} can be used.")
        say(f"Pulling {reference}.")
        return self._pull([f"--tls-verify={'false' if insecure else 'true'}", f"docker://{reference}"], f"{reference} cannot be pulled")

    def _pull(self, arguments, sentence):
        code, last = self._buildah(["buildah", "pull", "--quiet", *arguments], "reading the image")
        if code or not last:
            raise WrongInput(f"{sentence}: {complaint(last, code)}.")
        return last[-1].removeprefix("sha256:")

    def build(self, text, context):
        """From a Dockerfile."""
        file, built, nothing = HERE / "Dockerfile", HERE / "image", HERE / "nothing"
        named, stages = dockerfile.with_names(text, self.names)
        file.write_text(named)
        nothing.mkdir()
        limits = [f"--ulimit={name}={soft}:{hard}" for name, (soft, hard) in
                  (("nproc", limit(resource.RLIMIT_NPROC)), ("nofile", limit(resource.RLIMIT_NOFILE)))]
        # For `COPY --from`, where a stage of that name goes before.
        contexts = [f"--build-context={name}=container-image://{image}" for name, image in self.names.items() if name.lower() not in stages]
        # A process that a RUN left behind ends with the namespace.
        code, last = self._buildah(
            ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc",
             "buildah", "build", "--isolation=chroot", "--network=host", "--layers=false", "--pull=never", *limits, *contexts,
             f"--iidfile={built}", f"--file={file}", context or nothing], "building")
        if code:
            raise WrongInput(f"The Dockerfile cannot be built: {complaint(last, code)}.")
        return built.read_text().strip().removeprefix("sha256:")

    def _buildah(self, arguments, doing):
        before = used(HERE)
        code, last = commands.run(arguments, doing, self.environment, alive=lambda: f"{megabytes(max(used(HERE) - before, 0))} so far")
        if code:
            commands.complain_about_space(last, HERE)
        return code, last

    # --- an image that is there ---

    def config(self, image):
        """Its configuration. WrongInput where it is not for this machine."""
        described = json.loads(self._ask("inspect", "--type=image", image))["OCIv1"]
        config = described.get("config") or {}
        if (architecture := described.get("architecture") or ARCHITECTURE) != ARCHITECTURE:
            raise WrongInput(f"The image is for {architecture}; sandboxes here are {ARCHITECTURE}.")
        if config.get("Entrypoint") or config.get("Cmd"):
            say("ENTRYPOINT and CMD are not used: a sandbox runs what it is asked to.")
        if config.get("User") not in (None, "", "root", "0", "0:0", "root:root"):
            say("USER is used while building only: in a sandbox, commands run as root unless they are asked to run as another user.")
        env = {}
        for item in config.get("Env") or []:
            name, has, value = item.partition("=")
            if has and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and "\0" not in value:
                env[name] = value
            else:
                say(f"Left out a variable whose name no shell has: {name}")
        return Config(env, config.get("WorkingDir") or None)

    def mount(self, image):
        """The directory that shows the image's root."""
        container = self._ask("from", "--pull=never", "--quiet", image).decode().strip()
        return pathlib.Path(os.fsdecode(self._ask("mount", container)).strip())

    def layers(self):
        """What this build has added, a directory for each layer."""
        return [path for path in (STORE / "overlay").glob("*/diff") if path.is_dir()]

    def _ask(self, *arguments):
        try:
            return commands.output(["buildah", *arguments], self.environment)
        except subprocess.CalledProcessError as error:
            text = error.stderr.decode(errors="replace").strip()
            commands.complain_about_space([text], HERE)
            raise Failed(f"buildah {arguments[0]}: {text}") from error


def _add_template(name, disk, environment):
    """Writes an image whose layer is `disk`. Answers with its entries in the store's two lists."""
    layer = digest(f"template {name}".encode())
    environment = {"PATH": PATH} | environment
    config = json.dumps({
        "architecture": ARCHITECTURE, "os": "linux", "created": CREATED, "config": {"Env": [f"{key}={value}" for key, value in environment.items()]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer}"]}, "history": [{"created": CREATED, "created_by": f"template {name}"}],
    }).encode()
    oci = "application/vnd.oci.image"
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": f"{oci}.manifest.v1+json",
        "config": {"mediaType": f"{oci}.config.v1+json", "digest": f"sha256:{digest(config)}", "size": len(config)},
        "layers": [{"mediaType": f"{oci}.layer.v1.tar", "digest": f"sha256:{layer}", "size": 1024}],
    }).encode()
    image = digest(config)
    data = {f"sha256:{image}": config, "manifest": manifest, f"manifest-sha256:{digest(manifest)}": manifest}
    folder = TEMPLATES / "overlay-images" / image
    folder.mkdir()
    for key, content in data.items():
        encoded = key if key == "manifest" else "=" + base64.b64encode(key.encode()).decode()
        (folder / encoded).write_bytes(content)
    link, place = layer[:26].upper(), TEMPLATES / "overlay" / layer
    (place / "diff").mkdir(parents=True)
    (place / "link").write_text(link)
    (TEMPLATES / "overlay/l" / link).symlink_to(f"../{layer}/diff")
    subprocess.run(["mount", "--bind", disk, place / "diff"], check=True)
    # Names that no image can have are for FROM lines alone, which are written anew (dockerfile.py).
    known = name if REFERENCE.match(name) else f"template-{layer[:16]}"
    return (
        {"id": image, "digest": f"sha256:{digest(manifest)}", "names": [f"localhost/{known}:latest"], "layer": layer, "metadata": "{}", "created": CREATED,
         "big-data-names": list(data), "big-data-sizes": {key: len(content) for key, content in data.items()},
         "big-data-digests": {key: f"sha256:{digest(content)}" for key, content in data.items()}},
        {"id": layer, "created": CREATED, "diff-digest": f"sha256:{layer}", "diff-size": 1024,
         "compressed-diff-digest": f"sha256:{layer}", "compressed-size": 1024},
    )


def digest(content):
    return hashlib.sha256(content).hexdigest()


def limit(which):
    """This process's own limits, so that a RUN never asks for more than there is."""
    return tuple(sys.maxsize if value == resource.RLIM_INFINITY else value for value in resource.getrlimit(which))


def used(path):
    state = os.statvfs(path)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


def complaint(lines, code):
    """What a program that ended with `code` said last, as part of a sentence."""
    said = [line for line in lines if line.startswith("Error: ")] or lines[-1:]
    if code in (-9, 137) and not (lines and lines[-1].startswith("Error: ")):
        return "it needs more memory than the builder has"
    text = said[-1].removeprefix("Error: ") if said else f"exit code {code}"
    return text.replace("while running runtime: ", "").replace(f"{HERE}/", "").rstrip(".")
