"""The auditor's statistics through the real pipeline: engine, scorer, evidence and certificate, hundreds of times."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from spec.audit.certificate import MAX_DIRECTIONS
from spec.audit.mutants import MUTANTS
from spec.audit.sample import Sample
from spec.audit.scoring import Scored, Scorer
from spec.audit.statistical import Settings, Watch, requests
from spec.audit.toy import BlockToyEngine, Markov, ToyEngine, choose, toy_prompts
from spec.audit.trial import PANEL, measured, try_one

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def batches(kind: type[ToyEngine], seed: int, count: int, size: int = 12) -> Iterator[tuple[list[Sample], Scored]]:
    """Samples and scores of one engine; 32 tokens a sample."""
    models = Markov.pair(seed % 5)
    engine, scorer = kind(*models, seed), Scorer(*models, seed)
    coming = requests(toy_prompts(seed=seed), PANEL, Settings(seed=seed))
    for _ in range(count):
        samples = engine.generate(list(islice(coming, size)))
        yield samples, scorer.score(samples)


@pytest.fixture(scope="module", params=[ToyEngine, BlockToyEngine])
def null(request: pytest.FixtureRequest) -> list[Watch]:
    """200 audits of a right engine, 768 tokens each, looked at after every sample."""
    watches = []
    for seed in range(200):
        watch = Watch(Settings())
        for samples, scored in batches(request.param, seed, 2):
            watch.update(samples, scored)
        watches.append(watch)
    return watches


def kolmogorov(values: np.ndarray) -> float:
    """sqrt(n) sup |F_n(x) - x|; above 1.95 with probability 0.001 for uniform values."""
    n, ordered = len(values), np.sort(values)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * float(max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


@pytest.mark.parametrize("score", ["pit", "pit along the draft", "pairs", "surprise"])
def test_scores_of_right_engines_are_standard_normal(score: str, null: list[Watch]) -> None:
    scores = [watch.diagnostics.standard_tests()[score] for watch in null]
    assert kolmogorov(np.array([NormalDist().cdf(x) for x in scores])) < 1.95


def test_false_alarms_at_any_look_are_at_most_the_level(null: list[Watch]) -> None:
    alarms = sum(watch.evidence.highest >= math.log(10) for watch in null)
    assert alarms <= len(null) * 0.1 + 2 * math.sqrt(len(null) * 0.09)


class Mixture(ToyEngine):
    """Every token from (1 - s) p + s q: its mean total variation is known at every look."""

    share = 0.15

    def block(self) -> list[list[int]]:
        p, q = self.p(0, [], "bonus"), self.q([])
        self.shift = self.share * np.maximum(q - p, 0).sum(1)
        return [[int(token)] for token in choose((1 - self.share) * p + self.share * q, self.gumbel())]

    def generate(self, asked: object) -> list:  # type: ignore[type-arg]
        self.shifts: list[np.ndarray] = []
        block = self.block

        def kept() -> list[list[int]]:
            tokens = block()
            self.shifts.append(self.shift)
            return tokens

        self.block = kept  # type: ignore[method-assign]
        try:
            return super().generate(asked)  # type: ignore[arg-type]
        finally:
            del self.block


def test_the_bound_covers_a_known_distance_at_every_look_and_half_its_radius_does_not() -> None:
    delta, audits, missed, control = 0.1, 150, 0, 0
    for seed in range(audits):
        models = Markov.pair(seed % 5)
        engine, scorer = Mixture(*models, seed), Scorer(*models, seed)
        coming, watch, total = (
            requests(toy_prompts(seed=seed), PANEL, Settings(seed=seed)),
            Watch(Settings(delta=delta)),
            0.0,
        )
        outside = beyond = False
        for _ in range(8):
            samples = engine.generate(list(islice(coming, 6)))
            watch.update(samples, scorer.score(samples))
            total += float(np.sum(engine.shifts))
            truth = total / watch.tokens
            outside |= truth > watch.epsilon
            liked = watch.certificate.directions["tokens the draft likes (q > p)"]
            beyond |= abs(liked.shift - truth) > liked.radius(delta / MAX_DIRECTIONS) / 2
        missed += outside
        control += beyond
    assert missed <= audits * delta
    assert control > audits * delta / MAX_DIRECTIONS + 2 * math.sqrt(audits * delta)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_mutant_of_a_percent_or_more_is_found_within_20_000_tokens(mutant: type[ToyEngine]) -> None:
    verdict = try_one(mutant.__name__, 1)
    assert verdict.verdict == "different" or measured(mutant.__name__)["distance"] < 0.01


def test_the_benchmark_runs(tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    command = [sys.executable, "-m", "benchmarks.audit", "--seeds", "1", "--correct", "2", "--tokens", "500"]
    subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=True)
    found = json.loads(out.read_text())
    assert len(found["mutants"]) == len(MUTANTS) and found["correct"]["audits by verification"] == {
        "correct": 1, "correct block": 1,
    }  # fmt: skip
    assert found["mutants"]["Swapped"]["exact"] > 0.01 and found["mutants"]["Leak"]["exact"] is None
