"""A reduced vocabulary for the draft model: most of its head's work is for tokens that hardly ever come up.

The draft's output matrix is cut to the tokens most frequent in training text (FR-Spec, Zhao et al. 2502.14856); outside
it q = 0, which costs acceptance there and nothing else: the output stays exactly the target's. Special and end tokens
are always kept, for a draft that cannot end a text is rejected at every end.

``python -m spec.drafters.vocabulary --student DIR --data samples.jsonl --size 8192`` writes
``DIR/draft/vocabulary.safetensors``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "draft/vocabulary.safetensors"  # not beside the weights, where vLLM would take it for some of them
_ID_FIELDS = ("completion_ids", "token_ids", "input_ids")  # of a JSONL line, the first that is there
_TEXT_FIELDS = ("completion", "text")


@dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The tokens a draft model can propose. Raises ValueError unless ids are sorted, distinct and in range."""

    ids: np.ndarray  # [R] int64, ascending: row r of the reduced head is token ids[r]
    vocab_size: int  # V of the target
    mass: float = float("nan")  # share of the counted tokens that it covers

    def __post_init__(self) -> None:
        ids = self.ids
        if ids.ndim != 1 or ids.dtype != np.int64 or not len(ids):
            raise ValueError("a draft vocabulary is a non-empty list of int64 token ids: choose it with choose()")
        if (np.diff(ids) <= 0).any():
            raise ValueError("draft vocabulary ids must ascend without repeats: sort them, or choose it with choose()")
        if ids[0] < 0 or ids[-1] >= self.vocab_size:
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            raise ValueError(
                f"draft vocabulary names token {wrong}, outside the target's vocabulary of {self.vocab_size}: it was "
                "chosen for another tokenizer"
            )

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, directory: Path) -> Path:
        """Writes :data:`FILE` beside a student, whole or not at all."""
        from safetensors.numpy import save

        path = directory / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.tmp")
        header = {"vocab_size": str(self.vocab_size), "mass": repr(self.mass)}
        scratch.write_bytes(save({"ids": self.ids}, header))
        return scratch.replace(path)

    @classmethod
    def load(cls, directory: Path, vocab_size: int | None = None) -> DraftVocabulary | None:
        """What :meth:`save` wrote, None where there is none.

        Raises ValueError for a file that is none, or one for another vocabulary than ``vocab_size``.
        """
        from safetensors import SafetensorError, safe_open

        path = directory / FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header, ids = file.metadata(), file.get_tensor("ids")
            own = cls(ids, int(header["vocab_size"]), float(header["mass"]))
        except (SafetensorError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a draft vocabulary ({error}): remove it, or choose it again") from error
        if vocab_size is not None and own.vocab_size != vocab_size:
            raise ValueError(
                f"{path} was chosen from {own.vocab_size} tokens, the model has {vocab_size}: choose it again"
            )
        return own


def choose(
    counts: np.ndarray, *, size: int | None = None, mass: float | None = None, always: Iterable[int] = ()
) -> DraftVocabulary:
    """The most frequent tokens, the lower id of equals, and ``always``.

    Args:
        counts: [V] how often each token came up in training text.
        size: R, ``always`` included. mass: instead, the fewest of the most frequent tokens that cover this share of
            the counted ones (``always`` comes on top).
        always: tokens to keep whatever their count: :func:`always_kept`.

    Raises ValueError unless exactly one of ``size`` and ``mass`` is given and possible.
    """
    vocabulary, total = len(counts), int(counts.sum())
    kept = np.unique(np.fromiter(always, dtype=np.int64))
    if len(kept) and (kept[0] < 0 or kept[-1] >= vocabulary):
        raise ValueError(f"always={kept.tolist()}: names a token outside the vocabulary of {vocabulary}")
    if (size is None) == (mass is None):
        raise ValueError("pass either size or mass: how many tokens to keep, or which share of the text to cover")
    order = np.argsort(-counts, kind="stable")
    if size is not None:
        if not max(len(kept), 1) <= size <= vocabulary:
            raise ValueError(f"size={size}: must be from {max(len(kept), 1)} (always kept) to {vocabulary} (all)")
        others = order[~np.isin(order, kept)][: size - len(kept)]
    else:
        assert mass is not None
        if not 0 < mass <= 1 or not total:
            raise ValueError(f"mass={mass} of {total} counted tokens: need a share in (0, 1] and some text")
        covered = counts[order].cumsum()
        others = order[: int(np.searchsorted(covered, mass * total)) + 1]
    ids = np.union1d(kept, others).astype(np.int64)
    return DraftVocabulary(ids, vocabulary, float(counts[ids].sum() / total) if total else float("nan"))


def count_tokens(rows: Iterable[Sequence[int]], vocab_size: int) -> np.ndarray:
    """[V] int64 from texts as token ids. Raises ValueError for an id outside the vocabulary."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for row in rows:
        ids = np.asarray(row, dtype=np.int64)
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if len(outside):
            raise ValueError(f"token {outside[0]} is outside the vocabulary of {vocab_size}: count with its tokenizer")
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def token_rows(path: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[list[int]]:
    """The texts of a JSONL file as token ids, one a line: its ``completion_ids`` (as a run's ``samples`` hold them),
    ``token_ids`` or ``input_ids``, or else its ``completion`` or ``text``, with ``tokenizer``.

    Count what the draft will be asked to write (completions of the target), not prompts. Raises ValueError, naming the
    line, where there is nothing to count.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _token_ids(line, f"{path} line {number}", tokenizer)


def _token_ids(line: str, origin: str, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin} is not JSON: {error}") from error
    fields = record if isinstance(record, dict) else {}
    for name in _ID_FIELDS:
        if name in fields:
            return fields[name]
    for name in _TEXT_FIELDS:
        if name in fields:
            if tokenizer is None:
                raise ValueError(f"{origin} is text ({name!r}): pass the tokenizer")
            return tokenizer(fields[name], add_special_tokens=False)["input_ids"]
    raise ValueError(f"{origin} has none of {', '.join(_ID_FIELDS + _TEXT_FIELDS)}: use one of these names")


def always_kept(tokenizer: PreTrainedTokenizerBase, end_tokens: Iterable[int] = ()) -> list[int]:
    """Special tokens, tokens added to the vocabulary, and whatever else ends a text."""
    return sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), *end_tokens})


