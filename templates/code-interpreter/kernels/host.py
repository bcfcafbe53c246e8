"""The sessions of this machine, and who asks for them.

Owns: the socket, the requests' form, which session has which kernel. Knows nothing of what a kernel is.

One connection carries one request and its answer, each a line of JSON; a connection that ends before its answer takes its
request back: a cell is interrupted, a session that was to be opened is not. Requests:

    {"do": "open", "language": …}                          {"ok": {"session", "language", "created", "cells"}}
    {"do": "list"}                                         {"ok": [the same, …]}
    {"do": "run", "session": …, "code": …, "timeout_ms": …} {"ok": {"stdout", "stderr", "exit", "error", "results", …}}
    {"do": "close", "session": …}                          {"ok": true}

What is not done is {"error": word, "message": sentence}; words: invalid, unknown_language, no_session, limit, failed.
"""

import asyncio
import contextlib
import fcntl
import json
import pathlib
import secrets
import time

from kernel import Kernel, KernelFailed, languages

SESSIONS = 8
CODE_BYTES = 1 << 20
# A megabyte of code, each byte escaped.
REQUEST_BYTES = 8 << 20
CONNECTIONS = 64
LONGEST = 24 * 3600 * 1000
# Seconds until a new session is handed out although its kernel does not answer yet; its first cell waits for it.
OPENING = 10
ALIASES = {"py": "python", "python3": "python", "js": "javascript", "node": "javascript", "sh": "bash"}


class Refused(Exception):
    def __init__(self, word, message):
        super().__init__(message)
        self.word, self.message = word, message


class Session:
    def __init__(self, language, kernel):
        self.id, self.language, self.kernel = secrets.token_hex(8), language, kernel
        self.created, self.cells = time.time(), 0

    def line(self):
        return {"session": self.id, "language": self.language, "created": self.created, "cells": self.cells}


class Host:
    def __init__(self, folder):
        self.folder = folder
        self.sessions = {}
        self.spares = {}
        self.connections = 0

    async def warm(self):
        """Starts a kernel of each language ahead of its first session."""
        self.spares = {language: Kernel(self.folder, language, warm=True) for language in languages()}
        await asyncio.gather(*(spare.ready() for spare in self.spares.values()))

    async def serve(self, reader, writer):
        gone = asyncio.get_running_loop().create_future()
        watch = None
        try:
            self.connections += 1
            try:
                if self.connections > CONNECTIONS:
                    raise Refused("limit", f"more than {CONNECTIONS} requests at once")
                line = await reader.readuntil(b"\n")
                watch = asyncio.create_task(self.watch(reader, gone))
                answer = {"ok": await self.do(parse(line), gone)}
            except asyncio.LimitOverrunError:
                answer = {"error": "invalid", "message": "the request is too long"}
            except asyncio.IncompleteReadError:
                return
            except Refused as refused:
                answer = {"error": refused.word, "message": refused.message}
            except KernelFailed as failed:
                answer = {"error": "failed", "message": str(failed)}
            writer.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            await writer.drain()
        except OSError:
            pass
        finally:
            self.connections -= 1
            if watch is not None:
                watch.cancel()
            writer.close()

    async def watch(self, reader, gone):
        with contextlib.suppress(OSError):
            while await reader.read(4096):
                pass
        if not gone.done():
            gone.set_result(None)

    async def do(self, request, gone):
        match request.get("do"):
            case "open":
                return await self.open(text(request, "language"), gone)
            case "list":
                return [session.line() for session in self.sessions.values()]
            case "run":
                return await self.run(request, gone)
            case "close":
                session = self.find(request)
                del self.sessions[session.id]
                await session.kernel.close()
                return True
        raise Refused("invalid", "field `do` must be open, list, run or close")

    async def open(self, language, gone):
        language = ALIASES.get(language, language)
        if language not in languages():
            raise Refused("unknown_language", f"there is no kernel for {language[:64]!r} here, only for {', '.join(languages())}")
        if len(self.sessions) >= SESSIONS:
            raise Refused("limit", f"there are {SESSIONS} sessions in this sandbox already")
        session = Session(language, self.spares.pop(language, None) or Kernel(self.folder, language))
        self.sessions[session.id] = session
        ready = asyncio.ensure_future(session.kernel.ready())
        try:
            await asyncio.wait({ready, gone}, timeout=OPENING, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                raise Refused("invalid", "nobody waits for it")
            if ready.done():
                ready.result()
        except (Refused, KernelFailed):
            self.sessions.pop(session.id, None)
            await session.kernel.close()
            raise
        finally:
            ready.add_done_callback(lambda task: task.cancelled() or task.exception())
        return session.line()

    async def run(self, request, gone):
        session, code = self.find(request), text(request, "code")
        limit = request.get("timeout_ms")
        if not isinstance(limit, int) or not 1 <= limit <= LONGEST:
            raise Refused("invalid", f"field `timeout_ms` must be a whole number from 1 to {LONGEST}")
        if len(code.encode("utf-8", "replace")) > CODE_BYTES:
            raise Refused("invalid", f"field `code` is over {CODE_BYTES} bytes")
        session.cells += 1
        return await session.kernel.run(code, limit / 1000, gone)

    def find(self, request):
        session = self.sessions.get(text(request, "session"))
        if session is None:
            raise Refused("no_session", "session not found")
        return session

    async def close(self):
        kernels = [session.kernel for session in self.sessions.values()] + list(self.spares.values())
        await asyncio.gather(*(kernel.close() for kernel in kernels), return_exceptions=True)


def parse(line):
    try:
        request = json.loads(line)
    except ValueError as error:
        raise Refused("invalid", "the request is not JSON") from error
    if not isinstance(request, dict):
        raise Refused("invalid", "the request is not a JSON object")
    return request


def text(request, field):
    value = request.get(field)
    if not isinstance(value, str) or not value:
        raise Refused("invalid", f"field `{field}` must be a text, and not empty")
    return value


def prepare(folder):
    """A directory that nobody but us can enter, empty; answers the lock that says whose it is, or None when it is taken."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    lock = open(folder / "lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    # What a host that was killed left behind.
    for leftover in folder.iterdir():
        if leftover.name != "lock":
            leftover.unlink(missing_ok=True)
    return lock


async def serve(folder, warm, started=None):
    """Serves for ever, unless another one does. `started` is called once requests are taken, with `warm` the kernel included."""
    folder = pathlib.Path(folder)
    lock = prepare(folder)
    if lock is None:
        return
    host = Host(folder)
    if warm:
        await host.warm()
    server = await asyncio.start_unix_server(host.serve, folder / "new", limit=REQUEST_BYTES)
    # Whoever finds the socket can connect.
    (folder / "new").rename(folder / "socket")
    if started is not None:
        started()
    try:
        async with server:
            await server.serve_forever()
    finally:
        await host.close()
        lock.close()
