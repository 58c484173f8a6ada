"""Student beside teacher on held-out prompts: on the prefixes the teacher visits, and on those the student visits.

The second matter: a student is good where its teacher goes long before it is good where it goes itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from onpolicy.batching import pack
from onpolicy.losses import iter_logprobs
from onpolicy.student import Student
from onpolicy.teachers import Teacher
from onpolicy.types import Prompt, Rollout, SamplingParams
from spec.stats import expected_acceptance_from_logprobs

if TYPE_CHECKING:
    from onpolicy.rollouts.base import Sampler

METRICS = ("reverse_kl", "forward_kl", "acceptance_t1", "acceptance_t0", "agreement", "perplexity")


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts, with what the teacher makes of them: drawn once, compared with every time."""

    prompts: list[Prompt]
    params: dict[bool, SamplingParams]  # by greedy
    teacher_rollouts: dict[bool, list[Rollout]]  # by greedy
    token_budget: int
    share_prompts: bool

    def measure(self, student: Student, teacher: Teacher, sampler: Sampler) -> dict[str, float]:
        """The summary's figures of the student as it is now; the sampler must have its weights."""
        own = {greedy: sampler.generate(self.prompts, params) for greedy, params in self.params.items()}
        figures: dict[str, float] = {}
        for visited_by, rollouts in (("teacher", self.teacher_rollouts), ("student", own)):
            sampled, greedy = (
                token_statistics(
                    student, teacher, rollouts[key], token_budget=self.token_budget, share_prompts=self.share_prompts
                )
                for key in (False, True)
            )
            figures |= summarise(sampled, greedy, visited_by)
        return figures


def heldout_params(max_tokens: int, seed: int, greedy: bool, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """One completion of each held-out prompt, drawn at T=1 or greedily."""
    temperature = 0.0 if greedy else 1.0
    return SamplingParams(temperature, max_tokens=max_tokens, n=1, seed=seed, stop_token_ids=stop_token_ids)


@torch.no_grad()
def token_statistics(
    student: Student,
    teacher: Teacher,
    rollouts: Sequence[Rollout],
    *,
    token_budget: int = 2048,
    share_prompts: bool = True,
) -> dict[str, float]:
    """Means over all completion tokens of the rollouts, at temperature 1, nats.

    ``reverse_kl``, ``forward_kl``, ``acceptance`` (sum over the vocabulary of min(p, q)), ``agreement`` (same most
    likely token), ``student_nll`` and ``teacher_nll`` (of the text itself).
    """
    sums: dict[str, float] = {}
    tokens = 0
    for batch in pack(rollouts, token_budget, share_prompts=share_prompts):
        batch = batch.to(student.device)
        hidden, head = student(batch)
        score = teacher.score(batch)
        start = 0
        for q, p in iter_logprobs(hidden, head, score.hidden, score.head):
            ids = batch.token_ids[start : start + len(q), None]
            start += len(q)
            for name, values in _row_statistics(q, p, ids).items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
        tokens += len(batch.token_ids)
    return {name: total / tokens for name, total in sums.items()}


def _row_statistics(q: torch.Tensor, p: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """[n, V] log-probabilities of student and teacher -> [n] values."""
    return {
        "reverse_kl": (q.exp() * (q - p)).nan_to_num(0.0).sum(-1),
        "forward_kl": (p.exp() * (p - q)).nan_to_num(0.0).sum(-1),
        "acceptance": expected_acceptance_from_logprobs(p, q),
        "agreement": (p.argmax(-1) == q.argmax(-1)).float(),
        "student_nll": -q.gather(1, ids)[:, 0],
        "teacher_nll": -p.gather(1, ids)[:, 0],
    }


def summarise(sampled: dict[str, float], greedy: dict[str, float], visited_by: str) -> dict[str, float]:
    """Statistics on T=1 and on greedy completions of one model -> the summary's names.

    ``acceptance_t0`` is measured where greedy decoding goes, ``acceptance_t1`` where sampling goes. ``perplexity`` is
    the student's of the teacher's text; on the student's own text it is the teacher's.
    """
    text_nll = sampled["student_nll"] if visited_by == "teacher" else sampled["teacher_nll"]
    values = {
        "reverse_kl": sampled["reverse_kl"],
        "forward_kl": sampled["forward_kl"],
        "acceptance_t1": sampled["acceptance"],
        "acceptance_t0": greedy["agreement"],
        "agreement": sampled["agreement"],
        "perplexity": math.exp(min(text_nll, 700.0)),
    }
    suffix = "" if visited_by == "teacher" else "_on_student"
    return {name + suffix: values[name] for name in METRICS}