def build(
    student: Path, data: Sequence[Path], size: int | None = None, mass: float | None = None, output: Path | None = None
) -> DraftVocabulary:
    """Chooses a student's draft vocabulary from training text and saves it.

    Args:
        student: directory of the student (Hugging Face layout).
        data: JSONL files of token ids or text, such as a run's samples/teacher_warm_start.jsonl.
        size: tokens to keep, more where more have to be kept always.
        mass: instead of size, the share of the counted tokens to cover, for example 0.99.
        output: directory to save to; the student's own by default.
    """
    from transformers import AutoConfig, AutoTokenizer

    tokenizer, config = AutoTokenizer.from_pretrained(student), AutoConfig.from_pretrained(student)
    counts = np.zeros(int(config.vocab_size), dtype=np.int64)
    for file in data:
        counts += count_tokens(token_rows(file, tokenizer), len(counts))
    always = always_kept(tokenizer, _end_tokens(student, config.eos_token_id))
    chosen = choose(counts, size=None if size is None else max(size, len(always)), mass=mass, always=always)
    chosen.save(output or student)
    return chosen


def main(student: Path, data: list[Path], size: int | None = None, mass: float | None = None) -> None:
    """Chooses a student's draft vocabulary from training text and saves it beside the student.

    Args:
        student: directory of the student (Hugging Face layout).
        data: JSONL files of token ids or text, such as a run's samples/teacher_warm_start.jsonl.
        size: tokens to keep.
        mass: instead of size, the share of the counted tokens to cover, for example 0.99.
    """
    chosen = build(student, data, size, mass)
    print(f"{student / FILE}: {len(chosen)} of {chosen.vocab_size} tokens, {chosen.mass:.2%} of those counted")


def _end_tokens(student: Path, default: int | list[int] | None) -> list[int]:
    """What its generation config says ends a text, else its model config's ``default``."""
    path = student / "generation_config.json"
    ends = json.loads(path.read_text()).get("eos_token_id", default) if path.exists() else default
    return [] if ends is None else [ends] if isinstance(ends, int) else ends


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(main)
