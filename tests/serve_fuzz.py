"""Requests that schemathesis makes up from the server's own description of its API, and what must hold."""

from __future__ import annotations

from collections import Counter

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance)
LIMIT = ("--request-timeout", 5)  # of the server under test: many long texts are slow, which is no fault
SECONDS = 60.0  # for an answer, on a busy machine
FUZZED = (
    "GET /v1/models", "GET /v1/models/{name}", "POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize",
    "POST /detokenize", "GET /health", "GET /health/live", "GET /health/ready", "GET /metrics", "GET /admin/draft",
    "POST /admin/draft", "POST /admin/draft/rollback",
)  # fmt: skip


def fuzz(url: str, operation: str, mode: GenerationMode, examples: int, headers: dict[str, str]) -> Counter[int]:
    """Sends made-up requests to an operation ("POST /tokenize"), the same ones every time; the statuses of the answers.

    ``mode``: whether they keep to the description. Raises what a check raises, or the client for an answer that
    does not come in time.
    """
    schema = schemathesis.openapi.from_url(url + "/openapi.json")
    method, path = operation.split(" ")
    statuses: Counter[int] = Counter()

    @seed(1)
    @settings(
        max_examples=examples, deadline=None, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(base_url=url, headers=headers, timeout=SECONDS, checks=list(CHECKS))
        statuses[answer.status_code] += 1

    run()
    return statuses


def operations(url: str) -> set[str]:
    """Everything in the description."""
    paths = httpx.get(url + "/openapi.json").json()["paths"]
    return {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
