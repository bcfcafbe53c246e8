"""The target: the disk that becomes the template's root.

Owns: that it ends up with what an image has, and with what every sandbox needs of a root disk. Everything in it may be hostile, so
that it is only ever looked at and changed from inside (confined.py) or by rsync, which follows no link at its destination.
"""

import contextlib
import errno
import os
import subprocess
import tempfile

from . import confined
from .commands import complain_about_space, does_not_fit, run
from .report import Failed, WrongInput, megabytes, quoted, say

# What a running sandbox mounts over, and what a file system has for itself.
NOT_COPIED = ("/proc/*", "/sys/*", "/dev/*", "/run/*", "/lost+found", "/.dockerenv")
# The sandbox's gateway, the only resolver it reaches; the same as in templates/debian.
FILES = {"etc/resolv.conf": "nameserver 172.31.255.1\n", "etc/machine-id": "", "etc/hostname": "sandbox\n"}
WHERE_MISSING = {"etc/hosts": "127.0.0.1 localhost sandbox\n", "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n"}
DIRECTORIES = {"proc": 0o555, "sys": 0o555, "dev": 0o755, "run": 0o755, "mnt": 0o755, "root": 0o700, "etc": 0o755, "var/tmp": 0o1777, "tmp": 0o1777}


class Target:
    """The mounted disk."""

    def __init__(self, path, is_copy):
        self.path, self.is_copy = path, is_copy
        if not is_copy and set(os.listdir(path)) - {"lost+found"}:
            raise Failed(f"{path} is not empty")

    def copy(self, root, layers):
        """Makes the target like `root`, of which `layers` are the directories with what the build has changed."""
        excluded = [f"--exclude={pattern}" for pattern in NOT_COPIED]
        names = changed(root, layers, self.path) if self.is_copy else None
        if names is None:
            say("Copying the image into the root disk.")
            self.rsync("--delete-before", *excluded, f"{root}/", f"{self.path}/")
            return
        # The rest is the same already, and looking at all of it takes longer than most builds. What has kept its size and its
        # time may have other bytes, and what is not there any more is deleted.
        say("Copying the changes into the root disk.")
        with tempfile.NamedTemporaryFile() as file:
            for name in names:
                file.write(os.fsencode(name) + b"\0")
            file.flush()
            self.rsync("--checksum", "--force", "--delete-missing-args", "--from0", f"--files-from={file.name}", *excluded,
                       f"{root}/", f"{self.path}/")

    def rsync(self, *arguments):
        code, last = run(["rsync", "-aHAX", "--numeric-ids", *arguments],
                         "copying", alive=lambda: f"{megabytes(self.used())} in the root disk")
        if code:
            complain_about_space(last, self.path)
            raise Failed(f"rsync ended with {code}")

    def finish(self, workdir):
        """What every sandbox needs, where it is missing. Answers with the directory to start in."""
        return confined.call(self.path, _finish, workdir)

    def settle(self):
        """Everything is on the disk. Answers with the bytes in use."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            subprocess.run(["sync", "--file-system", str(self.path)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise Failed(f"the root disk cannot be written: {error}") from error
        return self.used()

    def used(self):
        state = os.statvfs(self.path)
        return (state.f_blocks - state.f_bfree) * state.f_frsize


def changed(root, layers, below):
    """Every name that may differ between `root` and `below`, which is what the layers stand on: each that a layer has, be it only to
    say that it is gone, and each that was in a directory that a layer has made anew. None where a layer says that a directory
    came from somewhere else."""
    names = set()
    for layer in layers:
        for folder, folders, files in os.walk(layer):
            inner = os.path.relpath(folder, layer)
            place = os.path.normpath(os.path.join(root, inner))
            if attribute(folder, "redirect"):
                return None
            # A later layer may have put a link in the folder's place, which has its own name.
            if os.path.realpath(place) != place:
                folders.clear()
                continue
            names.update(os.path.normpath(os.path.join(inner, name)) for name in (*folders, *files))
            if attribute(folder, "opaque") == b"y":
                names.update(everything(below, inner))
    return names


def everything(below, inner):
    """All names in a directory."""
    start = os.path.normpath(os.path.join(below, inner))
    if os.path.realpath(start) == start:
        for folder, folders, files in os.walk(start):
            yield from (os.path.relpath(os.path.join(folder, name), below) for name in (*folders, *files))


def attribute(folder, name):
    """What overlay says of a directory of a layer."""
    with contextlib.suppress(OSError):
        return os.getxattr(folder, f"trusted.overlay.{name}")
    return None


def _finish(workdir):
    try:
        for name, mode in DIRECTORIES.items():
            if not os.path.isdir(name):
                os.makedirs(name)
                os.chmod(name, mode)
        for name, text in FILES.items():
            if os.path.lexists(name):
                os.unlink(name)
            write(name, text)
        for name, text in WHERE_MISSING.items():
            if not os.path.exists(name) or not os.path.getsize(name):
                if os.path.lexists(name):
                    os.unlink(name)
                write(name, text)
        if os.path.lexists(".dockerenv"):
            os.unlink(".dockerenv")
        where = os.path.normpath("/" + (workdir or "root").lstrip("/"))
        os.makedirs(where, exist_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise does_not_fit("/") from error
        raise WrongInput(f"The root file system is not one that a sandbox can run: {error.filename}: {error.strerror}.") from error
    except ValueError as error:
        raise WrongInput(f"The working directory makes no sense: {quoted(workdir)}.") from error
    if not os.path.isfile("/bin/sh") or not os.access("/bin/sh", os.X_OK):
        raise WrongInput("The root file system has no /bin/sh, so a sandbox could not run a command.")
    return where


def write(name, text):
    with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8") as file:
        file.write(text)
