"""Drafters without a model propose what a search of the whole text would, after every commit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spec.drafters.base import Context, Drafter
from spec.drafters.fallback import Fallback, merged
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.drafters.suffix import SuffixDrafter
from spec.drafters.suffix_automaton import SuffixAutomaton
from spec.engine import Engine
from spec.params import Params
from spec.request import Completion, Request
from spec.verify import Drafts
from tests.spec_models import TableModel, random_logits

Text = list[int]
texts = st.lists(st.integers(0, 2), min_size=1, max_size=40)
commits = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), max_size=8)
ids = itertools.count()


def sequence(prompt: Sequence[int], output: Sequence[int] = (), capacity: int = 0) -> Context:
    return Context(next(ids), Params(), tuple(prompt), list(output), capacity=capacity)


def ends_of(text: Text, part: Text) -> list[int]:
    """Where ``part`` ends in ``text``."""
    return [end for end in range(len(part) - 1, len(text)) if text[end - len(part) + 1 : end + 1] == part]


def ngram_reference(text: Text, max_n: int, min_n: int, limit: int) -> Text:
    for n in range(min(max_n, len(text)), min_n - 1, -1):
        earlier = ends_of(text, text[len(text) - n :])[:-1]
        if earlier:
            whole = list(text)
            for i in range(limit):  # a continuation that runs past the end goes on into itself
                whole.append(whole[earlier[-1] + 1 + i])
            return whole[len(text) :]
    return []


def suffix_reference(text: Text, limit: int, min_match: int, factor: float, min_share: float) -> Text:
    suffixes = (text[start:] for start in range(1, len(text)))
    here = next((suffix for suffix in suffixes if len(ends_of(text, suffix)) > 1), [])
    proposal: Text = []
    if len(here) < min_match:
        return proposal
    share = 1.0
    for _ in range(min(limit, max(int(factor * len(here)), 1))):
        followers: dict[int, Text] = {}
        while not followers:
            followers = {x: ends for x in range(3) if (ends := ends_of(text, [*here, x]))}
            here = here if followers else here[1:]
            if len(here) < min_match:
                return proposal
        best = max(followers, key=lambda x: (len(followers[x]), followers[x][-1]))
        share *= len(followers[best]) / sum(map(len, followers.values()))
        if share < min_share:
            return proposal
        proposal.append(best)
        here = [*here, best]
    return proposal


def propose(drafter: Drafter, context: Context, limit: int) -> Text:
    drafts = drafter.propose([context], [limit])
    assert drafts.probs is None and drafts.lengths == [len(drafts.ids)]
    return drafts.ids.tolist()


@settings(max_examples=150, deadline=None)
@given(texts, commits, st.integers(1, 3), st.integers(0, 3), st.integers(1, 9), st.booleans())
def test_ngram_lookup_is_a_search(
    prompt: Text, commits: list[Text], min_n: int, more: int, limit: int, roomy: bool
) -> None:
    """Incrementally, after every commit, whatever part of the last proposal was accepted; arrays that grow or not."""
    drafter = NgramDrafter(min_n + more, min_n)
    context = sequence(prompt, capacity=200 if roomy else 0)
    drafter.open(context)
    for committed in [*commits, [0]]:
        expected = ngram_reference([*prompt, *context.output_ids], min_n + more, min_n, limit)
        assert propose(drafter, context, limit) == expected
        context.output_ids += [*expected[: committed[0]], *committed]
        drafter.commit(context, min(committed[0], len(expected)))


@settings(max_examples=150, deadline=None)
@given(texts, commits, st.integers(1, 3), st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.0, 0.3]))
def test_suffix_lookup_is_a_search(
    prompt: Text, commits: list[Text], min_match: int, factor: float, min_share: float
) -> None:
    drafter = SuffixDrafter(min_match, factor, min_share)
    context = sequence(prompt)
    drafter.open(context)
    for committed in [*commits, [0]]:
        expected = suffix_reference([*prompt, *context.output_ids], 7, min_match, factor, min_share)
        assert propose(drafter, context, 7) == expected
        context.output_ids += [*expected[: committed[0]], *committed]
        drafter.commit(context, min(committed[0], len(expected)))


@settings(max_examples=100, deadline=None)
@given(texts, texts)
def test_the_automaton_finds_the_longest_suffix_of_another_text(text: Text, other: Text) -> None:
    automaton = SuffixAutomaton(1)
    for token in text:
        automaton.extend(np.array([token]))
    longest = next(n for n in range(len(other), -1, -1) if n == 0 or ends_of(text, other[len(other) - n :]))
    match = automaton.match(np.array(other))
    assert match.length == longest
    if longest:
        followers = [text[end + 1] for end in ends_of(text, other[len(other) - longest :]) if end + 1 < len(text)]
        proposal, expected = automaton.continuation(match, 1, 0.0)
        if followers:
            most = max(map(followers.count, followers))
            assert followers.count(int(proposal[0])) == most and expected == pytest.approx(most / len(followers))


def test_long_and_monotonous_texts_take_linear_space_and_propose_on() -> None:
    """Every token of a run of one token has a longer chain of suffix links: only its start is walked."""
    automaton = SuffixAutomaton()
    automaton.extend(np.zeros(20_000, dtype=np.int64))
    assert automaton.repeated_suffix().length == 19_999
    assert automaton.continuation(automaton.repeated_suffix(), 5, 0.1)[0].tolist() == [0] * 5
    rng = np.random.default_rng(0)
    text = rng.integers(0, 49_152, 20_000)
    automaton = SuffixAutomaton()
    automaton.extend(np.concatenate([text, text[:500]]))
    assert automaton.repeated_suffix().length == 500
    assert automaton.continuation(automaton.repeated_suffix(), 50, 0.1)[0].tolist() == text[500:550].tolist()


@pytest.mark.parametrize("drafter", [NgramDrafter(), SuffixDrafter()], ids=lambda d: d.name)
def test_tables_grow_with_a_text_that_keeps_bringing_new_tokens(drafter: Drafter) -> None:
    context = sequence([0])
    drafter.open(context)
    for start in range(1, 3000, 7):
        context.output_ids += range(start, start + 7)
        assert propose(drafter, context, 3) == []
    context.output_ids += [1500, 1501]
    assert propose(drafter, context, 3) == [1502, 1503, 1504]


@pytest.mark.parametrize("drafter", [NgramDrafter(), SuffixDrafter()], ids=lambda d: d.name)
def test_sequences_are_independent_and_limits_hold(drafter: Drafter) -> None:
    repeats, no_repeats = sequence([1, 2, 3, 4, 1, 2, 3]), sequence(range(9))
    for context in (repeats, no_repeats):
        assert drafter.open(context)
    drafts = drafter.propose([no_repeats, repeats], [4, 3])
    assert drafts.lengths == [0, 3] and drafts.ids.tolist() == [4, 1, 2]
    assert drafter.propose([repeats, no_repeats], [0, 0]).lengths == [0, 0]
    drafter.close(repeats)
    repeats.output_ids += [4, 1, 2]  # a new sequence with the same text, and one that was left out for some rounds
    no_repeats.output_ids += [0, 1]
    drafter.open(again := sequence(repeats.prompt_ids, repeats.output_ids))
    drafts = drafter.propose([again, no_repeats], [2, 2])
    assert drafts.ids.tolist() == [3, 4, 2, 3]


def test_how_much_is_drafted_grows_with_the_match() -> None:
    drafter = SuffixDrafter(min_match=2, factor=1.5)
    for match in range(1, 8):
        context = sequence([*range(20), *range(match)])
        drafter.open(context)
        assert propose(drafter, context, 100) == ([] if match < 2 else list(range(match, match + int(1.5 * match))))


def test_earlier_outputs_are_looked_up_only_when_shared() -> None:
    for shared in (False, True):
        drafter = SuffixDrafter(shared=shared)
        first, second = sequence([90], [1, 2, 3, 4, 5]), sequence([91, 1, 2])
        drafter.open(first)
        drafter.open(second)
        assert propose(drafter, second, 9) == []
        drafter.close(first)
        assert propose(drafter, second, 9) == ([3, 4, 5] if shared else [])  # and not past the other text's end


def test_shared_outputs_are_bounded_and_the_oldest_go_first() -> None:
    drafter = SuffixDrafter(shared=True, shared_tokens=40)
    for start in (0, 100, 200, 300, 400):
        context = sequence([999], range(start, start + 10))
        drafter.open(context)
        drafter.close(context)
    found = {}
    for start in (0, 100, 200, 300, 400):
        context = sequence([start, start + 1])
        drafter.open(context)
        found[start] = propose(drafter, context, 2)
    assert found == {0: [], 100: [], 200: [], 300: [302, 303], 400: [402, 403]}


class Drawn:
    """Stands for a model: drafts ``token`` with q(token) = 0.5, and keeps a cache that must follow the text."""

    name = "drawn"

    def __init__(self, token: int, room: bool = True) -> None:
        self.token, self.room = token, room
        self.cache: dict[int, Text] = {}
        self.before: dict[int, int] = {}  # tokens of the text when it last proposed
        self.commits: list[tuple[int, int]] = []

    def open(self, context: Context) -> bool:
        if self.room:
            self.cache[context.id] = []
        return self.room

    def propose(self, contexts: Sequence[Context], lengths: Sequence[int]) -> Drafts:
        for context, length in zip(contexts, lengths, strict=True):
            assert length >= 1
            cache, text = self.cache[context.id], context.tokens(0, len(context))
            assert cache == text[: len(cache)]  # nothing rejected is left in it
            self.before[context.id] = len(text)
            self.cache[context.id] = text + [self.token] * (length - 1)
        total = sum(lengths)
        probs = torch.zeros(total, 8)
        probs[:, self.token], probs[:, 0] = 0.5, 0.5
        return Drafts(torch.full((total,), self.token), list(lengths), probs)

    def commit(self, context: Context, accepted: int) -> None:
        self.commits.append((context.id, accepted))
        assert len(context) == self.before[context.id] + accepted + 1
        del self.cache[context.id][self.before[context.id] + accepted :]

    def close(self, context: Context) -> None:
        del self.cache[context.id]


def test_the_first_drafter_with_a_proposal_serves_and_the_others_catch_up() -> None:
    lookup, model = NgramDrafter(2, 2), Drawn(7)
    both = Fallback(lookup, model)
    assert both.name == "ngram+drawn"
    plain, repeats = sequence([1, 2, 3]), sequence([1, 2, 3, 1, 2])
    for context in (plain, repeats):
        both.open(context)
    drafts = both.propose([plain, repeats], [2, 2])
    assert drafts.ids.tolist() == [7, 7, 3, 1] and drafts.lengths == [2, 2]
    assert drafts.probs is not None and drafts.probs_rows.tolist() == [0, 1, -1, -1]
    plain.output_ids += [7, 5]
    both.commit(plain, 1)
    repeats.output_ids += [3, 1, 2]  # all accepted: the model, which was not asked, hears nothing
    both.commit(repeats, 2)
    assert model.commits == [(plain.id, 1)]

    repeats.output_ids += [0]  # a round without drafts
    drafts = both.propose([repeats, plain], [1, 3])  # now the model serves both, four tokens further on
    assert drafts.ids.tolist() == [7, 7, 7, 7] and drafts.probs_rows.tolist() == [0, 1, 2, 3]
    repeats.output_ids += [4]
    both.commit(repeats, 0)
    assert model.commits[-1] == (repeats.id, 0)
    both.close(plain)  # which ended within its block: no commit
    both.close(repeats)
    assert not model.cache and not both._asked


def test_a_full_member_refuses_for_all() -> None:
    """Otherwise who drafts would depend on how full the engine was, and with it a seed's text."""
    lookup, context = NgramDrafter(), sequence([1])
    assert not Fallback(lookup, Drawn(1, room=False)).open(context)
    assert not lookup._indices
    with pytest.raises(ValueError, match="at least one drafter"):
        Fallback()


