"""Text and token ids on the HTTP side: prompts in, token strings out, with a tokenizer the engine's thread never sees.

Fast tokenizers are not made for two threads at once, and a long prompt must not hold up the event loop: prompts are
read in one thread that does nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2

from spec.serve.errors import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spec.constraint import Grammar, Grammars
    from spec.serve.constrained import Wanted
    from spec.serve.protocol import Message

T = TypeVar("T")


class Texts:
    """The target's tokenizer for handlers. ``longest``: token ids of a prompt at most; checked before tokenising.

    ``grammars``: of the same tokenizer; what they compile may take as long as a long prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int, grammars: Grammars):
        self._tokenizer, self._longest, self._grammars = tokenizer, longest, grammars
        self._most_characters = longest * max(len(token) for token in tokenizer.get_vocab())
        self._size = len(tokenizer)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._names: dict[int, str] = {}

    async def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text. Raises ApiError for one that is surely too long."""
        self._check_size(len(text))
        return await self._run(lambda: list(self._tokenizer(text, add_special_tokens=special)["input_ids"]))

    async def encode_chat(self, messages: Sequence[Message], generate: bool = True) -> list[int]:
        """Token ids of a conversation by the model's template. Raises ApiError where there is none, or it objects."""
        if not self._tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template: use /v1/completions", param="messages")
        written = [message.as_template() for message in messages]
        self._check_size(sum(len(message["content"]) for message in written))
        apply = self._tokenizer.apply_chat_template
        try:
            encoded: Any = await self._run(
                lambda: apply(written, add_generation_prompt=generate, tokenize=True, return_dict=True)
            )
        except jinja2.TemplateError as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return list(encoded["input_ids"])

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included. Raises ApiError for ids outside the vocabulary."""
        if max(ids, default=0) >= self._size:
            raise ApiError(400, f"token outside the vocabulary of {self._size}", param="tokens")
        return await self._run(lambda: str(self._tokenizer.decode(list(ids))))

    async def grammar(self, wanted: Wanted | None) -> Grammar | None:
        """Compiles what a client asks for. Raises ApiError, with the field, for what cannot be kept to."""
        if wanted is None:
            return None
        try:
            return await self._run(lambda: wanted.compile(self._grammars))
        except ValueError as error:
            raise ApiError(400, f"{wanted.field}: {error}", param=wanted.field) from None

    async def names(self, ids: Iterable[int]) -> Mapping[int, str]:
        """These tokens (and others) as texts, for log-probs; part of a character shows as the replacement character."""
        new = [id for id in set(ids) if id not in self._names]
        if new:
            self._names |= await self._run(lambda: {id: str(self._tokenizer.decode([id])) for id in new})
        return self._names

    def _check_size(self, characters: int) -> None:
        if characters > self._most_characters:
            raise ApiError(
                400, f"the prompt has {characters} characters, more than {self._longest} tokens can hold: shorten it",
                code="context_length_exceeded",
            )  # fmt: skip

    async def _run(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
