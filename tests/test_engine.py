"""A request gets what it gets alone whatever else runs, and what ends one text ends no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from spec.draft_length import Fixed
from spec.drafters.base import Context
from spec.drafters.model import ModelDrafter
from spec.engine import Engine
from spec.models.base import Step
from spec.models.decoder import Decoder
from spec.models.transformers_model import TransformersModel
from spec.models.weights import read
from spec.params import Params
from spec.request import Event, Request, Result, sample_seed
from spec.verify import Mode
from tests.enumerate_engine import Text
from tests.spec_models import TableModel, random_logits, scripted, tiny_llama


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(0)


@pytest.fixture(scope="module")
def drafts(llama):
    return {"bad": tiny_llama(7, layers=1), "good": tiny_llama(1, like=llama, noise=0.1), "same": llama}


def ids(results: Sequence[Result]) -> list[list[int]]:
    return [completion.token_ids for result in results for completion in result.completions]


@pytest.mark.parametrize("mode", ("token", "block"))
@pytest.mark.parametrize("quality", ("bad", "good", "same"))
def test_greedy_speculative_is_greedy_plain(quality: str, mode: Mode, llama, drafts) -> None:
    """For any draft; and a better one saves target steps, the target itself all that can be saved."""
    requests = [Request([i + 1, 5, i], Params(temperature=0), max_tokens=18, draft_length=None) for i in range(5)]
    plain = Engine(llama).generate(requests)
    quick = Engine(llama, ModelDrafter(drafts[quality], llama), draft_length=3, mode=mode).generate(requests)
    assert ids(quick) == ids(plain)
    steps = np.mean([result.completions[0].target_steps for result in quick])
    low, high = {"bad": (15, 18), "good": (5, 11), "same": (5, 5)}[quality]  # 18 tokens, 4 a step: 5 steps
    assert low <= steps <= high


def mixed_requests(count: int) -> list[Request]:
    """Every setting there is, prompts of 1 to 40 tokens."""
    rng = np.random.default_rng(0)
    settings = (
        {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.6, "top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1},
        {"presence_penalty": 0.6, "frequency_penalty": 0.2}, {"repetition_penalty": 1.2, "temperature": 0.0},
        {"logit_bias": {3: 2.0, 5: -1.0}}, {"allowed_token_ids": tuple(range(0, 48, 3))},
    )  # fmt: skip
    return [
        Request(
            rng.integers(0, 48, rng.integers(1, 41)).tolist(),
            Params(seed=int(rng.integers(2**32)), **settings[i % len(settings)]),  # type: ignore[arg-type]
            max_tokens=int(rng.integers(1, 14)),
            stop_token_ids=(i % 48,) if i % 3 == 0 else (),
            n=2 if i % 10 == 0 else 1,
            logprobs=2 if i % 4 == 0 else None,
            draft_length=(None, 0, 5)[i % 3],
        )
        for i in range(count)
    ]


def test_64_concurrent_requests_each_get_what_they_get_alone(llama, drafts) -> None:
    requests = mixed_requests(64)
    engine = Engine(llama, ModelDrafter(drafts["good"], llama), draft_length=3, max_running=24, prefill_tokens=50)
    together = engine.generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = Engine(llama, ModelDrafter(drafts["good"], llama), draft_length=3).generate([request])[0]
        for mine, other in zip(result.completions, alone.completions, strict=True):
            assert mine.token_ids == other.token_ids and mine.from_draft == other.from_draft
            assert mine.finish_reason == other.finish_reason
            assert mine.drafted == other.drafted and mine.accepted == other.accepted
    assert not llama._caches and not drafts["good"]._caches


def test_the_fast_forward_pass_tells_no_company_either() -> None:
    """bf16 on a CPU, to the bit: the target's products and kernels, an int8 draft's, forks and log-probs."""
    target = Decoder(read(tiny_llama(0).model.to(torch.bfloat16), "target"))
    draft = Decoder(
        read(tiny_llama(1, like=tiny_llama(0), noise=0.1).model.to(torch.bfloat16), "draft"), quantization="int8"
    )
    requests = mixed_requests(64)
    engine = Engine(target, ModelDrafter(draft, target), draft_length=3, max_running=40, prefill_tokens=70)
    together = engine.generate(requests)
    for request, result in zip(requests, together, strict=True):
        alone = Engine(target, ModelDrafter(draft, target), draft_length=3).generate([request])[0]
        assert alone.completions == result.completions
    assert sum(sum(completion.accepted) for result in together for completion in result.completions) > 50
    assert not target._spans and not draft._spans


def test_a_prompt_read_in_parts_changes_nothing(llama, drafts) -> None:
    requests = [replace(request, n=3) for request in mixed_requests(12)]
    whole, parts = (
        Engine(llama, ModelDrafter(drafts["good"], llama, prefill_tokens=size), prefill_tokens=size).generate(requests)
        for size in (1000, 3)
    )
    assert ids(whole) == ids(parts)


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    model = TableModel(random_logits(5, 0), 5)
    engine = Engine(model, prefill_tokens=4)
    order: list[str] = []
    engine.add(Request([1], max_tokens=12), lambda event: order.append("short"))
    engine.add(Request([1] * 40, max_tokens=2), lambda event: order.append("long"))
    while engine.step():
        pass
    assert max(model.forwards) <= 4 + 1  # the budget and one decoding sequence
    assert order.index("long") == 10  # 40 tokens, 4 a step: its first comes with the other's tenth


def test_draft_length_0_is_plain_decoding(llama, drafts) -> None:
    requests = [replace(request, draft_length=None) for request in mixed_requests(18)]
    plain = Engine(llama).generate(requests, progress=True)
    drafter = ModelDrafter(drafts["good"], llama)
    engine_wide = Engine(llama, drafter, draft_length=0).generate(requests)
    by_request = Engine(llama, drafter, draft_length=4).generate([replace(r, draft_length=0) for r in requests])
    assert ids(plain) == ids(engine_wide) == ids(by_request)
    assert sum(len(completion.drafted) for result in by_request for completion in result.completions) == 0


def test_the_policy_learns_what_became_of_its_drafts() -> None:
    """Every step, and what it read of prompts; nothing of requests with a length of their own."""

    class Recorder(Fixed):
        def __init__(self) -> None:
            super().__init__(3)
            self.seen: list[tuple[list[int], list[int], list[int]]] = []
            self.forgotten: list[int] = []

        def observe(self, contexts, drafted, accepted, seconds_target, seconds_draft, prompt_rows) -> None:
            assert seconds_target > 0 and seconds_draft > 0 and prompt_rows == (0 if self.seen else 3)
            self.seen.append(([context.id for context in contexts], list(drafted), list(accepted)))

        def forget(self, context: Context) -> None:
            self.forgotten.append(context.id)

    model, policy = TableModel(scripted(range(5, 25), 30, 2), 30), Recorder()
    engine = Engine(model, ModelDrafter(model, model), draft_length=policy)
    request = Request([0, 3, 1, 2], Params(temperature=0), max_tokens=11)
    engine.generate([request])
    assert policy.seen == [([0], [3], [3]), ([0], [3], [3]), ([0], [2], [2])] and policy.forgotten == [0]
    engine.generate([replace(request, draft_length=2)])
    assert len(policy.seen) == 3


@pytest.mark.parametrize("at_once", [False, True])
def test_what_prompts_have_in_common_is_read_once(at_once: bool) -> None:
    """By target and draft: a long system prompt, of which one text is all; the texts are those of lone requests."""
    system = tuple(i % 7 for i in range(40))
    prompts = [(*system, 1, 2), (*system, 3, 4, 5), (*system, 4, 5), (*system, 1, 2), (8,), system]
    requests = [Request(prompt, Params(seed=i), max_tokens=6) for i, prompt in enumerate(prompts)]

    def engine() -> tuple[Engine, TableModel, TableModel]:
        target, draft = TableModel(random_logits(9, 0), 9), TableModel(random_logits(9, 1), 9)
        drafter = ModelDrafter(draft, target)
        return Engine(target, drafter, draft_length=2, end_tokens=(), prefill_tokens=45), target, draft

    alone = [ids(engine()[0].generate([request]))[0] for request in requests]
    together, target, draft = engine()
    results: dict[int, Result] = {}
    for i, request in enumerate(requests):
        together.add(request, on_done=lambda result, i=i: results.update({i: result}))  # type: ignore[misc]
        if not at_once:
            together.step()
    while together.step():
        pass
    assert ids([results[i] for i in range(len(requests))]) == alone
    for model in (target, draft):
        assert sum(model.forwards) < len(system) + 80  # 6 texts of 6 tokens, drafted for, and the prompt once


def test_samples_share_one_prefill_and_differ(llama) -> None:
    target, draft = TableModel(random_logits(50, 0), 50), TableModel(random_logits(50, 1), 50)
    request = Request(list(range(40)), Params(seed=11), max_tokens=6, n=5)
    engine = Engine(target, ModelDrafter(draft, target), draft_length=2)
    result = engine.generate([request])[0]
    texts = [tuple(completion.token_ids) for completion in result.completions]
    assert len(set(texts)) == 5
    for i, text in enumerate(texts):  # sample i is a request of its own with the derived seed
        own = Engine(target, ModelDrafter(draft, target), draft_length=2).generate(
            [replace(request, n=1, params=Params(seed=sample_seed(11, i)))]
        )
        assert tuple(own[0].completions[0].token_ids) == text
    fresh_target, fresh_draft = TableModel(random_logits(50, 0), 50), TableModel(random_logits(50, 1), 50)
    Engine(fresh_target, ModelDrafter(fresh_draft, fresh_target), draft_length=2).generate([request])
    for model in (fresh_target, fresh_draft):
        assert sum(model.forwards) < 40 + 5 * 6 * 3  # one prompt, and at most 3 tokens a sample and step


def test_sample_seeds() -> None:
    assert sample_seed(5, 0) == 5
    assert len({sample_seed(seed, i) for seed in range(20) for i in range(1, 20)}) == 380
    assert sample_seed(5, 1) == 2880720509214096320  # part of what a seed means: must not change


def test_a_stop_token_within_a_block_ends_it() -> None:
    script = [4, 5, 6, 7, 8, 9]
    model = TableModel(scripted(script, 10, 2), 10)
    engine = Engine(model, ModelDrafter(model, model), draft_length=5)
    completion = engine.generate([Request([1, 2], Params(temperature=0), stop_token_ids=(6,))])[0].completions[0]
    assert completion.token_ids == [4, 5, 6] and completion.finish_reason == "stop"
    assert completion.from_draft == [True] * 3 and completion.target_steps == 1
    assert completion.drafted == completion.accepted == [1, 1, 1]
    assert not model.held


def test_max_tokens_and_the_context_end_a_text_and_nothing_is_drafted_beyond() -> None:
    class Watched(TableModel):
        longest = 0

        def forward(self, step: Step) -> torch.Tensor:
            self.longest = max(self.longest, int((step.starts + step.lengths).max()))
            return super().forward(step)

    for limit, prompt, most, expected in ((100, 3, 7, 7), (8, 3, 50, 5), (4, 3, 50, 1)):
        model = Watched(scripted([5] * 60, 10, prompt), 10, max_positions=limit)
        draft = TableModel(scripted([5] * 60, 10, prompt), 10)
        engine = Engine(model, ModelDrafter(draft, model), draft_length=4)
        completion = engine.generate([Request([1] * prompt, max_tokens=most)])[0].completions[0]
        assert completion.token_ids == [5] * expected and completion.finish_reason == "length"
        assert model.longest == prompt + expected - 1  # the last token is never fed


def stream(engine: Engine, request: Request) -> tuple[list[Event], Result]:
    events: list[Event] = []
    results: list[Result] = []
    engine.add(request, events.append, results.append)
    while engine.step():
        pass
    return events, results[0]


@pytest.mark.parametrize("length", (0, 1, 4))
def test_stop_strings_span_tokens_and_are_never_shown(length: int, tokenizer) -> None:
    script = tokenizer.encode("Tom has 42 apples. Ann has 7 pears? No.")
    model = TableModel(scripted(script, len(tokenizer), 1), len(tokenizer))
    engine = Engine(model, ModelDrafter(model, model), tokenizer=tokenizer, draft_length=length)
    for stop, text in (
        ((" has 7",), "Tom has 42 apples. Ann"),
        (("les. Annie", "pears? N"), "Tom has 42 apples. Ann has 7 "),
        (("42",), "Tom has "),
        (("T",), ""),
    ):
        events, result = stream(engine, Request([0], Params(temperature=0), stop=stop, max_tokens=len(script)))
        completion = result.completions[0]
        assert completion.text == text and completion.finish_reason == "stop"
        assert "".join(event.text for event in events) == text
        assert [event.token_id for event in events] == completion.token_ids == script[: len(events)]
        assert len(tokenizer.decode(script[: len(events) - 1])) < len(text) + len(stop[-1])  # no token too many
        assert events[-1].finish_reason == "stop" and not any(event.finish_reason for event in events[:-1])


def test_held_back_text_is_shown_when_the_text_ends_otherwise(tokenizer) -> None:
    script = tokenizer.encode("two pears")
    model = TableModel(scripted(script, len(tokenizer), 1), len(tokenizer))
    engine = Engine(model, tokenizer=tokenizer)
    request = Request([0], Params(temperature=0), stop=("pears and more",), max_tokens=len(script))
    events, result = stream(engine, request)
    assert result.completions[0].text == "".join(event.text for event in events) == "two pears"
    assert events[-1].finish_reason == "length"


def test_streamed_text_is_the_decoded_text(tokenizer) -> None:
    """Characters of several bytes, split over tokens, in a block of drafts; special tokens are not shown."""
    words = "naïve café – 3 × 4 = 12 €, 東京 😀 ok"
    script = [*tokenizer.encode(words), tokenizer.eos_token_id]
    model = TableModel(scripted(script, len(tokenizer), 1), len(tokenizer))
    engine = Engine(model, ModelDrafter(model, model), tokenizer=tokenizer, draft_length=3)
    events, result = stream(engine, Request([0], Params(temperature=0)))
    assert "".join(event.text for event in events) == result.completions[0].text == words
    assert not any("�" in event.text for event in events)
    assert result.completions[0].token_ids == script and result.completions[0].finish_reason == "stop"
    assert engine.generate([Request([0], Params(temperature=0))])[0].completions[0].text == words  # not streamed


def test_log_probs_are_the_targets(llama, drafts) -> None:
    """Against one transformers forward pass over the finished text, raw and processed."""
    params = Params(temperature=0.7, top_k=7, seed=3)
    request = Request([1, 2, 3, 4], params, max_tokens=15, logprobs=3)
    for source in ("raw", "processed"):
        engine = Engine(llama, ModelDrafter(drafts["good"], llama), draft_length=3, logprobs=source)  # type: ignore[arg-type]
        completion = engine.generate([request])[0].completions[0]
        assert any(completion.from_draft) and not all(completion.from_draft)
        with torch.inference_mode():
            logits = llama.model(torch.tensor([[1, 2, 3, 4, *completion.token_ids]])).logits[0, 3:-1]
        if source == "processed":
            logits = logits / 0.7
            logits = logits.masked_fill(logits < logits.topk(7).values[:, -1:], -torch.inf)
        expected = logits.log_softmax(-1)
        assert completion.logprobs is not None and len(completion.logprobs) == 15
        for row, token, entry in zip(expected, completion.token_ids, completion.logprobs, strict=True):
            assert entry.token_id == token
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert [id for id, _ in entry.top] == row.topk(3).indices.tolist()
            assert [value for _, value in entry.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_cancelling_frees_slots_and_leaves_the_others_alone() -> None:
    def engine_and_models() -> tuple[Engine, TableModel, TableModel]:
        target, draft = TableModel(random_logits(9, 0), 9, slots=2), TableModel(random_logits(9, 1), 9, slots=2)
        return Engine(target, ModelDrafter(draft, target), draft_length=2), target, draft

    requests = [Request([1, i], Params(seed=i), max_tokens=12) for i in range(4)]
    expected = ids(engine_and_models()[0].generate(requests))
    engine, target, draft = engine_and_models()
    results: dict[int, Result] = {}
    numbers = [engine.add(r, on_done=lambda result, i=i: results.update({i: result})) for i, r in enumerate(requests)]  # type: ignore[misc]
    engine.step()
    assert len(target.free) == len(draft.free) == 0  # two run, two wait
    engine.cancel(numbers[0])
    engine.cancel(numbers[3])
    assert len(target.free) == len(draft.free) == 1
    while engine.step():
        pass
    assert [results[i].completions[0].finish_reason for i in range(4)] == ["cancelled", "length", "length", "cancelled"]
    got = [results[i].completions[0].token_ids for i in range(4)]
    assert got[1:3] == expected[1:3] and got[3] == []
    assert 0 < len(got[0]) < 12 and got[0] == expected[0][: len(got[0])]
    assert len(target.free) == len(draft.free) == 2
    engine.cancel(numbers[1])  # long over: nothing happens


def test_callbacks_may_cancel_and_add() -> None:
    engine = Engine(TableModel(random_logits(9, 0), 9))
    done: list[str] = []

    def on_token(event: Event) -> None:
        if event.token_id is not None and len(done) == 0:
            done.append("first")
            engine.cancel(number)
            engine.add(Request([2], max_tokens=1), on_done=lambda result: done.append("second"))

    number = engine.add(Request([1], max_tokens=50), on_token, lambda result: done.append("cancelled"))
    while engine.step():
        pass
    assert done == ["first", "cancelled", "second"]


def test_a_callback_that_raises_leaves_the_engine_whole() -> None:
    model = TableModel(random_logits(9, 0), 9)
    engine = Engine(model)
    done: list[Result] = []

    def fail(event: Event) -> None:
        raise RuntimeError("the client is gone")

    engine.add(Request([1], max_tokens=1), fail, done.append)
    with pytest.raises(RuntimeError, match="gone"):
        engine.step()
    assert engine.busy and not engine.step()
    assert len(done) == 1 and not model.held


@pytest.mark.parametrize(("stop", "reason"), (((7,), "stop"), ((), "error")))
def test_a_text_that_ends_before_logits_that_are_not_finite_has_no_error(stop, reason) -> None:
    """The stop is in the block that came to them; without it the text up to them is kept, log-probs and all."""
    script = scripted([5, 6, 7, 8, 9], 10, 2)
    model = TableModel(lambda text: script(text) * (np.nan if len(text) >= 5 else 1.0), 10)
    engine = Engine(model, ModelDrafter(TableModel(script, 10), model), draft_length=4)
    request = Request([1, 2], Params(temperature=0), stop_token_ids=stop, logprobs=0)
    events, result = stream(engine, request)
    completion = result.completions[0]
    assert completion.token_ids == [5, 6, 7] and completion.finish_reason == events[-1].finish_reason == reason
    assert completion.from_draft == [True] * 3 and completion.drafted == completion.accepted == [1, 1, 1]
    assert [entry.token_id for entry in completion.logprobs or ()] == completion.token_ids
    assert not model.held


@pytest.mark.parametrize("value", (np.nan, np.inf, -np.inf))
def test_logits_that_are_not_finite_end_that_request_alone(value: float) -> None:
    sound = random_logits(9, 0)
    request = Request([1, 2], Params(seed=1), max_tokens=9)
    other = Request([3, 2], Params(seed=2), max_tokens=9, n=2)

    def logits(text: Text) -> np.ndarray:
        if text[0] == 1 and len(text) == 5:
            return np.full(9, value)
        return sound(text)

    for temperature in (1.0, 0.0):
        first, second = (
            replace(r, params=replace(r.params, temperature=temperature)) for r in (request, other)
        )  # fmt: skip
        model = TableModel(logits, 9)
        results = Engine(model, ModelDrafter(TableModel(sound, 9), model), draft_length=0).generate([first, second])
        broken = results[0].completions[0]
        assert broken.finish_reason == "error" and len(broken.token_ids) == 3
        assert "table: non-finite logits at position 4" in (broken.error or "") and "float32" in (broken.error or "")
        alone = Engine(TableModel(sound, 9)).generate([second])
        assert ids(results[1:]) == ids(alone) and all(c.finish_reason == "length" for c in results[1].completions)
        assert not model.held


BAD = {
    "prompt is empty": Request([]),
    "context of 30": Request([1] * 30),
    "token 9 is outside the vocabulary": Request([9]),
    "token -1 is outside": Request([-1]),
    "use 0 for plain decoding": Request([1], draft_length=-1),
    "max_tokens=0": Request([1], max_tokens=0),
    "n=0": Request([1], n=0),
    "logprobs=10": Request([1], logprobs=10),
    "logit_bias names token 99": Request([1], Params(logit_bias={99: 1.0})),
    "stop strings need a tokenizer": Request([1], stop=("x",)),
    "give a tuple of texts, ('end',)": Request([1], stop="end"),  # type: ignore[arg-type]
    "not a list of token ids": Request("What is 1 + 1?"),  # type: ignore[arg-type]
    "the prompt is not a list": Request(None),  # type: ignore[arg-type]
    "prompt is not a list of": Request([1.5]),  # type: ignore[list-item]
    "params={'temperature': 0}: give a spec.params.Params": Request([1], {"temperature": 0}),  # type: ignore[arg-type]
    "max_tokens='3': must be a whole number": Request([1], max_tokens="3"),  # type: ignore[arg-type]
    "max_tokens=None: must": Request([1], max_tokens=None),  # type: ignore[arg-type]
    "n='2': must be a whole number": Request([1], n="2"),  # type: ignore[arg-type]
    "n=None: must be": Request([1], n=None),  # type: ignore[arg-type]
    "logprobs=True: must be a whole number": Request([1], logprobs=True),
    "draft_length='auto': must be a whole number": Request([1], draft_length="auto"),  # type: ignore[arg-type]
    "stop=5: give a tuple of texts": Request([1], stop=5),  # type: ignore[arg-type]
    "stop=(5,): give a tuple": Request([1], stop=(5,)),  # type: ignore[arg-type]
    "stop_token_ids=5: must be token ids": Request([1], stop_token_ids=5),  # type: ignore[arg-type]
    "stop_token_ids: token='a': must be a whole number": Request([1], stop_token_ids=("a",)),  # type: ignore[arg-type]
}


def test_a_request_that_cannot_run_fails_alone() -> None:
    model = TableModel(random_logits(9, 0), 9, max_positions=30)
    good = Request([1, 2], max_tokens=4)
    results = Engine(model).generate([*BAD.values(), good])
    for message, result in zip(BAD, results, strict=False):
        assert result.completions[0].finish_reason == "error"
        assert message in (result.completions[0].error or "")
        with pytest.raises(ValueError, match="."):
            Engine(model).add(result.request)
    assert len(results[-1].completions[0].token_ids) == 4
    for wrong in (
        {"mode": "tree"},
        {"max_running": 0},
        {"prefill_tokens": 0},
        {"logprobs": "all"},
        {"draft_length": -1},
    ):
        with pytest.raises(ValueError, match="mode|max_running|prefill_tokens|logprobs|draft length"):
            Engine(model, **wrong)  # type: ignore[arg-type]


def test_a_request_waits_for_room_and_one_that_never_fits_fails_alone() -> None:
    class Small(TableModel):
        def open(self, capacity: int) -> int | None:
            if capacity > 20:
                raise ValueError(f"{capacity} tokens never fit in a cache of 20")
            return super().open(capacity)

    model = Small(random_logits(9, 0), 9, slots=1)
    requests = [Request([1], max_tokens=5), Request([1], max_tokens=40), Request([2], max_tokens=5)]
    completions = [result.completions[0] for result in Engine(model).generate(requests)]
    reasons = [(completion.finish_reason, completion.error) for completion in completions]
    assert reasons == [("length", None), ("error", "41 tokens never fit in a cache of 20"), ("length", None)]


def test_a_model_that_cannot_roll_back_is_refused() -> None:
    class Recurrent:
        _is_stateful = True

    with pytest.raises(ValueError, match="Recurrent keeps a recurrent state, which cannot be rolled back"):
        TransformersModel(Recurrent())  # type: ignore[arg-type]
