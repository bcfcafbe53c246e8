"""The Jupyter kernel of a language that has an interpreter of its own: `wrapped.py LANGUAGE -f CONNECTION_FILE`.

Owns: Jupyter's side. Knows no language (`engine`).

Beside what every kernel takes, it takes `renew_request` {"key"} on its shell channel: the machine has become another one.
"""

import asyncio
import os
import signal
import sys

from engine import ENGINES
from ipykernel.kernelapp import IPKernelApp
from ipykernel.kernelbase import Kernel

# Seconds for the last messages to leave before the process ends.
FAREWELL = 0.2


class Wrapped(Kernel):
    """A kernel around an engine. It ends with the exit code of its engine when that ends by itself."""

    implementation, implementation_version, banner = "pandastack", "1", ""
    language = ""

    @property
    def language_info(self):
        return {"name": self.language, "mimetype": "text/plain", "file_extension": ""}

    def __init__(self, **given):
        super().__init__(**given)
        self.engine = None
        self.shell_handlers["renew_request"] = self.renew_request

    def begin(self):
        self.engine = ENGINES[self.language](self.heard, self.shown, self.ended)

    # The process group is interrupted as a whole: the engine is meant, and not whatever runs in here at that moment.
    def pre_handler_hook(self):
        if self.engine is None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: self.engine.interrupt())
            self.begin()

    def post_handler_hook(self):
        pass

    def heard(self, stream, text):
        self.send_response(self.iopub_socket, "stream", {"name": stream, "text": text})

    def shown(self, bundle):
        self.send_response(self.iopub_socket, "display_data", {"data": bundle, "metadata": {}})

    def ended(self, code):
        asyncio.get_running_loop().call_later(FAREWELL, os._exit, code)

    async def do_execute(self, code, silent, store_history=True, user_expressions=None, allow_stdin=False, *, cell_id=None):
        got = await self.engine.run(code)
        base = {"execution_count": self.execution_count, "payload": [], "user_expressions": {}}
        if got["error"]:
            self.send_response(self.iopub_socket, "error", got["error"])
            return {"status": "error", **got["error"], **base}
        if got["result"] and not silent:
            self.send_response(self.iopub_socket, "execute_result",
                               {"execution_count": self.execution_count, "data": got["result"], "metadata": {}})
        # The exit status is ours: Jupyter knows only whether something was wrong.
        return {"status": "ok", "exit_status": got["exit"], **base}

    async def renew_request(self, stream, ident, parent):
        self.session.key = parent["content"]["key"].encode()
        if self.engine.ran:
            self.engine.renew()
        else:
            # Nobody has anything in it: a new process has nothing in common with the one that was copied.
            self.engine.close()
            self.begin()
        self.session.send(stream, "renew_reply", {"status": "ok"}, parent, ident=ident)


if __name__ == "__main__":
    Wrapped.language = sys.argv.pop(1)
    IPKernelApp.launch_instance(kernel_class=Wrapped)
