"""The auditor on trial: ``python -m benchmarks.audit [--json OUT]``.

For each broken engine of :mod:`spec.audit.mutants`: is it found, after how many tokens (median of the seeds that found
it), and would the tests the field uses have found it? And how often is a correct engine called different?

- chi-square: first tokens of one prompt at temperature 1, 4,096 draws, at the same level;
- TV: the same draws, empirical total variation above 5 %;
- greedy: is every token at temperature 0 the argmax?
- samples: :mod:`spec.audit.samples_only`, against the plain toy engine, 12 prompts of 16 answers each.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish
from spec import sampling
from spec.audit.diagnostics import wilson_hilferty
from spec.audit.greedy import argmax_gaps
from spec.audit.mutants import build
from spec.audit.sample import Sample
from spec.audit.samples_only import Plan, audit_samples
from spec.audit.toy import Markov, toy_prompts
from spec.audit.trial import ENGINES, PANEL, summary, try_one
from spec.params import Params
from spec.request import Request

DRAWS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="audits of each mutant (default 20)")
    parser.add_argument("--correct", type=int, default=200, help="audits of correct engines (default 200)")
    parser.add_argument("--tokens", type=int, default=20_000, help="of one audit (default 20000)")
    parser.add_argument("--delta", type=float, default=1e-3, help="level (default 0.001)")
    parser.add_argument("--loose", type=float, default=0.05, help="level at which false alarms are counted as well")
    parser.add_argument("--json", help="write the result with its provenance")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sampling._CACHED = 4096  # rows a piece: of 16 symbols, so many fit the cache
    table = {}
    print(
        f"{'engine':28} {'distance':>8} {'found':>6} {'tokens':>7} {'no draft':>8}  {'chi2 TV greedy samples':24} named"
    )
    for name in ENGINES:
        if name != "correct":
            table[name] = row(name, options)
            print(line(name, table[name]), flush=True)
    result = {"level": options.delta, "tokens": options.tokens, "mutants": table, "correct": correct(options)}
    print(result["correct"])
    finish(result, options.json)


def row(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All detectors on one mutant; shares of seeds."""
    with_draft = [try_one(name, s, tokens=options.tokens, delta=options.delta) for s in range(options.seeds)]
    few = max(options.seeds // 4, 1)
    without = [try_one(name, s, tokens=options.tokens, delta=options.delta, know_draft=False) for s in range(few)]
    blind = summary(without, name, measure=False)
    peers: dict[str, Callable[[str, int], bool]] = {
        "chi2": lambda n, s: first_tokens(n, s)[0] > NormalDist().inv_cdf(1 - options.delta),
        "tv": lambda n, s: first_tokens(n, s)[1] > 0.05,
        "greedy": greedy_differs,
        "samples": lambda n, s: samples_differ(n, s, options.delta),
    }
    found = {peer: sum(detects(name, s) for s in range(few)) / few for peer, detects in peers.items()}
    return {**summary(with_draft, name), "without_draft": {k: blind[k] for k in ("detected", "median_tokens")}, **found}


def line(name: str, r: dict[str, Any]) -> str:
    tokens, blind = r["median_tokens"], r["without_draft"]["detected"]
    peers = " ".join(f"{r[peer]:5.0%}" for peer in ("chi2", "tv", "greedy", "samples"))
    shown = "-" if tokens is None else f"{tokens:.0f}"
    return f"{name:28} {r['distance']:8.2%} {r['detected']:6.0%} {shown:>7} {blind:8.0%}  {peers:24} {r['named']}"


def correct(options: argparse.Namespace) -> dict[str, Any]:
    """False alarms at the level, and at a looser one at which a wrong level would show in so many audits."""
    strict, loose, bounds = 0, 0, []
    for seed in range(options.correct):
        verdict = try_one("correct", 10_000 + seed, tokens=options.tokens, delta=options.delta)
        strict += verdict.verdict == "different"
        loose += verdict.tests["log10_e"] >= -np.log10(options.loose)
        bounds.append(verdict.epsilon)
    return {
        "audits": options.correct,
        f"different at {options.delta:g}": strict,
        f"different at {options.loose:g}": loose,
        "allowed at the looser level, with two standard errors": options.loose * options.correct
        + 2 * sqrt(options.loose * (1 - options.loose) * options.correct),
        "median bound": float(np.median(finite)) if (finite := [x for x in bounds if x is not None]) else None,
    }


def first_tokens(name: str, seed: int) -> tuple[float, float]:
    """Chi-square score and empirical total variation of first tokens at temperature 1."""
    models = Markov.pair(seed % 5)
    prompt = tuple(toy_prompts(seed=seed)[0])
    engine = build(ENGINES[name], seed, models)
    samples = engine.generate([Request(prompt, Params(seed=i), 1) for i in range(DRAWS)])
    p = torch.from_numpy(models[0].table[prompt[-2], prompt[-1]]).softmax(-1).numpy()
    counts = np.bincount([s.token_ids[0] for s in samples], minlength=len(p))
    score = wilson_hilferty(float(((counts - DRAWS * p) ** 2 / (DRAWS * p)).sum()), len(p) - 1)
    return score, float(np.abs(counts / DRAWS - p).sum() / 2)


def greedy_differs(name: str, seed: int) -> bool:
    """Is any token at temperature 0 not the argmax?"""
    models = Markov.pair(seed % 5)
    engine = build(ENGINES[name], seed, models)
    asked = [Request(tuple(p), Params(temperature=0.0, seed=i), 16) for i, p in enumerate(toy_prompts(seed=seed))]
    samples: Sequence[Sample] = engine.generate(asked)
    return any(bool((argmax_gaps(models[0], sample) > 0).any()) for sample in samples)


def samples_differ(name: str, seed: int, delta: float) -> bool:
    models = Markov.pair(seed % 5)
    engines = build(ENGINES[name], seed, models), build(ENGINES["correct"], seed + 1, models)
    prompts = toy_prompts(12, seed)
    verdict = audit_samples(*engines, prompts, params=PANEL[seed % len(PANEL)], delta=delta, plan=Plan(seed=seed))
    return verdict.verdict == "different"


if __name__ == "__main__":
    main()
