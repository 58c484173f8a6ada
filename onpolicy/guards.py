"""Guards: what may be done to rollouts between sampling and training. Each is off unless configured.

They touch only what the student drew; text of a teacher or a dataset is left as it is.

Loop stop, prefix and curriculum are *stopping rules*: whether a token is kept depends on the tokens before it alone,
so kept prefixes are distributed as the student draws them, and a per-token gradient over kept tokens is unbiased for
the objective restricted to those positions. Dropping truncated completions looks at how a completion ends, and is
biased (docs/estimators.md, "unfinished rollouts masked").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from onpolicy.health_config import HealthConfig
from onpolicy.repetition import loop_end
from onpolicy.types import Rollout


def apply_guards(rollouts: Sequence[Rollout], config: HealthConfig) -> list[Rollout]:
    """What a step trains on, in the order given; an empty list when every completion was dropped.

    Loops are ended first, so that a loop counts as truncated; the prefix is taken last, so that a finished
    completion is not dropped for being longer than the prefix.
    """
    guarded = list(rollouts)
    if config.loop_stop is not None:
        guarded = [stop_loop(rollout, config.loop_length, config.loop_stop) for rollout in guarded]
    if config.drop_truncated:
        guarded = drop_truncated(guarded)
    if config.prefix_tokens is not None:
        guarded = [keep_prefix(rollout, config.prefix_tokens) for rollout in guarded]
    return guarded


def cut(rollout: Rollout, length: int) -> Rollout:
    """The first ``length`` tokens, their log-probs with them; cut short, it no longer ends with a stop token."""
    assert length >= 1, "a rollout has at least one token"
    if length >= len(rollout):
        return rollout
    ids, logprobs = rollout.completion_ids[:length], rollout.logprobs[:length]
    return replace(rollout, completion_ids=ids, logprobs=logprobs, finish_reason="length")


def stop_loop(rollout: Rollout, loop_length: int, repeats: int) -> Rollout:
    """Ended once a unit of at most ``loop_length`` tokens has come ``repeats`` times in a row."""
    if rollout.source != "student":
        return rollout
    return cut(rollout, loop_end(rollout.completion_ids, loop_length, repeats))


def keep_prefix(rollout: Rollout, tokens: int) -> Rollout:
    """The first ``tokens`` tokens of a student's completion."""
    return cut(rollout, tokens) if rollout.source == "student" else rollout


def drop_truncated(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Without the student's completions that have no stop token."""
    return [rollout for rollout in rollouts if rollout.source != "student" or rollout.finish_reason == "stop"]


def curriculum_tokens(step: int, first: int, last: int, steps: int) -> int:
    """max_tokens at ``step``, counted from 0: ``first``, growing evenly, ``last`` from step ``steps`` on."""
    return first + (last - first) * min(step, steps) // steps


def max_tokens_at(step: int, config: HealthConfig, max_tokens: int) -> int:
    """Completion tokens at most in an on-policy step: the curriculum's where there is one, else ``max_tokens``."""
    if config.curriculum_from is None:
        return max_tokens
    return curriculum_tokens(step, config.curriculum_from, max_tokens, config.curriculum_steps)
