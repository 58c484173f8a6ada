"""Who may import whom (docs/decisions.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARED = (
    "sampling",
    "stats",
    "runtime",
    "threads",
    "compiled",
    "vllm_engine",
    "pages",
    "provenance",
    "drafters.vocabulary",
)


def imported(package: str) -> Iterator[tuple[str, str]]:
    """(file, module) of every import in it, whenever it happens."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                yield from ((str(path), f"{node.module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((str(path), alias.name) for alias in node.names)


def test_spec_stands_alone() -> None:
    of_others = [found for found in imported("spec") if found[1].split(".")[0] in ("onpolicy", "benchmarks", "tests")]
    assert not of_others and len(list(imported("spec"))) > 100


def test_onpolicy_imports_what_is_shared_alone() -> None:
    found = [(path, name) for path, name in imported("onpolicy") if name.split(".")[0] == "spec"]
    shared = tuple(f"spec.{name}." for name in SHARED)
    assert found and not [(path, name) for path, name in found if not f"{name}.".startswith(shared)]
    assert not [name for _, name in imported("onpolicy") if name.split(".")[0] in ("benchmarks", "tests")]
