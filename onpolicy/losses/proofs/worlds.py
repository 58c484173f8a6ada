"""What a proof is: models, an estimator's gradient for every possible sample, its mean beside the exact one.

A :class:`Case` is one estimator: what it is said to descend (``claim``), what it descends (``exact``) and its gradient
for every possible sample. :func:`measure` takes the expectation and compares. The cases are in
:mod:`onpolicy.losses.proofs.cases`.

P prefixes, V vocabulary, B sequences or batches, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onpolicy.losses.estimators import policy_gradient
from onpolicy.losses.rewards import combine_teachers, expected_rewards, least_variance_baseline
from onpolicy.losses.toy import Tree

CONTROLS: dict[str, Callable[..., Tensor] | None] = {
    "none": None,
    "-KL": expected_rewards,
    "best": least_variance_baseline,
}


@dataclass(frozen=True)
class World:
    """The models of one proof, each a table of logits [P, V]."""

    tree: Tree
    student: Tensor
    teacher: Tensor
    second_teacher: Tensor
    reference: Tensor
    sampler: Tensor  # the student, as an engine that is a little off computes it
    task_rewards: Tensor  # [B] 0 or 1: whether a sequence's answer is right

    @classmethod
    def make(
        cls, vocabulary: int = 3, max_length: int = 3, seed: int = 0, spread: float = 1.0, distance: float | None = None
    ) -> World:
        """Random models. Logits of the student have deviation ``spread``; the teacher is unrelated, or its logits lie
        ``distance`` (deviation) from the student's."""
        tree = Tree.grow(vocabulary, max_length)
        student, teacher, second, reference, noise = (tree.table(5 * seed + k) for k in range(5))
        student = spread * student
        teacher = teacher if distance is None else student + distance * teacher
        right = torch.tensor([float(sum(y) % 2 == 0 and len(y) > 1) for y in tree.sequences], dtype=torch.float64)
        return cls(tree, student, teacher, second, reference, student + 0.7 * noise, right)

    def baselines(self) -> dict[str, Tensor]:
        """[P] each: the control variates compared."""
        zero = torch.zeros(len(self.tree.prefixes), dtype=torch.float64)
        return {name: zero if rule is None else rule(self.student, self.teacher) for name, rule in CONTROLS.items()}


@dataclass(frozen=True)
class Case:
    """One estimator. Gradients are [P, V]; a sample is whatever is drawn at once, a sequence or a batch of them."""

    idea: str
    name: str
    claims: str
    claim: Tensor
    really: str
    probabilities: Tensor  # [B] of each possible sample
    samples: dict[str, Tensor]  # by control variate: [B, P, V] the gradient of each sample
    exact: dict[str, Tensor]  # by control variate: what the samples' mean must be
    up_to_scale: bool = False  # the claim is of a direction only
    batch: int = 1  # sequences in a sample; variance is given per sequence


@dataclass(frozen=True)
class Row:
    """A case, measured, by control variate. Relative to the claimed gradient's norm (variance: to its square)."""

    idea: str
    name: str
    claims: str
    really: str
    bias: dict[str, float]
    variance: dict[str, float]
    error: float  # largest |mean of the samples - exact|: what is proved to be nothing


def measure(case: Case) -> Row:
    """Bias and variance of a case with each control variate, and how far its proof is off."""
    bias, variance, error = {}, {}, 0.0
    for control, samples in case.samples.items():
        mean = torch.einsum("b,bpv->pv", case.probabilities, samples)
        claim = case.claim
        if case.up_to_scale:
            claim = claim * (claim * mean).sum() / claim.square().sum()
        norm = claim.norm()
        spread = (case.probabilities * (samples - mean).square().sum((1, 2))).sum() * case.batch
        bias[control], variance[control] = float((mean - claim).norm() / norm), float(spread / norm.square())
        error = max(error, float((mean - case.exact[control]).norm() / norm))
    return Row(case.idea, case.name, case.claims, case.really, bias, variance, error)


