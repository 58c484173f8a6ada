"""The estimators proved: what each is said to descend, what it descends, and every gradient it can give.

Rows are grouped by idea, each a function of :class:`Facts`. What a gradient must equal is the gradient of an objective
summed over the tree or, where no objective has it, a brute-force sum over sequences, written without the estimators.
S student, T teacher, Q sampler; h_t a prefix, ρ importance ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from onpolicy.losses.divergences import per_token
from onpolicy.losses.proofs.facts import Facts, Named, Weight
from onpolicy.losses.proofs.worlds import CONTROLS, Case, World, estimated, estimated_pairs, per_sequence
from onpolicy.losses.toy import (
    STOP,
    Steps,
    brute_force,
    expected_shares,
    gradient,
    returns,
    score_gradient,
    sequence_kl,
    token_kl,
)

FIXED = "reverse KL, prefixes held fixed"
SEQUENCES = "reverse KL of sequences"


def all_cases(world: World) -> Iterator[Case]:
    """Every row of the table, by idea."""
    facts = Facts(world)
    for group in (placements, credits, rewards, corrections, normalisations, batches, full_vocabulary):
        yield from group(facts)


def placements(f: Facts) -> Iterator[Case]:
    """Where the estimate of KL(S‖T) goes: into the reward, or into the loss to be differentiated."""
    idea, claim = "k1, k2, k3: in the reward or in the loss", (FIXED, f.fixed)
    zero = ("zero", torch.zeros_like(f.fixed))
    half_square = f.held_fixed(lambda x: expected_k2(x, f.teacher))
    yield f.case(idea, "k1 in reward", claim, claim)
    yield f.case(idea, "k2 in reward", claim, ("∇E[k2] - ∇reverse KL", half_square - f.fixed), estimate="k2")
    yield f.case(idea, "k3 in reward", claim, ("∇reverse KL - ∇forward KL", f.fixed - f.forward), estimate="k3")
    loss: dict[str, Any] = {"place": "loss", "control": False}
    yield f.case(idea, "k1 in loss", claim, zero, estimate="k1", **loss)
    yield f.case(idea, "k2 in loss", claim, claim, estimate="k2", **loss)
    yield f.case(idea, "k3 in loss", claim, ("forward KL, prefixes held fixed", f.forward), estimate="k3", **loss)
    ratio: dict[str, Any] = {"place": "ratio", "control": False}
    yield f.case(idea, "k1 in loss, times S/stop(S)", claim, claim, estimate="k1", **ratio)
    yield f.case(idea, "k2 in loss, times S/stop(S)", claim, ("∇E[k2]", half_square), estimate="k2", **ratio)
    yield f.case(idea, "k3 in loss, times S/stop(S)", claim, claim, estimate="k3", **ratio)
    yield f.uncontrolled(idea, "top-2 KL at h_t as advantage", claim, zero, top_k_advantage(f))


def expected_k2(student: Tensor, teacher: Tensor) -> Tensor:
    """[P] E_S (log S/T)^2 / 2 of the next token."""
    return (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1)).square() / 2).sum(-1)


def top_k_advantage(f: Facts) -> Tensor:
    """[B, P, V] what one gets by weighting log-probs with a (top-k) KL at their prefix: the same for every token."""
    divergences = per_token("reverse_kl", f.student, f.teacher, top_k=2).detach()[f.tree.states]
    everything = torch.arange(len(f.tree.tokens))
    return per_sequence(
        f.tree, f.student, lambda logits: (divergences * logits.log_softmax(-1)[everything, f.tree.tokens]).sum()
    )


def credits(f: Facts) -> Iterator[Case]:
    """How far ahead a token is credited, and what the control variate is subtracted from."""
    idea, claim = "credit for later tokens", (SEQUENCES, f.sequences)
    half = f.scored(returns(f.tree, f.student, f.reward, 0.5))
    yield f.case(idea, "discount 0", claim, (FIXED, f.fixed))
    yield f.case(idea, "discount 0.5", claim, ("discounted: no objective", half), discount=0.5)
    yield f.case(idea, "discount 1", claim, claim, discount=1.0)
    yield f.case(idea, "discount 1, later rewards in closed form", claim, claim, discount=1.0, expected_future=True)
    mistake = rewards_controlled(f)
    yield f.uncontrolled(idea, "discount 1, -KL subtracted from rewards", claim, (FIXED, f.fixed), mistake)


def rewards_controlled(f: Facts) -> Tensor:
    """[B, P, V] the mistake of centring each *reward* before summing: later tokens' credit has mean zero."""
    shifted = f.teacher.log_softmax(-1) - f.baselines["-KL"][:, None]  # log T + KL: the reward becomes r + KL
    shifted = shifted[f.tree.states, f.tree.tokens]
    return estimated(f.world, "none", sampler=f.student, discount=1.0, teacher_logprobs=shifted)


