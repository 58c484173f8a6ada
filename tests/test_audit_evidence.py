"""The statistics of the audit, themselves tested: fair under the null at every look, coverage of the bound, power."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from spec.audit.certificate import Certificate, Direction, excess
from spec.audit.evidence import Evidence, _bumps, _intervals, _shape_bets
from spec.audit.mutants import MUTANTS, StaleCache, build
from spec.audit.samples_only import kernel, permutation_test
from spec.audit.scoring import Scored
from spec.audit.statistical import Settings, requests
from spec.audit.toy import Markov, ToyEngine, toy_prompts
from spec.audit.trial import PANEL, try_one
from spec.audit.verdict import Fault, Verdict
from spec.params import Params
from spec.request import Request


def scored(pit: np.ndarray, draw: np.random.Generator, length: int = 20) -> Scored:
    """Samples of ``length`` tokens with these PITs, and one named law whose ratios are fair: 0 or 2 in equal parts."""
    n = len(pit)
    ratio = np.where(draw.random(n) < 0.5, -np.inf, math.log(2))
    nothing = np.zeros(n)
    position = np.arange(n) % length
    return Scored(
        np.arange(n) // length, position, position % 3, np.full(n, -1.0), np.ones(n), np.ones(n), pit,
        np.full(n, np.nan),
        {"temperature x2": (np.zeros(n), nothing), "draft leak": (ratio, nothing)},
        {"half": ((pit < 0.5).astype(float), np.full(n, 0.5))},
    )  # fmt: skip


def test_every_shape_bet_is_fair() -> None:
    intervals = _intervals()
    for number, gain_in, gain_out in _bumps():
        width = 2.0 ** -intervals[number][0]
        assert width * math.exp(gain_in) + (1 - width) * math.exp(gain_out) == pytest.approx(1, abs=1e-12)


def test_shape_bets_count_what_lies_in_their_intervals() -> None:
    u = np.array([0.01, 0.26, np.nan, 0.99])
    gains = _shape_bets((u, np.zeros(4)), np.array([1, 3])).gains
    for (number, gain_in, gain_out), (first, second) in zip(_bumps(), gains, strict=True):
        level, i = _intervals()[number]
        inside = [i / 2**level <= x < (i + 1) / 2**level for x in (0.01, 0.26, 0.99)]
        due = [gain_in if yes else gain_out for yes in inside]
        assert first == pytest.approx(due[0] + due[1]) and second == pytest.approx(due[2])


def test_false_alarms_at_any_time_are_at_most_the_level() -> None:
    """The highest of all looks, in 200 audits of 600 tokens: above 1/0.1 in at most 10 % of them and two errors."""
    draw = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        evidence = Evidence()
        for _ in range(3):
            evidence.update(scored(draw.random(200), draw))
        alarms += evidence.highest >= math.log(10)
    assert alarms <= 200 * 0.1 + 2 * math.sqrt(200 * 0.1 * 0.9)


def test_dependence_between_tokens_is_found_though_each_is_uniform() -> None:
    draw = np.random.default_rng(2)
    u = draw.random(2000)
    u[1::2] = (u[::2] + 0.1 * draw.random(1000)) % 1  # every second token repeats the noise of the one before
    evidence = Evidence()
    evidence.update(scored(u, draw))
    best = max(evidence.shapes, key=lambda name: evidence.shapes[name].log_mean)
    assert evidence.highest > math.log(1000) and best == "after the token before"


def test_noise_used_for_every_request_is_found() -> None:
    draw = np.random.default_rng(3)
    evidence = Evidence()
    evidence.update(scored(np.tile(draw.random(20), 40), draw))
    assert evidence.shapes["beside the request before"].log_mean > math.log(1000)


def test_batches_do_not_matter() -> None:
    """The same tokens in one batch or in ten: the same evidence."""
    u = np.random.default_rng(4).random(400) ** 1.6
    one, ten = Evidence(level=0.5), Evidence(level=0.5)
    one.update(scored(u, np.random.default_rng(5)))
    draw = np.random.default_rng(5)
    for part in np.split(u, 10):
        ten.update(scored(part, draw))
    assert one.log_e == pytest.approx(ten.log_e, abs=1e-9)
    assert [look.tokens for look in one.path] == [look.tokens for look in ten.path]
    assert one.highest == pytest.approx(ten.highest, abs=1e-9) and one.reached == ten.reached is not None


def test_excess_is_where_the_mixture_reaches_the_level() -> None:
    from spec.audit.certificate import _PSI, _RATES

    for squares in (0.0, 3.0, 1e4):
        s = excess(squares, 1e-3)
        assert np.logaddexp.reduce(_RATES * s - _PSI * squares) - math.log(len(_RATES)) == pytest.approx(math.log(1e3))
    # within a factor of the law of the iterated logarithm's constants: z of a fixed sample would be 3.1
    assert 3.1 < excess(1e4, 1e-3) / 100 < 5


@pytest.mark.parametrize("shift", [0.0, 0.08])
def test_the_bound_holds_at_every_look(shift: float) -> None:
    """400 paths, a rare and a common set, expectation that changes from token to token: at most 10 % ever outside."""
    draw = np.random.default_rng(6)
    missed = 0
    for _ in range(400):
        p = draw.choice([0.02, 0.5], size=1500)
        x = (draw.random(1500) < p + shift) - p
        totals, squares, n = np.cumsum(x), np.cumsum(x * x), np.arange(1, 1501)
        looks = [19, 59, 199, 599, 1499]
        missed += any(
            abs(totals[i] / n[i] - shift) > Direction(int(n[i]), float(totals[i]), float(squares[i])).radius(0.1)
            for i in looks
        )
    assert missed <= 400 * 0.1 + 2 * math.sqrt(400 * 0.09)


def test_certificate_takes_the_worst_direction() -> None:
    draw = np.random.default_rng(7)
    certificate = Certificate(0.01)
    assert certificate.epsilon == 1
    certificate.update(scored(draw.random(4000) * 0.9, draw))
    table = certificate.table()
    assert certificate.epsilon == max(row["bound"] for row in table.values())
    assert table["half"]["shift"] == pytest.approx(0.5 / 0.9 - 0.5, abs=0.03)
    assert table["half"]["bound"] > 0.5 / 0.9 - 0.5


@pytest.mark.parametrize(
    ("name", "tokens"), [("GarbageTemperature", 200), ("GarbageTopP", 400), ("FixedSeed", 400),
                         ("GreedyVerification", 400), ("SeedNotAdvanced", 800), ("LogprobsOfAnotherToken", 100)]
)  # fmt: skip
def test_gross_mutants_are_found_within_a_few_hundred_tokens(name: str, tokens: int) -> None:
    verdict = try_one(name, 0, tokens=2000)
    assert verdict.verdict == "different"
    assert verdict.tests["decided_at"] <= tokens


@pytest.mark.parametrize(
    ("name", "seed", "fault"),
    [
        ("AcceptUniformReused", 0, "unnamed"),
        ("LenientAcceptance", 2, "lenient acceptance"),
        ("BlockVerificationWrong", 0, "strict acceptance"),
    ],
)
def test_subtle_mutants_are_found_within_ten_thousand_tokens(name: str, seed: int, fault: str) -> None:
    verdict = try_one(name, seed, tokens=10_000)
    assert verdict.verdict == "different" and verdict.fault is not None and verdict.fault.name == fault
    if fault == "unnamed":
        assert verdict.fault.parameters == {"seen in": "shape by token id"}


def test_wrong_log_probs_of_a_right_text_are_a_fault_apart_from_the_evidence() -> None:
    verdict = try_one("LogprobsOfAnotherToken", 0, tokens=300)
    assert verdict.fault is not None and verdict.fault.name == "log-probs of another token"
    assert verdict.tests["log10_e"] < 1 and verdict.fault.parameters["nats off"] > 0.5
    assert verdict.to_json()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_every_mutant_says_something_else_than_the_right_engine_with_its_noise(mutant: type[ToyEngine]) -> None:
    models = Markov.pair(0)
    asked = list(islice(requests(toy_prompts(), PANEL, Settings()), 96))
    right, broken = (build(kind, 0, models).generate(asked) for kind in (ToyEngine, mutant))
    assert [s.token_ids for s in right] != [s.token_ids for s in broken] or broken[0].logprobs is not None
    assert all(len(s.token_ids) == 32 for s in broken)


def test_a_stale_cache_holds_the_rejected_draft() -> None:
    """The block after a rejection at its first draft reads (draft, correction) where (old, correction) is due."""
    engine = StaleCache(*Markov.pair(0), 0)
    seen = []
    law = engine.law

    def watched(model: Markov, drafted: list[np.ndarray], *rest: object, **more: object) -> np.ndarray:
        seen.append([text[-2:] for text in engine.texts])
        return law(model, drafted, *rest, **more)  # type: ignore[arg-type]

    engine.law = watched  # type: ignore
    engine.begin([Request((1, 2), Params())])
    engine.texts, engine.prompts, engine.params = [[1, 2]], [[1, 2]], [Params()]
    for _ in range(40):
        block = engine.block()[0]
        first = int(engine.drafted[0][0])
        engine.texts[0] += block
        if len(block) == 1:
            break
    assert len(block) == 1 and block[0] != first
    seen.clear()
    engine.block()
    assert seen[0] == [[first, block[0]]]


def test_shares_of_a_law_are_excluded_only_below_what_there_is() -> None:
    """Tokens of p beside a law m with a third of the vocabulary doubled: large shares go, and the bound is fair."""
    draw = np.random.default_rng(11)
    m_over_p = np.array([2.0, 0.5])  # p = 1/3, 2/3
    exclusions = {0.0: 0, 0.3: 0}
    for truth in exclusions:
        for _ in range(100):
            hit = draw.random(1500) < 1 / 3 + truth / 3
            ratio = np.log(m_over_p[np.where(hit, 0, 1)])
            n = np.zeros(1500)
            evidence = Evidence()
            blank = scored(draw.random(1500), draw)
            evidence.update(replace(blank, ratios={"temperature x2": (n, n), "draft leak": (ratio, n)}))
            found = evidence.excluded(0.2).get("draft leak")
            exclusions[truth] += found is not None and found["share"] <= (truth or 0.3)
    assert exclusions[0.0] >= 95  # a share of 0.3 is excluded where there is none
    assert exclusions[0.3] <= 100 * 0.2 / 20 + 3  # where 0.3 is the truth, hardly ever


@pytest.mark.parametrize(("tolerance", "knows_rows", "fair"), [(0.002, False, True), (0.04, True, True),
                                                               (0.002, True, False)])  # fmt: skip
def test_mass_outside_the_support_on_few_rows(tolerance: float, knows_rows: bool, fair: bool) -> None:
    """Rounding puts 4 % outside on one row in twenty, 0.2 % in the mean.

    That is enough of a tolerance against bets that do not know the rows; one that bets on those alone needs the 4 %,
    and false alarms are what it gives without.
    """
    draw, n, alarms = np.random.default_rng(12), 4500, 0
    for _ in range(30):
        edge = draw.random(n) < 0.05
        out = edge & (draw.random(n) < 0.04)
        outside = np.where(edge, 0.5, 0.0) if knows_rows else np.full(n, 0.2)
        ratio = np.where(out, -2.0, np.log1p(-outside))  # m is p on the support, less what it has outside
        blank = scored(np.where(out, np.nan, draw.random(n)), draw)
        nothing = np.zeros(n)
        laws = {"temperature x2": (nothing, nothing), "top_p dropped": (ratio, outside)}
        evidence = Evidence(tolerance)
        evidence.update(replace(blank, log_p=np.where(out, -np.inf, -1.0), ratios=laws))
        alarms += evidence.highest >= math.log(10)
    assert (alarms <= 30 * 0.1 + 2 * math.sqrt(30 * 0.09)) if fair else alarms > 15


def test_a_temperature_that_is_not_a_number_is_named_though_the_text_repeats_itself() -> None:
    verdict = try_one("TemperatureNotANumber", 0, tokens=600)
    assert verdict.tests["decided_at"] <= 64
    assert verdict.fault is not None and verdict.fault.name == "garbage temperature, not a number"


def test_the_fault_is_named() -> None:
    verdict = try_one("PlainTemperatureIgnored", 1, tokens=8000)
    assert verdict.fault is not None and verdict.fault.name in ("temperature ignored", "temperature")
    assert verdict.fault.where["setting"] != "defaults"


def test_other_laws_that_would_have_sufficed_are_named_beside_it_the_best_first() -> None:
    """Of three, one that explains every token, one that explains most, and one that explains none."""
    draw, n = np.random.default_rng(3), 200
    nothing = np.zeros(n)
    evidence = Evidence(level=math.log(1000))
    laws = {"seed reuse": nothing + 0.5, "uniform noise": nothing + 2.0, "temperature x2": nothing - 1.0}
    evidence.update(replace(scored(draw.random(n), draw), ratios={k: (v, nothing) for k, v in laws.items()}))
    assert evidence.shown() == ["uniform noise", "seed reuse"]
    fault = Fault("uniform noise", {"share": 0.9}, also=("seed reuse",))
    said = Verdict("different", "engine", "statistical", 0.001, n, fault=fault).sentence()
    assert said == "different from its target, shown after 200 tokens: uniform noise share 0.9 (also: seed reuse)"


def test_a_correct_engine_is_not_called_different_and_is_bounded() -> None:
    verdict = try_one("correct", 3, tokens=4000, epsilon=0.08)
    assert verdict.verdict == "equivalent" and verdict.epsilon is not None and verdict.epsilon <= 0.08
    assert sum(verdict.histograms["pit"]) == verdict.tokens
    assert abs(verdict.tests["standard"]["pit"]) < 4.5


def test_settings_outside_their_range_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="delta=0"):
        Settings(delta=0)
    with pytest.raises(ValueError, match="tolerance"):
        Settings(tolerance=1.0)


# ----------------------------------------------------------------------------------------------- samples without scorer


def texts(draw: np.random.Generator, bias: float, count: int) -> list[tuple[int, ...]]:
    law = np.array([0.5 + bias, 0.3 - bias, 0.2])
    return [tuple(draw.choice(3, size=8, p=law).tolist()) for _ in range(count)]


def test_permutation_p_values_are_uniform_under_the_null_and_small_beside_it() -> None:
    draw = np.random.default_rng(8)
    null = [
        permutation_test([kernel([*texts(draw, 0, 6), *texts(draw, 0, 6)]) for _ in range(3)], 199, seed)[1]
        for seed in range(120)
    ]
    for level in (0.1, 0.3, 0.5):
        share = float(np.mean(np.array(null) <= level))
        assert abs(share - level) < 3 * math.sqrt(level * (1 - level) / 120)
    apart = [kernel([*texts(draw, 0, 16), *texts(draw, 0.25, 16)]) for _ in range(6)]
    assert permutation_test(apart, 1999)[1] == 1 / 2000


def test_the_kernel_sees_texts_that_are_shifted() -> None:
    k = kernel([(1, 2, 3, 4), (9, 1, 2, 3), (5, 6, 7, 8)])
    assert k[0, 0] == pytest.approx(2) and k[0, 1] > 0.5 and k[0, 2] == 0