def per_sequence(tree: Tree, student: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """[B, P, V] gradient of each sequence's loss, in one backward pass: every sequence has a copy of the student.

    ``loss`` maps logits at every token's prefix [N, V] to the sum of all sequences' losses.
    """
    copies = student.expand(len(tree.sequences), -1, -1).clone().requires_grad_()
    (gradients,) = torch.autograd.grad(loss(copies[tree.sequence_ids, tree.states]), copies)
    return gradients


def estimated(world: World, control: str, *, sampler: Tensor | None = None, **options: Any) -> Tensor:
    """[B, P, V] gradient of :func:`policy_gradient` for each sequence, as if it were drawn alone."""
    tree = world.tree
    arguments = batch_arguments(world, tree.tokens, tree.states, control, sampler, options)
    arguments |= {"mask": torch.ones_like(tree.tokens, dtype=torch.bool), "denominator": 1.0} | options

    def loss(logits: Tensor) -> Tensor:
        logprobs = logits.log_softmax(-1)[torch.arange(len(tree.tokens)), tree.tokens]
        return policy_gradient(logprobs, sequence_ids=tree.sequence_ids, **arguments)[0]

    return per_sequence(tree, world.student, loss)


def estimated_pairs(world: World, control: str, **options: Any) -> Tensor:
    """[B * B, P, V] gradient of :func:`policy_gradient` for each batch of two sequences."""
    tree, count = world.tree, len(world.tree.sequences)
    rows = [torch.nonzero(tree.sequence_ids == b).squeeze(1) for b in range(count)]
    gradients = torch.zeros(count, count, *world.student.shape, dtype=torch.float64)
    for first in range(count):
        for second in range(first + 1):
            chosen = torch.cat((rows[first], rows[second]))
            sequence_ids = torch.tensor([0] * len(rows[first]) + [1] * len(rows[second]))
            tokens, states = tree.tokens[chosen], tree.states[chosen]
            leaf = world.student.clone().requires_grad_()
            logprobs = leaf.log_softmax(-1)[states, tokens]
            arguments = batch_arguments(world, tokens, states, control, None, {})
            mask = torch.ones_like(tokens, dtype=torch.bool)
            loss = policy_gradient(logprobs, sequence_ids=sequence_ids, mask=mask, **arguments, **options)[0]
            (gradients[first, second],) = torch.autograd.grad(loss, leaf)
            gradients[second, first] = gradients[first, second]
    return gradients.flatten(0, 1)


def batch_arguments(
    world: World, tokens: Tensor, states: Tensor, control: str, sampler: Tensor | None, options: dict[str, Any]
) -> dict[str, Any]:
    """What :func:`policy_gradient` wants besides the student's log-probs, for tokens [N] after prefixes ``states``."""

    def logprobs(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[states, tokens]

    shares = options.pop("teacher_shares", (1.0, 0.0))
    teachers = [world.teacher, world.second_teacher]
    arguments: dict[str, Any] = {
        "sampler_logprobs": logprobs(world.student if sampler is None else sampler),
        "teacher_logprobs": combine_teachers([logprobs(teacher) for teacher in teachers], shares),
    }
    beyond: dict[str, Any] = {}
    if "extrapolation" in options:
        beyond = {"reference_logits": world.reference, "extrapolation": options["extrapolation"]}
        arguments["reference_logprobs"] = logprobs(world.reference)

    def closed_form(rule: Callable[..., Tensor]) -> Tensor:
        per_teacher = [rule(world.student, teacher, **beyond)[states] for teacher in teachers]
        return shares[0] * per_teacher[0] + shares[1] * per_teacher[1]

    rule = CONTROLS[control]
    if rule is not None:
        arguments["control_variate"] = closed_form(rule)
    if options.get("expected_future"):
        arguments["expected_rewards"] = closed_form(expected_rewards)
    return arguments
