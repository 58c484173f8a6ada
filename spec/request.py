"""What goes into the engine and what comes out."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from spec.field_types import need_integer, need_token_ids
from spec.params import Params
from spec.random import philox

if TYPE_CHECKING:
    from spec.constraint import Grammar

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """One prompt. ``n`` samples of it share its prefill; sample i draws from :func:`sample_seed` (params.seed, i)."""

    prompt_ids: Sequence[int]  # token ids, chat template already applied
    params: Params = field(default_factory=Params)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts that end the output and are not part of its text (their tokens are kept)
    stop_token_ids: tuple[int, ...] | None = None  # None: the model's end-of-text tokens; () for none
    n: int = 1
    logprobs: int | None = None  # None: none; 0: the sampled token's; k: also the k most probable
    draft_length: int | None = None  # None: as the engine is set up; 0: plain decoding; k: always k
    special_tokens: bool = False  # whether special tokens show in the text; what ends it never does
    grammar: Grammar | None = None  # what the text must match, compiled by spec.constraint.Grammars

    def check(self, vocabulary: int, max_positions: int, *, has_text: bool = True) -> None:
        """Raises ValueError, naming the remedy, for what a model of ``vocabulary`` and ``max_positions`` cannot do.

        For fields of another type too: one request's mistake must not end a batch.
        ``has_text``: whether the engine has a tokenizer, without which it cannot see stop strings.
        """
        _check_prompt(self.prompt_ids, vocabulary, max_positions)
        for name, least in (("max_tokens", 1), ("n", 1), ("logprobs", 0), ("draft_length", 0)):
            value = getattr(self, name)
            if value is None and name in _INSTEAD:
                continue
            need_integer(name, value)
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}{_INSTEAD.get(name, '')}")
        if self.logprobs is not None and self.logprobs > vocabulary:
            raise ValueError(f"logprobs={self.logprobs}: the vocabulary has {vocabulary} tokens")
        if self.stop_token_ids is not None:
            need_token_ids("stop_token_ids", self.stop_token_ids)
        _check_stop(self.stop, has_text)
        if not isinstance(self.params, Params):
            raise ValueError(f"params={self.params!r}: give a spec.params.Params, for example Params(temperature=0)")
        self.params.check_vocabulary(vocabulary)
        if self.grammar is not None:
            _check_grammar(self.grammar, vocabulary)


_INSTEAD = {"draft_length": "; use 0 for plain decoding", "logprobs": "; use None for no log-probs"}


def _check_prompt(ids: Sequence[int], vocabulary: int, max_positions: int) -> None:
    try:
        length, outside = len(ids), [token for token in ids if not 0 <= operator.index(token) < vocabulary]
    except TypeError:
        raise ValueError("the prompt is not a list of token ids: encode it with the target's tokenizer") from None
    if not length:
        raise ValueError("the prompt is empty: give at least one token, for example the beginning-of-text token")
    if length >= max_positions:
        raise ValueError(
            f"the prompt has {length} tokens and the model a context of {max_positions}: shorten it to at most "
            f"{max_positions - 1}, so that one token fits after it"
        )
    if outside:
        raise ValueError(
            f"prompt token {outside[0]} is outside the vocabulary of {vocabulary}: encode the prompt with the target's "
            "tokenizer"
        )


def _check_stop(stop: Sequence[str], has_text: bool) -> None:
    if isinstance(stop, str):
        raise ValueError(f"stop={stop!r} is one text: give a tuple of texts, ({stop!r},)")
    if not isinstance(stop, Sequence) or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"stop={stop!r}: give a tuple of texts, () for none")
    if "" in stop:
        raise ValueError("an empty stop string would end every text at once: remove it")
    if stop and not has_text:
        raise ValueError("stop strings need a tokenizer: give one to Engine(tokenizer=...), or use stop_token_ids")


def _check_grammar(grammar: Grammar, vocabulary: int) -> None:
    from spec.constraint import Grammar

    if not isinstance(grammar, Grammar):
        raise ValueError(f"grammar={grammar!r}: compile it with spec.constraint.Grammars, for example .regex('yes|no')")
    if grammar.vocab_size != vocabulary:
        raise ValueError(
            f"the grammar is compiled for a vocabulary of {grammar.vocab_size}, the target's has {vocabulary}: "
            "compile it with Grammars(tokenizer, target.vocab_size, ...)"
        )


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample ``index`` of a request: ``seed`` itself for the first, else 64 random bits.

    The bits are the first two words of Philox4x32-10 with key ``seed`` and counter (index, 0, 0, 0): a counter whose
    third word no :class:`spec.random.Purpose` has, so these bits are no draw of any request with the same seed.
    """
    if index == 0:
        return seed
    low, high, _, _ = philox(index, 0, 0, 0, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    return high << 32 | low


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a committed token under the target, nats; of which distribution: Engine(logprobs=...)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most probable first


@dataclass(frozen=True)
class Event:
    """What a streaming callback gets: one committed token, or (without a token) the end by cancellation or error."""

    sample: int  # index of the sample, in range(n)
    token_id: int | None
    from_draft: bool = False
    drafted: int | None = None  # on the first token of a target step: how many tokens were drafted for that step
    text: str = ""  # what the token adds to the text; text that may yet become a stop string comes later, or never
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None  # on the last event of the sample
    error: str | None = None


@dataclass
class Completion:
    """One sample of a request.

    ``drafted`` and ``accepted`` count what was verified; where a stop cuts a block, what came after it is in neither.
    """

    token_ids: list[int] = field(default_factory=list)  # a stop token included
    text: str = ""  # without special tokens and without what stopped it; empty if the engine has no tokenizer
    from_draft: list[bool] = field(default_factory=list)  # of each token: proposed by the drafter, or the target's own
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None  # None while it runs
    error: str | None = None
    target_steps: int = 0  # target forward passes that committed tokens of this sample
    drafted: list[int] = field(default_factory=list)  # by position in the block: how often a token was drafted there
    accepted: list[int] = field(default_factory=list)  # and how often it was committed


@dataclass
class Result:
    """What a request came to, samples in order."""

    request: Request
    completions: list[Completion]
    seconds_queued: float | None = None  # from add() to the first slot of any sample
    seconds_to_first_token: float | None = None  # from add() to the first token of any sample
    seconds: float = 0.0  # from add() to the end of the last sample
