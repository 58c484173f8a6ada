"""Two smaller questions: what k1, k2, k3 measure, and how much variance a control variate saves.

S student, T teacher, Q sampler; B sequences, N tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from onpolicy.losses.importance import RatioLevel, importance_ratios
from onpolicy.losses.proofs.worlds import CONTROLS, Case, World, estimated, measure
from onpolicy.losses.rewards import KL_ESTIMATES, expected_rewards
from onpolicy.losses.segments import segment_sums
from onpolicy.losses.toy import sequence_kl, token_kl


@dataclass(frozen=True)
class ValueRow:
    """An estimate of the sequences' reverse KL, summed over a sequence's tokens. Relative to what it estimates."""

    name: str
    really: str
    bias: float
    variance: float
    error: float  # |mean - exact|, relative


def value_rows(world: World) -> Iterator[ValueRow]:
    """Each estimate's expectation over all sequences, beside sums over prefixes that do not use it."""
    tree, student, teacher = world.tree, world.student, world.teacher
    kl = sequence_kl(tree, student, teacher)
    logprobs = {name: logits.log_softmax(-1) for name, logits in (("S", student), ("T", teacher), ("Q", world.sampler))}
    sampled = {name: table[tree.states, tree.tokens] for name, table in logprobs.items()}
    values = {name: estimate(sampled["S"], sampled["T"]) for name, estimate in KL_ESTIMATES.items()}
    square = (logprobs["S"].exp() * (logprobs["T"] - logprobs["S"]).square() / 2).sum(-1)
    said = "reverse KL of sequences"

    def row(name: str, per_token: Tensor, really: str, exact: Tensor, drawn_from: Tensor = student) -> ValueRow:
        law = tree.sequence_probabilities(drawn_from)
        value = segment_sums(per_token, tree.sequence_ids, len(tree.sequences))
        mean = (law * value).sum()
        variance = (law * (value - mean).square()).sum() / kl.square()
        return ValueRow(name, really, float((mean - kl).abs() / kl), float(variance), float((mean - exact).abs() / kl))

    yield row("k1", values["k1"], said, kl)
    yield row("k2", values["k2"], "E[(log S/T)²] / 2", (tree.visits(student) * square).sum())
    yield row("k3", values["k3"], said, kl)
    yield row("KL(S‖T) in closed form at each prefix", -expected_rewards(student, teacher)[tree.states], said, kl)
    gap = (logprobs["Q"].exp() * (logprobs["S"] - logprobs["T"])).sum(-1)
    visits = tree.visits(world.sampler)
    yield row("k1, drawn from Q", values["k1"], "E_Q[log S/T]", (visits * gap).sum(), world.sampler)

    def reweighted(level: RatioLevel) -> Tensor:
        everything = torch.ones_like(tree.tokens, dtype=torch.bool)
        return values["k1"] * importance_ratios(sampled["S"], sampled["Q"], tree.sequence_ids, everything, level)

    elsewhere = (visits * token_kl(student, teacher)).sum()
    name = "k1, drawn from Q, times ρ of the"
    yield row(f"{name} token", reweighted("token"), "KL(S‖T) at Q's prefixes", elsewhere, world.sampler)
    yield row(f"{name} prefix", reweighted("prefix"), said, kl, world.sampler)
    yield row(f"{name} sequence", reweighted("sequence"), said, kl, world.sampler)


@dataclass(frozen=True)
class ControlRow:
    """How a control variate changes the variance of "k1 in reward, discount 0" over several random worlds."""

    spread: float  # of the student's logits: 1 is unsure, 3 is mostly sure of its next token
    distance: float  # between student's and teacher's logits
    variance: dict[str, float]  # by control variate: median of its variance over that without
    lowered: dict[str, float]  # by control variate: share of worlds in which it lowers the variance


def control_rows(worlds: int = 20, vocabulary: int = 8, max_length: int = 2) -> Iterator[ControlRow]:
    """Students sure and unsure, teachers near and far."""
    for spread in (1.0, 3.0):
        for distance in (0.1, 1.0, 2.0):
            made = [World.make(vocabulary, max_length, seed, spread, distance) for seed in range(worlds)]
            measured = [variances(world) for world in made]
            ratios = {c: [m[c] / m["none"] for m in measured] for c in CONTROLS if c != "none"}
            medians = {c: statistics.median(r) for c, r in ratios.items()}
            lowered = {c: statistics.mean(float(x < 1) for x in r) for c, r in ratios.items()}
            yield ControlRow(spread, distance, medians, lowered)


def variances(world: World) -> dict[str, float]:
    """By control variate: variance of "k1 in reward, discount 0" on the student's own samples."""
    samples = {c: estimated(world, c, sampler=world.student, correction="none") for c in CONTROLS}
    law = world.tree.sequence_probabilities(world.student)
    claim = torch.einsum("b,bpv->pv", law, samples["none"])
    return measure(Case("", "", "", claim, "", law, samples, dict.fromkeys(CONTROLS, claim))).variance
