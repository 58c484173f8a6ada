"""Top-k truncation with an exact tail bucket.

The vocabulary is partitioned into K single tokens and one bucket holding all others, and a divergence is taken
between the two distributions over these K + 1 outcomes. Because both are true distributions, the value is never
negative and no gradient drains mass from the support, the two faults of summing over the top k alone.

Bias: merging outcomes never raises an f-divergence (data processing inequality), so forward and reverse KL, JSD,
total variation, both skewed divergences and -log alpha are *under*estimated, by exactly the divergence of the two
conditional distributions inside the bucket, weighted with its mass. For a support nested in a larger one the bias
shrinks monotonically, and it is 0 for K = V. The two mixtures whose weights depend on the distributions
(``adaptive_kl``, ``lk_hybrid``) are not f-divergences: the sign of their bias is not fixed.
What the truncation cannot see: how the student distributes mass *among* tail tokens. Inside the bucket the gradient
only rescales the student's own tail, proportionally.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Support = Literal["teacher", "student"]


def support_ids(lp: Tensor, lq: Tensor, k: int, support: Support) -> Tensor:
    """The K likeliest tokens of student (``lp``) or teacher (``lq``), [..., V] -> [..., K]. ValueError if k < 1."""
    if support not in ("teacher", "student"):
        raise ValueError(f"support must be 'teacher' or 'student', got {support!r}")
    if k < 1:
        raise ValueError(f"top_k must be at least 1, got {k}; leave it out for the full vocabulary")
    ranked = lq if support == "teacher" else lp
    return ranked.detach().topk(min(k, ranked.shape[-1]), dim=-1).indices


def coarsen(lp: Tensor, lq: Tensor, k: int, support: Support = "teacher") -> tuple[Tensor, Tensor]:
    """Log-probabilities [..., V] of both models -> [..., K + 1] over the support's tokens and the tail bucket.

    The bucket is summed over the tail itself (log-sum-exp), not taken as 1 - sum of the others, which loses all
    digits for a confident model. With K >= V there is no tail and the result is a permutation of the input.
    """
    ids = support_ids(lp, lq, k, support)
    return _bucketed(lp, ids), _bucketed(lq, ids)


def _bucketed(logs: Tensor, ids: Tensor) -> Tensor:
    inside = logs.gather(-1, ids)
    if ids.shape[-1] == logs.shape[-1]:
        return inside
    outside = logs.scatter(-1, ids, -torch.inf)
    # Where the whole tail is impossible, log-sum-exp's gradient is NaN: sum zeros there and put -inf back afterwards.
    empty = torch.isneginf(outside).all(-1, keepdim=True)
    tail = outside.masked_fill(empty, 0).logsumexp(-1, keepdim=True)
    return torch.cat([inside, tail.masked_fill(empty, -torch.inf)], dim=-1)
