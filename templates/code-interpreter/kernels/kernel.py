"""One kernel: its process, its cells one after the other, its end and its successor.

Owns: time limits, interrupts, what happens when the process dies, and that a copied machine's kernel is made unique before
it runs anything. Knows no sessions and no requests.

Kernels are spoken to over Unix sockets in a directory that only root can enter. A copy of a machine (a create, a fork, a
restore) is noticed by /etc/machine-id; then the kernel gets a fresh signing key and its generators are seeded again.
"""

import asyncio
import contextlib
import os
import pathlib
import secrets
import time

from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

from cell import Cell, ending

HERE = pathlib.Path(__file__).resolve().parent
MACHINE_ID = pathlib.Path("/etc/machine-id")
# Seconds: until a new kernel answers, until one does that imports from a cold disk, until a kernel does what it is told in passing, until an interrupted cell ends, and
# until what a cell wrote has arrived after its end.
START, WARM_START, ASIDE, INTERRUPT, LAST_OUTPUT = 120, 300, 20, 5, 1


class KernelFailed(Exception):
    """There is no kernel, and why; one sentence."""


def machine():
    """Which machine this is."""
    try:
        return MACHINE_ID.read_text().strip()
    except OSError:
        return ""


def languages():
    """What there are kernels for."""
    return sorted(path.name for path in (HERE / "specs").iterdir() if (path / "kernel.json").exists())


def died(code):
    """How a process ended, as a sentence's end and as an exit code."""
    if code is None:
        return "for an unknown reason", 1
    if code < 0:
        return f"killed by signal {-code}", 128 - code
    return f"exit code {code}", code & 0xFF


