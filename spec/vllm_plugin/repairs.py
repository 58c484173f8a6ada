"""What is wrong with speculative decoding in vLLM on a CPU, and the cure.

The faults touch stochastic requests only; greedy output is right without the repairs. The first two are in
``vllm/utils/cpu_triton_utils.py``, the third shows in ``vllm/v1/sample/rejection_sampler.py``.

1. ``_expand_kernel_impl`` spreads per-request temperature, top-k and top-p over the drafted tokens. It passes a
   *copy* of its output to the C++ kernel whenever the type is not int64, so that the caller reads uninitialised
   memory (vllm#55005, vllm#42638).
2. ``_rejection_random_sample_kernel_impl`` does not know that -1 pads the drafts of a request and must be rejected,
   as the Triton kernel knows. It takes the probability of token -1 from the element before the row, and may accept.
   vLLM pads drafts that a grammar forbids, and those of requests it admits with their prompt in the prefix cache.
3. ``apply_sampling_constraints`` raises, and the engine dies, in a step without any drafted token (all requests in
   prefill, or n-gram lookup without a match) when some request sets top-k and none top-p.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Kernel = Callable[..., None]

FAULTY_VERSIONS = frozenset({"0.32.0"})  # repaired unasked: uninitialised memory may look right in a test


def repair(sampler: ModuleType) -> None:
    """Replace what is faulty, the kernels both for later registration and where ``sampler`` launches them already.

    ``sampler`` is ``vllm.v1.sample.rejection_sampler``. Does nothing the second time. Raises ImportError or
    AttributeError in versions of vLLM that have no such functions.
    """
    from vllm.utils import cpu_triton_utils

    module: Any = sampler
    if not hasattr(module.apply_sampling_constraints, "mended"):
        module.apply_sampling_constraints = without_drafts_unchanged(module.apply_sampling_constraints)
    for launched, (name, mend) in _REPAIRS.items():
        faulty = getattr(cpu_triton_utils, name)
        if hasattr(faulty, "mended"):
            continue
        mended: Any = mend(faulty)
        mended.mended = True
        setattr(cpu_triton_utils, name, mended)
        override = getattr(module, launched)
        if getattr(override, "_impl", None) is faulty:
            override._impl = mended


def expand(
    output: Tensor,
    input_val: Tensor,
    cu_num_tokens: Tensor,
    replace_from: float,
    replace_to: float,
    MAX_NUM_TOKENS: int | None = None,
) -> None:
    """``output`` [N] = ``input_val`` [B], each repeated for the tokens of its request; ``cu_num_tokens`` [B] sums them.

    ``replace_from`` becomes ``replace_to``. Signature of ``_expand_kernel_impl``; any type.
    """
    values = torch.where(input_val == replace_from, replace_to, input_val)
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    output.copy_(values.repeat_interleave(counts, output_size=output.numel()))


def padding_rejected(kernel: Kernel) -> Kernel:
    """``_rejection_random_sample_kernel_impl`` that never accepts token -1."""

    @functools.wraps(kernel)
    def mended(
        output_token_ids: Tensor,
        cu_num_draft_tokens: Tensor,
        draft_token_ids: Tensor,
        draft_probs: Tensor | None,
        target_probs: Tensor,
        bonus_token_ids: Tensor,
        recovered_token_ids: Tensor,
        uniform_probs: Tensor,
        *rest: Any,
        **options: Any,
    ) -> None:
        # p / q >= u holds for no p and q > 0 when u is infinite
        uniforms = uniform_probs.masked_fill(draft_token_ids < 0, float("inf"))
        drafts = draft_token_ids.clamp(min=0)
        kernel(
            output_token_ids, cu_num_draft_tokens, drafts, draft_probs, target_probs, bonus_token_ids,
            recovered_token_ids, uniforms, *rest, **options,
        )  # fmt: skip

    return mended


def without_drafts_unchanged(constrain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``apply_sampling_constraints`` that returns ``logits`` [0, V] as they are."""

    @functools.wraps(constrain)
    def mended(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        return constrain(logits, *args, **options) if logits.shape[0] else logits

    mended.mended = True  # type: ignore[attr-defined]
    return mended


# What the rejection sampler launches -> the function behind it on a CPU, and its cure
_REPAIRS: dict[str, tuple[str, Callable[[Kernel], Kernel]]] = {
    "expand_kernel": ("_expand_kernel_impl", lambda _: functools.partial(expand)),
    "rejection_random_sample_kernel": ("_rejection_random_sample_kernel_impl", padding_rejected),
}
