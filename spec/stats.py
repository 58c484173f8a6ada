"""Acceptance figures, defined once. p is the target, q the draft, both processed by :mod:`spec.sampling`.

Formulas: Leviathan et al. 2211.17192 (acceptance, block efficiency, speed-up); block verification Sun et al.
2403.10444; cluster-robust variance as in Liang & Zeger (1986), on prompts, because tokens of one prompt are not
independent. Shape legend: V vocabulary, K draft length, S verification steps, n observations, G prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


def expected_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """sum_x min(p, q) = 1 - TV(p, q), [*, V] -> [*]: how often a token drawn from q is accepted."""
    import torch

    return torch.minimum(p, q).sum(-1)


def expected_acceptance_from_logprobs(p_log: Tensor, q_log: Tensor) -> Tensor:
    """The same from log-probabilities, [*, V] -> [*], in float32 (float64 for float64); -inf is probability 0."""
    import torch

    return torch.minimum(_wide(p_log), _wide(q_log)).exp().sum(-1)


def greedy_draft_acceptance(p: Tensor, q: Tensor) -> Tensor:
    """p(argmax q), [*, V] -> [*]: how often the draft's most probable token is accepted when the target samples.

    ``q`` may be probabilities, log-probabilities or logits; pass ``p`` as log-probabilities and exponentiate the
    result to stay in log space.
    """
    return p.gather(-1, q.argmax(-1, keepdim=True)).squeeze(-1)


def greedy_agreement(p: Tensor, q: Tensor) -> Tensor:
    """1.0 where argmax p = argmax q, [*, V] -> [*]: acceptance at temperature 0. The lowest id wins a tie."""
    return (p.argmax(-1) == q.argmax(-1)).float()


def survival(accept_probs: Tensor, mode: Literal["token", "block"]) -> Tensor:
    """P(tau >= i), i = 1..K, [*, K] -> [*, K], from what :func:`spec.verify.laws` gives for drawn drafts.

    Token-wise all of the first i have to pass, in a block any prefix of length i or more.
    """
    if mode == "token":
        return accept_probs.cumprod(-1)
    return 1 - (1 - accept_probs).flip(-1).cumprod(-1).flip(-1)


def expected_accepted(accept_probs: Tensor, mode: Literal["token", "block"]) -> Tensor:
    """E[tau], [*, K] -> [*], from the acceptance probabilities :func:`spec.verify.laws` gives for drawn drafts."""
    return survival(accept_probs, mode).sum(-1)


def equivalent_acceptance(accepted: float, drafted: Sequence[float] | np.ndarray) -> float:
    """The constant acceptance alpha of a token with which a step would accept as many: sum_i drafted_i alpha^i.

    Args:
        accepted: mean accepted tokens of a step.
        drafted: [K] share of the steps that drafted position i; all 1 where each drafts K tokens.

    NaN where nothing was drafted. By bisection; what is beyond the range of alpha in [0, 1] is taken as its end.
    """
    shares = np.asarray(drafted, dtype=np.float64)
    if not shares.sum() > 0:
        return math.nan
    powers = np.arange(1, len(shares) + 1)
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float(shares @ middle**powers) < accepted else (low, middle)
    return (low + high) / 2


def block_efficiency(alpha: float, length: int) -> float:
    """Expected tokens a target step, (1 - alpha^(length+1)) / (1 - alpha), for a constant acceptance rate.

    Summed term by term, so alpha = 1 gives length + 1 and length 0 gives 1. Raises ValueError outside the ranges.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"acceptance {alpha}: must be in [0, 1]")
    if length < 0:
        raise ValueError(f"draft length {length}: must be at least 0; use 0 for plain decoding")
    return math.fsum(alpha**i for i in range(length + 1))


def predicted_speedup(alpha: float, length: int, cost_ratio: float) -> float:
    """Block efficiency / (length c + 1), c = cost of a draft step / cost of a target step; 1 at length 0."""
    if not cost_ratio >= 0:
        raise ValueError(f"cost ratio {cost_ratio}: must be at least 0 (draft step time / target step time)")
    return block_efficiency(alpha, length) / (length * cost_ratio + 1)


def speedup_from_costs(tokens: float, seconds_draft: float, seconds_target: float, seconds_plain: float) -> float:
    """Speed-up from measured costs: ``tokens`` a step that drafts and verifies, against one a plain step.

    :func:`predicted_speedup` is the case in which verifying takes as long as a plain step and drafting K c of it.
    """
    return tokens * seconds_plain / (seconds_draft + seconds_target)


def best_draft_length(alpha: float, cost_ratio: float, longest: int = 16) -> int:
    """The length in 0..longest with the highest :func:`predicted_speedup`, the shortest of equals."""
    return max(range(longest + 1), key=lambda length: (predicted_speedup(alpha, length, cost_ratio), -length))


@dataclass(frozen=True)
class PositionAcceptance:
    """Acceptance by position 1..K in the draft; NaN where a position was never reached or drafted."""

    conditional: np.ndarray  # [K] share accepted of the steps in which every earlier position was accepted
    unconditional: np.ndarray  # [K] share accepted of all steps that drafted the position
    reached: np.ndarray  # [K] int64 denominators of conditional
    drafted: np.ndarray  # [K] int64 denominators of unconditional


