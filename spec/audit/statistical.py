"""The black-box audit: rounds of requests, scored and bet on, until the answer is known or the tokens are used up."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spec.audit.certificate import Certificate
from spec.audit.diagnostics import Diagnostics
from spec.audit.evidence import Capital, Evidence
from spec.audit.sample import EngineUnderAudit, Sample
from spec.audit.scoring import Scored, Scorer
from spec.audit.verdict import Answer, Fault, Verdict
from spec.params import Params
from spec.request import Request

PANEL = (
    Params(),
    Params(temperature=0.7),
    Params(temperature=1.2, top_k=20),
    Params(temperature=0.9, top_p=0.9),
    Params(temperature=0.8, repetition_penalty=1.2, presence_penalty=0.2, frequency_penalty=0.2),
    Params(min_p=0.05, logit_bias={1: 1.0, 2: -1.0}),
)


_TO_NAME = 1000  # tokens at least: several laws explain the first few hundred


@dataclass(frozen=True)
class Settings:
    """How an audit decides. Raises ValueError, naming the remedy, for a value outside its range."""

    delta: float = 1e-3  # of a wrong "different", and of a wrong "equivalent"
    epsilon: float = 0.02  # "equivalent" needs a bound this small
    tokens: int = 50_000  # at most
    max_tokens: int = 32  # a request
    first_round: int = 8  # requests; every later round is twice as large, up to 64 first rounds
    tolerance: float = 0.0  # mass per token outside the target's support that rounding may cause (spec.audit.evidence)
    logprob_gap: float = 0.05  # nats between a reported log-prob and ours that rounding may cause
    seed: int = 0
    stop_early: bool = True

    def __post_init__(self) -> None:
        for name, low, high in (("delta", 0, 1), ("epsilon", 0, 1)):
            if not low < getattr(self, name) < high:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1, for example 0.001 or 0.01")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: must be in [0, 1); 0 for exact arithmetic")
        for name in ("tokens", "max_tokens", "first_round"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


def panel_for(engine: EngineUnderAudit, panel: Sequence[Params] = PANEL, vocabulary: int = 2**31) -> list[Params]:
    """The panel without what the engine refuses, or the vocabulary has no tokens for; each setting once."""
    neutral = Params()
    kept = {}
    for params in panel:
        plain = replace(params, **{name: getattr(neutral, name) for name in engine.unsupported})
        plain = replace(plain, logit_bias={t: b for t, b in plain.logit_bias.items() if t < vocabulary})
        kept[repr(plain)] = plain
    return list(kept.values())


def requests(prompts: Sequence[Sequence[int]], panel: Sequence[Params], settings: Settings) -> Iterator[Request]:
    """Without end: every prompt under every setting, each twice in a row with different seeds."""
    if not prompts or not panel:
        raise ValueError("an audit needs at least one prompt and one setting")
    seeds = itertools.count(settings.seed * 2**32 + 1)
    for turn in itertools.count():
        # the settings rotate against the prompts, so that a short audit sees all of them
        for i, prompt in enumerate(prompts):
            params = panel[(i + turn) % len(panel)]
            for _ in range(2):
                yield Request(tuple(prompt), replace(params, seed=next(seeds)), settings.max_tokens)


def audit(
    engine: EngineUnderAudit,
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    settings: Settings | None = None,
    panel: Sequence[Params] | None = None,
    report: Callable[[Watch], None] = lambda watch: None,
) -> Verdict:
    """Audits ``engine`` against the scorer's target on ``prompts`` (token ids), cycling through ``panel``.

    ``report`` is called with what is known after every round of answers.

    Raises what the engine raises, and ValueError for greedy settings (see :mod:`spec.audit.greedy`) or an engine that
    says nothing.
    """
    settings = settings or Settings()
    panel = panel_for(engine, vocabulary=scorer.target.vocab_size) if panel is None else list(panel)
    if any(params.greedy for params in panel):
        raise ValueError("a greedy setting has no noise to test: use the greedy mode for temperature 0")
    watch = Watch(settings)
    clock = {"generation": 0.0, "scoring": 0.0}
    coming, size = requests(prompts, panel, settings), settings.first_round
    while watch.answer is None:
        asked = list(itertools.islice(coming, size))
        begin = time.perf_counter()
        samples = engine.generate(asked)
        middle = time.perf_counter()
        if not any(sample.token_ids for sample in samples):
            raise ValueError(f"{engine.name} says nothing: give prompts that it answers")
        watch.update(samples, scorer.score(samples))
        clock["generation"] += middle - begin
        clock["scoring"] += time.perf_counter() - middle
        report(watch)
        left = settings.tokens - watch.tokens
        size = max(2, min(2 * size, 64 * settings.first_round, math.ceil(left / settings.max_tokens)))
    return unsure(watch.verdict(engine.name, clock), getattr(engine, "left_out", 0))


def unsure(verdict: Verdict, left_out: int) -> Verdict:
    """``undecided`` where an engine's adapter had to leave out answers: which ones was decided by what they say."""
    tests = {**verdict.tests, "left_out": left_out}
    return replace(verdict, tests=tests, verdict="undecided" if left_out else verdict.verdict)


