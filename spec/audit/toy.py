"""A target and a draft of a few symbols, and a speculative engine over them that runs hundreds of texts in lock step.

Small enough that thousands of audits take minutes: what the auditor's own claims are measured on. The engine is written
apart from spec.engine, in numpy, with one method for each decision, so that a mutant overrides what it breaks.

Shape legend: B texts, V vocabulary, K draft length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from spec.audit.sample import Sample
from spec.params import Params, row_options
from spec.request import Request
from spec.sampling import processed_probs

V = 16
K = 3
CONTEXT = 2  # tokens


class Markov:
    """Next-token logits by the last two tokens: [V, V, V] float64."""

    vocab_size = V

    def __init__(self, table: np.ndarray):
        self.table = table

    @classmethod
    def pair(cls, seed: int = 0, closeness: float = 0.8) -> tuple[Markov, Markov]:
        """A target with two nats of spread, and a draft that resembles it (acceptance near 0.6)."""
        draw = np.random.default_rng(seed)
        target = 1.8 * draw.standard_normal((V, V, V))
        draft = closeness * target + 0.9 * draw.standard_normal((V, V, V))
        return cls(target), cls(draft)

    def rows(self, samples: Sequence[Sample], most: int) -> Iterator[Tensor]:
        """See :class:`spec.audit.conditionals.Conditionals`."""
        contexts: list[tuple[int, int]] = []
        for s in samples:
            text = [*s.prompt_ids, *s.token_ids]
            first = len(s.prompt_ids)
            contexts += [(text[at - 2], text[at - 1]) for at in range(first, len(text))]
        index = np.array(contexts, dtype=np.int64).reshape(-1, 2)
        for start in range(0, len(index), most):
            part = index[start : start + most]
            yield torch.from_numpy(self.table[part[:, 0], part[:, 1]])


def toy_prompts(count: int = 24, seed: int = 0) -> list[list[int]]:
    """Of 2 to 5 symbols."""
    draw = np.random.default_rng([seed, 7])
    return [draw.integers(0, V, int(draw.integers(2, 6))).tolist() for _ in range(count)]


class ToyEngine:
    """Token-wise speculative sampling, right in every respect. Mutants (:mod:`spec.audit.mutants`) override methods.

    All noise is Gumbel: a token is argmax(log law + g). Requests of one call run in lock step.
    """

    name = "toy"
    unsupported: frozenset[str] = frozenset()

    def __init__(self, target: Markov, draft: Markov, seed: int = 0):
        self.target, self.draft = target, draft
        self.noise = np.random.default_rng([seed, 11])

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Each request's text, with positions in the block."""
        self.params = [r.params for r in requests]
        self.texts = [list(r.prompt_ids) for r in requests]
        self.prompts = [list(r.prompt_ids) for r in requests]
        limits = [r.max_tokens for r in requests]
        offsets: list[list[int]] = [[] for _ in requests]
        self.begin(requests)
        while any(len(t) - len(p) < limit for t, p, limit in zip(self.texts, self.prompts, limits, strict=True)):
            blocks = self.block()
            for text, block, found in zip(self.texts, blocks, offsets, strict=True):
                text += block
                found += range(len(block))
        return [
            Sample(tuple(p), tuple(t[len(p) : len(p) + limit]), params, tuple(o[:limit]))
            for p, t, limit, params, o in zip(self.prompts, self.texts, limits, self.params, offsets, strict=True)
        ]

    # ------------------------------------------------------------------------------------------ what mutants override

    def begin(self, requests: Sequence[Request]) -> None:
        """Before the first block."""

    def gumbel(self) -> np.ndarray:
        """[B, V] noise."""
        return self.noise.gumbel(size=(len(self.texts), V))

    def uniform(self) -> np.ndarray:
        """[B]"""
        return self.noise.random(len(self.texts))

    def p(self, i: int, drafted: list[np.ndarray], role: str) -> np.ndarray:
        """[B, V] target law of row ``i``; role: accept, residual or bonus."""
        return self.law(self.target, drafted[:i])

    def q(self, drafted: list[np.ndarray]) -> np.ndarray:
        """[B, V] law the next draft is drawn from."""
        return self.law(self.draft, drafted)

    def reported(self, q: np.ndarray, drafted: list[np.ndarray]) -> np.ndarray:
        """[B, V] what the verifier is told of it."""
        return q

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        """[B] bool."""
        rows = np.arange(len(x))
        return u * q[rows, x] < p[rows, x]

    def residual(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """[B, V], not normalised: Gumbel sampling does not mind."""
        excess = np.maximum(p - q, 0)
        return np.where(excess.sum(1, keepdims=True) > 0, excess, p)

    def residual_noise(self, draft_noise: np.ndarray) -> np.ndarray:
        """[B, V]"""
        return self.gumbel()

    # ---------------------------------------------------------------------------------------------------- machinery

    def block(self) -> list[list[int]]:
        """What every text commits in one verification step."""
        drafted: list[np.ndarray] = []
        laws, noises = [], []
        for _ in range(K):
            q, g = self.q(drafted), self.gumbel()
            laws.append(self.reported(q, drafted))
            noises.append(g)
            drafted.append(choose(q, g))
        running = np.ones(len(self.texts), dtype=bool)
        blocks: list[list[int]] = [[] for _ in self.texts]
        for i, (q, x) in enumerate(zip(laws, drafted, strict=True)):
            good = self.accept(self.p(i, drafted, "accept"), q, x, self.uniform())
            y = choose(self.residual(self.p(i, drafted, "residual"), q), self.residual_noise(noises[i]))
            for b in np.flatnonzero(running):
                blocks[b].append(int(x[b] if good[b] else y[b]))
            running &= good
        y = choose(self.p(K, drafted, "bonus"), self.gumbel())
        for b in np.flatnonzero(running):
            blocks[b].append(int(y[b]))
        return blocks

    def law(
        self, model: Markov, drafted: Sequence[np.ndarray], params: Sequence[Params] | None = None, lag: int = 0
    ) -> np.ndarray:
        """[B, V] processed law of a model after the drafted tokens; penalties see all but the last ``lag`` tokens."""
        params = self.params if params is None else params
        texts = [[*t, *(int(x[b]) for x in drafted)] for b, t in enumerate(self.texts)]
        logits = torch.from_numpy(model.table[[t[-2] for t in texts], [t[-1] for t in texts]])
        outputs = [t[len(p) : max(len(t) - lag, len(p))] for t, p in zip(texts, self.prompts, strict=True)]
        return processed_probs(logits, **row_options(params, V, self.prompts, outputs)).numpy()


def choose(law: np.ndarray, gumbel: np.ndarray) -> np.ndarray:
    """[B] argmax(log law + noise)."""
    with np.errstate(divide="ignore"):
        return (np.log(law) + gumbel).argmax(1)
