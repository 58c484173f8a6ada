"""An audit of live traffic: what may be fed, in which order, and in bounded memory."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from spec.audit.live import Arrivals
from spec.audit.sample import Sample
from spec.audit.scoring import Scorer
from spec.audit.statistical import Settings, Watch
from spec.audit.toy import Markov, ToyEngine, V, toy_prompts
from spec.params import Params
from spec.request import Request

END = 0  # the token that ends an answer


def answer(first: int) -> Sample:
    return Sample((1, 2), (first,), Params())


def test_answers_are_fed_in_the_order_of_arrival() -> None:
    line = Arrivals(1.0)
    a, b, c = (line.arrived(Params(), clients_seed=False) for _ in range(3))
    assert a and b and c
    assert line.finished(c, answer(3)) == [] and line.finished(a, answer(1)) == [answer(1)]
    assert line.finished(b, None) == [answer(3)]  # an answer without tokens holds up nothing
    with pytest.raises(ValueError, match="once"):
        line.finished(b, answer(2))


def test_what_is_never_watched() -> None:
    line = Arrivals(1.0)
    assert line.arrived(Params(temperature=0.0), clients_seed=False) is None
    assert line.arrived(Params(seed=4), clients_seed=True) is not None
    assert line.arrived(Params(seed=4, temperature=0.5), clients_seed=True) is None
    assert line.arrived(Params(seed=4), clients_seed=False) is not None
    assert Arrivals(0.0).arrived(Params(), clients_seed=False) is None
    with pytest.raises(ValueError, match="share=2"):
        Arrivals(2.0)


def test_the_share_is_kept_and_the_line_is_bounded() -> None:
    line = Arrivals(0.25, waiting=10**6, random=random.Random(1))
    chosen = sum(line.arrived(Params(), clients_seed=False) is not None for _ in range(4000))
    assert 900 < chosen < 1100
    short = Arrivals(1.0, waiting=2)
    tickets = [short.arrived(Params(), clients_seed=False) for _ in range(3)]
    assert tickets[2] is None and tickets[0] is not None
    short.finished(tickets[0], answer(1))
    assert short.arrived(Params(), clients_seed=False) is not None


def test_the_order_of_finishing_would_be_a_false_alarm_and_that_of_arrival_is_not() -> None:
    """Answers end at a token. Of 400 asked together the short ones come first: they alone hold too much of it."""
    table = np.zeros((V, V, V))
    table[..., END] = -0.5  # 4 %: last in the order of the PIT
    models = Markov(table), Markov(table)
    engine = ToyEngine(*models, seed=3)
    asked = [Request(tuple(p), Params(seed=i), 40) for i, p in enumerate(toy_prompts(count=400, seed=3))]
    ended = [replace(s, token_ids=_to_the_end(s.token_ids), offsets=None) for s in engine.generate(asked)]
    watches = {}
    for name, order in (("arrival", ended), ("finish", sorted(ended, key=lambda s: len(s.token_ids)))):
        watches[name] = watch = Watch(Settings(delta=1e-3))
        watch.update(order, Scorer(models[0]).score(order))
    assert watches["arrival"].evidence.highest < np.log(1e3) < watches["finish"].evidence.highest


def _to_the_end(tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


def test_memory_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 answers in as many settings: what is kept has bounds, and what a server shows is there."""
    monkeypatch.setattr("spec.audit.scoring._REMEMBERED", 500)
    monkeypatch.setattr("spec.audit.evidence._LOOKS", 64)
    models, draw = Markov.pair(0), np.random.default_rng(0)
    scorer, watch = Scorer(models[0]), Watch(Settings(tokens=10**9))
    for turn in range(30):
        samples = [
            Sample((turn % V, i % V), tuple(draw.integers(0, V, 3)), Params(temperature=1 + turn / 100 + i / 1e4))
            for i in range(100)
        ]
        watch.update(samples, scorer.score(samples))
    assert len(scorer._answers) <= 101 and scorer._remembered <= 505
    assert len(watch.evidence.path) <= 66 and watch.evidence.path[-1].tokens == watch.tokens == 9000
    assert len(watch.diagnostics._groups) <= 66
    assert watch.log10_e > 3 and watch.answer == "different" and 0 < watch.epsilon <= 1
    spacing = np.diff([look.tokens for look in watch.evidence.path][:-1])
    assert len(set(spacing.tolist())) == 1  # evenly thinned