class Process:
    """A kernel's process and the conversation with it. Never started again: a successor is another one."""

    def __init__(self, folder, language, warm):
        name = secrets.token_hex(6)
        self.language, self.warm = language, warm
        self.mark = f"\x1e{secrets.token_hex(12)}\x1e" if language == "python" else ""
        specs = KernelSpecManager(kernel_dirs=[str(HERE / "specs")], ensure_native_kernel=False)
        self.manager = AsyncKernelManager(kernel_name=language, kernel_spec_manager=specs, transport="ipc", ip=f"{folder}/{name}",
                                          connection_file=f"{folder}/{name}.json", shutdown_wait_time=2.0)
        self.client = None
        self.machine = None
        self.cell, self.reply = None, None
        self.ended = asyncio.get_running_loop().create_future()
        self.pumps, self.pidfd = [], None

    async def start(self):
        environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "NOTIFY_SOCKET")}
        environment |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        self.machine = machine()
        limit = WARM_START if self.warm else START
        try:
            await self.manager.start_kernel(env=environment, cwd=os.environ.get("KERNELS_CWD", "/root"), stdout=asyncio.subprocess.DEVNULL,
                                            stderr=asyncio.subprocess.DEVNULL)
            pid = self.manager.provisioner.pid
            self.pidfd = os.pidfd_open(pid)
            asyncio.get_running_loop().add_reader(self.pidfd, self.note_end)
            # The host outlives what its kernels do to memory.
            with contextlib.suppress(OSError):
                pathlib.Path(f"/proc/{pid}/oom_score_adj").write_text("0")
            self.client = self.manager.client()
            self.client.start_channels(stdin=False, hb=False)
            await self.client.wait_for_ready(timeout=limit)
            self.pumps = [asyncio.create_task(self.pump(channel)) for channel in (self.client.iopub_channel, self.client.shell_channel)]
            if self.language == "python":
                path = str(HERE / "inside.py")
                self.send_aside("import sys, types\nm = types.ModuleType('_pandastack_kernel')\n"
                                f"exec(compile(open({path!r}).read(), {path!r}, 'exec'), m.__dict__)\n"
                                f"sys.modules[m.__name__] = m\nm.set_up(shell, {self.mark!r}, {self.warm!r})")
                await self.is_done(limit)
        except Exception as error:
            await self.kill()
            raise KernelFailed(f"no kernel for {self.language} could be started: {type(error).__name__}: {error}") from error

    def note_end(self):
        asyncio.get_running_loop().remove_reader(self.pidfd)
        if not self.ended.done():
            self.ended.set_result(None)

    async def exit_code(self):
        return await self.manager.provisioner.poll()

    async def pump(self, channel):
        """Takes every message as it comes, so that nothing waits in the kernel, and keeps those about the cell under way."""
        while True:
            try:
                message = await channel.get_msg(timeout=None)
            except (ValueError, KeyError, TypeError):
                # Signed with the key of before, or not a message at all.
                continue
            cell = self.cell
            if cell is None or (message.get("parent_header") or {}).get("msg_id") != cell.request:
                continue
            if channel is self.client.shell_channel:
                if self.reply is not None and not self.reply.done():
                    self.reply.set_result(message["content"])
            else:
                cell.take(message)
                self.last_heard = time.monotonic()

    def expect(self, request, mark=""):
        """What comes from now on is about this request."""
        self.reply = asyncio.get_running_loop().create_future()
        self.last_heard = time.monotonic()
        self.cell = Cell(request, mark)
        return self.cell

    def send(self, code):
        """Begins a cell of the user's."""
        return self.expect(self.client.execute(code, allow_stdin=False, stop_on_error=False), self.mark)

    def send_aside(self, code):
        """Begins what is not the user's, with `shell` and `kernel` in its reach; it leaves no name and no output behind."""
        hidden = "__import__('builtins').exec(%r, {'shell': get_ipython(), 'kernel': get_ipython().kernel})" % code
        self.expect(self.client.execute(hidden, silent=True, store_history=False, allow_stdin=False, stop_on_error=False))

    async def is_done(self, limit=ASIDE):
        """Waits until what is not the user's is done."""
        try:
            await asyncio.wait({self.reply, self.ended}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if not self.reply.done():
                raise KernelFailed("the kernel ended" if self.ended.done() else "the kernel did not answer")
            exit, error = ending(self.reply.result())
            if exit or error:
                raise KernelFailed(f"the kernel refused: {error}")
        finally:
            self.cell = None

    async def renew(self):
        """Makes the kernel this machine's own, if the machine has become another one since it last was."""
        now = machine()
        if now == self.machine:
            return
        # The request goes out under the old key, what the kernel says after it under the new one.
        key = secrets.token_hex(32)
        if self.language == "python":
            self.send_aside(f"import _pandastack_kernel as m; m.renew(kernel, {key!r})")
        else:
            request = self.client.session.msg("renew_request", {"key": key})
            self.client.shell_channel.send(request)
            self.expect(request["header"]["msg_id"])
        self.client.session.key = key.encode()
        try:
            await self.is_done()
        except KernelFailed as error:
            raise KernelFailed("the kernel of a copied machine could not be made unique") from error
        self.machine = now

    async def output(self):
        """Waits until everything that the cell wrote is here; not for ever, because a flood of messages loses some."""
        until = time.monotonic() + 10 * LAST_OUTPUT
        while not self.cell.complete:
            now = time.monotonic()
            if now > until or now - self.last_heard > LAST_OUTPUT:
                self.cell.lost = self.cell.lost or not self.cell.idle
                return
            await asyncio.sleep(0.002)

    async def interrupt(self):
        """Whether the cell under way ended because of it."""
        for _ in range(INTERRUPT):
            with contextlib.suppress(Exception):
                await self.manager.interrupt_kernel()
            await asyncio.wait({self.reply, self.ended}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            if self.reply.done() or self.ended.done():
                break
        return self.reply.done()

    async def kill(self):
        for pump in self.pumps:
            pump.cancel()
        if self.client is not None:
            self.client.stop_channels()
        with contextlib.suppress(Exception):
            await self.manager.shutdown_kernel(now=True)
        with contextlib.suppress(Exception):
            self.manager.cleanup_connection_file()
            self.manager.cleanup_ipc_files()
        if self.pidfd is not None:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = None


class Kernel:
    """A kernel that is replaced when it dies. One cell at a time."""

    def __init__(self, folder, language, warm=False):
        self.folder, self.language = folder, language
        self.turn = asyncio.Lock()
        self.process, self.note, self.closed = None, "", False
        self.starting = None
        self.begin(warm)

    def begin(self, warm=False):
        """Starts a process in the background."""
        self.process = Process(self.folder, self.language, warm)
        self.starting = asyncio.create_task(self.process.start())
        # Whoever needs it asks.
        self.starting.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def ready(self):
        await asyncio.shield(self.starting)

    async def usable(self):
        """A process that lives and is this machine's own."""
        if self.starting.done() and self.starting.exception() is not None:
            self.begin()
        await self.ready()
        if self.process.ended.done():
            how, _ = died(await self.process.exit_code())
            await self.replace(f"the kernel had died ({how})")
            await self.ready()
        try:
            await self.process.renew()
        except KernelFailed as error:
            await self.replace(str(error))
            await self.ready()

    async def replace(self, why):
        """Ends the process and starts its successor; the next cell's answer says so unless this one's does."""
        old = self.process
        if self.closed:
            raise KernelFailed("the session was closed")
        self.begin()
        self.note = f"{why}; a new one was started, and what the session had in memory is lost"
        await old.kill()

    async def run(self, code, seconds, gone):
        """Runs a cell and answers what became of it. Its time counts what it waits for other cells of the session, and not what
        a new kernel takes to start.

        `gone` is a future that completes when nobody wants the answer any more."""
        began = time.monotonic()
        waiting = asyncio.ensure_future(self.turn.acquire())
        await asyncio.wait({waiting, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done() or gone.done():
            if waiting.done():
                self.turn.release()
            waiting.cancel()
            return answer(Cell(""), began, 124, timed_out=True, note="other cells of the session ran, and it was not started")
        left = max(began + seconds - time.monotonic(), 0.001)
        try:
            await self.usable()
            note, self.note = self.note, ""
            return await self.follow(code, left, gone, note)
        finally:
            self.turn.release()

    async def follow(self, code, seconds, gone, note):
        process, began = self.process, time.monotonic()
        cell = process.send(code)
        try:
            if note:
                cell.streams["stderr"].add(f"[{note}]\n")
            await asyncio.wait({process.reply, process.ended, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            late = not process.reply.done() and not process.ended.done()
            if late and not await process.interrupt() and not process.ended.done():
                await self.replace("the kernel did not answer the interrupt")
                note, self.note = self.note, ""
                return answer(cell, began, 124, error=note, timed_out=True, restarted=True, note=note)
            if process.reply.done():
                await process.output()
                exit, error = ending(process.reply.result())
                if late:
                    exit = 124
                return answer(cell, began, exit, error=error, timed_out=late, restarted=bool(note), note=note)
            how, exit = died(await process.exit_code())
            await self.replace(f"the kernel died ({how})")
            note, self.note = self.note, ""
            return answer(cell, began, exit or 1, error=note, timed_out=late, restarted=True, note=note)
        finally:
            process.cell = None

    async def close(self):
        self.closed = True
        self.starting.cancel()
        with contextlib.suppress(BaseException):
            await self.starting
        await self.process.kill()


def answer(cell, began, exit, error=None, timed_out=False, restarted=False, note=""):
    stdout, stderr = (cell.streams[name].whole() for name in ("stdout", "stderr"))
    return {"stdout": stdout, "stderr": stderr, "exit": exit, "error": error, "results": cell.bundles,
            "duration_ms": int((time.monotonic() - began) * 1000), "truncated": cell.truncated,
            "timed_out": timed_out, "restarted": restarted, "note": note}
