"""The task's own reward: does a completion end at its prompt's answer?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from onpolicy.prompts import check_answer
from onpolicy.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Grade = Callable[[Rollout], float]


def answer_grader(tokenizer: PreTrainedTokenizerBase) -> Grade:
    """1.0 for a finished completion whose text ends at the answer of its prompt, as ``check_answer`` sees it; else 0.0.

    A completion that was cut off has not given its answer: its last number is there by chance.
    """

    def grade(rollout: Rollout) -> float:
        assert rollout.prompt.answer is not None, "checked before the run (checks.check_answers)"
        if rollout.finish_reason != "stop":
            return 0.0
        text = tokenizer.decode(rollout.completion_ids.tolist(), skip_special_tokens=True)
        return float(check_answer(text, rollout.prompt.answer))

    return grade


def task_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """``task_reward``: mean over the rollouts that have one; {} without any."""
    rewards = [rollout.task_reward for rollout in rollouts if rollout.task_reward is not None]
    return {"task_reward": fmean(rewards)} if rewards else {}
