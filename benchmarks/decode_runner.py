"""What the engines of benchmarks/decode.py have in common: they decode prompts together and count what they did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.decode_plan import Cell

_WARM_UP = 16  # tokens decoded before the clock starts, in every cell


@dataclass
class Counts:
    """What decoding some prompts came to. Sums, so that counts of several batches add up."""

    tokens: int = 0
    seconds: float = 0.0  # from handing the prompts over to the last token, prompts' passes included
    first_s: list[float] = field(default_factory=list)  # of each prompt: from handing over to its first token
    target_steps: int = 0  # target passes that committed tokens of a sequence, summed over sequences
    drafted: int = 0
    accepted: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def figures(self, batch: int) -> dict[str, Any]:
        """Of prompts decoded ``batch`` at a time. ``acceptance`` is None where nothing was drafted.

        ``decode_tok_s`` is the rate of the tokens after each prompt's first, from the mean time of the firsts on; None
        where there are no others.
        """
        others, seconds = self.tokens - len(self.first_s), self.seconds - sum(self.first_s) / batch
        return {
            "tok_s": self.tokens / self.seconds,
            "decode_tok_s": others / seconds if others else None,
            "first_token_s": sum(self.first_s) / len(self.first_s),
            "tokens_per_target_step": self.tokens / self.target_steps,
            "acceptance": self.accepted / self.drafted if self.drafted else None,
        }


class Runner:
    """An engine that decodes prompts."""

    def begin(self) -> None:
        """A cell begins: forget what was learnt in the one before."""

    def generate(self, prompts: Sequence[list[int]], temperature: float, tokens: int, seed: int) -> Counts:
        """Decodes the prompts together, ``tokens`` new tokens each."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to free by default: the process ends."""


def decode(runner: Runner, cell: Cell, tokens: int, seed: int) -> Counts:
    """A cell after a warm-up on its first batch. Raises RuntimeError where a side made another number of tokens."""
    batches = [cell.prompts[i : i + cell.batch] for i in range(0, len(cell.prompts), cell.batch)]
    runner.begin()
    runner.generate(batches[0], cell.temperature, min(_WARM_UP, tokens), seed)
    total = Counts()
    for i, prompts in enumerate(batches):
        total += runner.generate(prompts, cell.temperature, tokens, seed * len(batches) + i)
    asked = tokens * len(cell.prompts)
    if total.tokens != asked or len(total.first_s) != len(cell.prompts):
        raise RuntimeError(f"{asked} tokens were asked for, {total.tokens} were made")
    return total
