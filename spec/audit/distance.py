"""How far a toy engine really is from its target: total variation a token, estimated from below.

Two estimates, each unbiased for a lower bound; the larger counts. Shape legend: n copies, V vocabulary, G groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spec.audit.mutants import build
from spec.audit.sample import Sample
from spec.audit.scoring import Scored, Scorer
from spec.audit.statistical import Settings, requests
from spec.audit.toy import K, Markov, Text, ToyEngine, V, toy_prompts
from spec.params import Params

# What they do depends on what was drawn before the context: copies that start there do not show it
OF_HISTORY = frozenset({"FixedSeed", "SeedNotAdvanced", "StaleCache"})


@dataclass(frozen=True)
class Distance:
    """``how``: ``copies`` or ``sets``."""

    value: float
    how: str


def distance(
    engine: type[ToyEngine], panel: Sequence[Params], *, contexts: int = 32, copies: int = 1024, tokens: int = 20_000
) -> Distance:
    """Mean total variation a token between the engine's law and its target's, given the text so far, from below."""
    found = [Distance(by_sets(engine, panel, tokens), "sets")]
    if engine.__name__ not in OF_HISTORY:
        found.append(Distance(by_copies(engine, panel, contexts, copies), "copies"))
    return max(found, key=lambda one: one.value)


def by_copies(engine: type[ToyEngine], panel: Sequence[Params], contexts: int, copies: int, seed: int = 1000) -> float:
    """From visited contexts many copies go on for K + 1 tokens.

    In groups by position and the last two new tokens the set A on which the engine's tokens exceed p is chosen by one
    half of the copies and measured on the other, and the other way round. A right engine with the same noise serves as
    control variate: what it has too much is luck.
    """
    models = Markov.pair(seed % 5)
    broken, right = build(engine, seed, models), build(ToyEngine, seed, models)
    draw = np.random.default_rng(seed)
    coming = requests(toy_prompts(seed=seed), panel, Settings(seed=seed))
    visited = broken.generate([next(coming) for _ in range(contexts)])
    moved = 0.0
    for sample in visited:
        said = sample.token_ids[: int(draw.integers(len(sample.token_ids)))]
        broken.noise, right.noise = (np.random.default_rng(int(seed)) for seed in [draw.integers(2**62)] * 2)
        broken.begin([])
        new = [_continued(one, sample, said, copies) for one in (broken, right)]
        for at in range(K + 1):
            moved += _excess(new, at, right, sample, said)
    return moved / (len(visited) * (K + 1))


def _continued(engine: ToyEngine, sample: Sample, said: Text, copies: int) -> np.ndarray:
    """[n, K + 1] tokens after ``said``."""
    start = len(sample.prompt_ids) + len(said)
    prompts = [list(sample.prompt_ids)] * copies
    texts = [[*sample.prompt_ids, *said] for _ in range(copies)]
    engine.run(prompts, texts, [sample.params] * copies, [K + 1] * copies)
    return np.array([text[start : start + K + 1] for text in texts])


def _excess(new: Sequence[np.ndarray], at: int, right: ToyEngine, sample: Sample, said: Text) -> float:
    """Of position ``at``: mean mass that the first has on A beyond p, less what the second has."""
    sums = []  # of each half: [G, V] tokens beyond p
    for half in range(2):
        table = np.zeros((V * V, V))
        for tokens, sign in zip(new, (1.0, -1.0), strict=True):
            mine = tokens[half::2]
            prefixes, which = np.unique(mine[:, :at], axis=0, return_inverse=True)
            right.texts = [[*sample.prompt_ids, *said, *prefix] for prefix in prefixes.tolist()]
            right.prompts = [list(sample.prompt_ids)] * len(prefixes)
            p = right.law(right.target, [], [sample.params] * len(prefixes))
            beyond = np.eye(V)[mine[:, at]] - p[which.reshape(-1)]
            recent = mine[:, max(at - 2, 0) : at]
            np.add.at(table, recent @ V ** np.arange(recent.shape[1], dtype=np.int64), sign * beyond)
        sums.append(table)
    first, second = sums
    return float((second * (first > 0)).sum() + (first * (second > 0)).sum()) / len(new[0])


def by_sets(engine: type[ToyEngine], panel: Sequence[Params], tokens: int, seed: int = 1000) -> float:
    """In each group of tokens (setting, position in the block) the set of :mod:`spec.audit.scoring` on which the engine
    departs most is chosen by one half of the tokens, with its sign, and measured on the other.
    """
    models = Markov.pair(seed % 5)
    tested, scorer = build(engine, seed, models), Scorer(*models, seed)
    settings = Settings(tokens=tokens, seed=seed)
    halves: list[dict[Any, dict[str, list[float]]]] = [
        defaultdict(lambda: defaultdict(lambda: [0.0, 0.0])) for _ in "12"
    ]
    coming, seen, turn = requests(toy_prompts(seed=seed), panel, settings), 0, 0
    while seen < tokens:
        samples = tested.generate([next(coming) for _ in range(256)])
        scored = scorer.score(samples)
        seen, turn = seen + len(scored.sample), turn + 1
        _add(halves[turn % 2], scored, samples)
    moved = total = 0.0
    for group, measured in halves[1].items():
        known = halves[0].get(group, {})
        best = max(measured, key=lambda d: abs(known[d][0] / max(known[d][1], 1)) if d in known else 0.0)
        sign = np.sign(known[best][0]) if best in known else 0.0
        moved += sign * measured[best][0]
        total += measured[best][1]
    return float(moved / max(total, 1))


def _add(sums: dict[Any, dict[str, list[float]]], scored: Scored, samples: Sequence[Sample]) -> None:
    out = scored.impossible.astype(float)
    settings = np.array([repr(replace(samples[i].params, seed=0)) for i in scored.sample])
    for name, (hit, expected) in {**scored.directions, "outside": (out, np.zeros(len(out)))}.items():
        x = hit - expected
        for setting in np.unique(settings):
            for offset in np.unique(scored.offset):
                chosen = (settings == setting) & (scored.offset == offset)
                cell = sums[(setting, int(offset))][name]
                cell[0] += float(x[chosen].sum())
                cell[1] += float(chosen.sum())
