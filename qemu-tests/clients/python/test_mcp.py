"""Both MCP endpoints, with the protocol's own client library."""

import asyncio
import json
import os

import httpx
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

WORKSPACE = {"create_sandbox", "list_sandboxes", "delete_sandbox", "run_command", "read_file", "write_file", "list_dir", "list_templates"}
SANDBOX = {"shell", "read_file", "write_file", "list_dir"}


def talk(path, conversation, silence=60):
    """Runs a conversation with an endpoint to its end; `silence` is what its client takes for a dead server, in seconds."""
    async def whole():
        headers = {"Authorization": "Bearer " + os.environ["PANDASTACK_API_KEY"]}
        async with httpx.AsyncClient(headers=headers, timeout=silence) as http, \
                streamable_http_client(os.environ["PANDASTACK_API"] + path, http_client=http) as (read, write, _), \
                ClientSession(read, write) as session:
            hello = await session.initialize()
            await conversation(session, hello)

    asyncio.run(asyncio.wait_for(whole(), 300))


async def text(session, tool, failed=False, **arguments):
    outcome = await session.call_tool(tool, arguments)
    assert bool(outcome.isError) == failed, outcome
    return outcome.content[0].text


@pytest.mark.parametrize("path", ["/mcp", "/v1/mcp"])
def test_the_workspace_lists_its_tools(path):
    async def conversation(session, hello):
        assert hello.serverInfo.name == "pandastack" and hello.instructions
        await session.send_ping()
        tools = {tool.name: tool for tool in (await session.list_tools()).tools}
        assert set(tools) == WORKSPACE
        assert tools["run_command"].inputSchema["required"] == ["sandbox_id", "command"]

    talk(path, conversation)


def test_every_tool_of_the_workspace(client):
    made = []

    async def conversation(session, hello):
        templates = json.loads(await text(session, "list_templates"))
        assert "base" in [template["name"] for template in templates]
        sandbox = json.loads(await text(session, "create_sandbox", template="base", ttl_seconds=600, metadata={"suite": "mcp"}))
        id = sandbox["id"]
        made.append(id)
        assert sandbox["status"] == "running" and sandbox["metadata"]["suite"] == "mcp"
        assert id in [one["id"] for one in json.loads(await text(session, "list_sandboxes"))]
        ran = json.loads(await text(session, "run_command", sandbox_id=id, command="echo é; echo err >&2; exit 3"))
        assert (ran["stdout"], ran["stderr"], ran["exit_code"]) == ("é\n", "err\n", 3)
        written = json.loads(await text(session, "write_file", sandbox_id=id, path="/workspace/a b/ü", content="té\nxt"))
        assert written["bytes"] == 6
        assert await text(session, "read_file", sandbox_id=id, path="/workspace/a b/ü") == "té\nxt"
        assert [entry["name"] for entry in json.loads(await text(session, "list_dir", sandbox_id=id, path="/workspace/a b"))["entries"]] == ["ü"]
        assert "error" in json.loads(await text(session, "read_file", failed=True, sandbox_id=id, path="/workspace/none"))
        assert "timeout" in await text(session, "run_command", failed=True, sandbox_id=id, command="sleep 60", timeout_seconds=1)
        await text(session, "delete_sandbox", sandbox_id=id)
        await text(session, "delete_sandbox", failed=True, sandbox_id=id)

    try:
        talk("/mcp", conversation)
    finally:
        for sandbox in client.sandboxes.list():
            if sandbox.id in made:
                sandbox.kill()


def test_every_tool_of_a_sandbox(shared):
    async def conversation(session, hello):
        assert hello.serverInfo.name == "pandastack-sandbox"
        assert {tool.name for tool in (await session.list_tools()).tools} == SANDBOX
        assert await text(session, "shell", command="echo a; exit 4") == "a\n\n[exit code 4]"
        await text(session, "write_file", path="/tmp/mcp/file", content="x" * 10000)
        assert await text(session, "read_file", path="/tmp/mcp/file") == "x" * 10000
        await text(session, "shell", command="printf '\\377' > /tmp/mcp/binary")
        assert await text(session, "read_file", path="/tmp/mcp/binary") == "[binary; base64]\n/w=="
        names = [entry["name"] for entry in json.loads(await text(session, "list_dir", path="/tmp/mcp"))["entries"]]
        assert sorted(names) == ["binary", "file"]
        await text(session, "shell", command="rm -r /tmp/mcp")

    talk(f"/v1/sandboxes/{shared.id}/mcp", conversation)


def test_a_long_command_does_not_look_like_a_dead_server(shared):
    async def conversation(session, hello):
        assert await text(session, "shell", command="sleep 32; echo done", timeout_ms=120000) == "done\n\n[exit code 0]"

    talk(f"/v1/sandboxes/{shared.id}/mcp", conversation, silence=25)


def test_what_is_no_message_is_refused(http):
    for body, status, code in ((b"{", 400, -32700), (b"[]", 400, -32600), (b'{"id":1,"method":"ping"}', 400, -32600),
                               (b'{"jsonrpc":"2.0","id":1,"method":"none"}', 200, -32601),
                               (b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"none"}}', 200, -32602)):
        answer = http("POST", "/v1/mcp", data=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    for method in ("GET", "DELETE"):
        answer = http(method, "/mcp")
        assert answer.status_code == 405 and "POST" in answer.headers["Allow"]
