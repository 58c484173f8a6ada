"""The adapters, on tiny models: right engines pass, and one with another target, or another draft's word, does not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from spec_models import TableModel, tiny_llama

from spec.audit import assert_lossless
from spec.audit.conditionals import ModelConditionals
from spec.audit.engines.hf import TransformersEngine
from spec.audit.engines.ours import OurEngine
from spec.audit.floor import floor
from spec.audit.greedy import audit_greedy
from spec.audit.sample import Sample
from spec.audit.samples_only import Plan, audit_samples
from spec.audit.statistical import Settings, panel_for, requests
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.engine import Engine
from spec.params import Params
from spec.request import Request

V = 8
PROMPTS = [[1, 2], [3, 4, 5], [0, 7], [6, 6, 1]]
FEW = {"tokens": 1500, "epsilon": 0.15, "max_tokens": 16}


def markov(seed: int, spread: float = 1.5) -> TableModel:
    """By the last two tokens, so that it repeats itself and lookups find something."""
    table = spread * np.random.default_rng(seed).standard_normal((V, V, V))
    return TableModel(lambda text: table[text[-2] if len(text) > 1 else 0, text[-1]], V)


def engine(mode: str, drafter: str, target_seed: int = 0) -> OurEngine:
    target = markov(target_seed)
    drafters = {
        "model": lambda: ModelDrafter(markov(1), target),
        "greedy": lambda: ModelDrafter(markov(1), target, drafting="greedy"),
        "ngram": lambda: NgramDrafter(max_n=2, min_n=1),
        "plain": lambda: None,
    }
    return OurEngine(Engine(target, drafters[drafter](), draft_length=3, mode=mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["token", "block"])
@pytest.mark.parametrize("drafter", ["model", "greedy", "ngram", "plain"])
def test_our_engine_is_lossless(mode: str, drafter: str) -> None:
    draft = ModelConditionals(markov(1)) if drafter in ("model", "greedy") else None
    verdict = assert_lossless(engine(mode, drafter), markov(0), PROMPTS, draft=draft, **FEW)  # type: ignore[arg-type]
    assert verdict.engine.endswith(mode) and verdict.tokens <= 1520


def test_an_engine_with_another_target_is_not() -> None:
    with pytest.raises(AssertionError, match="different from its target"):
        assert_lossless(engine("block", "model", target_seed=5), markov(0), PROMPTS, **FEW)  # type: ignore[arg-type]


def test_a_test_that_cannot_tell_does_not_pass() -> None:
    with pytest.raises(AssertionError, match="undecided after"):
        assert_lossless(engine("token", "plain"), markov(0), PROMPTS, tokens=200, epsilon=0.001)


class Overconfident:
    """Sharpens its logits by a fifth and says nothing of it."""

    name, unsupported = "overconfident", frozenset({"logit_bias"})

    def __init__(self) -> None:
        self.inner = engine("token", "plain")

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        colder = [replace(r, params=replace(r.params, temperature=r.params.temperature * 0.6)) for r in requests]
        return [replace(s, params=r.params) for s, r in zip(self.inner.generate(colder), requests, strict=True)]


def test_a_temperature_that_is_off_is_named_with_its_factor() -> None:
    with pytest.raises(AssertionError, match=r"temperature factor 0\.[56]"):
        assert_lossless(Overconfident(), markov(0), PROMPTS, tokens=4000)


def test_the_panel_leaves_out_what_an_engine_refuses_and_rotates() -> None:
    panel = panel_for(Overconfident())
    assert all(not params.logit_bias for params in panel) and any(params.min_p for params in panel)
    asked = list(itertools.islice(requests(PROMPTS, panel, Settings()), 4 * len(panel) * 2))
    assert len({request.params.seed for request in asked}) == len(asked)
    settings = {(request.prompt_ids, repr(replace(request.params, seed=0))) for request in asked}
    assert len(settings) == len(asked) / 2  # each twice


# ---------------------------------------------------------------------------------------------------------- greedy mode


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_greedy_text_is_the_targets_and_another_models_is_not(drafter: str) -> None:
    right = audit_greedy(engine("block", drafter), ModelConditionals(markov(0)), PROMPTS, tie=1e-9, max_tokens=12)
    assert right.verdict == "equivalent" and right.tests["largest_gap"] == 0 and right.tokens == 4 * 2 * 12
    wrong = audit_greedy(engine("block", drafter, 5), ModelConditionals(markov(0)), PROMPTS, tie=1e-9, max_tokens=12)
    assert wrong.verdict == "different" and wrong.fault is not None and wrong.fault.parameters["short by"] > 1e-2


def test_samples_mode_tells_two_targets_apart_and_not_two_seeds() -> None:
    plan = Plan(answers=12, max_tokens=12, permutations=1999)
    same = audit_samples(engine("block", "model"), engine("token", "plain"), PROMPTS, plan=plan)
    other = audit_samples(engine("block", "model"), engine("token", "plain", 5), PROMPTS, plan=plan)
    assert same.verdict == "undecided" and same.tests["p"] > 1e-3
    assert other.verdict == "different"
    with pytest.raises(ValueError, match="cannot reach delta"):
        audit_samples(engine("block", "model"), engine("token", "plain"), PROMPTS, plan=Plan(permutations=99))


def test_the_floor_is_rounding_for_one_model_and_more_for_another_dtype() -> None:
    model = tiny_llama(0)
    low = tiny_llama(0)
    low.model.to(torch.bfloat16)
    samples = [Sample((1, 2, 3), (4, 5, 6, 7, 8, 9, 1, 2), Params(temperature=0.8))]
    panel = [Params(temperature=0.8), Params(top_k=3)]
    measured = floor(ModelConditionals(model), samples, {"dtype": lambda: ModelConditionals(low)}, panel)
    found = measured.figures
    assert found["shape mean TV"] < 1e-5 < 1e-4 < found["dtype mean TV"] < 0.2
    assert found["dtype largest TV"] >= found["dtype mean TV"]
    assert measured.logit_gap == found["shape largest logit difference"] < 1e-4  # another dtype is not the engine's


def test_the_floor_by_setting_and_what_is_left_to_rounding() -> None:
    """Kernels that give two logits the other order: outside top_k=1 by the share of rows, and nowhere else."""
    table = np.tile(np.array([0.0, 20.0, 0.5, 0.4]), (4, 1))
    table[2] = [0.0, 0.5, 30.0, 30.25]  # after a 2 the target says 3
    other = table.copy()
    other[2, 2:] = 30.25, 30.0
    models = [ModelConditionals(TableModel(lambda text, t=t: t[text[-1]], 4)) for t in (table, other)]
    samples = [Sample((0, 1), (2, 0, 0, 0), Params()), Sample((0, 1), (), Params())]
    panel = [Params(), Params(top_k=1, seed=9)]
    measured = floor(models[0], samples, {"kernels": lambda: models[1]}, panel)
    assert measured.figures["mass outside the support, top_k=1"] == measured.outside == 0.25
    assert measured.figures["mass outside the support, defaults"] == 0
    assert measured.figures["kernels mean TV"] > 0 == measured.figures["shape mean TV"]
    assert measured.tolerance(0.002) == 0.5 and floor(models[0], samples).tolerance(0.002) == 0.002
    # four times the gap; one unit in the last place at 30.25 is 0.125 in bfloat16
    assert measured.tie(torch.bfloat16) == 1.0 and floor(models[0], samples).tie(torch.bfloat16) == 0.125


# -------------------------------------------------------------------------------------------------------- other engines


@pytest.mark.parametrize("how", ["plain", "lookup"])
def test_transformers_generate_is_scored(how: str) -> None:
    model = tiny_llama(0)
    tested = TransformersEngine(model.model, lookup=3 if how == "lookup" else 0)
    panel = panel_for(tested, (Params(), Params(temperature=0.7, top_k=9)))
    verdict = assert_lossless(
        tested, model, PROMPTS, tokens=600, epsilon=0.3, max_tokens=12, panel=panel, tolerance=1e-3
    )  # fmt: skip
    assert verdict.tokens >= 200
