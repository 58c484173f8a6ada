"""Settings of :mod:`onpolicy.health` and :mod:`onpolicy.guards`. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class HealthConfig:
    """Rollout health: what is watched always, and guards, each off unless set."""

    loop_length: int = 16
    """Longest unit of a loop that is looked for, tokens (in the metrics and by loop_stop)."""
    ngram: int = 4
    """Length of the n-grams whose repetition is measured, tokens."""
    loop_stop: int | None = None
    """Guard: end a completion once a unit has come this many times in a row; 8 spares most honest repetition."""
    prefix_tokens: int | None = None
    """Guard: train on the first tokens of each completion only."""
    curriculum_from: int | None = None
    """Guard: max_tokens of the first on-policy step; it grows evenly to sampling.max_tokens."""
    curriculum_steps: int = 0
    """Steps until the curriculum reaches sampling.max_tokens; needed with curriculum_from."""
    drop_truncated: bool = False
    """Guard: leave completions without a stop token out of the update. Biased: docs/estimators.md, lengths."""
    warn_truncated: float | None = None
    """Warn when a larger share of completions is cut short, e.g. 0.5."""
    warn_repetition: float | None = None
    """Warn when a larger share of n-grams repeats an earlier one of its completion, e.g. 0.3."""
    warn_entropy: float | None = None
    """Warn when the student's mean entropy falls below, nats, e.g. 0.05."""
    warn_sample_size: float | None = None
    """Warn when the effective sample size of tokens falls below this share of their number, e.g. 0.5."""


def check_health(config: HealthConfig, max_tokens: int) -> None:
    """ValueError for values that cannot work together; ``max_tokens`` is sampling.max_tokens."""
    if config.loop_length < 1 or config.ngram < 1:
        raise ValueError(
            f"health.loop_length and health.ngram must be at least 1, got {config.loop_length} and {config.ngram}"
        )
    if config.loop_stop is not None and config.loop_stop < 2:
        raise ValueError(f"health.loop_stop must be at least 2 (once is no loop), got {config.loop_stop}")
    if config.prefix_tokens is not None and config.prefix_tokens < 1:
        raise ValueError(f"health.prefix_tokens must be at least 1, got {config.prefix_tokens}; leave it out for all")
    if config.curriculum_from is None and config.curriculum_steps:
        raise ValueError("health.curriculum_steps needs health.curriculum_from, the max_tokens of the first step")
    if config.curriculum_from is not None:
        if not 1 <= config.curriculum_from <= max_tokens:
            raise ValueError(
                f"health.curriculum_from must be between 1 and sampling.max_tokens={max_tokens}, got "
                f"{config.curriculum_from}"
            )
        if config.curriculum_steps < 1:
            raise ValueError("health.curriculum_from needs health.curriculum_steps, the steps to sampling.max_tokens")
    for name in ("warn_truncated", "warn_repetition", "warn_sample_size"):
        value = getattr(config, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"health.{name} is a share and must be in [0, 1], got {value}")
    if config.warn_entropy is not None and config.warn_entropy < 0:
        raise ValueError(f"health.warn_entropy must not be negative, got {config.warn_entropy} nats")