def rewards(f: Facts) -> Iterator[Case]:
    """What is rewarded: beyond the teacher, several teachers, bounded rewards, a task."""
    idea, world = "what is rewarded", f.world
    reference = world.reference.log_softmax(-1)

    def beyond(logits: Tensor) -> Tensor:
        gain = logits.softmax(-1) * (f.teacher.log_softmax(-1) - reference)
        return token_kl(logits, reference) - 1.5 * gain.sum(-1)

    extrapolated = ("KL(S‖R) - 1.5 E[log T/R], prefixes held fixed", f.held_fixed(beyond))
    yield f.case(idea, "extrapolation 1.5 from reference R", extrapolated, extrapolated, extrapolation=1.5)
    shares = (0.7, 0.3)
    mixed = f.held_fixed(lambda x: shares[0] * token_kl(x, f.teacher) + shares[1] * token_kl(x, world.second_teacher))
    both = ("0.7 KL(S‖T1) + 0.3 KL(S‖T2), prefixes held fixed", mixed)
    yield f.case(idea, "two teachers, weights 0.7 and 0.3", both, both, teacher_shares=shares)
    clipped = ("no objective", f.scored(f.reward.clamp(-1, 1)))
    yield f.case(idea, "rewards clipped to ±1", (FIXED, f.fixed), clipped, reward_clip=1.0)

    task = -gradient(lambda x: (f.tree.sequence_probabilities(x) * world.task_rewards).sum(), f.student)
    goal = (f"{FIXED}, less the mean task reward", f.fixed + task)
    final = brute_force(f.tree, f.student, f.student, last_token_credit(f))
    options: dict[str, Any] = {"task_rewards": world.task_rewards}
    yield f.case(idea, "task reward to every token, discount 0", goal, goal, **options)
    late = ("task reward teaches last tokens only", f.fixed + final)
    yield f.case(idea, "task reward to the last token, discount 0", goal, late, task_placement="last", **options)
    goal = (f"{SEQUENCES}, less the mean task reward", f.sequences + task)
    options |= {"task_placement": "last", "discount": 1.0}
    yield f.case(idea, "task reward to the last token, discount 1", goal, goal, **options)


def last_token_credit(f: Facts) -> Callable[[Steps, int], float]:
    """The task reward where a sequence ends, nothing before."""
    right = {y: float(f.world.task_rewards[b]) for b, y in enumerate(f.tree.sequences)}

    def coefficient(steps: Steps, t: int) -> float:
        return -right[tuple(token for _, token in steps)] if t == len(steps) - 1 else 0.0

    return coefficient


def corrections(f: Facts) -> Iterator[Case]:
    """Samples from Q, a little off the student: importance ratios, and what bounding them costs."""
    idea, claim, anything = "sampler Q differs from the student", (FIXED, f.fixed), 1e9
    ratio = f.ratio.tolist()

    def rho(steps: Steps, t: int) -> float:
        return float(ratio[steps[t][0]][steps[t][1]])

    def rho_sequence(steps: Steps) -> float:
        return math.prod(rho(steps, k) for k in range(len(steps)))

    def unclipped(steps: Steps, t: int, advantage: float) -> float:
        improves_beyond = rho(steps, t) > 1.2 if advantage > 0 else rho(steps, t) < 0.8
        return 0.0 if improves_beyond else rho(steps, t)

    def biased(name: str, weight: Weight, **options: Any) -> Case:
        return f.case(idea, name, claim, f.brute(f.sampler, weight), off_policy=True, **options)

    def full(level: str, **options: Any) -> dict[str, Any]:
        return {"off_policy": True, "correction": "truncate", "ratio_cap": anything, "ratio_level": level} | options

    elsewhere = f.held_fixed(lambda x: token_kl(x, f.teacher), f.tree.visits(f.sampler))
    yield biased("no correction", lambda steps, t, advantage: 1.0)
    yield f.case(idea, "ρ of the token", claim, ("reverse KL, Q's prefixes held fixed", elsewhere), **full("token"))
    yield f.case(idea, "ρ of the prefix up to the token", claim, claim, **full("prefix"))
    yield f.case(idea, "ρ of the sequence", claim, claim, **full("sequence"))
    yield biased("TIS: min(ρ, 2), token", lambda s, t, a: min(rho(s, t), 2.0), correction="truncate")
    options = {"correction": "truncate", "ratio_level": "sequence"}
    yield biased("TIS: min(ρ, 2), sequence", lambda s, t, a: min(rho_sequence(s), 2.0), **options)
    yield biased("IcePop: ρ in [0.5, 5], token", lambda s, t, a: rho(s, t) * (0.5 <= rho(s, t) <= 5), correction="mask")
    yield biased("PPO clip ±0.2, token", unclipped, correction="clip")
    claim = (SEQUENCES, f.sequences)
    exact = f.brute(f.sampler, lambda s, t, a: rho(s, t), discount=1.0)
    yield f.case(idea, "ρ of the token, discount 1", claim, exact, **full("token", discount=1.0))
    yield f.case(idea, "ρ of the sequence, discount 1", claim, claim, **full("sequence", discount=1.0))


