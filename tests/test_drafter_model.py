"""A draft model's proposals: drawn from the law they claim, from a cache that holds what was committed."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from spec.draft_length import Fixed
from spec.drafters.alignment import check_tokenizers
from spec.drafters.base import Context, Drafter
from spec.drafters.fallback import Fallback
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.engine import Engine
from spec.params import Params
from spec.request import Request
from spec.sampling import processed_probs
from tests.enumerate_engine import Branches, Text, text_law
from tests.spec_models import TableModel, random_logits, scripted, tiny_llama

CAPACITY = 1000


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def context(prompt: Text, output: Text = (), params: Params | None = None, id: int = 0) -> Context:
    return Context(id, params or Params(), prompt, list(output), capacity=CAPACITY)


def test_probabilities_are_those_the_tokens_came_from() -> None:
    """Row by row against the table, ragged lengths, after commits that left the draft one or two tokens behind."""
    law, target = random_logits(6, 0), TableModel(random_logits(6, 1), 6)
    drafter = ModelDrafter(TableModel(law, 6), target)
    texts = [
        context((1, 2), params=Params(seed=3)),
        context((3,), params=Params(seed=4, top_k=2), id=1),
        context((4,), id=2),
    ]
    for text in texts:
        assert drafter.open(text)
    for lengths, accepted in (((3, 1, 2), (3, 0, 1)), ((2, 2, 4), (2, 1, 4)), ((1, 4, 1), (0, 4, 0))):
        drafts = drafter.propose(texts, lengths)
        assert list(drafts.lengths) == list(lengths) and drafts.probs is not None
        ids, rows = drafts.ids.tolist(), drafts.probs_rows.tolist()
        at = 0
        for text, size, kept in zip(texts, lengths, accepted, strict=True):
            for i in range(size):
                prefix = (*text.prompt_ids, *text.output_ids, *ids[at : at + i])
                expected = softmax(law(prefix))
                if text.params.top_k:
                    expected = np.where(expected >= np.sort(expected)[-2], expected, 0)
                    expected /= expected.sum()
                assert np.allclose(drafts.probs[rows[at + i]].numpy(), expected, atol=1e-12)
                assert expected[ids[at + i]] > 0
            text.output_ids += [*ids[at : at + kept], 5]
            text.round += 1
            drafter.commit(text, kept)
            at += size


def test_draws_follow_their_probabilities() -> None:
    target = TableModel(random_logits(4, 1), 4)
    drafter = ModelDrafter(TableModel(random_logits(4, 0, 0.8), 4), target)
    texts = [context((1,), params=Params(seed=seed), id=seed) for seed in range(4000)]
    drafter.model.free = list(range(4000))  # type: ignore[attr-defined]
    for text in texts:
        drafter.open(text)
    drafts = drafter.propose(texts, [2] * len(texts))
    counts = Counter(map(tuple, drafts.ids.reshape(-1, 2).tolist()))
    law = random_logits(4, 0, 0.8)
    exact = {(a, b): softmax(law((1,)))[a] * softmax(law((1, a)))[b] for a, b in itertools.product(range(4), repeat=2)}
    assert sum((counts[text] - 4000 * p) ** 2 / (4000 * p) for text, p in exact.items()) < 37.7  # 15 df, 0.001


def test_a_rejected_suffix_is_drafted_anew_from_new_noise() -> None:
    """The round is part of the key: at one position, two rounds draw independently."""
    flat = TableModel(lambda text: np.zeros(50), 50)
    drafter = ModelDrafter(flat, flat)
    seen = set()
    for round in range(20):
        text = context((1,), params=Params(seed=9), id=round)
        text.round = round
        drafter.open(text)
        seen.add(tuple(drafter.propose([text], [3]).ids.tolist()))
    assert len(seen) == 20


def test_greedy_drafting_proposes_the_argmax_one_hot() -> None:
    law = random_logits(6, 0)
    model = TableModel(law, 6)
    for drafting, params in (("greedy", Params()), ("probabilistic", Params(temperature=0))):
        drafter = ModelDrafter(model, model, drafting=drafting)  # type: ignore[arg-type]
        text = context((2,), params=params)
        drafter.open(text)
        drafts = drafter.propose([text], [3])
        expected: list[int] = []
        for _ in range(3):
            expected.append(int(law((2, *expected)).argmax()))
        assert drafts.ids.tolist() == expected and drafts.probs is None
        drafter.close(text)


def test_every_token_is_read_once() -> None:
    """Nothing is fed twice and nothing is left out: prompt, accepted drafts, and the tokens that were the target's."""
    script = list(range(5, 25))
    target, draft = TableModel(scripted(script, 30, 2), 30), TableModel(scripted(script, 30, 2), 30)
    engine = Engine(target, ModelDrafter(draft, target), draft_length=4)
    completion = engine.generate([Request([1, 2], Params(temperature=0), max_tokens=20)])[0].completions[0]
    assert completion.token_ids == script and completion.target_steps == 4
    assert target.forwards == [2 + 4, 1 + 4, 1 + 4, 1 + 4]
    assert draft.forwards == [2, 1, 1, 1] + [2, 1, 1, 1] * 3  # two tokens at first: the last draft and the bonus


