"""The engine writes with the drafter, and every verification step is taken down."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from spec.bench.plan import Plan, Setting
from spec.bench.prompts import Prompt
from spec.drafters.base import Context, Drafter
from spec.engine import Engine
from spec.models.base import LanguageModel
from spec.request import Completion, Request, Result
from spec.verify import Drafts, Mode


@dataclass(frozen=True)
class Step:
    """A verification step of a text. Drafts after one that would end the text count as not drafted."""

    start: int  # output tokens before it
    drafted: int
    accepted: int
    tokens: int  # committed: the accepted and, unless an accepted one ended the text, the target's own


@dataclass(frozen=True)
class Text:
    """What the engine made of a prompt."""

    prompt: Prompt
    index: int  # of the prompt: what intervals are clustered by
    output_ids: list[int]
    steps: list[Step]


def write(
    target: LanguageModel,
    drafter: Drafter,
    prompts: Sequence[Prompt],
    setting: Setting,
    plan: Plan,
    end_tokens: Collection[int],
    advance: Callable[[], None] = lambda: None,
) -> list[Text]:
    """One text a prompt, ``plan.draft_length`` drafts a step. ``advance`` is called after each text.

    The texts are the target's in law, whatever the drafter: what follows from them holds for plain decoding too.
    Raises ValueError for a request that the engine refuses or breaks off.
    """
    watched = Watched(drafter, end_tokens)
    engine = Engine(
        target, watched, draft_length=plan.draft_length, mode=verification(plan), max_running=plan.batch,
        end_tokens=tuple(end_tokens),
    )  # fmt: skip
    results: dict[int, Result] = {}

    def done(i: int, result: Result) -> None:
        results[i] = result
        advance()

    for i, prompt in enumerate(prompts):
        request = Request(prompt.token_ids, setting.params(_seed(plan, i)), plan.max_tokens)
        engine.add(request, on_done=lambda result, i=i: done(i, result))  # type: ignore[misc]
    while engine.step():
        pass
    return [_text(prompts[i], i, results[i].completions[0], watched.drafted[_seed(plan, i)]) for i in sorted(results)]


def verification(plan: Plan) -> Mode:
    """The engine's name for it; for greedy drafts both are one law."""
    return "token" if plan.served == "probabilistic" else "block"


class Watched:
    """A drafter whose proposals' lengths are taken down, by the request's seed and the output length they came at."""

    def __init__(self, drafter: Drafter, end_tokens: Collection[int]):
        self._drafter, self._end_tokens, self.name = drafter, end_tokens, drafter.name
        self.drafted: dict[int, dict[int, int]] = {}

    def open(self, context: Context) -> bool:
        self.drafted.setdefault(context.params.seed, {})
        return self._drafter.open(context)

    def propose(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Drafts:
        drafts = self._drafter.propose(contexts, lengths)
        ids, at = drafts.ids.tolist(), 0
        for context, size in zip(contexts, drafts.lengths, strict=True):
            useful = useful_length(ids[at : at + size], self._end_tokens)
            self.drafted[context.params.seed][len(context.output_ids)] = useful
            at += size
        return drafts

    def commit(self, context: Context, accepted: int) -> None:
        self._drafter.commit(context, accepted)

    def close(self, context: Context) -> None:
        self._drafter.close(context)


def useful_length(drafted: Sequence[int], end_tokens: Collection[int]) -> int:
    """How many of the drafted tokens can be committed: none after one that ends the text."""
    return next((i for i, token in enumerate(drafted, 1) if token in end_tokens), len(drafted))


def _seed(plan: Plan, index: int) -> int:
    return plan.seed + index


def _text(prompt: Prompt, index: int, completion: Completion, drafted: dict[int, int]) -> Text:
    if completion.error is not None:
        raise ValueError(completion.error)
    return Text(prompt, index, completion.token_ids, _steps(completion.from_draft, drafted))


def _steps(from_draft: Sequence[bool], drafted: dict[int, int]) -> list[Step]:
    """A step ends with a token of the target's own, or with the text."""
    steps: list[Step] = []
    start = 0
    for i, is_draft in enumerate(from_draft):
        if not is_draft or i + 1 == len(from_draft):
            accepted = i - start + int(is_draft)
            steps.append(Step(start, drafted.get(start, 0), accepted, i - start + 1))
            start = i + 1
    return steps
