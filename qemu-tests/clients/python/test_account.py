import pytest
from pandastack import Client
from pandastack.exceptions import AuthError, NotFoundError


def test_me(client):
    me = client.me()

    assert me["auth_method"] == "token" and me["user_id"] and me["orgs"] == []


def test_a_token_is_made_used_listed_and_revoked(client):
    made = client.tokens.create("suite", expires_in_days=2)
    assert made.token.startswith("pds_") and made.token.startswith(made.prefix) and len(made.token) == 36

    other = Client(api_key=made.token)
    assert other.me()["user_id"] == client.me()["user_id"]
    assert made.prefix in [token.prefix for token in client.tokens.list()]
    client.tokens.revoke(made.prefix)

    with pytest.raises(AuthError):
        other.me()
    with pytest.raises(NotFoundError):
        client.tokens.revoke(made.prefix)


def test_a_token_of_another_workspace_can_not_be_revoked(client, foreign):
    made = client.tokens.create("mine")

    with pytest.raises(NotFoundError):
        foreign.tokens.revoke(made.prefix)

    assert made.prefix in [token.prefix for token in client.tokens.list()]
    client.tokens.revoke(made.prefix)


def test_the_catalogue(client):
    listed = {template.name: template for template in client.templates.list()}

    assert {"base", "code-interpreter"} <= set(listed)
    assert client.templates.get("base").name == "base"
    with pytest.raises(NotFoundError):
        client.templates.get("nothing")
