"""Code interpreter sessions through the published client: what a notebook shows, and what stays of it."""

import pytest
from pandastack.exceptions import BadRequestError, NotFoundError, SandboxTimeout, ServerError

# Starting a kernel takes its time where processors are emulated; the one that waits in the template does not.
pytestmark = pytest.mark.timeout(600)

DRAW = "import random, ssl, numpy\nprint(random.random(), numpy.random.random(), ssl.RAND_bytes(8).hex())"


@pytest.fixture
def notebook(client, making):
    """A sandbox of its own, so that its first session has the kernel that the template has."""
    return making(client.sandboxes.create(template="code-interpreter"))


def test_a_plot_a_table_text_and_state(notebook):
    with notebook.create_code_context(language="python") as context:
        first = context.run_code("import matplotlib.pyplot as plt\nimport pandas as pd\nx = 41\nprint('hi')\nplt.plot([1, 3, 2])\nplt.show()\n"
                                 "pd.DataFrame({'a': [1, 2]})")
        assert (first.stdout, first.stderr, first.error, first.exit_code) == ("hi\n", "", None, 0)
        assert first.png and any("<table" in result.html for result in first.results if result.html)

        assert context.run_code("x + 1").text == "42"
        out = context.run_code("import os, subprocess\nos.write(1, b'raw\\n')\nsubprocess.run(['sh', '-c', 'echo sub; echo err >&2'])\nNone")
        assert (out.stdout, out.stderr) == ("raw\nsub\n", "err\n")
        failed = context.run_code("1 / 0")
        assert "ZeroDivisionError" in failed.error and "\x1b" not in failed.error and failed.exit_code == 1
        assert context.run_code("import sys; sys.exit(3)").exit_code == 3

        with pytest.raises(SandboxTimeout):
            context.run_code("import time\ntime.sleep(60)", timeout_seconds=2)
        assert context.run_code("x").text == "41"


def test_sessions_survive_sleep_and_copies_and_each_copy_draws_its_own(client, http, notebook, making):
    context = notebook.create_code_context()
    context.run_code("kept = [1]\nimport random; random.seed(1)")
    notebook.hibernate()
    notebook.wake()
    # Awake again it is the same machine: its generators go on where they were.
    assert context.run_code("kept.append(2)\nrandom.random()").text == "0.13436424411240122"
    context.run_code("random.seed(1); import numpy; numpy.random.seed(1)")

    children = [making(notebook.fork()) for _ in range(2)]

    drawn = [context.run_code(DRAW).stdout]
    for child in children:
        # The session is in the fork, too, under the same name.
        answer = http("POST", f"/v1/sandboxes/{child.id}/repl/sessions/{context.id}/run", json={"code": "kept"})
        assert answer.json()["results"] == [{"text/plain": "[1, 2]"}]
        drawn.append(http("POST", f"/v1/sandboxes/{child.id}/repl/sessions/{context.id}/run", json={"code": DRAW}).json()["stdout"])
    for column in zip(*(line.split() for line in drawn)):
        assert len(set(column)) == 3, drawn


def test_javascript_and_bash_keep_their_state_through_timeouts_sleep_and_copies(http, notebook, making):
    script, shell = notebook.create_code_context(language="javascript"), notebook.create_code_context(language="bash")
    first = script.run_code("import os from 'node:os';\nconst x = 41;\nconsole.log('hi'); console.error('err');\nawait Promise.resolve({x: x + 1})")
    assert (first.stdout, first.stderr, first.text, first.exit_code) == ("hi\n", "err\n", "{ x: 42 }", 0), first
    assert script.run_code("({[Symbol.for('Jupyter.display')]: () => ({'text/html': '<b>x</b>'})})").results[0].html == "<b>x</b>"
    told = shell.run_code("cd /tmp; x=41; echo hi; echo err >&2; false")
    assert (told.stdout, told.stderr, told.exit_code, told.error) == ("hi\n", "err\n", 1, None), told
    for context, slow, code, kept in ((script, "while (true) {}", "x + os.EOL", "'41\\n'"), (shell, "while true; do sleep 1; done", "echo $x $PWD", "41 /tmp\n")):
        with pytest.raises(SandboxTimeout):
            context.run_code(slow, timeout_seconds=2)
        after = context.run_code(code)
        assert (after.text or after.stdout) == kept

    notebook.hibernate()
    notebook.wake()
    child = making(notebook.fork())

    def drawn(sandbox, context, code):
        answer = http("POST", f"/v1/sandboxes/{sandbox.id}/repl/sessions/{context.id}/run", json={"code": code}).json()
        return answer["stdout"].split() or answer

    draws = "console.log(x, Math.random(), require('crypto').randomBytes(8).toString('hex'))", "echo $x $RANDOM$RANDOM$RANDOM"
    for context, code in zip((script, shell), draws):
        ours, theirs = drawn(notebook, context, code), drawn(child, context, code)
        assert ours[0] == theirs[0] == "41", (ours, theirs)
        assert all(one != other for one, other in zip(ours[1:], theirs[1:], strict=True)), (ours, theirs)


def test_two_creates_draw_different_numbers(client, making):
    drawn = []
    for _ in range(2):
        sandbox = making(client.sandboxes.create(template="code-interpreter"))
        drawn.append(sandbox.create_code_context().run_code(DRAW).stdout.split())
        sandbox.kill()

    assert all(one != other for one, other in zip(*drawn)), drawn


def opened(notebook):
    """A session of a host that starts from nothing, which may take longer than a client waits for an answer."""
    for _ in range(5):
        try:
            return notebook.create_code_context()
        except ServerError as error:
            assert "still starting" in str(error), error
    raise AssertionError("the code interpreter does not start")


def test_a_killed_host_is_started_again_and_its_sessions_are_gone(notebook):
    context = notebook.create_code_context()
    # A killed process loses its command line before its socket: it is gone when its number is.
    notebook.exec("old=$(pgrep -f '[/]usr/lib/pandastack/kernels'); kill -9 $old; for pid in $old; do while [ -d /proc/$pid ]; do sleep 0.1; done; done",
                  timeout_seconds=20, check=True)

    with pytest.raises(NotFoundError):
        context.run_code("1")
    assert opened(notebook).run_code("1 + 1").text == "2"


def test_templates_without_kernels_and_code_without_a_session(http, shared, interpreter):
    with pytest.raises(BadRequestError, match="no kernel"):
        shared.create_code_context()
    with pytest.raises(BadRequestError):
        interpreter.create_code_context(language="cobol")
    for language, code in (("python", "print(6 * 7)"), ("node", "console.log(6 * 7)"), ("bash", "echo $((6 * 7))")):
        ran = http("POST", f"/v1/sandboxes/{interpreter.id}/repl", json={"language": language, "code": code}).json()
        assert (ran["stdout"], ran["exit_code"]) == ("42\n", 0), ran
    assert "python" in http("GET", "/v1/repl/languages").json()