def test_a_sample_takes_the_prompt_over_and_a_long_prompt_is_read_in_parts() -> None:
    target, draft = TableModel(random_logits(9, 1), 9), TableModel(random_logits(9, 0), 9)
    drafter = ModelDrafter(draft, target, prefill_tokens=8)
    prompt = tuple(i % 9 for i in range(30))
    first, second = context(prompt), context(prompt, params=Params(seed=1), id=1)
    drafter.open(first)
    drafter.propose([first], [1])
    assert draft.forwards == [8, 8, 6, 8]
    drafter.open(second)
    drafter.propose([second], [1])
    assert draft.forwards[4:] == [1]


REDUCED = torch.tensor([1, 2, 4])


@pytest.mark.parametrize(
    "params",
    (Params(), Params(temperature=0.7, top_p=0.8), Params(presence_penalty=0.5, logit_bias={2: 0.5, 3: 1.0})),
    ids=("plain", "shaped", "by token"),
)
def test_a_reduced_vocabulary_has_q_0_outside_it(params: Params) -> None:
    target = TableModel(random_logits(6, 1), 6)
    drafter = ModelDrafter(TableModel(random_logits(3, 0), 3), target, vocabulary=REDUCED)
    text = context((5,), (4,), params)
    drafter.open(text)
    drafts = drafter.propose([text], [3])
    assert drafts.probs is not None and set(drafts.ids.tolist()) <= {1, 2, 4}
    history: list[int] = [4]
    for row, token in zip(drafts.probs, drafts.ids.tolist(), strict=True):
        logits = torch.full((6,), -torch.inf, dtype=torch.float64)
        logits[REDUCED] = torch.from_numpy(random_logits(3, 0)((5, *history)))
        options = {"presence_penalty": params.presence_penalty, "logit_bias": params.logit_bias}
        expected = processed_probs(
            logits[None], temperature=params.temperature, top_p=params.top_p, prompt_ids=torch.tensor([[5]]),
            output_ids=torch.tensor([history]), **options,
        )[0]  # fmt: skip
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-12)
        history.append(token)


@pytest.mark.parametrize("case", ("reduced", "smaller", "larger", "greedy", "lookup first"))
def test_every_kind_of_draft_is_exact(case: str, monkeypatch) -> None:
    """Joint law of three tokens through the engine, by enumeration."""
    law = random_logits(3, 1)
    params = Params(temperature=0.8, frequency_penalty=0.5)

    def program() -> Text:
        target = TableModel(law, 3)
        drafter: Drafter
        if case == "reduced":
            drafter = ModelDrafter(TableModel(random_logits(2, 0), 2), target, vocabulary=torch.tensor([0, 2]))
        elif case == "lookup first":
            drafter = Fallback(NgramDrafter(), ModelDrafter(TableModel(random_logits(3, 0), 3), target))
        else:
            rows = {"smaller": 2, "larger": 5, "greedy": 3}[case]
            draft = TableModel(random_logits(rows, 0), rows)
            drafter = ModelDrafter(draft, target, drafting="greedy" if case == "greedy" else "probabilistic")
        engine = Engine(target, drafter, draft_length=Fixed(2))
        return tuple(engine.generate([Request((1, 0, 1, 0, 1), params, max_tokens=3)])[0].completions[0].token_ids)

    def next_token(text: Text) -> np.ndarray:
        return softmax((law((1, 0, 1, 0, 1, *text)) - 0.5 * np.bincount(text, minlength=3)) / 0.8)

    got, exact = Branches(monkeypatch).law(program), text_law(next_token, 3, frozenset())
    assert got.keys() == exact.keys()
    assert max(abs(got[text] - exact[text]) for text in exact) < 1e-12


