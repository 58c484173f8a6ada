"""The numerical floor: how far the target is from itself when it is computed another way.

Two computations of the same weights differ by rounding, which a certificate of exactness cannot go below: an engine
is never nearer to the target than the target is. Rounding shifts mass in directions that change from prefix to prefix,
so that means over prefixes (what the audit bounds) are much smaller than the mean total variation reported here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spec.audit.conditionals import Conditionals, regrouped
from spec.audit.sample import Sample
from spec.params import row_options
from spec.sampling import processed_probs


def floor(target: Conditionals, samples: Sequence[Sample], other: Conditionals | None = None) -> dict[str, float]:
    """The target against itself in pieces of 7 tokens, and against ``other`` (another dtype) where given.

    For each: mean and largest total variation of the processed laws, the largest difference of logits (of tokens
    within 20 nats of the best), and the mean mass outside the other's support.
    """
    found = {f"shape {k}": v for k, v in _between(target, 256, target, 7, samples).items()}
    if other is not None:
        found |= {f"dtype {k}": v for k, v in _between(target, 256, other, 256, samples).items()}
    return found


def _between(a: Conditionals, most_a: int, b: Conditionals, most_b: int, samples: Sequence[Sample]) -> dict[str, float]:
    distances, outside, widest = [], [], 0.0
    for sample in samples:
        if not sample.token_ids:
            continue
        whole = [len(sample.token_ids)]
        first, second = (next(regrouped(c.rows([sample], most), iter(whole))) for c, most in ((a, most_a), (b, most_b)))
        n = len(first)
        outputs = [sample.token_ids[:i] for i in range(n)]
        options = row_options([sample.params] * n, first.shape[-1], [sample.prompt_ids] * n, outputs, first.device)
        second = second.to(first)
        likely = first > first.amax(-1, keepdim=True) - 20
        widest = max(widest, float(torch.where(likely, (first - second).abs(), 0.0).max()))
        p, r = (processed_probs(x.clone(), **options) for x in (first, second))
        distances.append((p - r).abs().sum(-1).double() / 2)
        outside.append(torch.where(p > 0, 0.0, r).sum(-1).double())
    if not distances:
        return {}
    tv = torch.cat(distances)
    return {
        "mean TV": float(tv.mean()),
        "largest TV": float(tv.max()),
        "largest logit difference": widest,
        "mass outside the support": float(torch.cat(outside).mean()),
    }
