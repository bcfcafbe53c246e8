#!/usr/bin/env python3
"""Makes docs/compatibility.md of what a run of the suite covered, and says what it does not cover.

    compatibility.py RESULTS DOCUMENT

RESULTS has python.json and one file for each file of the TypeScript suite (python/surface.py, typescript/surface.mjs). The document that the run
makes is put beside them. Ends with 1 when a line that must work has no test, or when DOCUMENT is another one.
"""

import json
import pathlib
import re
import sys

HERE = pathlib.Path(__file__).parent
SUITES = ("python.json", "suite.test.mjs.json", "state.test.mjs.json", "surface.test.mjs.json")
NOT_YET = ("functions", "schedules", "databases", "apps", "function ", "schedule ", "database ", "app ")

# Lines that fail inside the client whatever a server does, or need a Docker engine beside it: why, and the test that shows it.
NO_SUCH_METHOD = "calls a method that its own SDK does not have"
NO_DOCKER = "runs `docker build` and `docker push` beside it; with an engine's place taken by a stand-in its requests are served"
CLIENT_SIDE = {
    "cli:sandbox invite": (NO_SUCH_METHOD, "test_cli.py::test_invitations_fail_inside_the_client"),
    "cli:sandbox invites": (NO_SUCH_METHOD, "test_cli.py::test_invitations_fail_inside_the_client"),
    "cli:sandbox revoke-invite": (NO_SUCH_METHOD, "test_cli.py::test_invitations_fail_inside_the_client"),
    "cli:sandbox participants": (NO_SUCH_METHOD, "test_cli.py::test_invitations_fail_inside_the_client"),
    "cli:template push": (NO_DOCKER, "test_docker.py::test_the_command_line_pushes_with_docker"),
    "python:__main__ template push": (NO_DOCKER, "test_docker.py::test_the_modules_command_line_pushes_with_docker"),
    "python:Client.templates.push": (NO_DOCKER, "test_docker.py::test_the_sdk_pushes_with_docker"),
    "python:templates.push": (NO_DOCKER, "test_docker.py::test_the_sdk_pushes_with_docker"),
}
TOPICS = (
    ("Sandboxes", ""), ("Templates", r"templat|registry_ref"), ("Volumes", "volumes"), ("Snapshots", r"\.snapshots|cli:snapshot"),
    ("Tokens and identity", r"token|\.me$|:me$|cli:auth|constructor|__init__|default_client|Client\.request|cli:version|cli:help"),
    ("Agents' worker", "cma"), ("Functions", "function"), ("Schedules", "schedule"), ("Databases", "database"), ("Apps", r"apps|cli:app"),
)
HEAD = """# Compatibility

What the published clients can ask for, line by line, and what shows that the appliance does it. The clients are those of PyPI
(`pandastack` 0.10.0) and npm (`@pandastack/sdk` 0.9.0 with its command line), unmodified.

*This file is made by the suite* (`qemu-tests/clients/compatibility.py`), from which methods of the clients were called and returned in tests that
passed on the booted appliance. A run that covers other lines fails and says how to renew it.

| state | meaning |
|---|---|
| passes | a call of it returned in the named test, which passed |
| client-side | it fails inside the client, or needs a Docker engine beside it; the named test shows that |
| not yet | belongs to functions, schedules, databases or apps |
| **untested** | no test that passed has called it yet |
"""


def lines():
    return [
        line for line in HERE.joinpath("surface.txt").read_text().splitlines() if line]


def topic(line):
    """The last topic that fits."""
    return [name for name, pattern in TOPICS if re.search(pattern, line)][-1]


def is_not_yet(line):
    name = line.partition(":")[2]
    return name.removeprefix("Client.").startswith(NOT_YET)


def gather(results):
    """Tests by line, tests that passed, and what is incomplete."""
    covered, passed, missing = {}, set(), []
    for suite in SUITES:
        path = results / suite
        told = json.loads(path.read_text()) if path.exists() else {"complete": False, "passed": [], "lines": {}}
        if not told["complete"]:
            missing.append(suite)
        passed.update(told["passed"])
        for line, tests in told["lines"].items():
            covered.setdefault(line, set()).update(tests)
    return covered, passed, missing


def named_before(document):
    """The test that the document names for each line."""
    rows = re.findall(r"^\| `([^`]+)` \| [a-z -]+ \| (?:[^|]*; )?`([^`]+)` \|$", document, re.M)
    return {line: test for line, test in rows}


def choose(line, tests, covered, before):
    """The test that was named before, if it still covers the line; otherwise the one that covers the fewest others."""
    if before.get(line) in tests:
        return before[line]
    breadth = lambda test: sum(test in others for others in covered.values())
    return min(tests, key=lambda test: (breadth(test), test))


def render(covered, passed, before):
    """The document, and what is wrong with the run."""
    wrong, sections = [], {name: [] for name, _ in TOPICS}
    for line in lines():
        if covered.get(line):
            row = f"passes | `{choose(line, covered[line], covered, before)}`"
        elif line in CLIENT_SIDE:
            why, test = CLIENT_SIDE[line]
            if test not in passed:
                wrong.append(f"{line}: its proof {test} did not pass")
            row = f"client-side | {why}; `{test}`"
        elif is_not_yet(line):
            row = "not yet | "
        else:
            wrong.append(f"{line}: no test that passed has called it")
            row = "**untested** | "
        sections[topic(line)].append(f"| `{line}` | {row} |")
    text = [HEAD]
    for name, rows in sections.items():
        if rows:
            text.append(f"\n## {name}\n\n| line | state | shown by |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "".join(text), wrong


def main(results, document):
    covered, passed, missing = gather(results)
    committed = document.read_text() if document.exists() else ""
    made, wrong = render(covered, passed, named_before(committed))
    made_at = results / "compatibility.md"
    made_at.write_text(made)
    if unknown := sorted(set(covered) - set(lines())):
        # Methods that the clients have and the list does not name.
        print("beside the list:", ", ".join(unknown))
    if missing:
        wrong.insert(0, f"these suites did not run, not wholly, or failed: {', '.join(missing)}")
    elif made != committed:
        wrong.append(f"{document} is not what this run makes. Look at the difference, then: cp {made_at} {document}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
