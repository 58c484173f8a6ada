"""Checkable answers: reading them from reference texts and finding them in completions."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

# A sign counts only where it cannot be a minus between two operands: "= -3", not "10-3".
_NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212]\$?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<!\w)(?=\.\d))(?:\.\d+)?")
_FINAL = re.compile(r"####[ \t]*(\S[^\n]*)")  # GSM8K's mark for the final answer


def normalise(text: str) -> str:
    """Case, width and white space folded, digits and punctuation kept: what makes two prompts the same prompt."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def last_number(text: str) -> Decimal | None:
    """The last number written in ``text``: "so $1,234.50 in all." gives 1234.50. None if there is none."""
    found = _NUMBER.findall(text)
    return _to_decimal(found[-1]) if found else None


def final_answer(text: str) -> str:
    """The checkable part of a reference answer: what follows "####", else the whole text; "1,000" becomes "1000"."""
    marked = _FINAL.findall(text)
    answer = (marked[-1] if marked else text).strip()
    return str(_to_decimal(answer)) if _NUMBER.fullmatch(answer) else answer


def check_answer(text: str, answer: str | int) -> bool:
    """Whether the completion ``text`` ends at the right answer.

    A numeric ``answer`` is compared with the last number of the completion ("$1,200.00" equals "1200"); any other
    answer must be the completion's last words, up to case, white space and closing punctuation.
    """
    expected = str(answer).strip().lstrip("$").rstrip("%").strip()
    if _NUMBER.fullmatch(expected):
        return last_number(text) == _to_decimal(expected)
    wanted = normalise(expected)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}\W*$", normalise(text)) is not None


def _to_decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", "").replace("\u2212", "-"))
