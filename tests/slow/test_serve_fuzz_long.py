"""Hundreds of made-up requests an operation: see tests/serve_fuzz.py."""

from __future__ import annotations

import pytest
from schemathesis import GenerationMode

from tests.conftest import make_model
from tests.serve_fuzz import FUZZED, LIMIT, fuzz
from tests.serve_process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ADMIN = {"Authorization": "Bearer root"}


@pytest.fixture(scope="module")
def server(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("fuzz")
    target = make_model(folder / "target", tokenizer)
    draft = make_model(folder / "draft", tokenizer, layers=1, seed=1)
    server = ServerProcess("--target", target, "--draft", draft, "--backend", "torch", "--admin-key", "root", *LIMIT)
    yield server
    assert server.stop() == 0


@pytest.mark.parametrize("mode", GenerationMode, ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", [o for o in FUZZED if o.startswith("POST") and not o.endswith("rollback")])
def test_no_request_of_many_breaks_the_server(operation: str, mode: GenerationMode, server) -> None:
    assert fuzz(server.url, operation, mode, 300, ADMIN).total() > 50
    server.settled("vllm:num_requests_running", 0)
    server.settled("vllm:kv_cache_usage_perc", 0)
