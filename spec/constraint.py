"""Output that must match a JSON schema, a regular expression or one of some texts, decoded speculatively and exactly.

Which tokens may come next is a function of the text so far. So p' proportional to p times that mask is a target like
any other, and verification against p' is exact with masked rows alone: a forbidden draft has p' = 0 and is rejected. A
draft model's rows are masked too: the law does not need it, but forbidden drafts are of no use. The rows behind a
forbidden draft, or behind the end, are never come to; any mask will do there, and they have none.

Which texts match, and the masks, are llguidance's affair (https://github.com/guidance-ai/llguidance). Where a grammar
forces the next bytes, its mask leaves the one token with which the tokenizer itself would write them.

    grammars = Grammars(tokenizer, target.vocab_size, [tokenizer.eos_token_id])
    engine.generate([Request(ids, grammar=grammars.json_schema({"type": "object"}))])

Shape legend: K drafted tokens, V vocabulary of the target, padding included.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST = 2**16  # characters of a grammar, some hundred properties; masks of much longer ones would hold up a step
_KEPT = 32  # compiled grammars; one that is used a lot grows to some megabytes
# The other limits are llguidance's own: some 20 ms for the lexer of a grammar, and for each mask.
_LIMITS = LLParserLimits(max_lexer_states=20_000, max_grammar_size=100_000, verbose_errors=False)


class Grammars:
    """Compiles grammars for one tokenizer, and keeps the last 32. For one thread at a time.

    Args:
        tokenizer: the target's, a fast one; it is copied, and not used afterwards.
        vocab_size: V. end_tokens: which may come where a text matches, and end it.

    Each method raises ValueError, with the reason, for a grammar that llguidance cannot keep to or that is too large.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, end_tokens: Sequence[int]):
        self._given = tokenizer, vocab_size, sorted(end_tokens)
        self._compiled: Callable[[str], Grammar] = lru_cache(_KEPT)(lambda source: Grammar(self._tokenizer, source))

    def json_schema(self, schema: Any) -> Grammar:
        """JSON values valid under ``schema``, with white space as the model likes it.

        ``{"type": "object"}`` for any object. A keyword that cannot be kept to is an error, never passed over. The key
        ``x-guidance`` takes llguidance's own options, ``{"whitespace_flexible": false}`` for one.
        """
        return self._compile(LLMatcher.grammar_from_json_schema, json.dumps(schema))

    def regex(self, pattern: str) -> Grammar:
        """Texts that match as a whole. The syntax is that of Rust's regex crate, without look-around."""
        return self._compile(LLMatcher.grammar_from_regex, pattern)

    def choice(self, texts: Sequence[str]) -> Grammar:
        """One of ``texts``."""
        if not texts:
            raise ValueError("there is nothing to choose from: give at least one text")
        lexeme = " | ".join(json.dumps(text) for text in texts)  # one terminal: alternatives of a rule would be slow
        return self._compile(LLMatcher.grammar_from_lark, f"start: CHOICE\nCHOICE: {lexeme}")

    def _compile(self, as_grammar: Callable[[str], str], written: str) -> Grammar:
        if len(written) > _LONGEST:
            raise ValueError(f"{len(written):,} characters: at most {_LONGEST:,} are compiled; simplify it")
        return self._compiled(as_grammar(written))

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """Takes about a second, so it is made when it is first needed."""
        tokenizer, vocab_size, end_tokens = self._given
        if not end_tokens:
            raise ValueError("the model names no end-of-text token, with which a constrained text would end")
        try:
            return from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=end_tokens)
        except ValueError as error:
            raise ValueError(
                f"constrained output needs a fast tokenizer with byte-level or byte-fallback tokens ({error})"
            ) from None


class Grammar:
    """A compiled grammar; any number of samples may follow it at once, in the thread of one engine.

    ``vocab_size``: V; ``end_tokens``: with which a text that matches may end, and with nothing else.
    """

    def __init__(self, tokenizer: LLTokenizer, source: str):
        self.vocab_size, self.end_tokens = tokenizer.vocab_size, frozenset(tokenizer.eos_tokens)
        self._tokenizer, self._source = tokenizer, source
        self._first = self._fresh()
        tried = self.matcher()
        tried.compute_bitmask()  # some things are found out here only: no token to begin with, too many ways to go on
        if tried.is_error():
            raise ValueError(_reason(tried))

    def start(self) -> Constraint:
        """For one sample."""
        return Constraint(self)

    def matcher(self, renew: bool = False) -> LLMatcher:
        """At the start of a text. All of them share a lexer that grows with use, unless it is renewed here."""
        if renew:
            self._first = self._fresh()
        return self._first.deep_copy()

    def _fresh(self) -> LLMatcher:
        return LLMatcher(self._tokenizer, self._source, log_level=0, limits=_LIMITS)


class Constraint:
    """What one sample may say. It reads what was committed from the lists it is given, and keeps up with them.

    An error of the matcher (a limit on its work, for one) leaves no token in the row where it happens, and no mark on
    rows before it: a text that comes to that row ends there, with :meth:`failure` for a reason, and no other text does.
    """

    def __init__(self, grammar: Grammar):
        self._grammar, self._matcher = grammar, grammar.matcher()
        self._read = 0  # committed tokens the matcher has consumed
        self._failure: tuple[int, str] | None = None

    def rows(self, output_ids: Sequence[int], drafted: Sequence[int], first: int = 0) -> np.ndarray:
        """[K + 1 - first, V] bool: the tokens that may follow the committed ones and drafts 0 to i - 1, i >= first.

        ``first``: drafts known to be allowed. Rows behind a draft that is not, or ends the text, allow everything.
        """
        rows, self._failure = self._masks(output_ids, drafted, first)
        if self._failure is not None:  # of this text, or of what others made of the lexer they share?
            self._matcher, self._read = self._grammar.matcher(renew=True), 0
            rows, self._failure = self._masks(output_ids, drafted, first)
        return rows

    def failure(self, position: int) -> str | None:
        """Why no token may follow ``position`` output tokens, if that is the matcher's failure."""
        at, reason = self._failure or (None, "")
        return f"the constraint cannot be followed further: {reason}; simplify it" if at == position else None

    def _masks(
        self, output_ids: Sequence[int], drafted: Sequence[int], first: int
    ) -> tuple[np.ndarray, tuple[int, str] | None]:
        """The rows, and where and why the matcher failed."""
        self._matcher.consume_tokens(list(output_ids[self._read :]))
        self._read = len(output_ids)
        matcher = self._matcher.deep_copy()  # microseconds; nothing to take back afterwards
        rows = np.ones((len(drafted) + 1 - first, self._grammar.vocab_size), dtype=bool)
        for i in range(len(drafted) + 1):
            if i >= first:
                bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
                rows[i - first] = np.unpackbits(bits, count=rows.shape[1], bitorder="little")
                if matcher.is_error():
                    rows[i - first] = False
                    return rows, (len(output_ids) + i, _reason(matcher))
            if i == len(drafted) or drafted[i] in self._grammar.end_tokens:
                break
            if i >= first and not rows[i - first, drafted[i]]:
                break
            matcher.consume_token(drafted[i])
        return rows, None


def _reason(matcher: LLMatcher) -> str:
    """What is wrong, in a line, without the grammar that is quoted around it."""
    lines = matcher.get_error().splitlines() or ["unknown error"]
    line = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return "no token of the vocabulary can follow" if line.startswith("NoExtension") else line[:300]
