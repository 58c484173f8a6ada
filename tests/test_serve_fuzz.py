"""A tiny server under requests made up from its own OpenAPI description: no 5xx, no hang, only what is declared."""

from __future__ import annotations

import pytest
from schemathesis import GenerationMode

from tests.conftest import make_model
from tests.serve_fuzz import FUZZED, LIMIT, fuzz, operations
from tests.serve_process import ServerProcess

ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    target = make_model(tmp_path_factory.mktemp("fuzz") / "target", tokenizer, layers=1)
    server = ServerProcess(
        "--target", target, "--backend", "torch", "--admin-key", "root", "--audit-at-start", 0, *LIMIT
    )
    yield server
    assert server.stop() == 0


def test_every_operation_is_fuzzed(server) -> None:
    assert operations(server.url) == set(FUZZED)


@pytest.mark.parametrize("operation", FUZZED)
def test_no_request_breaks_the_server(operation: str, server) -> None:
    valid = fuzz(server.url, operation, GenerationMode.POSITIVE, 20 if operation.startswith("POST") else 5, ADMIN)
    assert valid[200] > 0 or operation in WITHOUT
    if operation.startswith("POST") and not operation.endswith("rollback"):
        assert fuzz(server.url, operation, GenerationMode.NEGATIVE, 10, ADMIN)[400] > 0
    server.settled("vllm:num_requests_running", 0)


# No made-up name is this model's, nothing made up is a draft, and without another one there is none to go back to.
WITHOUT = {"GET /v1/models/{name}", "POST /admin/draft", "POST /admin/draft/rollback"}
