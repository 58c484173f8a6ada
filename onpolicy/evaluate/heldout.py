"""Student beside teacher on held-out prompts: on the prefixes the teacher visits, and on those the student visits.

The second matter: a student is good where its teacher goes long before it is good where it goes itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from onpolicy.batching import Batch, pack
from onpolicy.losses import _fused, iter_logits, per_token
from onpolicy.losses.divergences import log_probs
from onpolicy.student import Student
from onpolicy.teachers import Score, Teacher
from onpolicy.types import Prompt, Rollout, SamplingParams
from spec.stats import expected_acceptance, greedy_agreement

if TYPE_CHECKING:
    from onpolicy.rollouts.base import Progress, Sampler

_FEW = 32  # tokens: torch's vocabulary-wide intermediates of so many stay in a processor's cache
_COMPARED = ("agreement", "reverse_kl", "forward_kl", "acceptance", "student_logprob", "teacher_logprob")
METRICS = ("reverse_kl", "forward_kl", "acceptance_t1", "acceptance_t0", "agreement", "perplexity")


Scored = list[tuple[Batch, Score]]


class HeldOut:
    """The held-out prompts, with what the teacher makes of them: drawn and scored once, compared with every time."""

    def __init__(
        self,
        prompts: list[Prompt],
        params: dict[bool, SamplingParams],  # by greedy
        teacher_rollouts: dict[bool, list[Rollout]],  # by greedy
        teacher: Teacher,
        *,
        token_budget: int,
        share_prompts: bool,
    ):
        self.prompts, self.params, self.teacher_rollouts, self.teacher = prompts, params, teacher_rollouts, teacher
        self.token_budget, self.share_prompts = token_budget, share_prompts
        self._scored: dict[bool, Scored] = {}

    def measure(self, student: Student, sampler: Sampler, progress: Progress | None = None) -> dict[str, float]:
        """The summary's figures of the student as it is now; the sampler must have its weights.

        ``progress`` is called with the number of tokens newly drawn, and with 0 after other work; it may raise.
        """
        tell = progress or (lambda tokens: None)
        if not self._scored:
            self._scored = {
                greedy: self._score(student, rollouts, tell) for greedy, rollouts in self.teacher_rollouts.items()
            }
        own = {
            greedy: self._score(student, sampler.generate(self.prompts, params, tell), tell)
            for greedy, params in self.params.items()
        }
        figures: dict[str, float] = {}
        for visited_by, scored in (("teacher", self._scored), ("student", own)):
            sampled = token_statistics(student, scored[False])
            greedy = token_statistics(student, scored[True], agreement_only=True)
            figures |= summarise(sampled, greedy, visited_by)
            tell(0)
        return figures

    def _score(self, student: Student, rollouts: Sequence[Rollout], tell: Progress) -> Scored:
        scored: Scored = []
        for batch in pack(rollouts, self.token_budget, share_prompts=self.share_prompts):
            batch = batch.to(student.device)
            scored.append((batch, self.teacher.score(batch)))
            tell(0)
        return scored


def heldout_params(max_tokens: int, seed: int, greedy: bool, stop_token_ids: tuple[int, ...]) -> SamplingParams:
    """One completion of each held-out prompt, drawn at T=1 or greedily."""
    temperature = 0.0 if greedy else 1.0
    return SamplingParams(temperature, max_tokens=max_tokens, n=1, seed=seed, stop_token_ids=stop_token_ids)


@torch.no_grad()
def token_statistics(
    student: Student, scored: Sequence[tuple[Batch, Score]], agreement_only: bool = False
) -> dict[str, float]:
    """Means over all completion tokens of the batches, at temperature 1, nats.

    ``agreement`` (same most likely token), ``reverse_kl``, ``forward_kl``, ``acceptance`` (sum over the vocabulary of
    min(p, q)), ``student_logprob`` and ``teacher_logprob`` (of the text itself).
    """
    sums: dict[str, float] = {}
    tokens = 0
    for batch, score in scored:
        hidden, head = student(batch)
        few = hidden.device.type == "cpu" and not _fused.compares(torch.empty(0))
        start = 0
        for q, p in iter_logits(hidden, head, score.hidden, score.head, chunk_size=_FEW if few else None):
            ids = batch.token_ids[start : start + len(q)]
            start += len(q)
            compiled = _fused.compares(q) and _fused.compares(p)
            rows = (_fused.compare if compiled else _compare)(q, p, ids, agreement_only)
            for name, values in zip(_COMPARED, rows.double().sum(-1).tolist(), strict=False):
                sums[name] = sums.get(name, 0.0) + values
        tokens += len(batch.token_ids)
    return {name: total / tokens for name, total in sums.items()}


def _compare(student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, agreement_only: bool) -> torch.Tensor:
    """What :func:`onpolicy.losses._fused.compare` gives, by torch."""
    agreement = greedy_agreement(teacher, student).double()
    if agreement_only:
        return agreement[None]
    q, p = log_probs(student, 1.0), log_probs(teacher, 1.0)
    kls = (per_token(name, student, teacher) for name in ("reverse_kl", "forward_kl"))
    said = (logs.gather(1, ids[:, None])[:, 0] for logs in (q, p))
    return torch.stack([x.double() for x in (agreement, *kls, expected_acceptance(p.exp(), q.exp()), *said)])


def summarise(sampled: dict[str, float], greedy: dict[str, float], visited_by: str) -> dict[str, float]:
    """Statistics on T=1 and on greedy completions of one model -> the summary's names.

    ``acceptance_t0`` is measured where greedy decoding goes, ``acceptance_t1`` where sampling goes. ``perplexity`` is
    the student's of the teacher's text; on the student's own text it is the teacher's.
    """
    text_nll = -sampled["student_logprob" if visited_by == "teacher" else "teacher_logprob"]
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
