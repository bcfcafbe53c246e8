"""Programs that the build runs: their output becomes the log, line by line, and silence is broken by a sign of life."""

import contextlib
import os
import re
import selectors
import subprocess
import time

from .report import WrongInput, say

# Seconds of silence after which the log says that it goes on.
SILENCE = 10
# Most output of one program that is shown, bytes: the log belongs to people.
SHOWN = 8 << 20
# What buildah says of its own affairs.
NOISE = re.compile(r"Getting image source signatures|Copying (blob|config) |Writing manifest |Storing signatures|(sha256:)?[0-9a-f]{64}$")


def run(arguments, doing, environment=None, alive=None):
    """Runs a program with its output in the log. Answers with its exit code (negative: the signal) and its last lines.

    `doing` is what the log says during silence, with what `alive()` answers.
    """
    with subprocess.Popen([str(argument) for argument in arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=environment, start_new_session=True) as process:
        try:
            last = _follow(process.stdout, doing, alive)
        except BaseException:
            process.kill()
            raise
    return process.returncode, last


def _follow(stream, doing, alive):
    shown, pending, last, started = 0, b"", [], time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(SILENCE):
                say(f"… {doing}, {time.monotonic() - started:.0f} s{', ' + alive() if alive else ''}")
                continue
            piece = os.read(stream.fileno(), 1 << 16)
            # A bar that is drawn over itself is a line each time.
            *lines, pending = (pending + piece).replace(b"\r", b"\n").split(b"\n")
            if not piece or len(pending) > 1 << 16:
                lines, pending = [*lines, pending], b""
            for line in lines:
                text = line.decode(errors="replace").rstrip()
                if not text:
                    continue
                last = [*last[-20:], text]
                if shown <= SHOWN and not NOISE.match(text):
                    say(text)
                    shown += len(line) + 1
                    if shown > SHOWN:
                        say("… what it prints from here on is left out")
            if not piece:
                return last


def output(arguments, environment=None):
    """What a program prints, for a program that says little and takes no time. Raises CalledProcessError."""
    return subprocess.run([str(argument) for argument in arguments], check=True, env=environment, stdin=subprocess.DEVNULL,
                          capture_output=True).stdout


def complain_about_space(lines, path):
    """Raises WrongInput where a program's last words are that the disk of `path` is full."""
    if any("no space left" in line.lower() for line in lines):
        raise does_not_fit(path)


def does_not_fit(path):
    """The sentence for a full disk."""
    with contextlib.suppress(OSError):
        state = os.statvfs(path)
        size = state.f_blocks * state.f_frsize >> 20
        if state.f_files and not state.f_ffree:
            return WrongInput(f"It does not fit: a root disk of {size} MiB holds {state.f_files} files and directories.")
        return WrongInput(f"It does not fit into {size} MiB of disk.")
    return WrongInput("It does not fit into the disk.")
