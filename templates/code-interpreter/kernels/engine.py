"""A language's own interpreter as a process that does one cell after the other: bash, Node.js.

Owns: how it is started, told what to do, interrupted and made new, and that its output comes before its outcome. Knows no
Jupyter.

Descriptor 3 of the process is a file in memory with the cell's code, 4 a pipe on which the outcomes come, each ended by a
zero byte; the first one says only that it has started. 1 and 2 are pipes; what a cell wrote into them before its outcome
is read before it.
"""

import asyncio
import codecs
import contextlib
import ctypes
import fcntl
import json
import os
import pathlib
import secrets
import signal
import subprocess
import termios

HERE = pathlib.Path(__file__).resolve().parent
# Bytes of one stream that are passed on per cell; who reads them keeps less.
STREAM_BYTES = 2 << 20
# Seconds for which output is collected into one message: a message per line would be more than their queue holds.
TOGETHER = 0.02
PR_SET_PDEATHSIG = 1


class Engine:
    """One process. `heard` is called with a stream's name and a text, `shown` with a bundle, `ended` with its exit code."""

    # What a child class says: its command, what goes into its environment, and whether it is told in lines on descriptor 5
    # or on its standard input.
    command, environment, control = (), {}, "stdin"

    def __init__(self, heard, shown, ended):
        self.heard, self.shown, self.ended = heard, shown, ended
        self.ran, self.outcome, self.rest = False, None, b""
        # What it says before that is nobody's output.
        self.started = asyncio.Event()
        self.collected = {"stdout": [], "stderr": []}
        self.passing = None
        self.code = os.memfd_create("cell", os.MFD_CLOEXEC)
        outcomes, told = os.pipe2(os.O_CLOEXEC)
        inlet, self.inlet = os.pipe2(os.O_CLOEXEC)
        given = {3: self.code, 4: told, 5: inlet} if self.control != "stdin" else {3: self.code, 4: told}
        parent = os.getpid()

        def arrange():
            # The host ends a kernel by its process; what runs in it shall not stay.
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            high = {fd: fcntl.fcntl(source, fcntl.F_DUPFD, 64) for fd, source in given.items()}
            for fd, source in high.items():
                os.dup2(source, fd)
                os.close(source)

        self.process = subprocess.Popen(self.command, env=os.environ | self.environment, preexec_fn=arrange, close_fds=False,
                                        stdin=inlet if self.control == "stdin" else subprocess.DEVNULL,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.close(told)
        os.close(inlet)
        self.streams = {name: [pipe.fileno(), codecs.getincrementaldecoder("utf-8")("replace"), 0]
                        for name, pipe in (("stdout", self.process.stdout), ("stderr", self.process.stderr))}
        self.outcomes, self.pidfd = outcomes, os.pidfd_open(self.process.pid)
        loop = asyncio.get_running_loop()
        for name, (fd, _, _) in self.streams.items():
            loop.add_reader(fd, self.read, name)
        loop.add_reader(self.outcomes, self.read_outcomes)
        loop.add_reader(self.pidfd, self.note_end)

    def read(self, name, size=1 << 16):
        """Passes on what is there; nothing more is, then False."""
        fd, decoder, passed = self.streams[name]
        piece = os.read(fd, size) if unread(fd) else b""
        if not piece:
            # Its end, or nothing yet.
            if self.process.poll() is not None:
                asyncio.get_running_loop().remove_reader(fd)
            return False
        text = decoder.decode(piece)
        if passed < STREAM_BYTES and text and self.started.is_set():
            self.streams[name][2] += len(piece)
            self.collected[name].append(text)
            if self.passing is None:
                self.passing = asyncio.get_running_loop().call_later(TOGETHER, self.pass_on)
        return True

    def pass_on(self):
        """Passes on what has been collected."""
        if self.passing is not None:
            self.passing.cancel()
            self.passing = None
        for name, texts in self.collected.items():
            if texts:
                self.heard(name, "".join(texts))
                texts.clear()

    def drain(self):
        """What was written before an outcome came is in the pipes now."""
        for name, (fd, _, _) in self.streams.items():
            left = unread(fd)
            if left:
                self.read(name, left)
        self.pass_on()

    def read_outcomes(self):
        piece = os.read(self.outcomes, 1 << 16)
        if not piece:
            asyncio.get_running_loop().remove_reader(self.outcomes)
            return
        *whole, self.rest = (self.rest + piece).split(b"\0")
        for one in whole:
            self.drain()
            if self.started.is_set():
                self.told(one.decode("utf-8", "replace"))
            else:
                self.started.set()

    def told(self, outcome):
        """An outcome, as the language tells it."""
        raise NotImplementedError

    def done(self, outcome):
        if self.outcome is not None and not self.outcome.done():
            self.outcome.set_result(outcome)

    def note_end(self):
        asyncio.get_running_loop().remove_reader(self.pidfd)
        while any([self.read(name) for name in self.streams]):
            pass
        self.pass_on()
        code = self.process.wait()
        self.ended(code if code >= 0 else 128 - code)

    def tell(self, line):
        with contextlib.suppress(BrokenPipeError):
            os.write(self.inlet, line.encode() + b"\n")

    async def run(self, code):
        """Runs a cell; answers {"exit", "result", "error"}."""
        self.ran = True
        # Told earlier, a cell could be over before it is known that the process has started, and its output would be dropped.
        await self.started.wait()
        for stream in self.streams.values():
            stream[2] = 0
        self.outcome = asyncio.get_running_loop().create_future()
        os.ftruncate(self.code, 0)
        os.pwrite(self.code, code.encode("utf-8", "replace").replace(b"\0", b""), 0)
        self.begin()
        return await self.outcome

    def begin(self):
        """Tells the process that there is a cell."""
        raise NotImplementedError

    def interrupt(self):
        """The whole process group has been interrupted; what has to be done besides."""

    def renew(self):
        """This process is a copy of one that runs elsewhere, too: what it draws from now on is not the other's."""
        raise NotImplementedError

    def close(self):
        loop = asyncio.get_running_loop()
        for fd in (self.outcomes, self.pidfd, *(fd for fd, _, _ in self.streams.values())):
            loop.remove_reader(fd)
        if self.passing is not None:
            self.passing.cancel()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()
        for fd in (self.outcomes, self.pidfd, self.inlet, self.code):
            os.close(fd)


def unread(fd):
    count = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return int.from_bytes(count, "little")


class Bash(Engine):
    """An interactive bash, because only such a one goes on after an interrupt; without a terminal, a prompt or a history."""

    command = ("bash", "--noprofile", "--norc", "--noediting", "-i", "+H")
    environment = {"PS1": "", "PS2": "", "HISTFILE": ""}

    def __init__(self, *given):
        super().__init__(*given)
        self.tell("builtin printf '\\0' >&4")

    def begin(self):
        # Two lines: an interrupt ends the first one, and the second tells of it.
        self.tell('eval "$(</dev/fd/3)" </dev/null 3<&- 4>&-\nbuiltin printf \'%s\\0\' "$?" >&4')

    def told(self, outcome):
        self.done({"exit": int(outcome) & 0xFF, "result": None, "error": None})

    def renew(self):
        self.tell(f"RANDOM={secrets.randbits(32)}")


class JavaScript(Engine):
    """Node.js with `engine.cjs`."""

    command = ("node", "--no-warnings", str(HERE / "engine.cjs"))
    control = "descriptor"

    def begin(self):
        self.tell("run")

    def told(self, outcome):
        outcome = json.loads(outcome)
        if "shown" in outcome:
            self.shown(outcome["shown"])
        else:
            self.done(outcome)

    def interrupt(self):
        self.tell("interrupt")

    def renew(self):
        self.tell("renew")


ENGINES = {"bash": Bash, "javascript": JavaScript}
