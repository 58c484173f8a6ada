"""The auditor on trial: over toy models, correct engines and mutants, how often and how soon it answers "different"."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from spec.audit.distance import distance
from spec.audit.mutants import MUTANTS, build
from spec.audit.scoring import Scorer
from spec.audit.statistical import Settings, audit
from spec.audit.toy import BlockToyEngine, Markov, ToyEngine, toy_prompts
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
CORRECT: dict[str, type[ToyEngine]] = {"correct": ToyEngine, "correct block": BlockToyEngine}
ENGINES: dict[str, type[ToyEngine]] = {**CORRECT, **{mutant.__name__: mutant for mutant in MUTANTS}}


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
    return {
        name: {**summary([try_one(name, seed, tokens=tokens, delta=delta) for seed in range(seeds)]), **measured(name)}
        for name in names
    }


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Of audits of one engine. ``median_tokens`` counts a miss as infinitely many: None where half or more miss."""
    hits = [v for v in verdicts if v.verdict == "different"]
    faults = Counter(v.fault.name for v in hits if v.fault is not None).most_common(1)
    tokens = median(v.tests["decided_at"] if v.verdict == "different" else math.inf for v in verdicts)
    return {
        "detected": len(hits) / len(verdicts),
        "median_tokens": tokens if math.isfinite(tokens) else None,
        "named": faults[0][0] if faults else None,
    }


def measured(name: str) -> dict[str, Any]:
    """``distance`` of a named engine, and how it was measured (``distance_by``)."""
    found = distance(ENGINES[name], PANEL)
    return {"distance": found.value, "distance_by": found.how}


HEADER = f"{'engine':28} {'distance':>8} {'found':>6} {'tokens':>7}  named"


def line(name: str, row: Mapping[str, Any]) -> str:
    """One engine's row of the table, under ``HEADER``."""
    tokens = "-" if row["median_tokens"] is None else f"{row['median_tokens']:.0f}"
    far = f"{row['distance']:.2%}"
    return f"{name:28} {far:>8} {row['detected']:6.0%} {tokens:>7}  {row['named'] or '-'}"


def missed(table: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Engines about which the audit is wrong: mutants of 1 % or more not found every time, right ones that were."""
    return [
        name
        for name, row in table.items()
        if (row["detected"] > 0 if name in CORRECT else row["detected"] < 1 and row["distance"] >= 0.01)
    ]
