"""The law of the engine's output is the target's: the joint law of whole texts, by enumeration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from spec.draft_length import Adaptive, DraftLength, Fixed
from spec.drafters.base import Context
from spec.drafters.model import ModelDrafter
from spec.engine import Engine
from spec.params import Params
from spec.request import Request
from spec.verify import Mode
from tests.enumerate_engine import Branches, Text, text_law
from tests.spec_models import TableModel, random_logits

PROMPT = (0, 1)
SHAPED = Params(
    temperature=0.7, presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.3, logit_bias={1: 0.5}
)  # fmt: skip


class Moody:
    """A draft length chosen to do harm if past verdicts could: two more after a full block, none after a rejection."""

    def __init__(self) -> None:
        self.next: dict[int, int] = {}

    def lengths(self, contexts: Sequence[Context], limits: Sequence[int]) -> list[int]:
        return [min(self.next.get(c.id, 1), limit) for c, limit in zip(contexts, limits, strict=True)]

    def observe(self, contexts, drafted, accepted, seconds_target, seconds_draft, prompt_rows) -> None:
        for context, size, kept in zip(contexts, drafted, accepted, strict=True):
            self.next[context.id] = size + 2 if kept == size else 0 if self.next.get(context.id, 1) else 2

    def forget(self, context: Context) -> None:
        self.next.pop(context.id, None)


def processed(logits: np.ndarray, params: Params, prompt: Text, output: Text) -> np.ndarray:
    """Penalties, bias and temperature written out, [V]: an independent definition for the toy."""
    scores = logits.copy()
    for token, bias in params.logit_bias.items():
        scores[token] += bias
    for token in {*prompt, *output}:
        scores[token] *= params.repetition_penalty if scores[token] < 0 else 1 / params.repetition_penalty
    for token, count in Counter(output).items():
        scores[token] -= params.frequency_penalty * count + params.presence_penalty
    weights = np.exp(scores / params.temperature)
    return weights / weights.sum()


POLICIES: dict[str, tuple[DraftLength | type, int, int]] = {  # policy, vocabulary, longest text
    "fixed-2": (Fixed(2), 3, 3),
    "fixed-3": (Fixed(3), 2, 4),
    "moody": (Moody, 3, 3),
    "adaptive": (lambda: Adaptive(3, costs=(0.1, 1.0), probe_every=2), 2, 4),
}


@pytest.mark.parametrize("mode", ("token", "block"))
@pytest.mark.parametrize("params", (Params(), SHAPED), ids=("plain", "shaped"))
@pytest.mark.parametrize("policy", POLICIES)
def test_the_joint_law_is_the_targets(policy: str, params: Params, mode: Mode, monkeypatch) -> None:
    """Prompt to end through the engine: roll-back, histories, stop tokens, lengths that look at past verdicts."""
    make, vocabulary, longest = POLICIES[policy]
    target, draft = random_logits(vocabulary, 1), random_logits(vocabulary, 2)
    request = Request(PROMPT, params, max_tokens=longest, stop_token_ids=(0,))

    def program() -> Text:
        model = TableModel(target, vocabulary)
        drafter = ModelDrafter(TableModel(draft, vocabulary), model)
        length = make() if callable(make) else make
        result = Engine(model, drafter, draft_length=length, mode=mode).generate([request])[0]
        return tuple(result.completions[0].token_ids)

    law = Branches(monkeypatch).law(program)
    exact = text_law(
        lambda text: processed(target(PROMPT + text), params, PROMPT, text), longest, stops=frozenset({0})
    )  # fmt: skip
    assert law.keys() == exact.keys()
    assert max(abs(law[text] - exact[text]) for text in exact) < 1e-12


BROKEN = {(1,): np.nan, (2, 1): np.inf, (2, 2, 1): np.nan, (1, 2, 0): np.nan}  # the last is never come to
ENDED = 3  # stands for the end by an error in the laws below


@pytest.mark.parametrize("mode", ("token", "block"))
@pytest.mark.parametrize("temperature", (1.0, 0.6))
def test_logits_that_are_not_finite_end_the_texts_that_come_to_them_alone(
    temperature: float, mode: Mode, monkeypatch
) -> None:
    """Rows behind a rejected draft included: text and error together have the law of drawing one by one."""
    sound, draft, params = random_logits(3, 1), random_logits(3, 2), Params(temperature=temperature)

    def logits(text: Text) -> np.ndarray:
        value = BROKEN.get(text[len(PROMPT) :])
        return sound(text) if value is None else np.where(np.arange(3) == 0, value, sound(text))

    def program() -> Text:
        model = TableModel(logits, 3)
        engine = Engine(model, ModelDrafter(TableModel(draft, 3), model), draft_length=3, mode=mode)
        completion = engine.generate([Request(PROMPT, params, max_tokens=4, stop_token_ids=(0,))])[0].completions[0]
        if completion.error is None:
            return tuple(completion.token_ids)
        assert f"position {len(PROMPT) + len(completion.token_ids) - 1} of the sequence" in completion.error
        return (*completion.token_ids, ENDED)

    def next_token(text: Text) -> np.ndarray:
        if text in BROKEN:
            return np.array([0.0, 0.0, 0.0, 1.0])
        return np.append(processed(sound(PROMPT + text), params, PROMPT, text), 0.0)

    law = Branches(monkeypatch).law(program)
    exact = {text: p for text, p in text_law(next_token, 4, frozenset({0, ENDED})).items() if p}
    assert law.keys() == exact.keys() and {(1, ENDED), (2, 1, ENDED), (2, 2, 1, ENDED)} < law.keys()
    assert max(abs(law[text] - exact[text]) for text in exact) < 1e-12


@pytest.mark.parametrize("mode", ("token", "block"))
def test_drawn_text_has_the_targets_law(mode: Mode) -> None:
    """The same with the engine's own random streams: 6,000 seeds, chi-square over all 27 texts of three tokens."""
    target, draft = random_logits(3, 3, 0.7), random_logits(3, 4, 0.7)
    model = TableModel(target, 3)
    engine = Engine(model, ModelDrafter(TableModel(draft, 3), model), draft_length=2, mode=mode, max_running=500)
    requests = [Request(PROMPT, Params(seed=seed), max_tokens=3) for seed in range(6000)]
    counts = Counter(tuple(result.completions[0].token_ids) for result in engine.generate(requests))
    exact = text_law(lambda text: processed(target(PROMPT + text), Params(), PROMPT, text), 3, frozenset())
    chi_square = sum((counts[text] - 6000 * p) ** 2 / (6000 * p) for text, p in exact.items())
    assert chi_square < 54.1  # 26 degrees of freedom, one false alarm in a thousand