class Watch:
    """The running state of an audit, in bounded memory: also of live traffic, for as long as a server runs.

    What it says is valid only for samples that were not picked by what they say: feed live traffic through
    :class:`spec.audit.live.Arrivals`.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        self.evidence = Evidence(settings.tolerance, level=-math.log(settings.delta))
        self.certificate = Certificate(settings.delta)
        self.diagnostics = Diagnostics()
        self._gaps: dict[str, float] = {}  # law that log-probs may be reported of -> largest gap to the reported ones
        self._misreported: int | None = None  # tokens when neither law explained them

    def update(self, samples: Sequence[Sample], scored: Scored) -> None:
        """``scored``: of these samples, in this order, by one :class:`Scorer` for the whole audit."""
        self.evidence.update(scored)
        self.certificate.update(scored)
        self.diagnostics.update(scored, [sample.params for sample in samples])
        for law, gaps in scored.gaps.items():
            if not np.isnan(gaps).all():
                self._gaps[law] = max(self._gaps.get(law, 0.0), min(float(np.nanmax(gaps)), 1e9))  # finite, for JSON
        if self._misreported is None and self.logprob_gap is not None and self.logprob_gap > self.settings.logprob_gap:
            self._misreported = self.tokens

    @property
    def logprob_gap(self) -> float | None:
        """Largest |reported - due| log-prob, of the law (raw or processed) that fits better; None: none reported.

        Arithmetic, not statistics: the text can be right and its log-probs another token's.
        """
        return min(self._gaps.values()) if self._gaps else None

    @property
    def tokens(self) -> int:
        """Audited so far."""
        return self.evidence.tokens

    @property
    def log10_e(self) -> float:
        """The evidence now; different from ``log10(1 / delta)``, wherever its maximum was."""
        return self.evidence.log_e / math.log(10)

    @property
    def epsilon(self) -> float:
        """The bound on the mean shift of mass so far, see :mod:`spec.audit.certificate`; 1 before any token."""
        return self.certificate.epsilon

    @property
    def answer(self) -> Answer | None:
        """None while more tokens may tell. Once "different" it stays so; "equivalent" speaks of the tokens so far."""
        settings, shown = self.settings, self.evidence.reached
        spent = self.tokens >= settings.tokens
        if shown is None and self._misreported is not None:
            return "different" if spent or settings.stop_early else None
        if shown is not None:  # a little further, to name the fault
            named = self.tokens >= max(_TO_NAME, 4 * shown)
            return "different" if spent or (settings.stop_early and named) else None
        if self.epsilon <= settings.epsilon and (settings.stop_early or spent):
            return "equivalent"
        return "undecided" if spent else None

    def verdict(self, engine: str, seconds: dict[str, float]) -> Verdict:
        answer = self.answer or "undecided"
        fault = self._fault() if answer == "different" else None
        families = {
            kind: {name: {"log10_e": c.log_mean / math.log(10), "best": c.best} for name, c in found.items()}
            for kind, found in (("named", self.evidence.named), ("shapes", self.evidence.shapes))
        }
        return Verdict(
            verdict=answer,
            engine=engine,
            mode="statistical",
            delta=self.settings.delta,
            tokens=self.tokens,
            epsilon=self.epsilon,
            wanted_epsilon=self.settings.epsilon,
            fault=fault,
            tests={
                "log10_e": self.evidence.highest / math.log(10),
                "decided_at": self.evidence.reached or self._misreported or self.tokens,
                "bets": families,
                "directions": self.certificate.table(),
                "excluded": self.evidence.excluded(self.settings.delta),
                "logprob_gap": self.logprob_gap,
                "tolerance": self.settings.tolerance,
                "standard": self.diagnostics.standard_tests(),
            },
            path=[(look.tokens, look.log_e / math.log(10)) for look in self.evidence.path],
            histograms=self.diagnostics.histograms(),
            seconds=seconds,
        )

    def _fault(self) -> Fault:
        """The named family with the largest capital, unless a shape has e^5 times that: then none is right.

        What began as one fault shows in many ways (a temperature that is garbage repeats tokens, say), so every other
        family that would have sufficed alone is named beside it.
        """
        if self.evidence.reached is None and self.logprob_gap is not None:
            return Fault("log-probs of another token", {"nats off": self.logprob_gap})
        name, best = max(self.evidence.named.items(), key=lambda item: item[1].log_mean)
        shape, bump = max(self.evidence.shapes.items(), key=lambda item: item[1].log_mean)
        if bump.log_mean > best.log_mean + 5:
            return Fault("unnamed", {"seen in": shape}, self.diagnostics.where(None))
        law = f"temperature x{best.best:g}" if name == "temperature" else name
        also = [other for other in self.evidence.shown() if other != name]
        return Fault(name, _parameters(name, best), self.diagnostics.where(law), tuple(also))


def _parameters(name: str, capital: Capital) -> dict[str, float]:
    if name == "temperature":
        return {"factor": capital.best}
    return {} if name == "temperature ignored" else {"share": capital.best}
