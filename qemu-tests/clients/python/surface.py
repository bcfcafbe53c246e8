"""Which lines of ../surface.txt a run really calls.

Every public method of the published client is wrapped before the tests are collected; the client itself is as it was published. A line is
covered by a test that passed and in which a call of it returned: one that only ever raises proves nothing. The command lines, which are
processes, are started by `cli` and `module` of this file, which note them. ../compatibility.py makes docs/compatibility.md of it.
"""

import functools
import importlib
import inspect
import json
import os
import pathlib
import subprocess
import sys

LINES = pathlib.Path(__file__).parent.parent.joinpath("surface.txt").read_text().split("\n")
NPM = pathlib.Path(os.environ.get("NPM_PACKAGE", "")) / "dist/cli.js"

_now = set()
_covered = {}
_passed = set()


def _wrap(line, function):
    """A function that notes its line when it returns, or when what it generates was read."""
    if inspect.isgeneratorfunction(function):
        @functools.wraps(function)
        def reads(*args, **kwargs):
            for item in function(*args, **kwargs):
                _now.add(line)
                yield item
            _now.add(line)
        return reads

    @functools.wraps(function)
    def calls(*args, **kwargs):
        answer = function(*args, **kwargs)
        _now.add(line)
        return answer
    return calls


def _owner(path):
    """Whose attribute the last word of a line is."""
    pandastack = importlib.import_module("pandastack")
    sandbox = importlib.import_module("pandastack.sandbox")
    explore = importlib.import_module("pandastack.explore")
    module = lambda name: importlib.import_module("pandastack." + name)
    fixed = {
        "Client": pandastack.Client, "Client.sandboxes": module("client").SandboxAPI, "Client.templates": module("templates").TemplatesAPI,
        "Client.tokens": module("tokens").TokensAPI, "Client.volumes": module("volumes").VolumesAPI,
        "Client.snapshots": module("snapshots").SnapshotsAPI, "Sandbox": sandbox.Sandbox, "Sandbox.filesystem": sandbox.SandboxFilesystem,
        "Sandbox.commands": sandbox.SandboxCommands, "templates": module("templates"), "tokens": module("tokens"),
        "TemplateBuild": module("templates").TemplateBuild, "cma.CmaConfig": module("cma").CmaConfig, "cma.Worker": module("cma").Worker,
        "ExploreResult": explore.ExploreResult if inspect.ismodule(explore) else sys.modules["pandastack.explore"].ExploreResult,
        "Candidate": pandastack.Candidate,
    }
    return fixed.get(path) or getattr(sandbox, path)


def install():
    """Wraps what the list names."""
    for line in LINES:
        client, _, name = line.partition(":")
        if client != "python" or name.startswith("__main__") or name.startswith(
                ("Client.functions", "Client.schedules", "Client.databases", "Client.apps")):
            continue
        path, _, last = name.rpartition(".")
        if not path:
            _install_function(line, last)
            continue
        owner = _owner(path)
        found = inspect.getattr_static(owner, last)
        if isinstance(found, property):
            setattr(owner, last, property(_wrap(line, found.fget), found.fset, found.fdel, found.__doc__))
        elif isinstance(found, (classmethod, staticmethod)):
            setattr(owner, last, type(found)(_wrap(line, found.__func__)))
        else:
            setattr(owner, last, _wrap(line, found))


def _install_function(line, name):
    """A function of the package has several names: its own module's, and those that were imported from there."""
    package = importlib.import_module("pandastack")
    function = getattr(package, name, None) or getattr(sys.modules["pandastack.sandbox"], name)
    wrapped = _wrap(line, function)
    setattr(package, name, wrapped)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("pandastack.") and getattr(module, name, None) is function:
            setattr(module, name, wrapped)


def _note_words(prefix, args):
    """The line of a command line: its first words."""
    words = [arg for arg in args if not arg.startswith("-")]
    for count in (2, 1):
        if (line := f"{prefix}{' '.join(words[:count])}") in LINES:
            _now.add(line)
            return
    raise AssertionError(f"{args} is no line of surface.txt")


def _run(prefix, command, args, *, check=True, env=None, **options):
    options.setdefault("timeout", 150)
    run = subprocess.run(command + list(args), capture_output=True, text=True, env=os.environ | (env or {}), **options)
    if check:
        assert run.returncode == 0, (args, run.returncode, run.stdout, run.stderr)
        _note_words(prefix, args)
    return run


def cli(*args, **options):
    """The npm package's command line. With `check=False` it may fail, and covers nothing."""
    return _run("cli:", ["node", str(NPM)], args, **options)


def module(*args, **options):
    """`python -m pandastack`."""
    return _run("python:__main__ ", [sys.executable, "-m", "pandastack"], args, **options)


def note(line):
    """Notes a line that a test started in its own way."""
    assert line in LINES, line
    _now.add(line)


class Recorder:
    """The plugin."""

    def pytest_runtest_setup(self, item):
        _now.clear()

    def pytest_runtest_logreport(self, report):
        if report.when != "call" or not report.passed:
            return
        name = report.nodeid.split("[")[0].rpartition("/")[2]
        _passed.add(name)
        for line in _now:
            _covered.setdefault(line, set()).add(name)

    def pytest_sessionfinish(self, session, exitstatus):
        directory = os.environ.get("SURFACE_RESULTS")
        if not directory:
            return
        complete = exitstatus == 0 and not session.config.getoption("keyword") and not session.config.getoption("markexpr")
        told = {"complete": complete, "passed": sorted(_passed), "lines": {line: sorted(tests) for line, tests in sorted(_covered.items())}}
        pathlib.Path(directory, "python.json").write_text(json.dumps(told, indent=1))
