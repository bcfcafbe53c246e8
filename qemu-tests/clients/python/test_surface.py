"""What the published Python client has beside what the other tests use: its second ways to the same things."""

import pandastack
import pytest
from pandastack import Candidate, Client, Sandbox, explore, get_default_client, set_default_client, tokens
from pandastack.exceptions import AuthError, NotFoundError
from pandastack.sandbox import Execution


def test_the_default_client(client, monkeypatch):
    set_default_client(None)
    made = get_default_client()
    assert made is get_default_client() and made is not client
    assert made.me() == client.me()
    set_default_client(client)
    assert get_default_client() is client


def test_sandboxes_by_their_class(client, making):
    sandbox = making(Sandbox.create(template="base", metadata={"a": "b"}))
    assert Sandbox.get(sandbox.id).metadata["a"] == "b"
    assert sandbox.id in [one.id for one in Sandbox.list()]
    assert sandbox.commands.run("echo $((6 * 7))").stdout == "42\n"
    assert sandbox.commands.run("exit 3", timeout=20).exit_code == 3
    assert sandbox.refresh().status == "running"


def test_sandboxes_by_their_ids(client, fresh, making):
    child = making(client.sandboxes.fork(fresh.id, metadata={"a": "b"}))
    one, two = making(*client.sandboxes.fork_tree(fresh.id, 2))

    told = client.sandboxes.promote(one.id, cleanup_siblings=True)

    assert child.metadata["a"] == "b" and (told["winner"], told["deleted"]) == (one.id, [two.id])
    client.sandboxes.delete(child.id)
    with pytest.raises(NotFoundError):
        client.sandboxes.get(child.id)


def test_explore_as_a_function(fresh, making):
    result = explore(fresh, [Candidate.shell("three", "echo 3 > /root/score"), Candidate.call("eight", lambda one: one.exec("echo 8 > /root/score"))],
                     score_fn=lambda one, outcome: float(one.filesystem.read("/root/score")))
    making(result.winner)

    assert [outcome.label for outcome in result.best(2)] == ["eight", "three"]
    assert "eight" in result.table() and result.winner.filesystem.read("/root/score") == b"8\n"


def test_tokens_by_their_module(client):
    made = tokens.create("module", expires_in_days=1)
    assert made.prefix in [token.prefix for token in tokens.list()]
    tokens.revoke(made.prefix)
    with pytest.raises(AuthError):
        Client(api_key=made.token).me()


def test_templates_by_their_module(client):
    from pandastack import templates

    assert {"base", "code-interpreter"} <= {template.name for template in templates.list()}
    assert templates.get("base").name == "base"


@pytest.mark.timeout(600)
def test_a_cell_shows_everything_that_a_result_can_be(client, making):
    sandbox = making(client.sandboxes.create(template="code-interpreter"))
    shows = ("from IPython.display import HTML, JSON, SVG, Image, Markdown, display\n"
             "display(Image(b'\\x89PNG\\r\\n\\x1a\\n', format='png'), Image(b'\\xff\\xd8\\xff\\xe0', format='jpeg'))\n"
             "display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\"/>'), HTML('<b>h</b>'), Markdown('*m*'), JSON({'a': [1]}))\n"
             "print('said')\n"
             "'last'")

    with sandbox.create_code_context(language="python") as context:
        ran = context.run_code(shows)

    shown = lambda kind: [value for value in (getattr(result, kind) for result in ran.results) if value]
    assert ran.logs == {"stdout": "said\n", "stderr": ""} and ran.error is None, ran.error
    assert shown("png")[0].startswith("iVBOR") and shown("jpeg")[0].startswith("/9j/") and "<svg" in shown("svg")[0]
    assert shown("html") == ["<b>h</b>"] and shown("markdown") == ["*m*"] and shown("json") == [{"a": [1]}]
    assert "'last'" in shown("text") and len(shown("chart")) == 3
    assert ran.png == shown("png")[0] and ran.text
    assert Execution.from_dict({"results": []}).text is None and pandastack.__version__ == "0.10.0"
