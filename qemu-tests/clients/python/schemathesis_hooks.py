"""What Schemathesis holds our answers against: no 500, no 502, and refusals for lack of means only in the contract's form."""

import os

import schemathesis


@schemathesis.hook
def map_path_parameters(context, path_parameters):
    # Half of the requests reach a real sandbox; random ids end at 404 and prove little.
    if path_parameters and "id" in path_parameters and len(str(path_parameters["id"])) % 2:
        path_parameters["id"] = os.environ["SCHEMATHESIS_SANDBOX"]
    return path_parameters


@schemathesis.hook
def map_query(context, query):
    # A stream that is followed has no end. What is neither yes nor no stays, and is refused.
    if query and str(query.get("follow")).strip("[]'").lower() in ("true", "1"):
        query["follow"] = "false"
    return query


@schemathesis.check
def refusals_have_their_form(ctx, response, case):
    status = response.status_code
    # Nothing listens on a port that was made up, and the contract has a word for that.
    nobody = "/proxy/" in case.path and status == 502 and response.json()["error"].startswith("upstream: ")
    assert nobody or status not in (500, 501, 502, 505), f"{status}: {response.text[:300]}"
    if status == 503:
        assert "retry-after" in response.headers, "503 without Retry-After"
    if status >= 400:
        body = response.json()
        if body.get("jsonrpc") == "2.0":
            assert isinstance(body["error"]["message"], str), f"{status} without a sentence"
            return
        assert isinstance(body.get("error"), str) and body["error"], f"{status} without a sentence"
