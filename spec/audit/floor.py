"""The numerical floor: how far the target is from itself when it is computed another way.

Two computations of the same weights differ by rounding, which a certificate of exactness cannot go below: an engine
is never nearer to the target than the target is. Rounding shifts mass in directions that change from prefix to prefix,
so that means over prefixes (what the audit bounds) are much smaller than the mean total variation reported here.

Shape legend: n tokens of a sample, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spec.audit.conditionals import Conditionals, regrouped
from spec.audit.diagnostics import setting
from spec.audit.sample import Sample
from spec.params import Params, row_options
from spec.sampling import processed_probs

_LIKELY = 20.0  # nats below the best: the logits of other tokens do not matter
_MARGIN = 4.0  # a sampled maximum against the true one, and a tie is between two logits
_OUTSIDE = "mass outside the support"


@dataclass(frozen=True)
class Floor:
    """``figures`` for reports; the rest is what verdicts lean on."""

    figures: dict[str, float]
    logit_gap: float  # largest difference of a logit between two computations in the engine's dtype
    largest_logit: float
    outside: float  # mean mass outside the support, a token, of the setting with the most

    def tie(self, dtype: torch.dtype) -> float:
        """Nats between two logits within which rounding decides which is larger; never below one unit in the last
        place of the largest logit, for engines that round their logits to ``dtype``.
        """
        ulp = torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(self.largest_logit, 1.0)))
        return max(_MARGIN * self.logit_gap, ulp)

    def tolerance(self, least: float) -> float:
        """For :class:`spec.audit.statistical.Settings`."""
        return min(max(least, _MARGIN * self.outside), 0.5)


def floor(
    target: Conditionals,
    samples: Sequence[Sample],
    others: Mapping[str, Callable[[], Conditionals]] | None = None,
    panel: Sequence[Params] | None = None,
) -> Floor:
    """The target against itself in pieces of 7 tokens (``shape``), and against the ``others``, opened one at a time.

    Of others, ``kernels`` is another program in the same dtype; ``dtype`` is not counted among what an engine in the
    target's own dtype may differ by. Every text is processed under every setting of ``panel`` (None: its own): for
    each computation mean and largest total variation and the largest difference of logits (of tokens within 20 nats of
    the best); for each setting the largest mean mass, a token, outside the target's support.
    """
    figures: dict[str, float] = {}
    outside: dict[str, float] = {}
    gap = largest = 0.0
    computations: dict[str, Callable[[], Conditionals]] = {"shape": lambda: target, **(others or {})}
    for kind, opened in computations.items():
        found = _Compared()
        other = opened()
        for sample in samples:
            if sample.token_ids:
                found.add(_all(target, sample, 256), _all(other, sample, 7 if kind == "shape" else 256), sample, panel)
        if not found.distances:
            continue
        tv = torch.cat(found.distances)
        figures |= {f"{kind} mean TV": float(tv.mean()), f"{kind} largest TV": float(tv.max())}
        figures[f"{kind} largest logit difference"] = found.widest
        largest = max(largest, found.largest)
        if kind != "dtype":
            gap = max(gap, found.widest)
        for name, masses in found.outside.items():
            outside[name] = max(outside.get(name, 0.0), float(torch.cat(masses).mean()))
    figures |= {f"{_OUTSIDE}, {name}": mass for name, mass in outside.items()}
    return Floor(figures, gap, largest, max(outside.values(), default=0.0))


class _Compared:
    """Two computations of the same rows."""

    def __init__(self) -> None:
        self.distances: list[Tensor] = []
        self.outside: dict[str, list[Tensor]] = defaultdict(list)
        self.widest = self.largest = 0.0

    def add(self, first: Tensor, second: Tensor, sample: Sample, panel: Sequence[Params] | None) -> None:
        """[n, V] logits of both."""
        second = second.to(first)
        likely = first > first.amax(-1, keepdim=True) - _LIKELY
        self.widest = max(self.widest, float(torch.where(likely, (first - second).abs(), 0.0).max()))
        self.largest = max(self.largest, float(torch.where(likely, first.abs(), 0.0).max()))
        for params in panel or [sample.params]:
            p, r = _laws(first, sample, params), _laws(second, sample, params)
            self.distances.append((p - r).abs().sum(-1).double() / 2)
            self.outside[setting(replace(params, seed=0))].append(torch.where(p > 0, 0.0, r).sum(-1).double())


def _laws(logits: Tensor, sample: Sample, params: Params) -> Tensor:
    n = len(logits)
    outputs = [sample.token_ids[:i] for i in range(n)]
    options = row_options([params] * n, logits.shape[-1], [sample.prompt_ids] * n, outputs, logits.device)
    return processed_probs(logits.clone(), **options)


def _all(source: Conditionals, sample: Sample, most: int) -> Tensor:
    """[n, V]"""
    return next(regrouped(source.rows([sample], most), iter([len(sample.token_ids)])))
