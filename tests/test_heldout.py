"""The summary's figures against their definitions, row by row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from onpolicy.batching import pack
from onpolicy.config import StudentConfig
from onpolicy.evaluate.heldout import _compare, summarise, token_statistics
from onpolicy.losses import _fused
from onpolicy.models import load_causal_lm
from onpolicy.student import build_student
from onpolicy.teachers.local import LocalTeacher
from onpolicy.types import Prompt, Rollout


@pytest.fixture(scope="module")
def teacher_model(teacher_dir):
    return load_causal_lm(str(teacher_dir), torch.float32)


def rollouts() -> list[Rollout]:
    rng = np.random.default_rng(0)
    return [
        Rollout(Prompt(str(i), (1, 2, i)), rng.integers(3, 300, size=n), np.zeros(n, np.float32), "length", 0)
        for i, n in enumerate((5, 1, 8))
    ]


def scored(model, token_budget: int):
    teacher = LocalTeacher(model)
    return [(batch, teacher.score(batch)) for batch in pack(rollouts(), token_budget)]


def plain_log_probs(model, rollout: Rollout) -> torch.Tensor:
    ids = torch.tensor([[*rollout.prompt.token_ids, *rollout.completion_ids.tolist()]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("compiled", (True, False))
def test_token_statistics_follow_their_definitions(teacher_model, compiled: bool, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(_fused, "compares", lambda logits: False)
    student = build_student(StudentConfig(num_layers=2, precision="float32"), teacher_model)
    figures = token_statistics(student, scored(teacher_model, 16))
    alone = token_statistics(student, scored(teacher_model, 16), agreement_only=True)
    assert alone == {"agreement": figures["agreement"]}
    q = torch.cat([plain_log_probs(student.model, r) for r in rollouts()])
    p = torch.cat([plain_log_probs(teacher_model, r) for r in rollouts()])
    tokens = torch.from_numpy(np.concatenate([r.completion_ids for r in rollouts()]))[:, None]
    expected = {
        "reverse_kl": (q.exp() * (q - p)).sum(-1).mean(),
        "forward_kl": (p.exp() * (p - q)).sum(-1).mean(),
        "acceptance": torch.minimum(p.exp(), q.exp()).sum(-1).mean(),
        "agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "student_logprob": q.gather(1, tokens).mean(),
        "teacher_logprob": p.gather(1, tokens).mean(),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-4), name


def test_compiled_and_torchs_rows_agree_at_the_edges() -> None:
    """Tokens that one model or both rule out, best tokens that are level, logits that are NaN."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 5001, generator=generator) * 3 for _ in range(2))
    student[1, 5], teacher[2, 6] = -torch.inf, -torch.inf
    student[3, 7:900] = teacher[3, 7:900] = -torch.inf
    student[4, [17, 4000]] = teacher[4, [17, 3000]] = 50.0
    student[5, 8] = torch.nan
    ids = torch.tensor([0, 5, 6, 10, 17, 3])
    compiled, plain = (f(student.clone(), teacher.clone(), ids, False) for f in (_fused.compare, _compare))
    torch.testing.assert_close(compiled[1:], plain[1:], rtol=2e-5, atol=2e-6, equal_nan=True)
    assert compiled[0, :5].equal(plain[0, :5]) and compiled[0, 4] == 1
    assert torch.isinf(plain[2, 1]) and torch.isinf(plain[1, 2]) and plain[1, 5].isnan()
    assert _fused.compare(student.clone(), teacher.clone(), ids, True).shape == (1, 6)


def test_a_student_that_is_its_teacher_is_perfect(teacher_model) -> None:
    student = build_student(StudentConfig(num_layers=4, precision="float32"), teacher_model)
    figures = token_statistics(student, scored(teacher_model, 1000))
    assert figures["reverse_kl"] == pytest.approx(0, abs=1e-5)
    assert figures["acceptance"] == pytest.approx(1, abs=1e-4) and figures["agreement"] == 1


def test_summary_names_and_which_text_they_come_from() -> None:
    sampled = {
        "reverse_kl": 1.0,
        "forward_kl": 2.0,
        "acceptance": 0.3,
        "agreement": 0.4,
        "student_logprob": -1.5,
        "teacher_logprob": -0.5,
    }
    greedy = {**sampled, "agreement": 0.9}
    on_teacher = summarise(sampled, greedy, "teacher")
    assert on_teacher["acceptance_t1"] == 0.3 and on_teacher["acceptance_t0"] == 0.9 and on_teacher["agreement"] == 0.4
    assert on_teacher["perplexity"] == pytest.approx(math.exp(1.5))
    on_student = summarise(sampled, greedy, "student")
    assert on_student["perplexity_on_student"] == pytest.approx(math.exp(0.5))
    assert set(on_student) == {name + "_on_student" for name in on_teacher}
