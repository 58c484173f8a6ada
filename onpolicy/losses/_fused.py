"""The divergences' fast path: logits to value and gradient, row by row, in kernels that read a row three times.

On a CPU they are compiled by numba (:mod:`onpolicy.losses._fused_kernels`): a row of both models' logits stays in the
core's cache while it is read. On a GPU they are Triton's (:mod:`onpolicy.losses._fused_triton`), and are compared with
the torch path of :mod:`onpolicy.losses._scores` once before they are trusted. Either is imported and compiled (then
cached on disk) at the first use; where it is missing, torch computes the same.
The definitions are those of :mod:`onpolicy.losses.divergences`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from onpolicy.losses import _scores
from onpolicy.losses.divergences import log_probs

Compute = Callable[..., None]  # as onpolicy.losses._fused_triton.rows

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


def supports(name: str, logits: Tensor) -> bool:
    """Whether :func:`run` computes this divergence on these logits [n, V]."""
    if name not in _CODES or logits.dtype != torch.float32:
        return False
    return _has_numba() if logits.device.type == "cpu" else logits.is_cuda and _triton_agrees(name, logits.device)


@lru_cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


@lru_cache
def _triton_agrees(name: str, device: torch.device) -> bool:
    """Whether Triton is there and its kernel gives what torch gives; says so where it does not."""
    if importlib.util.find_spec("triton") is None:
        return False
    why = f"the loss {name} takes torch's slower path on {device}: its Triton kernel"
    try:
        agrees = agree(name, device)
    except Exception as error:  # compilers fail in many ways, and none of them may end a run that torch can do
        warnings.warn(f"{why} failed ({type(error).__name__}: {error})", stacklevel=2)
        return False
    if not agrees:
        warnings.warn(f"{why} differs; please report this, with the versions of torch and triton", stacklevel=2)
    return agrees


def agree(name: str, device: torch.device, compute: Compute | None = None) -> bool:
    """Whether the kernel (of this device, or ``compute``) and torch agree, on rows with masked entries and odd ends."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(3, 5001, generator=generator) for _ in range(2))
    student[1, 7:900] = teacher[1, 7:900] = -torch.inf
    student, teacher = student.to(device), teacher.to(device)
    ids, scale = torch.tensor([0, 3, 5000], device=device), torch.tensor([0.5, 2.0, 1.0], device=device)
    option = _CODES[name][1]
    options = {option: 0.3} if option else {}
    lp, lq = (log_probs(logits, 0.8) for logits in (student, teacher))
    value, grad = _scores.value_and_grad(
        name, student, lp, lq, temperature=0.8, token_ids=ids, top_k=None, support="teacher", options=options
    )
    entropy = -torch.where(torch.isneginf(lp), 0, lp.exp() * lp).sum(-1)
    expected = (value, entropy, *(logs.gather(1, ids[:, None])[:, 0] for logs in (lp, lq)))
    rounded = torch.empty_like(student, dtype=torch.bfloat16)
    found = run(name, options, 0.8, student, teacher, ids, scale, rounded, compute)[:4]
    grad *= scale[:, None]
    return (
        all(a is not None and torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(found, expected, strict=True))
        and torch.allclose(student, grad, rtol=1e-3, atol=1e-6)
        and torch.allclose(rounded.float(), student, rtol=2**-7, atol=1e-30)  # an interpreter cuts off
    )


def run(
    name: str,
    options: Mapping[str, float],
    temperature: float,
    student: Tensor,  # [n, V] float32 logits; overwritten, with the gradient if scale is given
    teacher: Tensor,  # [n, V] float32 logits; overwritten
    token_ids: Tensor | None,  # [n]
    scale: Tensor | None,  # [n] factor of each row's gradient
    rounded: Tensor | None,  # [n, V] bf16, receives a copy of the gradient
    compute: Compute | None = None,  # in place of the kernels of this device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Value [n], entropy of the student [n], both models' log-probabilities at ``token_ids`` [n], ``rounded``."""
    code, option = _CODES[name]
    parameter = options[option] if option else 0.0
    if option in ("beta", "skew") and parameter in (0.0, 1.0):  # the ends of JSD and of the skews are plain KL
        code = 1 if (code, parameter) in ((2, 1.0), (5, 0.0)) else 0
    compute = compute or (numba_rows if student.device.type == "cpu" else triton_rows)
    if rounded is not None and rounded.dtype != torch.bfloat16:
        rounded = None
    rows, device = len(student), student.device
    stats = torch.empty(4, rows, device=device)
    ids = torch.full((rows,), -1, device=device) if token_ids is None else token_ids.to(torch.int64).contiguous()
    factors = torch.zeros(rows, device=device) if scale is None else scale.to(torch.float32) / temperature
    compute(code, parameter, 1 / temperature, scale is not None, student, teacher, rounded, ids, factors, stats)
    value, entropy, student_logprobs, teacher_logprobs = stats
    if token_ids is None:
        return value, entropy, None, None, rounded
    return value, entropy, student_logprobs, teacher_logprobs, rounded


def compares(logits: Tensor) -> bool:
    """Whether :func:`compare` works on these logits."""
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and _has_numba()


def compare(student: Tensor, teacher: Tensor, ids: Tensor, agreement_only: bool) -> Tensor:
    """[n, V] float32 logits (overwritten) and ids [n] -> [6, n] float64 or [1, n].

    Agreement, reverse and forward KL, acceptance, log-probabilities of the ids under student and teacher.
    """
    from onpolicy.losses import _fused_kernels as kernels

    out = torch.empty(1 if agreement_only else 6, len(student), dtype=torch.float64)
    arrays = [x.numpy() for x in (student, teacher, ids, out)]
    kernels.comparisons(torch.get_num_threads(), agreement_only, *arrays)
    return out


def numba_rows(
    code: int, parameter: float, inverse: float, grad: bool, student: Tensor, teacher: Tensor, rounded: Tensor | None,
    ids: Tensor, factors: Tensor, stats: Tensor,
) -> None:  # fmt: skip
    """See :func:`onpolicy.losses._fused_triton.rows`."""
    from onpolicy.losses import _fused_kernels as kernels

    bits = torch.empty(len(student), 0, dtype=torch.int16) if rounded is None else rounded.view(torch.int16)
    arrays = [x.numpy() for x in (student, teacher, bits, ids, factors, stats)]
    kernels.rows(torch.get_num_threads(), code, parameter, inverse, grad, *arrays)


def triton_rows(*arguments: Any) -> None:
    """The same on a GPU."""
    from onpolicy.losses import _fused_triton as kernels

    kernels.rows(*arguments)
