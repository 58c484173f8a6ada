"""The engine on the default teacher in bf16, with a real draft: equal bits in any company, and so equal text."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onpolicy.models import load_causal_lm, load_tokenizer
from onpolicy.prompts import word_problems
from onpolicy.student import Student, prune_layers
from onpolicy.teachers.convert import DEFAULT_TEACHER, default_teacher
from spec.drafters.fallback import Fallback
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.engine import Engine
from spec.loading import encode_prompt
from spec.models.base import Step
from spec.models.load import load
from spec.params import Params
from spec.request import Request

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
QUICKSTART = Path(__file__).parents[2] / "runs" / "quickstart" / "student"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(DEFAULT_TEACHER)


@pytest.fixture(scope="module")
def target() -> Any:
    return load(default_teacher(), device="cpu")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Any:
    """The quickstart's student where there is one; a merely pruned one is as right, and as often wrong."""
    if QUICKSTART.exists():
        return load(QUICKSTART, device="cpu", quantization="int8")
    student = tmp_path_factory.mktemp("student")
    Student(prune_layers(load_causal_lm(DEFAULT_TEACHER, torch.float32), [0, 9, 19, 29])).save(student, tokenizer)
    return load(student, device="cpu", quantization="int8")


@pytest.fixture
def drafter(target: Any, draft: Any) -> Iterator[Fallback]:
    yield Fallback(NgramDrafter(), ModelDrafter(draft, target))


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    return [encode_prompt(tokenizer, problem.question) for problem in islice(word_problems(77), count)]


def test_greedy_speculative_is_greedy_plain_on_200_prompts(tokenizer, target, drafter) -> None:
    """Token for token, no tie excused: plain alone, speculative eight at a time."""
    requests = [Request(ids, Params(temperature=0), max_tokens=32) for ids in prompts(tokenizer, 200)]
    plain = Engine(target, tokenizer=tokenizer, max_running=1).generate(requests)
    fast = Engine(target, drafter, tokenizer=tokenizer, max_running=8).generate(requests)
    assert [r.completions[0].token_ids for r in fast] == [r.completions[0].token_ids for r in plain]
    assert sum(sum(r.completions[0].accepted) for r in fast) > 500


def test_64_mixed_requests_at_once_are_those_requests_alone(tokenizer, target, drafter) -> None:
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 20, "min_p": 0.02},
        {"presence_penalty": 0.4, "repetition_penalty": 1.1}, {"logit_bias": {198: -5.0}},
    ]  # fmt: skip
    requests = [
        Request(ids, Params(seed=i, **settings[i % len(settings)]), max_tokens=8 + i % 17, draft_length=i % 5)
        for i, ids in enumerate(prompts(tokenizer, 64))
    ]
    together = Engine(target, drafter, tokenizer=tokenizer, prefill_tokens=200).generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = Engine(target, drafter, tokenizer=tokenizer).generate([request])[0]
        assert result.completions[0].token_ids == alone.completions[0].token_ids
        assert result.completions[0].text == alone.completions[0].text


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_logits_do_not_depend_on_company(quantization) -> None:
    """Sequences read in random parts beside random others, against each alone: equal bits."""
    model = load(default_teacher(), device="cpu", quantization=quantization)
    rng = np.random.default_rng(0)
    texts = [rng.integers(5, 49000, int(n)).tolist() for n in rng.integers(20, 120, 10)]

    def forward(parts: list[list[int]], slots: list[int], starts: list[int]) -> list[torch.Tensor]:
        lengths = np.array([len(part) for part in parts])
        flat = torch.tensor([token for part in parts for token in part])
        step = Step(flat, np.array(slots), np.array(starts), lengths, np.arange(lengths.sum()))
        return list(model.forward(step).split(lengths.tolist()))

    def opened(text: list[int]) -> int:
        slot = model.open(len(text))
        assert slot is not None
        return slot

    alone = []
    for text in texts:
        slot = opened(text)
        alone.append(forward([text], [slot], [0])[0])
        model.close(slot)
    slots, done = [opened(text) for text in texts], [0] * len(texts)
    while any(d < len(text) for d, text in zip(done, texts, strict=True)):
        some = rng.permutation(len(texts))[: rng.integers(1, 9)].tolist()
        who = [i for i in some if done[i] < len(texts[i])]
        if not who:
            continue
        parts = [texts[i][done[i] : done[i] + int(rng.integers(1, 20))] for i in who]
        for i, part, logits in zip(
            who, parts, forward(parts, [slots[i] for i in who], [done[i] for i in who]), strict=True
        ):
            assert torch.equal(logits, alone[i][done[i] : done[i] + len(part)])
            done[i] += len(part)
