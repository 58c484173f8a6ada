"""Is an engine's output distributed as its target's? With a bound, and the number of tokens it took.

``python -m spec.audit --help`` for the command line; :func:`assert_lossless` in tests; docs/audit.md for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spec.audit.pytest_helper import assert_lossless
    from spec.audit.sample import EngineUnderAudit, Sample
    from spec.audit.statistical import Settings, audit
    from spec.audit.verdict import Fault, Verdict

__all__ = ["EngineUnderAudit", "Fault", "Sample", "Settings", "Verdict", "assert_lossless", "audit"]

_HOME = {
    "EngineUnderAudit": "sample", "Sample": "sample", "Settings": "statistical", "audit": "statistical",
    "Fault": "verdict", "Verdict": "verdict", "assert_lossless": "pytest_helper",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports torch only when something is used: the command line answers --help without it."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
