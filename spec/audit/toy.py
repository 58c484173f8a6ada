"""A target and a draft of a few symbols, and a speculative engine over them that runs hundreds of texts in lock step.

Small enough that thousands of audits take minutes: what the auditor's own claims are measured on. The engine is written
apart from spec.engine, in numpy, with one method for each decision, so that a mutant overrides what it breaks.

Shape legend: B texts, V vocabulary, K draft length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spec.audit.sample import UNKNOWN, Sample
from spec.params import Params, row_options
from spec.request import Request
from spec.sampling import processed_probs

V = 16
K = 3
CONTEXT = 2  # tokens
_KNOWN = 20_000  # rows remembered
Text = tuple[int, ...]


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
        self.fault = np.random.default_rng([seed, 13])  # what a mutant's fault draws: the rest stays as it would be
        self._tables: dict[tuple[object, ...], np.ndarray] = {}  # laws by model and setting, [V, V, V]
        self._rows: dict[tuple[Any, ...], np.ndarray] = {}  # of settings with penalties, by their whole text

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Each request's text, with positions in the block."""
        prompts, limits = [list(r.prompt_ids) for r in requests], [r.max_tokens for r in requests]
        self.begin(requests)
        offsets = self.run(prompts, [[*p] for p in prompts], [r.params for r in requests], limits)
        return [
            Sample(tuple(p), tuple(t[len(p) : len(p) + limit]), r.params, tuple(o[:limit]))
            for p, t, limit, r, o in zip(prompts, self.texts, limits, requests, offsets, strict=True)
        ]

    def run(
        self, prompts: list[list[int]], texts: list[list[int]], params: list[Params], tokens: Sequence[int]
    ) -> list[list[int]]:
        """Continues ``texts`` (prompt and what was said) by at least so many tokens; their positions in the block."""
        self.prompts, self.texts, self.params = prompts, texts, params
        ends = [len(text) + more for text, more in zip(texts, tokens, strict=True)]
        offsets: list[list[int]] = [[] for _ in texts]
        while any(len(t) < end for t, end in zip(self.texts, ends, strict=True)):
            for text, block, found in zip(self.texts, self.block(), offsets, strict=True):
                text += block
                found += range(len(block))
        return offsets

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
        whole = np.array([t[-CONTEXT:] for t in self.texts])
        whole = np.concatenate([whole, np.stack(drafted, 1)], axis=1) if len(drafted) else whole
        once = {id(x): setting_key(x) for x in {id(x): x for x in params}.values()}
        alike: dict[tuple[object, ...], list[int]] = {}  # rows by setting
        if len(once) == 1:
            alike[next(iter(once.values()))] = list(range(len(params)))
        else:
            for b, x in enumerate(params):
                alike.setdefault(once[id(x)], []).append(b)
        laws = np.empty((len(whole), V))
        for key, rows in alike.items():
            shaping, who = params[rows[0]], (model is self.target, *key)
            if shaping.penalised:
                laws[rows] = self._penalised(model, whole, shaping, who, rows, lag)
            else:
                if who not in self._tables:
                    flat = torch.from_numpy(model.table.reshape(-1, V))
                    shaped = processed_probs(flat, **row_options([shaping] * len(flat), V))
                    self._tables[who] = shaped.numpy().reshape(V, V, V)
                laws[rows] = self._tables[who][whole[rows, -2], whole[rows, -1]]
        return laws

    def _penalised(
        self, model: Markov, whole: np.ndarray, shaping: Params, who: tuple[object, ...], rows: list[int], lag: int
    ) -> np.ndarray:
        """[len(rows), V]; ``whole``: [B, CONTEXT + drafted] last tokens."""
        if len(self._rows) > _KNOWN:
            self._rows.clear()
        keys: list[tuple[Any, ...]] = []
        unknown: dict[tuple[Any, ...], None] = {}
        for b in rows:
            text, prompt, ahead = self.texts[b], self.prompts[b], whole[b].tolist()
            said = (*text[len(prompt) :], *ahead[CONTEXT:])
            said = said[: max(len(said) - lag, 0)] if lag else said
            key = (who, ahead[-2], ahead[-1], tuple(prompt), said)
            keys.append(key)
            if key not in self._rows:
                unknown[key] = None
        if unknown:
            _, older, newer, prompts, outputs = zip(*unknown, strict=True)
            logits = torch.from_numpy(model.table[list(older), list(newer)])
            found = processed_probs(logits, **row_options([shaping] * len(unknown), V, prompts, outputs)).numpy()
            self._rows.update(zip(unknown, found, strict=True))
        return np.stack([self._rows[key] for key in keys])


class BlockToyEngine(ToyEngine):
    """The same with block verification (Sun et al. 2403.10444, algorithm 2), right as well."""

    name = "toy block"

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """A later position in the block says something of the token there: see spec.audit.engines.ours.offsets."""
        return [
            replace(s, offsets=tuple(o if o == 0 else UNKNOWN for o in s.offsets or ()))
            for s in super().generate(requests)
        ]

    def block(self) -> list[list[int]]:
        drafted: list[np.ndarray] = []
        q: list[np.ndarray] = []
        for _ in range(K):
            q.append(self.q(drafted))
            drafted.append(choose(q[-1], self.gumbel()))
        p = [self.p(i, drafted, "bonus") for i in range(K + 1)]
        rows = np.arange(len(self.texts))
        weights = [np.ones(len(rows))]
        for i, x in enumerate(drafted):
            weights.append(np.minimum(1.0, weights[-1] * p[i][rows, x] / q[i][rows, x]))
        excess = [np.maximum(weights[i][:, None] * p[i] - q[i], 0) for i in range(K)] + [p[K]]
        taken = np.zeros(len(rows), dtype=int)
        for i in range(1, K + 1):
            mass = excess[i].sum(1)
            h = mass / np.maximum(mass + 1 - weights[i], 1e-300) if i < K else weights[K]
            taken[self.uniform() < h] = i
        last = choose(np.stack(excess)[taken, rows], self.gumbel())
        return [[*(int(drafted[i][b]) for i in range(taken[b])), int(last[b])] for b in rows]


def setting_key(params: Params) -> tuple[object, ...]:
    """What a law depends on: all but the seed."""
    return (
        params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty,
        params.presence_penalty, params.frequency_penalty, *params.logit_bias.items(),
    )  # fmt: skip


def choose(law: np.ndarray, gumbel: np.ndarray) -> np.ndarray:
    """[B] argmax(log law + noise)."""
    with np.errstate(divide="ignore"):
        return (np.log(law) + gumbel).argmax(1)
