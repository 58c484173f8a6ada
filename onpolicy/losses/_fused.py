"""The divergences' fast path on CPU: logits to value and gradient, row by row, in float32 kernels compiled by numba.

A row of both models' logits stays in the core's cache while it is read three times: maximum; exponentials (one an
element and model) with their sums; value and gradient. numba is imported and the kernels compiled (then cached on
disk) at the first use; without numba the torch path of :mod:`onpolicy.losses._scores` computes the same.
The definitions are those of :mod:`onpolicy.losses.divergences`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from onpolicy.losses._threads import in_threads

# name -> (code of the kernel, option that it takes)
_CODES: Mapping[str, tuple[int, str | None]] = {
    "forward_kl": (0, None),
    "reverse_kl": (1, None),
    "jsd": (2, "beta"),
    "total_variation": (3, None),
    "skew_forward_kl": (4, "skew"),
    "skew_reverse_kl": (5, "skew"),
    "lk_hybrid": (6, "eta"),
}


@lru_cache
def available() -> bool:
    """Whether numba can be imported."""
    return importlib.util.find_spec("numba") is not None


def supports(name: str, logits: Tensor) -> bool:
    """Whether :func:`run` computes this divergence on these logits [n, V]."""
    return name in _CODES and logits.device.type == "cpu" and logits.dtype == torch.float32 and available()


def run(
    name: str,
    options: Mapping[str, float],
    temperature: float,
    student: Tensor,  # [n, V] float32 logits; overwritten, with the gradient if scale is given
    teacher: Tensor,  # [n, V] float32 logits; overwritten
    token_ids: Tensor | None,  # [n]
    scale: Tensor | None,  # [n] factor of each row's gradient
    rounded: Tensor | None,  # [n, V] bf16, receives a copy of the gradient
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Value [n], entropy of the student [n], both models' log-probabilities at ``token_ids`` [n], ``rounded``."""
    from onpolicy.losses import _fused_kernels as kernels

    code, option = _CODES[name]
    parameter = options[option] if option else 0.0
    if option in ("beta", "skew") and parameter in (0.0, 1.0):  # the ends of JSD and of the skews are plain KL
        code = 1 if (code, parameter) in ((2, 1.0), (5, 0.0)) else 0
    rows = len(student)
    if rounded is not None and rounded.dtype != torch.bfloat16:
        rounded = None
    stats = torch.empty(4, rows)
    ids = torch.full((rows,), -1) if token_ids is None else token_ids.to(torch.int64).contiguous()
    factors = torch.zeros(rows) if scale is None else scale.to(torch.float32) / temperature
    bits = torch.empty(rows, 0, dtype=torch.int16) if rounded is None else rounded.view(torch.int16)
    arrays = [x.numpy() for x in (student, teacher, bits, ids, factors, stats)]

    def work(first: int, last: int) -> None:
        kernels.rows(code, parameter, 1 / temperature, scale is not None, first, last, *arrays)

    in_threads(rows, work)
    value, entropy, student_logprobs, teacher_logprobs = stats
    if token_ids is None:
        return value, entropy, None, None, rounded
    return value, entropy, student_logprobs, teacher_logprobs, rounded
