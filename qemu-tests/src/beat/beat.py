"""Runs in a guest: counts in memory and on disk at once, and answers what it finds when it compares the two.

It beats until it is killed. A word written to the pipe IN is answered on the pipe OUT, one at a time (a shell can do that, and
starts much faster than a second Python):
  state  how far it is, and the longest time since the last `state` in which nothing ran
  hold   as `state`, and stands still from now on, so that copies can be compared
  go     beats again
  check  compares memory with what the disk has
"""

import array
import glob
import json
import mmap
import os
import select
import struct
import threading
import time
import zlib

HOME, IN, OUT = "/root/beat", "/run/beat.in", "/run/beat.out"
PAGE, PAGES = 4096, 256
BALLAST = 2 << 20


class Table:
    """Pages that are the same in memory and in a file; `synced` ones are on the disk at every beat."""

    def __init__(self, name, synced):
        self.path, self.synced = f"{HOME}/{name}", synced
        self.memory = bytearray(PAGE * PAGES)
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.pwrite(self.file, self.memory, 0)
        os.fsync(self.file)

    def beat(self, n):
        at, data = n * 97 % PAGES * PAGE, struct.pack("<Q", n) * (PAGE // 8)
        self.memory[at:at + PAGE] = data
        os.pwrite(self.file, data, at)
        if self.synced:
            os.fdatasync(self.file)

    def differs(self, how):
        """What the disk has otherwise than the memory."""
        file = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        found = mmap.mmap(-1, PAGE * PAGES)
        size = os.preadv(file, [found], 0)
        os.close(file)
        if size == PAGE * PAGES and found[:] == self.memory:
            return []
        pages = [page for page in range(PAGES) if found[page * PAGE:(page + 1) * PAGE] != self.memory[page * PAGE:(page + 1) * PAGE]]
        return [f"{self.path} ({how}): {size} bytes, pages {pages[:5]} of {len(pages)} differ"]


class Beat:
    def __init__(self):
        os.makedirs(HOME, exist_ok=True)
        self.n, self.held, self.longest = 0, False, 0.0
        self.tables = [Table("plain", False), Table("synced", True)]
        self.ballast = bytearray(os.urandom(BALLAST))
        # Every beat leaves a record in a list and in a file.
        self.records = array.array("Q")
        self.log = open(f"{HOME}/log", "wb", buffering=0)
        threading.Thread(target=self.pulse, daemon=True).start()

    def pulse(self):
        last = time.monotonic()
        while True:
            time.sleep(0.01)
            now = time.monotonic()
            self.longest, last = max(self.longest, now - last), now

    def beat(self):
        self.n += 1
        self.records.append(self.n)
        self.log.write(struct.pack("<Q", self.n))
        struct.pack_into("<Q", self.ballast, self.n * 4099 % (BALLAST - 8), self.n)
        self.tables[self.n % 4 == 0].beat(self.n)

    def crc(self):
        value = zlib.crc32(self.ballast)
        for part in (*(table.memory for table in self.tables), self.records.tobytes()):
            value = zlib.crc32(part, value)
        return value

    def check(self):
        wrong = self.tables[1].differs("before a sync")
        os.sync()
        for table in self.tables:
            wrong += table.differs("synced")
        with open(f"{HOME}/log", "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if file.read() != self.records.tobytes():
                wrong.append("the log differs from the list")
        for path in glob.glob("/sys/fs/ext4/*/errors_count"):
            with open(path) as file:
                if int(file.read()):
                    wrong.append(f"ext4 has seen errors: {path}")
        return wrong

    def answer(self, word):
        self.held = {"hold": True, "go": False}.get(word, self.held)
        longest, self.longest = self.longest, 0.0
        wrong = self.check() if word == "check" else []
        told = {"n": self.n, "crc": self.crc(), "gap_ms": longest * 1000, "unix": time.time(), "pid": os.getpid(), "wrong": wrong}
        # What it took to compare is no gap of anybody else's making.
        self.longest = 0.0
        return told

    def serve(self):
        os.mkfifo(OUT)
        os.mkfifo(f"{IN}.new")
        # Its own writer, too: without one it would always be at its end.
        words = os.open(f"{IN}.new", os.O_RDWR)
        os.rename(f"{IN}.new", IN)
        while True:
            ready, _, _ = select.select([words], [], [], 0.05)
            if ready:
                told = self.answer(os.read(words, 64).decode().strip())
                with open(OUT, "w") as out:
                    out.write(json.dumps(told))
            elif not self.held:
                self.beat()


if __name__ == "__main__":
    Beat().serve()
