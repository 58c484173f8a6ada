"""What drafting and verifying take on this machine, at batch 1."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from spec.bench.counting import verification
from spec.bench.plan import Plan, Setting
from spec.bench.prompts import Prompt
from spec.drafters.base import Context, Drafter
from spec.models.base import LanguageModel, Step
from spec.rows import decide
from spec.verify import Drafts

_WARM_UP = 2  # rounds that are not counted
_ID = 2**32  # number of the first context, apart from the engines'


@dataclass(frozen=True)
class Costs:
    """Seconds at one setting, by number of drafts 0..L; more drafts never take less."""

    draft: list[float]  # of proposing k tokens; 0 for none
    target: list[float]  # of a step that verifies k tokens: forward pass and decision

    @property
    def ratio(self) -> float:
        """c: a draft step over a plain target step."""
        longest = len(self.draft) - 1
        return self.draft[longest] / longest / self.target[0]


def measure(
    target: LanguageModel,
    drafter: Drafter,
    prompt: Prompt,
    setting: Setting,
    plan: Plan,
    advance: Callable[[], None] = lambda: None,
) -> Costs:
    """Medians of ``plan.cost_rounds`` rounds after ``prompt``, made non-decreasing.

    Each round goes through all draft lengths, up and down in turns, so that a busy moment of the machine falls on all
    alike. ``advance`` is called after each. Raises ValueError where the models' caches have no room.
    """
    bench = _Bench(target, prompt, setting, plan)
    rounds = []
    for i in range(_WARM_UP + plan.cost_rounds):
        lengths = range(plan.longest + 1) if i % 2 == 0 else range(plan.longest, -1, -1)
        rounds.append(bench.round(drafter, _ID + i, lengths))
        if i >= _WARM_UP:
            advance()
    bench.close()
    drafting, verifying = np.median(np.array(rounds[_WARM_UP:]), axis=0)  # [L + 1] each
    return Costs([0.0, *non_decreasing(drafting[1:])], non_decreasing(verifying))


def non_decreasing(values: Sequence[float] | np.ndarray) -> list[float]:
    """The closest non-decreasing sequence in squares: neighbours in the wrong order share their mean, and so on."""
    blocks: list[tuple[float, int]] = []  # (sum, size)
    for value in values:
        total, size = float(value), 1
        while blocks and blocks[-1][0] / blocks[-1][1] > total / size:
            before, more = blocks.pop()
            total, size = total + before, size + more
        blocks.append((total, size))
    return [total / size for total, size in blocks for _ in range(size)]


class _Bench:
    """A slot of the target that holds the prompt, and contexts that begin with it."""

    def __init__(self, target: LanguageModel, prompt: Prompt, setting: Setting, plan: Plan):
        self._target, self._prompt, self._setting, self._plan = target, prompt.token_ids, setting, plan
        self._capacity = len(prompt.token_ids) + 2 * plan.longest + 3
        slot = target.open(self._capacity)
        if slot is None:
            raise ValueError(f"the cache of {target.name} has no room for {self._capacity} tokens: use shorter prompts")
        self._slot = slot
        self._forward(list(self._prompt), 0)

    def close(self) -> None:
        self._target.close(self._slot)

    def round(self, drafter: Drafter, id: int, lengths: Sequence[int]) -> tuple[list[float], list[float]]:
        """Seconds of drafting and of verifying 0..L tokens, timed in the order given. The text grows as it must."""
        context = Context(id, self._setting.params(self._plan.seed), self._prompt, [], capacity=self._capacity)
        if not drafter.open(context):
            raise ValueError(
                f"the cache of {drafter.name} has no room for {self._capacity} tokens: use shorter prompts"
            )
        drafter.propose([context], [1])  # reads the prompt
        drafting, verifying = [0.0] * len(lengths), [0.0] * len(lengths)
        for length in lengths:
            drafter.commit(context, 0)
            context.output_ids.append(self._prompt[length % len(self._prompt)])
            context.round += 1
            begin = time.perf_counter()
            drafts = drafter.propose([context], [length]) if length else None
            drafted = time.perf_counter()
            self._verify(context, drafts, length)
            verifying[length] = time.perf_counter() - drafted
            drafting[length] = drafted - begin
        drafter.close(context)
        return drafting, verifying

    def _verify(self, context: Context, drafts: Drafts | None, length: int) -> None:
        """A step with ``length`` drafts; where a lookup had fewer, any tokens will do."""
        device = self._target.device
        if drafts is None or len(drafts.ids) < length:
            ids = torch.tensor([self._prompt[i % len(self._prompt)] for i in range(length)], dtype=torch.long)
            drafts = Drafts(ids.to(device), [length])
        else:
            drafts = Drafts(drafts.ids.to(device), drafts.lengths, drafts.probs, drafts.rows)
        tokens = drafts.ids.tolist()
        last = len(context) - 1
        logits = self._forward([*context.tokens(last, last + 1), *tokens], last)
        decide(logits, [context], drafts, tokens, verification(self._plan))

    def _forward(self, ids: list[int], start: int) -> torch.Tensor:
        one = np.ones(1, np.int64)
        rows = np.arange(len(ids)) if start else np.zeros(0, np.int64)  # of the prompt none is wanted
        tokens = torch.tensor(ids, device=self._target.device)
        return self._target.forward(Step(tokens, one * self._slot, one * start, one * len(ids), rows))


def overall_ratio(costs: list[Costs]) -> float:
    """Median of c over the settings."""
    return median(cost.ratio for cost in costs)
