"""A tenant's archive: what it is, and unpacking a plain root file system.

Owns: reading a hostile tar, and what of it becomes files. Refuses to follow it anywhere: every path is resolved by the kernel in a
process whose root is the target (confined.py), so a link can lead only to other places in there. Archives of images are told
apart here and unpacked elsewhere.
"""

import contextlib
import dataclasses
import errno
import os
import re
import subprocess
import tarfile
import tempfile
import time

from . import confined
from .commands import does_not_fit
from .report import Failed, WrongInput, megabytes, quoted, say

DECOMPRESSORS = ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"))
# All that the archives of `docker save`, of podman and of an OCI layout have in them.
OF_IMAGES = re.compile(r"(blobs(/.*)?|index\.json|oci-layout|manifest\.json|repositories|[0-9a-f]{64}(\.json|\.tar|/.*)?)$")
# What is kept of extended attributes.
ATTRIBUTES = re.compile(r"SCHILY\.xattr\.(security\.capability|user\..*)$", re.DOTALL)
PROGRESS = 5
# Of what follows the end of the archive, bytes that are read so that a checksum at the end is looked at.
TAIL = 64 << 20


@contextlib.contextmanager
def opened(path):
    """A descriptor of the archive, uncompressed. Where it was read to its end, a compression that is broken is WrongInput."""
    with open(path, "rb", buffering=0) as file:
        start = file.read(8)
        file.seek(0)
        program = next((program for magic, program in DECOMPRESSORS if start.startswith(magic)), None)
        if not program:
            yield file.fileno()
            return
        with subprocess.Popen([program, "-dc"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                yield process.stdout.fileno()
            except BaseException:
                process.kill()
                raise
            process.stdout.close()
            complaint = process.stderr.read(1000).decode(errors="replace").strip()
    # One that is told to stop is no reason to complain, and neither is zero padding (gzip's warning, 2).
    if process.returncode not in (0, 2, -13):
        raise WrongInput(f"The archive cannot be uncompressed: {complaint or process.returncode}.")


class StrictHeader(tarfile.TarInfo):
    """A header in which the library sees the end of the archive only where there is one."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error


class Reader:
    """The entries of an archive, in their order; `at` is the name of the last one."""

    def __init__(self, archive, stream):
        self.archive, self.stream, self.at = archive, stream, ""

    def members(self, limit):
        """Each entry with its name below the root; a name that leads out of it is WrongInput."""
        for number, member in enumerate(self.archive):
            if number >= limit:
                raise WrongInput(f"The archive has more than {limit} entries.")
            self.at = inside(member.name)
            yield self.at, member
        left = TAIL
        while left > 0 and (piece := self.stream.read(1 << 20)):
            left -= len(piece)

    def where(self):
        return f" at {quoted(self.at)}" if self.at else ""


def inside(name):
    """The name from the root on, without `.` and empty parts."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise WrongInput(f"The archive has an entry that leads out of the root: {quoted(name)}.")
    return "/".join(parts)


@contextlib.contextmanager
def reading(descriptor):
    """The archive behind a descriptor; what its bytes make go wrong is WrongInput."""
    reader = Reader(None, None)
    try:
        with open(descriptor, "rb", closefd=False) as reader.stream:
            with tarfile.open(fileobj=reader.stream, mode="r|", bufsize=1 << 20, tarinfo=StrictHeader, stream=True) as reader.archive:
                yield reader
    except tarfile.TarError as error:
        raise WrongInput(f"The archive is no tar of a root file system, or it is damaged{reader.where()}: {error}.") from error
    except EOFError as error:
        raise WrongInput(f"The archive ends too early{reader.where()}.") from error
    except MemoryError as error:
        raise WrongInput(f"The archive has a header that is too large{reader.where()}.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise does_not_fit("/") from error
        if error.errno in (errno.EIO, errno.EROFS):
            raise Failed(f"the disk: {error.strerror}") from error
        raise WrongInput(f"The archive has an entry that cannot be unpacked{reader.where()}: {error.strerror}.") from error
    except (ValueError, OverflowError, RecursionError, KeyError, IndexError, TypeError) as error:
        raise WrongInput(f"The archive has an entry that makes no sense{reader.where()}: {error}.") from error


# --- what it is ---------------------------------------------------------------------------------------------------------


def kind_of(path, limit):
    """`rootfs`, or buildah's name for an archive of images. A root file system is known by its first entries."""
    say("Looking at the archive.")
    with tempfile.TemporaryDirectory() as nowhere, opened(path) as descriptor:
        return confined.call(nowhere, _kind, descriptor, limit)


def _kind(descriptor, limit):
    seen = set()
    with reading(descriptor) as reader:
        for name, _ in reader.members(limit):
            if name and not OF_IMAGES.match(name):
                return "rootfs"
            seen.add(name)
    if "manifest.json" in seen:
        return "docker-archive"
    return "oci-archive" if "oci-layout" in seen else "rootfs"


# --- a root file system -------------------------------------------------------------------------------------------------


def unpack(path, target, limit):
    """Fills the empty target."""
    say("Unpacking the root file system.")
    with opened(path) as descriptor:
        done = confined.call(target, _unpack, descriptor, limit)
    say(f"Unpacked {done['entries']} entries, {megabytes(done['bytes'])}.")
    if done["skipped"]:
        say(f"Left out {done['skipped']} devices, pipes and other special files: a sandbox has its own.")
    if done["attributes"]:
        say(f"Left out extended attributes of {done['attributes']} entries that the root disk does not take.")


@dataclasses.dataclass
class Progress:
    """What has been unpacked, which the log hears of every now and then."""

    entries: int = 0
    bytes: int = 0
    skipped: int = 0
    attributes: int = 0
    told: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, entries=0, size=0):
        self.entries += entries
        self.bytes += size
        if time.monotonic() - self.told > PROGRESS:
            self.told = time.monotonic()
            say(f"… {self.entries} entries, {megabytes(self.bytes)}")


def _unpack(descriptor, limit):
    done, directories = Progress(), []
    with reading(descriptor) as reader:
        for name, member in reader.members(limit):
            done.add(entries=1)
            if name.partition("/")[0] == "lost+found":
                continue
            if not put(reader.archive, name or ".", member, done):
                done.skipped += 1
                continue
            if not member.islnk():
                done.attributes += not own(name or ".", member)
            if member.isdir():
                directories.append((name or ".", member.mtime))
        # What is put into a directory changes its time.
        for name, mtime in reversed(directories):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                touch(name, mtime)
    return dataclasses.asdict(done)


def put(archive, name, member, done):
    """Makes the entry, in place of what is there. Answers whether it is something that a root disk has."""
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return False
    folder = os.path.dirname(name)
    if folder and not os.path.isdir(folder):
        # What a link leads to may not be there yet.
        os.makedirs(os.path.realpath(folder), 0o755, exist_ok=True)
    if member.isdir():
        if not os.path.isdir(name):
            clear(name)
            os.mkdir(name)
        return True
    clear(name)
    if member.issym():
        os.symlink(member.linkname, name)
    elif member.islnk():
        try:
            os.link(inside(member.linkname), name, follow_symlinks=False)
        except FileNotFoundError as error:
            raise WrongInput(f"The archive has a hard link to what is not in it: {quoted(name)} to {quoted(member.linkname)}.") from error
    else:
        write(archive, name, member, done)
    return True


def clear(name):
    if os.path.lexists(name):
        if os.path.isdir(name) and not os.path.islink(name):
            os.rmdir(name)
        else:
            os.unlink(name)


def write(archive, name, member, done):
    # The unbuffered one: it can go forward in a stream, from hole to hole.
    opened_member = archive.extractfile(member)
    content = opened_member.raw
    with opened_member, open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=0) as file:
        if member.issparse():
            # Only what is there is written: holes stay holes, and the size is the disk's to refuse.
            for offset, size in member.sparse:
                content.seek(offset)
                file.seek(offset)
                copy(content, file, size, done)
            file.truncate(member.size)
        else:
            copy(content, file, member.size, done)


def copy(content, file, size, done):
    while size > 0:
        piece = content.read(min(size, 1 << 20))
        if not piece:
            raise EOFError
        done.add(size=len(piece))
        while piece:
            written = file.write(piece)
            size -= written
            piece = piece[written:]


def own(name, member):
    """Owner, mode, time and attributes. Answers whether the disk took them all."""
    os.chown(name, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        os.chmod(name, member.mode & 0o7777)
    complete = True
    for key, value in member.pax_headers.items():
        if match := ATTRIBUTES.match(key):
            try:
                os.setxattr(name, match[1], value.encode("utf-8", "surrogateescape"), follow_symlinks=False)
            except OSError:
                complete = False
    touch(name, member.mtime)
    return complete


def touch(name, mtime):
    second = min(max(int(mtime), 0), 0x3_FFFF_FFFF)
    os.utime(name, (second, second), follow_symlinks=False)
