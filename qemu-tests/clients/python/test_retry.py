"""A full quota through the published client: its own retry waits for room, and nothing is there after a refusal."""

import os
import threading

import pytest
from pandastack import Client
from pandastack.exceptions import BadRequestError

pytestmark = pytest.mark.timeout(600)

CALL = "busctl call ai.pandastack.api1 /ai/pandastack/api1 ai.pandastack.api1.Manager"
KEY = os.environ.get("PANDASTACK_FOREIGN_KEY")


@pytest.fixture
def narrow(operator, foreign):
    """A workspace that may have one sandbox, and has it."""
    for sandbox in foreign.sandboxes.list():
        sandbox.kill()
    only = foreign.sandboxes.create(template="base")
    operator(f"{CALL} SetQuota sst stranger sandboxes 1")
    yield only
    operator(f"{CALL} RemoveQuota ss stranger sandboxes")
    for sandbox in foreign.sandboxes.list():
        sandbox.kill()


def ways(client, parent):
    return {"create": lambda: client.sandboxes.create(template="base"), "fork": lambda: client.sandboxes.fork(parent.id),
            "fork-tree": lambda: client.sandboxes.fork_tree(parent.id, 1)}


def test_nothing_exists_after_a_refusal(narrow, foreign):
    impatient = Client(api_key=KEY, max_create_retry_seconds=0)
    look = lambda: (impatient._request("GET", "/quotas"), foreign.snapshots.list(), foreign.volumes.list())
    before = look()

    for way, make in ways(impatient, narrow).items():
        with pytest.raises(BadRequestError, match="max sandboxes reached"):
            make()
        assert [sandbox.id for sandbox in foreign.sandboxes.list()] == [narrow.id], way

    assert look() == before


def test_a_create_that_waits_gets_through_when_room_appears(narrow, foreign):
    refused = threading.Event()
    events = []

    def told(event):
        events.append(event)
        refused.set()

    patient = Client(api_key=KEY, max_create_retry_seconds=120, on_create_retry=told)
    # Room appears after the first refusal, whenever that is.
    frees = threading.Thread(target=lambda: refused.wait(120) and narrow.kill())
    frees.start()

    made = patient.sandboxes.create(template="base")
    frees.join()

    assert [sandbox.id for sandbox in foreign.sandboxes.list()] == [made.id] and made.id != narrow.id
    assert events and all((event.status_code, event.path) == (429, "/sandboxes") and event.retry_after_seconds for event in events)
    assert made.exec("echo here").stdout == "here\n"
    made.kill()


def test_the_patience_of_a_client_ends_with_the_refusal(narrow, foreign):
    events = []
    patient = Client(api_key=KEY, max_create_retry_seconds=10, on_create_retry=events.append)

    with pytest.raises(BadRequestError, match="max sandboxes reached"):
        patient.sandboxes.create(template="base")

    assert events and [sandbox.id for sandbox in foreign.sandboxes.list()] == [narrow.id]
