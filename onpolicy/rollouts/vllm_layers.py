"""What stands between vLLM's matrix products on a CPU, by one kernel each.

vLLM has kernels of its own for norms and gates, and on an x86 CPU calls plain torch instead: six to ten small
operations each, nine norms and four gates a step for a student of four layers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from onpolicy.layers.packed import rms_norm, silu_mul, supports


def quicken(model: torch.nn.Module) -> None:
    """Give the norms and gates of a vLLM model these kernels, where this CPU and the model's dtype allow them.

    The parity check of every step would notice a difference that matters.
    """
    if not supports(next(iter(model.parameters())).reshape(1, -1)):
        return
    for module in model.modules():
        kind = type(module).__name__
        if kind == "RMSNorm" and module.variance_size_override is None and module.has_weight:
            module._forward_method = partial(_norm, module)  # what vLLM's CustomOp calls
        elif kind == "SiluAndMul":
            module._forward_method = silu_mul  # type: ignore[assignment]


def _norm(module: Any, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return rms_norm(x, module.weight, module.variance_epsilon)
    return rms_norm(x, module.weight, module.variance_epsilon, residual), residual
