"""Constrained output: the law is the masked target's, and every text matches."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLParserLimits

from spec import constraint
from spec.constraint import Grammar, Grammars
from spec.drafters.model import ModelDrafter
from spec.drafters.ngram import NgramDrafter
from spec.engine import Engine
from spec.params import Params
from spec.request import Request
from spec.verify import Mode
from tests.enumerate_engine import Branches, Text, text_law
from tests.spec_models import Logits, TableModel, random_logits
from tests.test_engine_law import SHAPED, processed

LETTERS, END, VOCABULARY = "abc", 3, 5  # token 4 is padding: logits, but no text
PATTERN = "(a|bc?a|cc)*"
PROMPT = (0, 1, 0, 1, 2, 0)  # for a lookup to find something in


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    """For a tokenizer of three letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "c": 2, "<end>": 3}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return Grammars(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), VOCABULARY, [END])


@cache
def allowed(text: Text) -> tuple[bool, ...]:
    """[V] by trying continuations: an independent definition. Anything behind what cannot be come to."""
    if not all(allowed(text[:i])[text[i]] and text[i] != END for i in range(len(text))):
        return (True,) * VOCABULARY
    written = "".join(LETTERS[token] for token in text)

    def goes_on(letter: str) -> bool:
        ends = ("".join(end) for size in range(3) for end in product(LETTERS, repeat=size))
        return any(re.fullmatch(PATTERN, written + letter + end) for end in ends)

    return (*map(goes_on, LETTERS), re.fullmatch(PATTERN, written) is not None, False)


def masked(logits: Logits) -> Logits:
    """The logits of the target that a constraint makes of another; a draft model masked likewise drafts the same."""
    return lambda text: np.where(allowed(text[len(PROMPT) :]), logits(text), -np.inf)


TARGET = random_logits(VOCABULARY, 1)
DRAFTERS: dict[str, Any] = {
    "model": lambda target: ModelDrafter(TableModel(random_logits(VOCABULARY, 2), VOCABULARY), target),
    "reduced": lambda target: ModelDrafter(
        TableModel(random_logits(3, 2), 3), target, vocabulary=torch.tensor([0, 2, END])
    ),
    "lookup": lambda target: NgramDrafter(2, 1),
}


@pytest.mark.parametrize("mode", ("token", "block"))
@pytest.mark.parametrize(
    ("name", "params"), (("model", SHAPED), ("reduced", Params()), ("lookup", Params()), ("lookup", SHAPED))
)
def test_the_joint_law_is_the_masked_targets(name: str, params: Params, mode: Mode, grammars, monkeypatch) -> None:
    """Forbidden drafts, drafts beyond the end, masks of drafted text: every path of the engine, to 1e-12."""
    request = Request(PROMPT, params, max_tokens=4, stop_token_ids=(END,), grammar=grammars.regex(PATTERN))
    drafted: set[Text] = set()

    def program() -> Text:
        model = TableModel(TARGET, VOCABULARY)
        engine = Engine(model, DRAFTERS[name](model), draft_length=2, mode=mode)
        completion = engine.generate([request])[0].completions[0]
        drafted.add(tuple(completion.drafted))
        return tuple(completion.token_ids)

    law = Branches(monkeypatch).law(program)
    exact = text_law(
        lambda text: processed(masked(TARGET)(PROMPT + text), params, PROMPT, text), 4, frozenset({END})
    )  # fmt: skip
    exact = {text: p for text, p in exact.items() if p}
    assert law.keys() == exact.keys() and any(drafted)
    assert max(abs(law[text] - exact[text]) for text in exact) < 1e-12


def ids(engine: Engine, requests: list[Request]) -> list[list[int]]:
    return [c.token_ids for result in engine.generate(requests) for c in result.completions]


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_and_drawn_text_beside_unconstrained_requests(name: str, grammars) -> None:
    """Greedy speculative text is the plain one, and no request is moved by what else is in the batch."""
    free = [Request(PROMPT, Params(temperature=t, seed=s), 12, (), (END,)) for t in (0, 1) for s in range(3)]
    bound = [replace(request, grammar=grammars.regex(PATTERN)) for request in free]
    model = TableModel(TARGET, VOCABULARY)
    engine = Engine(model, DRAFTERS[name](model), draft_length=3)
    together = ids(engine, [*free, *bound])
    assert together == ids(engine, free) + ids(engine, bound) and together[6:] != together[:6]
    assert together[6] == ids(Engine(model), bound[:1])[0]
    for text in together[6:]:
        said = "".join(LETTERS[token] for token in text if token != END)
        assert re.fullmatch(PATTERN, said) if text[-1] == END else allowed(tuple(text[:-1]))[text[-1]]


def test_a_draft_model_drafts_what_is_allowed(grammars) -> None:
    """A perfect draft is accepted as if there were no constraint, and no draft model says what is forbidden."""
    target = TableModel(TARGET, VOCABULARY)
    request = Request(PROMPT, Params(seed=1), 40, (), (END,), grammar=grammars.regex("(a|bc?a|cc){20,30}"))
    completion = Engine(target, ModelDrafter(target, target), draft_length=3).generate([request])[0].completions[0]
    assert completion.accepted == completion.drafted and completion.target_steps <= len(completion.token_ids) / 4 + 1


