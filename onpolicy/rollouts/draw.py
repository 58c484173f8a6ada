"""Drawing a token from a distribution, given a seed and a position: the same draw whatever else is in the batch.

Both samplers draw through this module, so that one seed means one completion in either, up to the rounding of the
logits. The random number of a token depends on (seed, position) alone: not on the batch, on a generator's history,
or on how often a request was scheduled.

Shape legend: B rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from onpolicy.types import SamplingParams
from spec.sampling import GREEDY_BELOW, NonFiniteLogits, processed_logprobs, processed_probs

_BLOCK = 128  # near the square root of a usual V, so that both levels of the search cost the same


def draw_tokens(logits: torch.Tensor, uniform: np.ndarray, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row and its log-prob: [B, V] -> [B] int64, [B] float32 nats.

    The log-prob is of the processed distribution (``spec.sampling``: temperature, top-k, top-p, renormalised); at
    temperature 0, where that is a single point, of the model's own distribution.

    Args:
        logits: [B, V], any float dtype.
        uniform: [B] float64 in [0, 1), as of :func:`uniforms`; unused at temperature 0.

    Raises spec.sampling.NonFiniteLogits for NaN, +inf, or a row of -inf alone.
    """
    if params.temperature < GREEDY_BELOW:
        logprobs = processed_logprobs(logits)
        tokens = logprobs.argmax(-1)
        return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)
    if params.top_k == 0 and params.top_p == 1 and logits.device.type == "cpu" and logits.dtype != torch.float64:
        return _draw_from_all(logits, uniform, params.temperature)
    probs = processed_probs(logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p)
    tokens = invert_cdf(probs, torch.from_numpy(uniform).to(probs.device))
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


def _draw_from_all(logits: torch.Tensor, uniform: np.ndarray, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`draw_tokens`, nothing truncated, in one compiled pass over a row that stays in the core's cache."""
    from onpolicy.rollouts import draw_kernels as kernels

    scores = logits.detach().float().contiguous()
    tokens, logprobs = torch.empty(len(scores), dtype=torch.int64), torch.empty(len(scores))
    inverse = np.float32(1 / temperature)
    kernels.draw(torch.get_num_threads(), scores.numpy(), inverse, uniform, tokens.numpy(), logprobs.numpy())
    if bool((tokens < 0).any()):
        raise NonFiniteLogits("model", (tokens < 0).nonzero().flatten().tolist())
    return tokens, logprobs


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Independent uniforms [B] float64 in [0, 1), one for each (seed, position): SplitMix64 (Steele et al. 2014).

    Args:
        seeds: [B] uint64, one a completion; hashed with the position, so that neighbouring seeds share nothing.
        positions: [B] which completion token is drawn, from 0.
    """
    state = _mix(seeds.astype(np.uint64)) + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(state) >> np.uint64(11)) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def invert_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Tokens [B] int64: the smallest v with uniform < cdf(v), by a search over blocks and then within one.

    One pass over the vocabulary instead of the V random numbers a row that Gumbel or exponential noise needs.
    A token of probability 0 is never returned.

    Args:
        probs: [B, V] float32, non-negative, each row of positive sum; need not be normalised.
        uniform: [B] float64 in [0, 1).
    """
    size = probs.shape[1]
    whole = size // _BLOCK * _BLOCK
    sums = probs[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < size:
        sums = torch.cat([sums, probs[:, whole:].sum(-1, keepdim=True)], dim=1)
    block, rest = _search(sums, uniform)
    # The last block may be short: its columns are clamped to real ones, of weight 0.
    columns = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=probs.device)
    inside = probs.gather(1, columns.clamp(max=size - 1)).masked_fill(columns >= size, 0.0)
    token, _ = _search(inside, rest)
    return block * _BLOCK + token


def _search(weights: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The index [B] whose share of the row's weight holds ``uniform``, and where in that share [0, 1) it falls."""
    upper = weights.double().cumsum(1)
    total = upper[:, -1:]
    # Rounding must not carry the target to the total: no index would be left.
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(upper, target, right=True)
    width = weights.gather(1, index).double()
    lower = upper.gather(1, index) - width
    rest = ((target - lower) / width).clamp(0.0, 1.0 - 2.0**-53)
    return index.squeeze(1), rest.squeeze(1)
