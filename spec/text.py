"""From tokens to text as they come: incremental detokenisation, and stop strings that may span tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "�"  # what a decoder makes of a character whose bytes are not all there
_LONGEST_WAIT = 16  # tokens; a character has at most 4 bytes, so these are broken for good


class Detokenizer:
    """Tokens one at a time to text deltas, which add up to ``tokenizer.decode`` of all.

    Special tokens are skipped unless ``special_tokens``.

    A token's text depends on its neighbours (spaces, characters of several bytes): each delta is the difference of two
    decodings of a short window, and an incomplete character is held back. After 16 tokens without a whole character
    the window is given out as it is; only then may the sum differ from the decoding of all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special_tokens: bool = False):
        self._tokenizer, self._special_tokens = tokenizer, special_tokens
        self._window: list[int] = []
        self._known = 0  # tokens at the start of the window whose text is out
        self._known_text = ""

    def push(self, token: int) -> str:
        """The text this token completes, possibly empty."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._known
        if (len(text) <= len(self._known_text) or text.endswith(_INCOMPLETE)) and waiting < _LONGEST_WAIT:
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What is held back, incomplete characters as the decoder writes them."""
        return self._advance(self._decode(self._window)) if self._known < len(self._window) else ""

    def _advance(self, text: str) -> str:
        delta = text[len(self._known_text) :]
        self._window = self._window[self._known :]  # the tokens just given out are the context of the next ones
        self._known = len(self._window)
        self._known_text = self._decode(self._window)
        return delta

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=not self._special_tokens))


class StopStrings:
    """Text deltas in, text that is safe to show out; it ends before the first stop string.

    What may still become a stop string is held back: the longest end of the text that begins one.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, delta: str) -> str:
        """The text that can be shown now. Sets ``stopped`` once a stop string is complete: nothing follows then."""
        text = self._held + delta
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held back, when the text ended for another reason."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``, shorter than ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