def acceptance_by_position(
    accepted: Sequence[int] | np.ndarray, lengths: Sequence[int] | np.ndarray
) -> PositionAcceptance:
    """Counted acceptance by position from [S] accepted tokens and [S] draft lengths.

    Raises ValueError if a step accepted more than it drafted.
    """
    tau, drafted = np.asarray(accepted, dtype=np.int64), np.asarray(lengths, dtype=np.int64)
    if tau.shape != drafted.shape or (tau < 0).any() or (tau > drafted).any():
        raise ValueError("accepted and lengths must be of one shape with 0 <= accepted <= length: pass one pair a step")
    position = np.arange(1, int(drafted.max(initial=0)) + 1)[:, None]
    offered = position <= drafted
    passed = (position <= tau).sum(1)
    reached = (offered & (position <= tau + 1)).sum(1)
    return PositionAcceptance(_share(passed, reached), _share(passed, offered.sum(1)), reached, offered.sum(1))


def tokens_per_step(accepted: Sequence[int] | np.ndarray) -> float:
    """Mean tokens committed a target step: the accepted ones and the target's own. NaN without steps."""
    return float(np.mean(np.asarray(accepted) + 1)) if len(accepted) else math.nan


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence limits."""

    mean: float
    lo: float
    hi: float
    clusters: int  # G, what the interval's width rests on


def cluster_robust(
    values: Sequence[float] | np.ndarray, clusters: Sequence[int | str] | np.ndarray, confidence: float = 0.95
) -> Interval:
    """Closed form: mean of [n] values with a standard error clustered by [n] prompt labels.

    Variance G/(G-1) sum_g (sum of g's residuals)^2 / n^2, t quantile with G-1 degrees of freedom. The limits are
    infinite for one prompt: it says nothing about others.
    """
    sums, counts = _cluster_totals(values, clusters, confidence)
    groups, n = len(sums), counts.sum()
    mean = float(sums.sum() / n)
    if groups == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    error = math.sqrt(groups / (groups - 1) * ((sums - mean * counts) ** 2).sum()) / n
    width = _student_quantile(confidence, groups - 1) * error
    return Interval(mean, mean - width, mean + width, groups)


def cluster_bootstrap(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[int | str] | np.ndarray,
    confidence: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap that resamples whole prompts; for the mean of [n] values with [n] prompt labels.

    Stays within the values' range, which the closed form does not. The same seed gives the same interval.
    """
    sums, counts = _cluster_totals(values, clusters, confidence)
    if draws < 1:
        raise ValueError(f"draws={draws}: must be at least 1; 2000 is usual")
    groups = len(sums)
    picks = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    lo, hi = np.quantile((picks @ sums) / (picks @ counts), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(lo), float(hi), groups)


def ratio_of_rates(
    amounts: Sequence[float] | np.ndarray,
    seconds: Sequence[float] | np.ndarray,
    base_amounts: Sequence[float] | np.ndarray,
    base_seconds: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
) -> Interval:
    """(sum amounts / sum seconds) over the same of a base, from [G] totals of each prompt: a measured speed-up.

    The limits are the delta method's on the logarithm, prompts as clusters, t quantile with G - 1 degrees of freedom;
    0 and infinity for one prompt. Raises ValueError unless all four are positive in sum and of one length.
    """
    columns = [np.asarray(column, dtype=np.float64) for column in (amounts, seconds, base_amounts, base_seconds)]
    totals = [float(column.sum()) for column in columns]
    if any(column.shape != columns[0].shape or column.ndim != 1 for column in columns) or min(totals) <= 0:
        raise ValueError("a ratio of rates needs one positive amount and time a prompt for both sides")
    groups = len(columns[0])
    signs = (1, -1, -1, 1)
    ratio = math.exp(sum(sign * math.log(total) for sign, total in zip(signs, totals, strict=True)))
    if groups == 1:
        return Interval(ratio, 0.0, math.inf, 1)
    influence = sum(
        (sign * column / total for sign, column, total in zip(signs, columns, totals, strict=True)), np.zeros(groups)
    )
    error = math.sqrt(groups / (groups - 1) * float((influence**2).sum()))
    width = math.exp(_student_quantile(confidence, groups - 1) * error)
    return Interval(ratio, ratio / width, ratio * width, groups)


def _cluster_totals(values: object, clusters: object, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """[G] sums and [G] counts by prompt."""
    numbers, labels = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    if numbers.ndim != 1 or numbers.shape != labels.shape or not len(numbers):
        raise ValueError("values and clusters must be non-empty and of one length: pass each value's prompt label")
    if not np.isfinite(numbers).all():
        raise ValueError("values hold NaN or infinity: drop the steps in which nothing was drafted")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence {confidence}: must be in (0, 1), for example 0.95")
    _, group = np.unique(labels, return_inverse=True)
    return np.bincount(group, weights=numbers), np.bincount(group)


def _student_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = ``confidence`` (Abramowitz & Stegun 26.7.3-4, inverted by bisection on the angle)."""

    def central(angle: float) -> float:
        sine, square = math.sin(angle), math.cos(angle) ** 2
        term = math.cos(angle) if freedom % 2 else 1.0
        total = 0.0
        for i in range(1 + freedom % 2, freedom, 2):
            total += term
            term *= square * i / (i + 1)
        return sine * total if freedom % 2 == 0 else 2 / math.pi * (angle + sine * total)

    if freedom > 1000:
        return NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _wide(tensor: Tensor) -> Tensor:
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.float()
