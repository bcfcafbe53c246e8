"""What runs inside every Python kernel: set up once, and made new when its machine has become another one.

The kernel's own process runs this file; nothing of it is in the user's namespace.
"""

import fcntl
import os
import random
import sys
import termios
import time
import warnings

# The pipes that the kernel has put in the place of descriptors 1 and 2, by descriptor.
pipes = {}
mark = ""


def identity(fd):
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def set_up(shell, token, warm):
    """Makes a cell end when everything that it and its subprocesses wrote has been read, and `exit` mean what it says."""
    global mark
    mark = token
    pipes.update((fd, identity(fd)) for fd in (1, 2))
    shell.events.register("post_run_cell", lambda _: end_output())
    shell.InteractiveTB.set_mode("Plain")
    # Through the descriptors, like any other subprocess: IPython's way with a terminal puts both streams together.
    shell.system = shell.system_raw
    # IPython's own would end the kernel.
    for name in ("exit", "quit"):
        shell.user_ns[name] = shell.user_ns_hidden[name] = sys.exit
    warnings.filterwarnings("ignore", message="To exit: use")
    if warm:
        warm_up()


def warm_up():
    """Imports what most cells import, and does once what is slow the first time."""
    import io
    import ssl  # noqa: F401

    import matplotlib.figure
    import matplotlib.pyplot  # noqa: F401
    import numpy
    import pandas

    figure = matplotlib.figure.Figure()
    figure.subplots().plot([1, 2, 3])
    figure.savefig(io.BytesIO(), format="png")
    pandas.DataFrame({"x": numpy.arange(3)})._repr_html_()


def end_output():
    """Writes the mark behind what was written to the descriptors, and lets the kernel read it."""
    for fd, pipe in pipes.items():
        try:
            # Whoever has put a file there shall not find a mark in it.
            if identity(fd) != pipe:
                continue
            os.write(fd, mark.encode())
        except OSError:
            continue
    until = time.monotonic() + 0.2
    for fd in pipes:
        while time.monotonic() < until and unread(fd):
            time.sleep(0.0005)
    # The thread that has read them has still to pass them on.
    time.sleep(0.001)


def unread(fd):
    count = bytearray(4)
    try:
        fcntl.ioctl(fd, termios.FIONREAD, count)
    except OSError:
        return 0
    return int.from_bytes(count, sys.byteorder)


def renew(kernel, key):
    """This process is a copy of one that runs elsewhere, too: nothing that it signs or draws from now on is the other's."""
    kernel.session.key = key.encode()
    random.seed()
    numpy = sys.modules.get("numpy.random")
    if numpy is not None:
        numpy.seed()
    openssl = sys.modules.get("_ssl")
    if openssl is not None:
        openssl.RAND_add(os.urandom(64), 64.0)
