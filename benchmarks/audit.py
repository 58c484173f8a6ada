"""The auditor on trial: ``python -m benchmarks.audit [--json OUT]``.

For each broken engine of :mod:`spec.audit.mutants`: how often is it found and after how many tokens (median over
seeds, a miss counts as never), with and without knowledge of the draft, and would the tests the field uses have found
it? And how often is a correct engine, with token-wise and with block verification, called different?

- chi2, tv: first tokens of one prompt, 4,096 draws: chi-square at the same level, and empirical total variation
  above 5 %; at temperature 1, and (``panel``) at one of the settings our audit cycles through;
- greedy: is every token at temperature 0 the argmax? This is also our greedy mode;
- exact: our exact mode on the faults that a verifier's own function can have (blank: it does not see the others);
- samples: :mod:`spec.audit.samples_only`, against the plain toy engine, 12 prompts of 16 answers each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from math import log10, sqrt
from multiprocessing import get_context
from statistics import NormalDist
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.common import finish
from spec.audit.diagnostics import wilson_hilferty
from spec.audit.exact import World, joint_gap, turning_point
from spec.audit.greedy import argmax_gaps
from spec.audit.mutants import BlockVerificationWrong, build
from spec.audit.samples_only import Plan, audit_samples
from spec.audit.toy import Markov, ToyEngine, toy_prompts
from spec.audit.trial import CORRECT, ENGINES, HEADER, PANEL, line, measured, summary, try_one
from spec.audit.verdict import Verdict
from spec.params import Params
from spec.request import Request
from spec.verify import length_law

DRAWS = 4096
PEERS = ("chi2", "tv", "chi2 panel", "tv panel", "greedy", "samples")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="audits of each mutant (default 20)")
    parser.add_argument("--correct", type=int, default=200, help="audits of correct engines (default 200)")
    parser.add_argument("--tokens", type=int, default=20_000, help="of one audit (default 20000)")
    parser.add_argument("--delta", type=float, default=1e-3, help="level (default 0.001)")
    parser.add_argument("--loose", type=float, default=0.05, help="level at which false alarms are counted as well")
    parser.add_argument("--processes", type=int, default=2, help="audits at a time (default 2)")
    parser.add_argument("--json", help="write the result with its provenance")
    options = parser.parse_args()
    begin, table = perf_counter(), {}
    print(HEADER, "  no draft;", ", ".join((*PEERS, "exact")))
    # spawned, for torch's threads do not survive a fork
    with ProcessPoolExecutor(options.processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pending = {name: [pool.submit(trial, name, seed, options) for seed in range(options.seeds)] for name in MUTANTS}
        far = {name: pool.submit(measured, name) for name in MUTANTS}
        exact = pool.submit(exact_gaps)
        right = [pool.submit(try_correct, seed, options) for seed in range(options.correct)]
        for name, jobs in pending.items():
            table[name] = {
                **row([job.result() for job in jobs]),
                **far[name].result(),
                "exact": exact.result().get(name),
            }
            print(line(name, table[name]), "  ", shown(table[name]), flush=True)
        false_alarms = correct([job.result() for job in right], options)
    print(false_alarms)
    result = {"level": options.delta, "tokens": options.tokens, "mutants": table, "correct": false_alarms}
    finish({**result, "seconds": perf_counter() - begin}, options.json)


MUTANTS = tuple(name for name in ENGINES if name not in CORRECT)


def trial(name: str, seed: int, options: argparse.Namespace) -> tuple[Verdict, Verdict, dict[str, bool]]:
    """One seed of one mutant: our audit with and without the draft, and every other detector."""
    with_draft, without = (
        try_one(name, seed, tokens=options.tokens, delta=options.delta, know_draft=known) for known in (True, False)
    )
    return with_draft, without, dict(peers(name, seed, options.delta))


def peers(name: str, seed: int, delta: float) -> Iterator[tuple[str, bool]]:
    """Whether each of ``PEERS`` calls the engine different."""
    for suffix, params in (("", Params()), (" panel", PANEL[seed % len(PANEL)])):
        score, distance = first_tokens(name, seed, params)
        yield f"chi2{suffix}", score > NormalDist().inv_cdf(1 - delta)
        yield f"tv{suffix}", distance > 0.05
    yield "greedy", greedy_differs(name, seed)
    yield "samples", samples_differ(name, seed, delta)


def row(trials: list[tuple[Verdict, Verdict, dict[str, bool]]]) -> dict[str, Any]:
    """Of all seeds of a mutant; peers as shares of seeds."""
    ours, blind, others = zip(*trials, strict=True)
    shares = {peer: sum(found[peer] for found in others) / len(others) for peer in PEERS}
    without = {key: value for key, value in summary(blind).items() if key != "named"}
    return {**summary(ours), "without_draft": without, **shares}


def shown(r: dict[str, Any]) -> str:
    exact = "" if r["exact"] is None else f"{r['exact']:.1e}"
    return " ".join(f"{x:5.0%}" for x in (r["without_draft"]["detected"], *(r[peer] for peer in PEERS))) + f" {exact}"


def try_correct(seed: int, options: argparse.Namespace) -> tuple[str, Verdict]:
    """By turns with token-wise and with block verification."""
    name = list(CORRECT)[seed % len(CORRECT)]
    return name, try_one(name, 10_000 + seed, tokens=options.tokens, delta=options.delta)


def correct(found: list[tuple[str, Verdict]], options: argparse.Namespace) -> dict[str, Any]:
    """False alarms at the level, and at a looser one at which a wrong level would show in so many audits."""
    loose, count = -log10(options.loose), len(found)
    bounds = [verdict.epsilon for _, verdict in found if verdict.epsilon is not None]
    by_kind = {name: sum(kind == name for kind, _ in found) for name in CORRECT}
    return {
        "audits": count,
        "audits by verification": by_kind,
        f"different at {options.delta:g}": sum(v.verdict == "different" for _, v in found),
        f"different at {options.loose:g}": sum(v.tests["log10_e"] >= loose for _, v in found),
        "allowed at the looser level, with two standard errors": options.loose * count
        + 2 * sqrt(options.loose * (1 - options.loose) * count),
        "median bound": float(np.median(bounds)) if bounds else None,
    }


def first_tokens(name: str, seed: int, params: Params) -> tuple[float, float]:
    """Chi-square score and empirical total variation of first tokens; a token outside the support scores infinity."""
    models = Markov.pair(seed % 5)
    prompt = tuple(toy_prompts(seed=seed)[0])
    engine = build(ENGINES[name], seed, models)
    samples = engine.generate([Request(prompt, params, 1)] * DRAWS)
    engine.texts, engine.prompts = [list(prompt)], [list(prompt)]
    p = engine.law(models[0], [], [params])[0]
    counts = np.bincount([s.token_ids[0] for s in samples], minlength=len(p))
    inside = p > 0
    statistic = float(((counts - DRAWS * p)[inside] ** 2 / (DRAWS * p[inside])).sum())
    score = wilson_hilferty(statistic, int(inside.sum()) - 1) if inside.sum() > 1 else 0.0
    return (float("inf") if counts[~inside].any() else score), float(np.abs(counts / DRAWS - p).sum() / 2)


def greedy_differs(name: str, seed: int) -> bool:
    """Is any token at temperature 0 not the argmax?"""
    models = Markov.pair(seed % 5)
    engine = build(ENGINES[name], seed, models)
    asked = [Request(tuple(p), Params(temperature=0.0, seed=i), 16) for i, p in enumerate(toy_prompts(seed=seed))]
    return any(bool((argmax_gaps(models[0], sample) > 0).any()) for sample in engine.generate(asked))


def samples_differ(name: str, seed: int, delta: float) -> bool:
    models = Markov.pair(seed % 5)
    engines = build(ENGINES[name], seed, models), build(ENGINES["correct"], seed + 1, models)
    prompts = toy_prompts(12, seed)
    verdict = audit_samples(*engines, prompts, params=PANEL[seed % len(PANEL)], delta=delta, plan=Plan(seed=seed))
    return verdict.verdict == "different"


# Of these the verifier's own function is broken, the one thing that the exact mode looks at
VERIFIERS = (
    "BlockVerificationWrong", "GreedyVerification", "ResidualNotSubtracted", "ResidualNotClipped",
    "ResidualNotRenormalised", "Swapped", "LenientAcceptance",
)  # fmt: skip


def exact_gaps() -> dict[str, float]:
    """The largest error of the joint law over a toy world, of a right verifier and of each broken one."""
    world = World(3, 2, seed=0)
    return {name: joint_gap(partial(step, ENGINES[name]), world) for name in ("correct", *VERIFIERS)}


def step(
    engine: type[ToyEngine], target: torch.Tensor, draft: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A toy engine's ``accept`` and ``residual`` as :data:`spec.audit.exact.StepLaw`."""
    verifier = engine(*Markov.pair())
    p, q, x = (tensor.numpy() for tensor in (target, draft, ids))

    def passes(i: int, u: float) -> bool:
        if isinstance(verifier, BlockVerificationWrong):
            verifier.weight = np.ones(1)  # what the block rule carries from row to row
        rows = [(p[j : j + 1], q[j : j + 1], x[j : j + 1], np.array([u if j == i else 0.0])) for j in range(i + 1)]
        return bool([verifier.accept(*one)[0] for one in rows][-1])

    accept = torch.tensor([turning_point(partial(passes, i)) for i in range(len(x))], dtype=torch.float64)
    last = [verifier.residual(p[i : i + 1], q[i : i + 1])[0] for i in range(len(x))]
    last = [law / max(law.sum(), 1e-300) for law in last]
    return length_law(accept, "token"), torch.from_numpy(np.stack([*last, p[-1]]))


if __name__ == "__main__":
    main()
