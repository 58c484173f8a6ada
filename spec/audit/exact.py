"""White box: a verifier's whole law over a toy world, every draft and every outcome followed, against the target's.

The world: V tokens, laws p and q that depend on the whole prefix. A verifier is seen as a function from target rows
[K+1, V], draft rows [K, V] and drafted ids [K] to the law of how many are accepted, [K+1], and of the token after
them, [K+1, V]. Summed over all V^K drafts, what it commits, continued by the target itself to K + 1 tokens, must have
the target's joint law.

Verifiers that draw rather than say their law are probed through their noise: an acceptance probability is the
uniform at which the decision turns, found by bisection (:func:`turning_point`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from spec.verify import Backend, Drafts, Mode, laws, length_law

StepLaw = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Text = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """Random laws by prefix, some of them with tokens that cannot be said."""

    vocabulary: int = 3
    length: int = 2  # K
    seed: int = 0
    zeros: bool = True  # a third of the rows lack a token, of the draft and of the target independently

    def law(self, who: int, prefix: Text) -> Tensor:
        """[V] float64; ``who`` 0: target, 1: draft."""
        draw = np.random.default_rng([self.seed, who, len(prefix), *prefix])
        weights = draw.dirichlet(np.ones(self.vocabulary))
        if self.zeros and draw.random() < 1 / 3:
            weights[draw.integers(self.vocabulary)] = 0.0
        return torch.from_numpy(weights / weights.sum())

    def rows(self, who: int, draft: Text, count: int) -> Tensor:
        """[count, V] along a draft."""
        return torch.stack([self.law(who, draft[:i]) for i in range(count)])

    def drafts(self) -> Iterator[tuple[float, Text]]:
        """Every draft that can be drawn, with its probability."""
        for draft in itertools.product(range(self.vocabulary), repeat=self.length):
            weight = float(np.prod([float(self.law(1, draft[:i])[x]) for i, x in enumerate(draft)]))
            if weight > 0:
                yield weight, draft

    def text_law(self, start: Text = ()) -> dict[Text, float]:
        """The target's law of K + 1 tokens that begin with ``start``."""
        found = {start: 1.0}
        for _ in range(self.length + 1 - len(start)):
            found = {
                (*text, token): weight * float(p)
                for text, weight in found.items()
                for token, p in enumerate(self.law(0, text))
            }
        return found


def joint_gap(step: StepLaw, world: World) -> float:
    """The largest |probability - target's| over all texts of K + 1 tokens."""
    total = dict.fromkeys(world.text_law(), 0.0)
    for weight, draft in world.drafts():
        lengths, last = step(
            world.rows(0, draft, world.length + 1), world.rows(1, draft, world.length), torch.tensor(draft)
        )
        for accepted, share in enumerate(lengths.tolist()):
            for token, p in enumerate(last[accepted].tolist()):
                if share * p > 0:
                    for text, rest in world.text_law((*draft[:accepted], token)).items():
                        total[text] += weight * share * p * rest
    return max(abs(total[text] - due) for text, due in world.text_law().items())


def our_step(mode: Mode, backend: Backend) -> StepLaw:
    """:func:`spec.verify.laws`."""

    def step(target: Tensor, draft: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        accept, last = laws(target, Drafts(ids, [len(ids)], draft), mode=mode, backend=backend)
        return length_law(accept, mode), last

    return step


def transformers_step(target: Tensor, draft: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """``transformers.generation.utils._speculative_sampling``, its noise in our hands.

    Raises ImportError where this transformers has no such function.
    """
    from transformers.generation import utils

    size = len(ids)

    def run(uniforms: Tensor) -> tuple[int, Tensor]:
        """Accepted tokens, and the law of the next."""
        with _noise_of_transformers(uniforms) as seen:
            _, matches = utils._speculative_sampling(ids[None], draft.log()[None], size, target.log()[None])
        return int(matches), seen[0]

    accept = []
    for i in range(size):

        def passes(u: float, i: int = i) -> bool:
            uniforms = torch.zeros(size, dtype=torch.float64)
            uniforms[i] = u
            uniforms[i + 1 :] = 2.0  # not asked
            return run(uniforms)[0] > i

        accept.append(turning_point(passes))
    last = []
    for accepted in range(size + 1):
        uniforms = torch.zeros(size, dtype=torch.float64)
        uniforms[accepted:] = 2.0
        reached, law = run(uniforms)
        last.append(law if reached == accepted and bool(law.isfinite().all()) else target[accepted])
    return length_law(torch.tensor(accept, dtype=torch.float64), "token"), torch.stack(last)


def turning_point(passes: Callable[[float], bool]) -> float:
    """The largest u in [0, 1] that passes, to 2^-60; 0 if hardly any does. ``passes`` is decreasing in u."""
    low, high = 0.0, 1.0
    if passes(1.0):
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


@contextmanager
def _noise_of_transformers(uniforms: Tensor) -> Iterator[list[Tensor]]:
    """Acceptance draws given; the law a token would be drawn from recorded."""
    seen: list[Tensor] = []

    def multinomial(law: Tensor, num_samples: int, **_: Any) -> Tensor:
        seen.append(law.reshape(-1).clone())
        return torch.zeros(1, 1, dtype=torch.long)

    def rand_like(other: Tensor, **_: Any) -> Tensor:
        return uniforms.reshape(other.shape).to(other)

    with mock.patch("torch.multinomial", multinomial), mock.patch("torch.rand_like", rand_like):
        yield seen


def report(worlds: int = 6) -> dict[str, float]:
    """The largest gap over several worlds, of each of our verifiers and of transformers' function."""
    steps: dict[str, StepLaw] = {
        f"ours {mode} {backend}": our_step(mode, backend)  # type: ignore[arg-type]
        for mode in ("token", "block")
        for backend in ("reference", "numba", "torch")
    }
    steps["transformers _speculative_sampling"] = transformers_step
    shapes = [(3, 2), (2, 3), (4, 2)]
    return {
        name: max(joint_gap(step, World(*shapes[seed % 3], seed=seed)) for seed in range(worlds))
        for name, step in steps.items()
    }
