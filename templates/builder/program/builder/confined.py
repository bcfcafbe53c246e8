"""Runs a function in a process of its own whose root is another directory.

Owns: that what it does with paths, through whatever links, stays below that directory, because the kernel resolves them there; and that
it has bounded memory. The process runs no program and imports nothing after it has changed its root, so nothing in there can have an
effect but as data.
"""

import gc
import json
import os
import resource
import sys
import traceback

from .report import Failed, WrongInput

# What a header of an archive may make us hold, bytes.
MEMORY = 768 << 20


def call(root, function, *arguments):
    """The function's result, which has to fit into JSON. What it raises as WrongInput or Failed is raised here."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(root, writer, function, arguments)
    os.close(writer)
    try:
        with open(reader, encoding="utf-8") as pipe:
            text = pipe.read()
    except BaseException:
        os.kill(child, 9)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if not text:
        raise Failed(f"a process of the builder ended early (status {status})")
    kind, value = json.loads(text)
    if kind == "ok":
        return value
    raise {"wrong": WrongInput, "failed": Failed}[kind](value)


def _child(root, writer, function, arguments):
    try:
        os.chroot(root)
        os.chdir("/")
        sys.meta_path.clear()
        gc.freeze()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        answer = ["ok", function(*arguments)]
    except WrongInput as error:
        answer = ["wrong", str(error)]
    except Failed as error:
        answer = ["failed", str(error)]
    except BaseException as error:  # Whatever it is, the parent has to be told.
        where = traceback.extract_tb(error.__traceback__)[-1]
        answer = ["failed", f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})"]
    try:
        os.write(writer, json.dumps(answer).encode())
    finally:
        os._exit(0)
