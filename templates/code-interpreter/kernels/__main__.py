"""Code interpreter sessions: Jupyter kernels behind a Unix socket.

    python3 kernels start [--warm]    returns when requests are taken; with --warm, when a kernel of each language waits for its first cell
    python3 kernels serve [--warm]    the server itself, in the foreground

The server outlives who started it. A second one ends at once.
"""

import argparse
import asyncio
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

FOLDER = pathlib.Path(os.environ.get("KERNELS_FOLDER", "/run/pandastack/kernels"))
# Seconds until `start` gives up.
PATIENCE = 700


def answers():
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as probe:
        try:
            probe.connect(str(FOLDER / "socket"))
        except OSError:
            return False
        return True


def start(warm):
    if answers():
        return 0
    server = subprocess.Popen([sys.executable, "-B", str(pathlib.Path(__file__).resolve().parent), "serve", *(["--warm"] if warm else [])],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + PATIENCE
    ended = None
    while time.monotonic() < until:
        if answers():
            return 0
        # The one that was started ends at once where another one is about to take requests.
        ended = ended or (server.poll() is not None and time.monotonic())
        if ended and time.monotonic() > ended + 30 or server.returncode:
            break
        time.sleep(0.02)
    print("the kernels' host did not start", file=sys.stderr)
    return 1


def serve(warm):
    # Where memory is short, somebody else ends first.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("-900")
    from host import serve as serving

    async def main():
        task = asyncio.ensure_future(serving(FOLDER, warm))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(main())
    return 0


def main():
    arguments = argparse.ArgumentParser(description="Jupyter kernels behind a Unix socket.")
    arguments.add_argument("what", choices=["start", "serve"])
    arguments.add_argument("--warm", action="store_true", help="have a kernel of each language wait for its first session")
    given = arguments.parse_args()
    return {"start": start, "serve": serve}[given.what](given.warm)


sys.exit(main())