def test_tokens_the_draft_has_no_row_for_do_not_stop_it() -> None:
    """A target padded to more rows may say a padding token, of which the draft has neither embedding nor column."""
    target, draft = tiny_llama(0, vocabulary=48), tiny_llama(1, vocabulary=40)
    for allowed, drafted in (((41, 45), False), ((3, 45), True)):
        request = Request([1, 2], Params(temperature=0, allowed_token_ids=allowed), max_tokens=6)
        plain = Engine(target).generate([request])
        quick = Engine(target, ModelDrafter(draft, target), draft_length=2).generate([request])
        assert quick[0].completions[0].token_ids == plain[0].completions[0].token_ids
        assert bool(quick[0].completions[0].drafted) == drafted


def test_a_draft_whose_logits_are_not_finite_falls_silent_and_says_so() -> None:
    sound = random_logits(9, 0)
    target = TableModel(sound, 9)
    draft = TableModel(lambda text: np.full(9, np.nan) if len(text) == 4 and text[0] == 1 else sound(text), 9)
    requests = [Request([i, 2], Params(temperature=0), max_tokens=8) for i in (1, 3)]
    plain = Engine(target).generate(requests)
    with pytest.warns(RuntimeWarning, match="table: non-finite logits at position 3 of the sequence"):
        quick = Engine(target, ModelDrafter(draft, target), draft_length=3).generate(requests)
    for one, other in zip(plain, quick, strict=True):
        assert one.completions[0].token_ids == other.completions[0].token_ids
    assert sum(quick[0].completions[0].drafted) == 2 < sum(quick[1].completions[0].drafted)
    assert not draft.held


def test_a_shorter_context_of_the_draft_ends_drafting_only() -> None:
    target, draft = TableModel(random_logits(9, 0), 9), TableModel(random_logits(9, 0), 9, max_positions=8)
    requests = [Request([1] * size, Params(temperature=0), max_tokens=12) for size in (3, 9)]
    quick = Engine(target, ModelDrafter(draft, target), draft_length=2).generate(requests)
    assert [r.completions[0].token_ids for r in quick] == [
        r.completions[0].token_ids for r in Engine(target).generate(requests)
    ]
    assert sum(quick[0].completions[0].drafted) > 0 and quick[1].completions[0].drafted == []
    assert not draft.held


def test_a_sequence_waits_for_room_in_the_draft_model() -> None:
    """Never decoded without drafts because others run: its text must not depend on them."""
    target, draft = TableModel(random_logits(9, 0), 9), TableModel(random_logits(9, 1), 9, slots=1)
    requests = [Request([i], Params(seed=i), max_tokens=6) for i in range(3)]
    together = Engine(target, ModelDrafter(draft, target), draft_length=2).generate(requests)
    alone = [Engine(target, ModelDrafter(draft, target), draft_length=2).generate([r])[0] for r in requests]
    assert [r.completions[0].token_ids for r in together] == [r.completions[0].token_ids for r in alone]
    assert len(target.free) == 1000


def test_a_larger_draft_and_a_wrong_vocabulary_are_told() -> None:
    target, draft = TableModel(random_logits(6, 0), 6), TableModel(random_logits(3, 0), 3)
    draft.num_parameters = 5
    with pytest.warns(UserWarning, match="are the two swapped"):
        ModelDrafter(draft, target, vocabulary=REDUCED)
    draft.num_parameters = 1
    for wrong in ([1, 2], [1, 2, 6], [1, 2, -1], [1, 1, 2]):
        with pytest.raises(ValueError, match="pass the vocabulary the draft was saved with"):
            ModelDrafter(draft, target, vocabulary=torch.tensor(wrong))
    with pytest.raises(ValueError, match="choose probabilistic or greedy"):
        ModelDrafter(draft, target, drafting="beam")  # type: ignore[arg-type]


class Words:
    def __init__(self, *words: str):
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: id for id, word in enumerate(self._words)}


def test_other_tokenizers_are_refused() -> None:
    check_tokenizers(Words("a", "b", "<end>"), Words("a", "b", "<end>", "<extra>"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 ids differ, the first is 1, 'b' in the target and 'c' in the draft"):
        check_tokenizers(Words("a", "b", "c"), Words("a", "c", "b"))  # type: ignore[arg-type]
