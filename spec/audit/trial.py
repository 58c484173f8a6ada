"""The auditor on trial: over toy models, correct engines and mutants, how often and how soon it answers "different"."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from spec.audit.mutants import MUTANTS, build
from spec.audit.sample import Sample
from spec.audit.scoring import Scored, Scorer
from spec.audit.statistical import Settings, audit, requests
from spec.audit.toy import Markov, ToyEngine, toy_prompts
from spec.audit.verdict import Verdict
from spec.params import Params

PANEL = (
    Params(),
    Params(temperature=0.7),
    Params(temperature=1.2, top_k=5),
    Params(temperature=0.9, top_p=0.8),
    Params(temperature=0.8, repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.3),
    Params(min_p=0.1, logit_bias={1: 2.0, 2: -2.0}),
)
ENGINES: dict[str, type[ToyEngine]] = {"correct": ToyEngine, **{mutant.__name__: mutant for mutant in MUTANTS}}


def try_one(
    name: str, seed: int, *, tokens: int = 20_000, delta: float = 1e-3, epsilon: float = 1e-6, know_draft: bool = True
) -> Verdict:
    """One audit of a named toy engine; by default it goes on until the tokens are used up or it finds a fault."""
    models = Markov.pair(seed % 5)
    scorer = Scorer(models[0], models[1] if know_draft else None, seed)
    settings = Settings(tokens=tokens, delta=delta, epsilon=epsilon, seed=seed, first_round=2)
    return audit(build(ENGINES[name], seed, models), scorer, toy_prompts(seed=seed), settings, PANEL)


def try_all(
    names: Sequence[str] = tuple(ENGINES), *, seeds: int = 20, tokens: int = 20_000, delta: float = 1e-3
) -> dict[str, dict[str, Any]]:
    """For each engine: share detected, median tokens to detection, distance, and the fault named most often."""
    return {name: summary([try_one(name, seed, tokens=tokens, delta=delta) for seed in range(seeds)], name)
            for name in names}  # fmt: skip


def summary(verdicts: Sequence[Verdict], name: str, measure: bool = True) -> dict[str, Any]:
    """Of audits of one engine; its distance only if it is to be measured."""
    hits = [v for v in verdicts if v.verdict == "different"]
    faults = Counter(v.fault.name for v in hits if v.fault is not None).most_common(1)
    return {
        "distance": distance(name) if measure else None,
        "detected": len(hits) / len(verdicts),
        "median_tokens": median(v.tests["decided_at"] for v in hits) if hits else None,
        "named": faults[0][0] if faults else None,
    }


def distance(name: str, tokens: int = 60_000, seed: int = 1000) -> float:
    """A lower bound, up to its sampling error of about 0.3 %, of the mean total variation a token.

    In each group of tokens (setting, position in the block) the set of :mod:`spec.audit.scoring` on which the engine
    departs most is chosen by one half of the tokens, with its sign, and measured on the other half.
    """
    models = Markov.pair(seed % 5)
    engine, scorer = build(ENGINES[name], seed, models), Scorer(*models, seed)
    settings = Settings(tokens=tokens, seed=seed)
    halves: list[dict[Any, dict[str, list[float]]]] = [
        defaultdict(lambda: defaultdict(lambda: [0.0, 0.0])) for _ in "12"
    ]
    coming, seen, turn = requests(toy_prompts(seed=seed), PANEL, settings), 0, 0
    while seen < tokens:
        samples = engine.generate([next(coming) for _ in range(256)])
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
