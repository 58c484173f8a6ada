"""Exact gradients on the toy model, without the code of the estimators they judge.

S student, T teacher, Q sampler; P prefixes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from onpolicy.losses.proofs.worlds import CONTROLS, Case, World, estimated
from onpolicy.losses.toy import Steps, brute_force, gradient, score_gradient, sequence_kl, token_kl

Named = tuple[str, Tensor]  # what a gradient is of, and the gradient [P, V]
Weight = Callable[[Steps, int, float], float]  # of a whole sequence, a position in it and its advantage


class Facts:
    """Exact quantities of a world that several cases share. All gradients are [P, V]."""

    def __init__(self, world: World) -> None:
        self.world, self.tree = world, world.tree
        self.student, self.teacher, self.sampler = world.student, world.teacher, world.sampler
        self.visits = self.tree.visits(self.student)
        self.reward = self.teacher.log_softmax(-1) - self.student.log_softmax(-1)  # [P, V]
        self.baselines = world.baselines()  # [P] each
        self.ratio = (self.student.log_softmax(-1) - self.sampler.log_softmax(-1)).exp()  # [P, V]
        self.fixed = self.held_fixed(lambda logits: token_kl(logits, self.teacher))
        self.sequences = gradient(lambda logits: sequence_kl(self.tree, logits, self.teacher), self.student)
        self.forward = self.held_fixed(lambda logits: token_kl(self.teacher, logits))

    def held_fixed(self, per_prefix: Callable[[Tensor], Tensor], visits: Tensor | None = None) -> Tensor:
        """Gradient of Σ_h d(h) f(h), the law d of prefixes held fixed: the student's unless given."""
        visits = self.visits if visits is None else visits
        return gradient(lambda logits: (visits * per_prefix(logits)).sum(), self.student)

    def differentiated(self, per_prefix: Callable[[Tensor], Tensor]) -> Tensor:
        """Gradient of E_{y~S} Σ_t f(h_t), the law of prefixes differentiated too."""
        return gradient(lambda logits: (self.tree.visits(logits) * per_prefix(logits)).sum(), self.student)

    def scored(self, advantage: Tensor) -> Tensor:
        """-Σ_h d(h) Σ_v S(v|h) A(h, v) ∇log S(v|h): a score-function estimator with advantages A [P, V]."""
        return -score_gradient(self.visits[:, None] * self.student.softmax(-1) * advantage, self.student)

    def brute(self, drawn_from: Tensor, weight: Weight, discount: float = 0.0) -> dict[str, Tensor]:
        """-Σ_y q(y) Σ_t w(y, t) A_t ∇log S(y_t|h_t), A the discounted return less each control variate in turn."""
        reward = self.reward.tolist()

        def gradient_with(baseline: list[float]) -> Tensor:
            def coefficient(steps: Steps, t: int) -> float:
                to_go = sum(discount ** (k - t) * reward[h][v] for k, (h, v) in enumerate(steps) if k >= t)
                advantage = to_go - baseline[steps[t][0]]
                return -weight(steps, t, advantage) * advantage

            return brute_force(self.tree, drawn_from, self.student, coefficient)

        return {control: gradient_with(baseline.tolist()) for control, baseline in self.baselines.items()}

    def case(
        self, idea: str, name: str, claim: Named, really: Named | dict[str, Tensor], *,
        control: bool = True, off_policy: bool = False, **options: Any,
    ) -> Case:  # fmt: skip
        """A case of single sequences. ``really`` is one gradient, if no control variate may change it, or several."""
        drawn_from = self.sampler if off_policy else self.student
        options = {"sampler": drawn_from, "correction": "none", **options}
        text, exact = ("no objective", really) if isinstance(really, dict) else (really[0], repeated(really[1]))
        samples = {c: estimated(self.world, c, **options) for c in (CONTROLS if control else ("none",))}
        return Case(idea, name, *claim, text, self.tree.sequence_probabilities(drawn_from), samples, exact)

    def uncontrolled(self, idea: str, name: str, claim: Named, really: Named, samples: Tensor) -> Case:
        """A case from ready gradients [B, P, V] of the student's own sequences, with no control variate."""
        drawn = self.tree.sequence_probabilities(self.student)
        return Case(idea, name, *claim, really[0], drawn, {"none": samples}, repeated(really[1]))


def repeated(exact: Tensor) -> dict[str, Tensor]:
    """The same exact gradient whatever the control variate."""
    return dict.fromkeys(CONTROLS, exact)
