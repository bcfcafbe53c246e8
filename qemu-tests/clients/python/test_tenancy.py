"""Nobody learns of what is another workspace's: every route of the served document, with a foreign token."""

import json
import os

import pytest
import requests

from pandastack import Client
from pandastack.exceptions import NotFoundError

METHODS = ("get", "post", "put", "patch", "delete")


def resolve(document, schema):
    """A schema without references and without the choice of null."""
    while True:
        if "$ref" in schema:
            node = document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                node = node[part]
            schema = node
        elif "oneOf" in schema or "anyOf" in schema:
            schema = [one for one in schema.get("oneOf", schema.get("anyOf")) if one.get("type") != "null"][0]
        else:
            return schema


def smallest(document, schema):
    """A value that a schema allows, of what it requires and nothing else."""
    schema = resolve(document, schema)
    kind = schema.get("type", "object")
    kind = [one for one in kind if one != "null"][0] if isinstance(kind, list) else kind
    if "enum" in schema:
        return schema["enum"][0]
    if kind == "object":
        return {name: smallest(document, schema["properties"][name]) for name in schema.get("required", [])}
    if kind in ("integer", "number"):
        return max(schema.get("minimum", 1), 1)
    return {"array": [], "boolean": True}.get(kind, "true")


def body(document, operation):
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        return {"json": smallest(document, content["application/json"]["schema"])}
    return {"data": b"x"} if content else {}


def query(operation):
    wanted = [one for one in operation.get("parameters", []) if one["in"] == "query" and one.get("required")]
    return {one["name"]: "/etc/hostname" if one["name"] == "path" else "1" for one in wanted}


@pytest.fixture
def mine(client, http):
    """One of everything that a workspace can have, by the name of its path parameter."""
    sandbox = client.sandboxes.create(template="base", metadata={"tenancy": "only-mine"})
    snapshot = volume = token = None
    try:
        session = http("POST", f"/v1/sandboxes/{sandbox.id}/exec", json={"cmd": "sleep 1000", "detach": True}).json()["session_id"]
        snapshot = http("POST", f"/v1/sandboxes/{sandbox.id}/snapshots", timeout=180).json()["id"]
        volume = client.volumes.create("only-mine", size_mb=16)["name"]
        token = client.tokens.create("only-mine")
        org = http("GET", "/v1/orgs").json()[0]["id"]
        yield {"id": sandbox.id, "snapshot": snapshot, "name": volume, "prefix": token.prefix, "session": session, "org": org}
    finally:
        if token:
            client.tokens.revoke(token.prefix)
        if volume:
            client.volumes.delete(volume)
        sandbox.kill()
        if snapshot:
            http("DELETE", f"/v1/snapshots/{snapshot}")


@pytest.mark.timeout(600)
def test_every_route_hides_what_is_another_workspaces(http, mine):
    document = http("GET", "/openapi.json").json()
    stranger = requests.Session()
    stranger.headers["Authorization"] = "Bearer " + os.environ["PANDASTACK_FOREIGN_KEY"]
    asked, found, wrong, leaks = 0, set(), [], []
    for path, operations in document["paths"].items():
        # A parameter that this test does not know gets an id that is foreign, too.
        filled = path
        for part in path.split("/"):
            if part.startswith("{"):
                filled = filled.replace(part, mine.get(part.strip("{}"), mine["id"]))
        for method, operation in ((method, operations[method]) for method in METHODS if method in operations):
            ask = {"params": query(operation), "timeout": 60, "stream": True, **body(document, operation)}
            if filled != path:
                asked += 1
                with stranger.request(method, http.base + filled, **ask) as answer:
                    if answer.status_code != 404:
                        wrong.append((method, path, answer.status_code, answer.text[:200]))
                if method == "get":
                    with http("GET", filled, **ask) as answer:
                        found |= {path} if answer.status_code < 400 else set()
            elif method == "get" and operation.get("security") != [{}] and path.startswith("/v1/"):
                text = stranger.get(http.base + path, timeout=60).text
                leaks += [(path, name, value) for name, value in mine.items() if value in text]
    assert not wrong, wrong
    assert not leaks, leaks
    # A 404 proves something only where the owner gets another answer.
    assert asked > 30 and {"/v1/sandboxes/{id}", "/v1/sandboxes/{id}/execs/{session}", "/v1/snapshots/{snapshot}",
                           "/v1/volumes/{name}", "/v1/volumes/{name}/snapshots", "/v1/orgs/{org}"} <= found, (asked, found)
    for path in (f"/v1/sandboxes/{mine['id']}", f"/v1/snapshots/{mine['snapshot']}", f"/v1/volumes/{mine['name']}",
                 f"/v1/sandboxes/{mine['id']}/execs"):
        assert http("GET", path).status_code == 200, path
    assert mine["prefix"] in http("GET", "/v1/me/tokens").text
    with pytest.raises(NotFoundError):
        Client(api_key=os.environ["PANDASTACK_FOREIGN_KEY"]).sandboxes.create(from_snapshot=mine["snapshot"])


def test_an_organisation_is_asked_for_by_its_members_only(http):
    org = http("GET", "/v1/orgs").json()[0]
    foreign = {"Authorization": "Bearer " + os.environ["PANDASTACK_FOREIGN_KEY"]}
    for wanted in (org["id"], org["slug"]):
        header = {"X-Pandastack-Org": wanted}
        assert http("GET", "/v1/me", headers=header).status_code == 200
        answer = requests.get(http.base + "/v1/sandboxes", headers=foreign | header, timeout=60)
        assert (answer.status_code, answer.json()["error"]) == (403, "not a member of requested org")


def test_a_token_that_only_reads_and_one_for_one_sandbox(client, http, shared):
    made = [http("POST", "/v1/me/tokens", json=wish).json() for wish in ({"scope": "read"}, {"sandbox_id": shared.id})]
    try:
        reading, bound = (Client(api_key=token["token"]) for token in made)
        assert reading.sandboxes.get(shared.id).exec is not None
        refused = requests.post(http.base + f"/v1/sandboxes/{shared.id}/exec", json={"cmd": "true"}, timeout=60,
                                headers={"Authorization": "Bearer " + made[0]["token"]})
        assert (refused.status_code, refused.json()["error"]) == (403, "this token may only read")
        assert bound.sandboxes.get(shared.id).exec("echo in").stdout == "in\n"
        refused = requests.get(http.base + "/v1/sandboxes", timeout=60, headers={"Authorization": "Bearer " + made[1]["token"]})
        assert refused.status_code == 403 and shared.id in refused.json()["error"]
        assert bound.me()["token"]["sandbox_id"] == shared.id
    finally:
        for token in made:
            client.tokens.revoke(token["prefix"])


def test_quotas_show_what_is_there(http, shared):
    answer = http("GET", "/v1/quotas").json()
    lines = {line["resource"]: line for line in answer["quotas"]}
    assert set(lines) == {"sandboxes", "vcpus", "memory_mib", "disk_mib", "snapshots", "volumes", "volume_mib"}
    assert lines["sandboxes"]["used"] == len(http("GET", "/v1/sandboxes").json()) and lines["memory_mib"]["used"] > 0
    assert answer["rates"]["requests_per_second"] > 0 and json.dumps(answer)
