"""Two engines and no scorer: a permutation test on the maximum mean discrepancy of their texts.

As in Model Equality Testing (Gao et al. 2410.20247): each prompt is answered by both, n times each, and labels are
permuted within prompts, so that the p-value is exact for every n under "both draw from one law". The kernel counts
equal tokens at equal positions (their Hamming kernel) and common pairs of successive tokens anywhere, so that a shift
by one position does not hide everything.

It can show a difference, never the absence of one: the answer is ``different`` or ``undecided``.
Shape legend: G prompts, n answers an engine and prompt, L longest text, R permutations.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from spec.audit.sample import EngineUnderAudit
from spec.audit.verdict import Verdict
from spec.params import Params
from spec.request import Request

Text = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """How much is asked."""

    answers: int = 16  # an engine and prompt
    max_tokens: int = 24
    permutations: int = 4999
    seed: int = 0


def audit_samples(
    first: EngineUnderAudit,
    second: EngineUnderAudit,
    prompts: Sequence[Sequence[int]],
    *,
    params: Params | None = None,
    delta: float = 1e-3,
    plan: Plan | None = None,
) -> Verdict:
    """Compares two engines under one setting. Raises ValueError where so few permutations cannot reach ``delta``."""
    plan, params = plan or Plan(), params or Params()
    if 1 / (plan.permutations + 1) > delta:
        raise ValueError(f"{plan.permutations} permutations cannot reach delta={delta}: {math.ceil(1 / delta)} do")
    texts = [
        _answers(engine, prompts, params, plan, seed=plan.seed + 10**6 * i) for i, engine in enumerate((first, second))
    ]
    kernels = [kernel([*a, *b]) for a, b in zip(*texts, strict=True)]
    statistic, p_value = permutation_test(kernels, plan.permutations, plan.seed)
    tokens = sum(len(text) for group in texts[0] for text in group)
    return Verdict(
        verdict="different" if p_value <= delta else "undecided",
        engine=first.name,
        mode="samples",
        delta=delta,
        tokens=tokens,
        tests={"mmd2": statistic, "p": p_value, "against": second.name, "prompts": len(prompts), "decided_at": tokens},
    )


def permutation_test(kernels: Sequence[np.ndarray], permutations: int, seed: int = 0) -> tuple[float, float]:
    """The mean over prompts of MMD^2, and its p-value. ``kernels``: G of [2n, 2n], the first n of one engine.

    For equal halves MMD^2 without the diagonal is, up to constants, s' K s with s = +1 for one engine, -1 for the
    other; labels are permuted within each prompt.
    """
    draw = np.random.default_rng(seed)
    observed, null = 0.0, np.zeros(permutations)
    for k in kernels:
        half = len(k) // 2
        off = k - np.diag(np.diag(k))
        signs = np.repeat([1.0, -1.0], half)
        observed += float(signs @ off @ signs) / half**2
        shuffled = draw.permuted(np.tile(signs, (permutations, 1)), axis=1)  # [R, 2n]
        null += ((shuffled @ off) * shuffled).sum(1) / half**2
    p_value = (1 + int((null >= observed - 1e-12).sum())) / (permutations + 1)
    return observed / max(len(kernels), 1), p_value


def kernel(texts: Sequence[Text]) -> np.ndarray:
    """[m, m] similarity of m texts: share of equal positions plus cosine of their counts of token pairs."""
    longest = max(max((len(t) for t in texts), default=1), 1)
    padded = np.full((len(texts), longest), -1, dtype=np.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    hamming = ((padded[:, None] == padded[None]) & (padded[:, None] >= 0)).sum(2) / longest
    counts = [Counter(pairwise(text)) for text in texts]
    columns = {pair: i for i, pair in enumerate(dict.fromkeys(pair for c in counts for pair in c))}
    spectrum = np.zeros((len(texts), max(len(columns), 1)))
    for of_text, profile in zip(counts, spectrum, strict=True):
        for pair, number in of_text.items():
            profile[columns[pair]] = number
    spectrum /= np.maximum(np.linalg.norm(spectrum, axis=1, keepdims=True), 1e-12)
    found: np.ndarray = hamming + spectrum @ spectrum.T
    return found


def _answers(
    engine: EngineUnderAudit, prompts: Sequence[Sequence[int]], params: Params, plan: Plan, seed: int
) -> list[list[Text]]:
    """[G][n] texts, every request with a seed of its own."""
    asked = [
        Request(tuple(prompt), replace(params, seed=seed + i * plan.answers + j + 1), plan.max_tokens)
        for i, prompt in enumerate(prompts)
        for j in range(plan.answers)
    ]
    texts = [sample.token_ids for sample in engine.generate(asked)]
    return [texts[start : start + plan.answers] for start in range(0, len(texts), plan.answers)]
