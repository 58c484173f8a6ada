"""What to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spec.params import GREEDY_BELOW, Params

# How a draft is made and verified: drawn from q and verified token by token or as a block, or its argmax (for which
# the two verifications are the same law).
Served = Literal["greedy", "probabilistic", "block"]
SERVED: tuple[Served, ...] = ("greedy", "probabilistic", "block")


@dataclass(frozen=True, order=True)
class Setting:
    """A point of the grid."""

    temperature: float
    top_p: float

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def params(self, seed: int) -> Params:
        """Of one request."""
        return Params(temperature=self.temperature, top_p=self.top_p, seed=seed)

    def __str__(self) -> str:
        return "T=0" if self.greedy else f"T={self.temperature:g}, top-p {self.top_p:g}"


def grid(temperatures: list[float], top_ps: list[float]) -> list[Setting]:
    """Every combination once, in order; at temperature 0, where top-p changes nothing, only top-p 1.

    Raises ValueError for a value that :class:`spec.params.Params` refuses.
    """
    settings: dict[Setting, None] = {}
    for temperature in temperatures:
        for top_p in top_ps:
            Setting(temperature, top_p).params(0)
            settings[Setting(0.0, 1.0) if temperature < GREEDY_BELOW else Setting(temperature, top_p)] = None
    return list(settings)


@dataclass(frozen=True)
class Plan:
    """How much to measure at each setting. Raises ValueError, naming the remedy, for a value outside its range."""

    settings: tuple[Setting, ...]
    draft_length: int = 4  # K of the runs that are counted and timed
    longest: int = 8  # drafts of what is expected reach this far, for the best length
    served: Served = "block"  # how the runs draft and verify
    max_tokens: int = 64  # of each text
    rollouts: int = 512  # verification steps a setting that are looked at again; drawn at random from all
    batch: int = 16  # texts at a time
    cost_rounds: int = 20  # timings of each draft length
    speed_prompts: int = 4  # prompts that are timed; 0: none
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"draft_length": 1, "max_tokens": 2, "rollouts": 1, "batch": 1, "cost_rounds": 1, "speed_prompts": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name.replace('_', ' ')} {getattr(self, name)}: must be at least {lowest}")
        if self.longest < self.draft_length:
            raise ValueError(
                f"longest draft {self.longest}: must be at least the draft length of the runs, {self.draft_length}"
            )
        if not self.settings:
            raise ValueError("no temperature or no top-p: give at least one of each")

    @property
    def room(self) -> int:
        """Positions a prompt has to leave: for the text, or the timings, and for drafts beyond it."""
        return max(self.max_tokens, self.longest + 2) + self.longest + 1