def normalisations(f: Facts) -> Iterator[Case]:
    """Dividing by a length that depends on the tokens being credited."""
    idea, tree = "lengths", f.tree

    lengths = torch.bincount(tree.sequence_ids).double()
    per_token_weight = (tree.sequence_probabilities(f.student) / lengths)[tree.sequence_ids]
    weights = torch.zeros(len(tree.prefixes), dtype=torch.float64).index_add(0, tree.states, per_token_weight)
    target = f.held_fixed(lambda x: token_kl(x, f.teacher), weights)
    claim = ("mean over each sequence's tokens, prefixes held fixed", target)
    exact = f.brute(f.student, lambda s, t, a: 1 / len(s))
    yield f.case(idea, "normalised by sequence", claim, exact, normalisation="sequence")
    kept = tree.finished[tree.sequence_ids]
    exact = f.brute(f.student, lambda s, t, a: float(s[-1][1] == STOP))
    yield f.case(idea, "unfinished rollouts masked", (FIXED, f.fixed), exact, mask=kept)


def batches(f: Facts) -> Iterator[Case]:
    """What a batch shares among its sequences; here batches of two."""
    idea, tree, n_prefixes = "batches of two sequences", f.tree, len(f.tree.prefixes)
    drawn = tree.sequence_probabilities(f.student)

    def pairs(name: str, claim: Named, share: Callable[[list[float]], list[float]], **options: Any) -> Case:
        samples = {c: estimated_pairs(f.world, c, correction="none", **options) for c in CONTROLS}
        shares = {c: expected_shares(tree, f.student, f.reward - b[:, None], share) for c, b in f.baselines.items()}
        exact = {c: -score_gradient(coefficients, f.student) for c, coefficients in shares.items()}
        up_to_scale = "whitening" in options
        law = torch.outer(drawn, drawn).flatten()
        return Case(idea, name, *claim, "no objective", law, samples, exact, up_to_scale=up_to_scale, batch=2)

    ones = torch.ones(n_prefixes, tree.vocabulary, dtype=torch.float64)
    weights = expected_shares(tree, f.student, ones, lambda a: [x / len(a) for x in a]).sum(-1)
    target = f.held_fixed(lambda x: token_kl(x, f.teacher), weights)
    claim = ("mean over the batch's tokens, prefixes held fixed", target)
    yield pairs("normalised by token", claim, lambda a: [x / len(a) for x in a])
    claim = (f"{FIXED}, up to scale", f.fixed)
    yield pairs("whitened: less the mean", claim, centre, whitening="mean", denominator=2.0)
    options = {"whitening": "mean_std", "denominator": 2.0}
    yield pairs("whitened: less the mean, over the deviation", claim, standardise, **options)


def centre(values: list[float]) -> list[float]:
    """Half of each value's distance from the mean: half, because a batch of two is averaged over its sequences."""
    mean = sum(values) / len(values)
    return [(value - mean) / 2 for value in values]


def standardise(values: list[float]) -> list[float]:
    """:func:`centre` in units of the standard deviation; without spread (two equal tokens) nothing is left."""
    centred = centre(values)
    deviation = math.sqrt(sum((2 * value) ** 2 for value in centred) / len(centred))
    return [value / deviation if deviation > 1e-6 else 0.0 for value in centred]


def full_vocabulary(f: Facts) -> Iterator[Case]:
    """GKD: a divergence over the vocabulary at sampled prefixes, whose law is not differentiated."""
    idea = "full vocabulary at the student's prefixes (GKD)"
    forward_of_sequences = gradient(lambda x: sequence_kl(f.tree, f.teacher, x), f.student)

    def case(name: str, text: str, claim: Named, exact: Callable[[Tensor], Tensor]) -> Case:
        teacher, really = f.teacher[f.tree.states], (f"{text}, prefixes held fixed", f.held_fixed(exact))
        samples = per_sequence(f.tree, f.student, lambda x: per_token(name, x, teacher).sum())
        return f.uncontrolled(idea, text, claim, really, samples)

    divergences: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "reverse_kl": ("reverse KL", lambda x: token_kl(x, f.teacher)),
        "forward_kl": ("forward KL", lambda x: token_kl(f.teacher, x)),
        "jsd": ("JSD(0.5)", lambda x: half_jsd(x.softmax(-1), f.teacher.softmax(-1))),
        "total_variation": ("total variation", lambda x: (x.softmax(-1) - f.teacher.softmax(-1)).abs().sum(-1) / 2),
    }
    yield case("reverse_kl", "reverse KL", (FIXED, f.fixed), divergences["reverse_kl"][1])
    yield case("reverse_kl", "reverse KL", (SEQUENCES, f.sequences), divergences["reverse_kl"][1])
    claim = ("forward KL of sequences", forward_of_sequences)
    yield case("forward_kl", "forward KL", claim, divergences["forward_kl"][1])
    for name in ("forward_kl", "jsd", "total_variation"):
        text, exact = divergences[name]
        yield case(name, text, (f"{text}, prefixes differentiated", f.differentiated(exact)), exact)


def half_jsd(p: Tensor, q: Tensor) -> Tensor:
    """[P] Jensen-Shannon divergence, from probabilities."""
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2
