"""Everything that is measured, setting after setting."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from spec.bench import costs, counting, speed
from spec.bench.costs import Costs
from spec.bench.counting import Text
from spec.bench.plan import Plan, Served, Setting
from spec.bench.prompts import Prompt
from spec.bench.replay import Expected, Replay
from spec.bench.speed import Speed
from spec.drafters.base import Drafter
from spec.models.base import LanguageModel

DRAWN, ARGMAX = "drawn", "argmax"  # drafters of a replay

Bars = Callable[[str, int], contextlib.AbstractContextManager[Callable[[], None]]]  # (what, how many) -> advance


@dataclass(frozen=True)
class Drafters:
    """One draft, served in two ways."""

    drawn: Drafter  # drafts drawn from q; a lookup's are what they are
    argmax: Drafter | None = None  # the most probable ones; None where there is no q

    def serving(self, served: Served) -> Drafter:
        """The one that an engine is given."""
        return self.argmax if served == "greedy" and self.argmax is not None else self.drawn


@dataclass(frozen=True)
class Measured:
    """All of one setting."""

    setting: Setting
    texts: list[Text]
    expected: list[Expected]  # of the same texts
    costs: Costs
    speed: Speed | None

    def drafter(self, served: Served) -> str:
        """Whose trials tell of this way of drafting: where drafting is deterministic there is only one."""
        return ARGMAX if served == "greedy" and ARGMAX in self.expected[0].trials else DRAWN


def measure(
    target: LanguageModel,
    drafters: Drafters,
    prompts: Sequence[Prompt],
    plan: Plan,
    end_tokens: Collection[int],
    bars: Bars | None = None,
) -> list[Measured]:
    """The whole plan.

    At each setting the texts are drawn anew, so that every prefix is one the target visits there. Raises ValueError for
    what the engine refuses.
    """
    bar = bars or _no_bar
    return [_measure(target, drafters, prompts, setting, plan, end_tokens, bar) for setting in plan.settings]


def _measure(
    target: LanguageModel,
    drafters: Drafters,
    prompts: Sequence[Prompt],
    setting: Setting,
    plan: Plan,
    end_tokens: Collection[int],
    bars: Bars,
) -> Measured:
    serving = drafters.serving(plan.served)
    with bars(f"{setting}: texts", len(prompts)) as advance:
        texts = counting.write(target, serving, prompts, setting, plan, end_tokens, advance)
    with bars(f"{setting}: expected acceptance", len(prompts)) as advance:
        walked = {DRAWN: drafters.drawn}
        if drafters.argmax is not None and not setting.greedy:
            walked[ARGMAX] = drafters.argmax
        replay = Replay(
            target, walked, setting, longest=plan.longest, max_tokens=plan.max_tokens, end_tokens=end_tokens,
            batch=plan.batch,
        )  # fmt: skip
        expected = replay.run(texts, choose(texts, plan.rollouts, plan.seed), advance)
    with bars(f"{setting}: costs", plan.cost_rounds) as advance:
        cost = costs.measure(target, serving, prompts[0], setting, plan, advance)
    timed = prompts[: plan.speed_prompts]
    fast: Speed | None = None
    if timed:
        with bars(f"{setting}: speed", len(timed)) as advance:
            fast = speed.measure(target, serving, timed, setting, plan, end_tokens, advance)
    return Measured(setting, texts, expected, cost, fast)


def choose(texts: Sequence[Text], count: int, seed: int) -> list[set[int]]:
    """Of each text the starts of some of its steps, ``count`` of all of them at random (all where there are fewer)."""
    starts = [(i, step.start) for i, text in enumerate(texts) for step in text.steps]
    if len(starts) > count:
        starts = random.Random(seed).sample(starts, count)
    chosen: list[set[int]] = [set() for _ in texts]
    for i, start in starts:
        chosen[i].add(start)
    return chosen


@contextlib.contextmanager
def _no_bar(what: str, count: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