def test_merging_keeps_every_proposal_with_its_own_row() -> None:
    def drawn(tokens: Text, lengths: Text, scale: float) -> Drafts:
        return Drafts(torch.tensor(tokens), lengths, scale + torch.arange(len(tokens))[:, None].expand(-1, 3))

    nothing = Drafts(torch.zeros(0, dtype=torch.long), [0, 0])
    once = Drafts(torch.tensor([2, 2]), [1, 1], torch.ones(1, 3), torch.tensor([-1, 0]))
    parts = [([0, 3], nothing), ([4, 1], drawn([1, 1, 0], [1, 2], 10)), ([3, 0], once)]
    drafts = merged(parts, 6)
    assert drafts.lengths == [1, 2, 0, 1, 1, 0] and drafts.ids.tolist() == [2, 1, 0, 2, 1]
    assert drafts.probs is not None
    assert drafts.probs_rows.tolist() == [3, 1, 2, -1, 0]
    assert drafts.probs[drafts.probs_rows[1:3], 0].tolist() == [11, 12]
    assert merged([], 2).lengths == [0, 0] and merged([([1, 0], nothing)], 2).probs is None


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_in_the_engine_each_request_gets_what_it_gets_alone(temperature: float) -> None:
    """Greedy text is also plain decoding's. The texts repeat themselves, so lookup and model both get to serve."""
    sure, other = random_logits(6, 1, 3.0), random_logits(6, 2, 1.0)
    target = TableModel(lambda text: sure(text[-2:]), 6)

    def generate(requests: Sequence[Request], drafter: Drafter | None) -> list[Completion]:
        results = Engine(target, drafter, draft_length=4, end_tokens=()).generate(requests)
        return [result.completions[0] for result in results]

    def both() -> Fallback:
        draft = TableModel(lambda text: sure(text[-2:]) + other(text[-3:]), 6)
        return Fallback(NgramDrafter(4, 3), ModelDrafter(draft, target))

    prompts = [(i % 6, i // 6, 1) for i in range(12)]
    requests = [Request(p, Params(temperature=temperature, seed=i), 20 + i) for i, p in enumerate(prompts)]
    together = generate(requests, both())
    assert sum(sum(completion.accepted) for completion in together) > 50
    assert [c.token_ids for c in together] == [generate([r], both())[0].token_ids for r in requests]
    plain = [completion.token_ids for completion in generate(requests, None)]
    assert (plain == [c.token_ids for c in together]) == (temperature == 0)


def test_mistakes_name_their_remedy() -> None:
    with pytest.raises(ValueError, match="2 and 4 are usual"):
        NgramDrafter(max_n=2, min_n=3)
    for setting in ({"min_match": 0}, {"factor": 0.0}, {"min_share": 2.0}, {"shared_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            SuffixDrafter(**setting)  # type: ignore[arg-type]