def test_masks_are_a_function_of_the_text(tokenizer) -> None:
    """Whatever was drafted and rejected before, and whoever else shares the grammar: as by a fresh matcher."""
    grammars = Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    schema = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]}}
    grammar, random = grammars.json_schema(schema), np.random.default_rng(0)
    for _ in range(3):
        walked, text = grammar.start(), list[int]()
        while len(text) < 15 and tokenizer.eos_token_id not in text:
            mask = walked.rows(text, [])[0]
            drafted = random.choice(np.flatnonzero(mask), 1).tolist()
            drafted += random.choice(len(mask), 2).tolist()  # most likely forbidden
            rows = walked.rows(text, drafted)
            for i, row in enumerate(rows):
                behind = drafted[:i]  # what is forbidden, or the end
                free = not all(rows[j][drafted[j]] for j in range(i)) or tokenizer.eos_token_id in behind
                fresh = Grammar(grammar._tokenizer, grammar._source).start()
                assert (row == (True if free else fresh.rows([*text, *behind], [])[0])).all()
            assert (walked.rows(text, drafted[:1], 1) == rows[1]).all()
            text.append(int(random.choice(np.flatnonzero(mask))))


def test_a_lexer_that_others_filled_is_made_anew(grammars, monkeypatch) -> None:
    """Three long texts fit one after the other, not together: each alone decides whether it can be followed."""
    monkeypatch.setattr(constraint, "_LIMITS", LLParserLimits(max_lexer_states=60))
    made: list[Grammar] = []
    fresh = Grammar._fresh
    monkeypatch.setattr(Grammar, "_fresh", lambda self: made.append(self) or fresh(self))  # type: ignore[func-returns-value]
    grammar = grammars.regex("a{1,40}|b{1,40}|c{1,40}")
    for letter in range(3):
        one = grammar.start()
        for size in range(40):
            rows = one.rows([letter] * size, [letter])
            assert one.failure(size) is None and rows[0][letter] and rows[0][END] == (size > 0)
    assert len(made) > 1


def test_a_matcher_that_fails_ends_its_text_alone(grammars, monkeypatch) -> None:
    """Named with its cause, and only where the text comes to it: not behind a rejected draft."""
    monkeypatch.setattr(constraint, "_LIMITS", LLParserLimits(max_lexer_states=26, verbose_errors=False))
    grammar = grammars.regex("a{1,30}|b{3}")
    says_a = TableModel(lambda text: np.array([5.0, 0, 0, 0, 0]), VOCABULARY)
    says_b = TableModel(lambda text: np.array([0, 5.0, 0, 0, 0]), VOCABULARY)
    request = Request(PROMPT, Params(temperature=0), 40, (), (END,), grammar=grammar)
    engine = Engine(says_a, ModelDrafter(says_a, says_a), draft_length=20)
    failed, free = (result.completions[0] for result in engine.generate([request, replace(request, grammar=None)]))
    assert failed.finish_reason == "error" and set(failed.token_ids) == {0} and 2 < len(failed.token_ids) < 30
    assert "the constraint cannot be followed further: " in (failed.error or "") and "states" in (failed.error or "")
    assert free.finish_reason == "length" and not says_a.held
    both = Engine(says_b, ModelDrafter(says_a, says_b), draft_length=20).generate([request])[0].completions[0]
    assert both.token_ids == [1, 1, 1, END] and both.finish_reason == "stop"


REFUSED: dict[str, Any] = {
    "Invalid type: strin": lambda g: g.json_schema({"type": "strin"}),
    "Unimplemented keys": lambda g: g.json_schema({"not": {"type": "string"}}),
    "Unsatisfiable schema": lambda g: g.json_schema(False),
    "unclosed group": lambda g: g.regex("("),
    "look-around": lambda g: g.regex("(?=a)b"),
    "nothing to choose from": lambda g: g.choice([]),
    "at most 65,536": lambda g: g.regex("a" * 70_000),
    "too big": lambda g: g.json_schema({"type": "array", "items": {}, "minItems": 10_000, "maxItems": 100_000}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_kept_to_is_refused(reason: str, tokenizer) -> None:
    with pytest.raises(ValueError, match=reason):
        REFUSED[reason](Grammars(tokenizer, len(tokenizer), [tokenizer.eos_token_id]))


def test_requests_that_do_not_fit_their_grammar_are_refused(grammars, tokenizer) -> None:
    model, grammar = TableModel(TARGET, VOCABULARY), grammars.choice(["ab", "a"])
    for stop_tokens in (None, (), (0,)):  # the table names no end of text by itself
        with pytest.raises(ValueError, match="leave stop_token_ids unset, or name in it 3 too"):
            Engine(model).add(Request(PROMPT, stop_token_ids=stop_tokens, grammar=grammar))
    with pytest.raises(ValueError, match="compiled for a vocabulary of 5, the target's has 7"):
        Engine(TableModel(random_logits(7, 1), 7)).add(Request(PROMPT, grammar=grammar))
    with pytest.raises(ValueError, match="compile it with spec.constraint.Grammars"):
        Engine(model).add(Request(PROMPT, grammar="a|b"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="names no end-of-text token"):
        Grammars(tokenizer, len(tokenizer), []).regex("a")
    with pytest.raises(ValueError, match="vocab size too small"):
        Grammars(tokenizer, 5, [3]).regex("a")
    with pytest.raises(ValueError, match="no token of the vocabulary can follow"):
        grammars.regex("x")
    assert grammars.choice(["ab", "a"]) is grammar  # compiled once
