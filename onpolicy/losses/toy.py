"""A language model small enough to sum over everything it can say: the oracle of every estimator.

A model is a table of logits [P, V], one row per prefix, so that contexts matter and each gradient is one too: [P, V].
Completions end with the stop token or at ``max_length``. Nothing here uses the estimators it is there to judge:
probabilities are multiplied out, gradients of log-probs are written down (one-hot minus probabilities).

P prefixes, V vocabulary, B all sequences, N all their tokens laid end to end. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

STOP = 0
Steps = list[tuple[int, int]]  # (prefix row, token) along a sequence


@dataclass(frozen=True)
class Tree:
    """Every prefix and every sequence over a vocabulary, up to a length."""

    vocabulary: int
    max_length: int
    prefixes: tuple[tuple[int, ...], ...]  # P prefixes a token may follow, by length; the first is empty
    sequences: tuple[tuple[int, ...], ...]  # B completions, each ended by STOP or by max_length
    tokens: Tensor  # [N] int64
    states: Tensor  # [N] int64: which prefix the token follows
    sequence_ids: Tensor  # [N] int64
    finished: Tensor  # [B] bool: ended by STOP

    @classmethod
    def grow(cls, vocabulary: int = 4, max_length: int = 3) -> Tree:
        words = range(1, vocabulary)
        prefixes = tuple(prefix for length in range(max_length) for prefix in product(words, repeat=length))
        stopped = [(*prefix, STOP) for prefix in prefixes]
        sequences = (*stopped, *product(words, repeat=max_length))
        index = {prefix: row for row, prefix in enumerate(prefixes)}
        flat = [(token, index[y[:t]], b) for b, y in enumerate(sequences) for t, token in enumerate(y)]
        tokens, states, sequence_ids = (torch.tensor(column) for column in zip(*flat, strict=True))
        finished = torch.tensor([y[-1] == STOP for y in sequences])
        return cls(vocabulary, max_length, prefixes, sequences, tokens, states, sequence_ids, finished)

    def table(self, seed: int, scale: float = 1.0) -> Tensor:
        """[P, V] logits of a model, normally distributed."""
        shape = (len(self.prefixes), self.vocabulary)
        return torch.from_numpy(np.random.default_rng(seed).normal(size=shape) * scale)

    def walks(self) -> list[Steps]:
        """[B] every sequence as the (prefix row, token) pairs it passes."""
        index = {prefix: row for row, prefix in enumerate(self.prefixes)}
        return [[(index[y[:t]], token) for t, token in enumerate(y)] for y in self.sequences]

    def child(self, state: int, token: int) -> int | None:
        """The prefix row after a token, None where the sequence has ended."""
        prefix = (*self.prefixes[state], token)
        return self.prefixes.index(prefix) if token != STOP and len(prefix) < self.max_length else None

    def sequence_probabilities(self, logits: Tensor) -> Tensor:
        """[B] probability of each sequence, with gradient."""
        logprobs = logits.log_softmax(-1)[self.states, self.tokens]
        return torch.zeros(len(self.sequences), dtype=logprobs.dtype).index_add(0, self.sequence_ids, logprobs).exp()

    def visits(self, logits: Tensor) -> Tensor:
        """[P] probability that a completion passes each prefix, with gradient; from the root down."""
        probabilities = logits.softmax(-1)
        reached: list[Tensor] = [torch.ones((), dtype=logits.dtype)]
        for prefix in self.prefixes[1:]:
            parent = self.prefixes.index(prefix[:-1])
            reached.append(reached[parent] * probabilities[parent, prefix[-1]])
        return torch.stack(reached)


def gradient(objective: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """[P, V] gradient of a scalar function of a table."""
    leaf = logits.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(objective(leaf), leaf)
    return result


def sequence_kl(tree: Tree, first: Tensor, second: Tensor) -> Tensor:
    """KL(first‖second) between the laws of whole sequences: a sum over every sequence."""
    p, q = tree.sequence_probabilities(first), tree.sequence_probabilities(second)
    return (p * (p / q).log()).sum()


def token_kl(first: Tensor, second: Tensor) -> Tensor:
    """[P] KL(first‖second) of the next token at each prefix."""
    p, q = first.softmax(-1), second.softmax(-1)
    return (p * (p / q).log()).sum(-1)


def score_gradient(coefficients: Tensor, logits: Tensor) -> Tensor:
    """[P, V] Σ over prefixes and tokens of coefficient * ∇log π(token|prefix), written down without autograd."""
    return coefficients - logits.softmax(-1) * coefficients.sum(-1, keepdim=True)


def returns(tree: Tree, logits: Tensor, rewards: Tensor, discount: float) -> Tensor:
    """[P, V] expected discounted return of taking each token at each prefix, from the leaves up.

    ``rewards`` [P, V] are earned by the token itself; afterwards the model ``logits`` goes on.
    """
    probabilities, values = logits.softmax(-1), rewards.clone()
    for state in reversed(range(len(tree.prefixes))):
        for token in range(tree.vocabulary):
            child = tree.child(state, token)
            if child is not None:
                values[state, token] += discount * (probabilities[child] * values[child]).sum()
    return values


def brute_force(tree: Tree, drawn_from: Tensor, logits: Tensor, coefficient: Callable[[Steps, int], float]) -> Tensor:
    """[P, V] Σ_y q(y) Σ_t coefficient(y, t) ∇log π(y_t|h_t), one sequence and one token at a time."""
    total = [[0.0] * tree.vocabulary for _ in tree.prefixes]
    probabilities = drawn_from.softmax(-1).tolist()
    for steps in tree.walks():
        drawn = math.prod(probabilities[state][token] for state, token in steps)
        for t, (state, token) in enumerate(steps):
            total[state][token] += drawn * coefficient(steps, t)
    return score_gradient(torch.tensor(total, dtype=logits.dtype), logits)


def expected_shares(tree: Tree, logits: Tensor, values: Tensor, share: Callable[[list[float]], list[float]]) -> Tensor:
    """[P, V] Σ over all batches of two sequences of what ``share`` makes of the batch's ``values`` [P, V]."""
    total = [[0.0] * tree.vocabulary for _ in tree.prefixes]
    probabilities, given, walks = logits.softmax(-1).tolist(), values.tolist(), tree.walks()
    drawn = [math.prod(probabilities[state][token] for state, token in steps) for steps in walks]
    for first, second in product(range(len(walks)), repeat=2):
        batch = walks[first] + walks[second]
        shares = share([given[state][token] for state, token in batch])
        for (state, token), value in zip(batch, shares, strict=True):
            total[state][token] += drawn[first] * drawn[second] * value
    return torch.tensor(total, dtype=logits.dtype)
